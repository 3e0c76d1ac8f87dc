"""Real guests for tests and the demo: built once, suspended once, cloned for each use."""

from ouassister.testing.guest import GuestImage, Recipe, build_image
from ouassister.testing.suspended import (
    clone,
    forwarded_port,
    guest_run,
    http_get,
    make_suspended,
    overlay,
    wait_ready,
)

__all__ = [
    "GuestImage",
    "Recipe",
    "build_image",
    "clone",
    "forwarded_port",
    "guest_run",
    "http_get",
    "make_suspended",
    "overlay",
    "wait_ready",
]
