"""What all tiers share: missing tools skip on a laptop and fail in CI; one suspended guest."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final, NoReturn

import pytest

from ouassister.testing import build_image, make_suspended

GUESTS: Final = Path(__file__).parents[1] / "build" / "guests"


def need(tool: str) -> str:
    """Return the tool's path; skip without it, or fail where CI promises it."""
    path = shutil.which(tool)
    if path is None:
        lacking(f"{tool} is not installed ('make deps' installs it)")
    return path


def lacking(what: str) -> NoReturn:
    """This host lacks something: skip on a laptop, fail where CI promises it."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def suspended() -> Path:
    """The ``vm.toml`` of a suspended guest. Read only: work on a clone."""
    for tool in ("qemu-system-x86_64", "qemu-img", "mmdebstrap", "mke2fs", "sfdisk"):
        need(tool)
    image = build_image(GUESTS, progress=print)
    return make_suspended(image, GUESTS / f"{image.disk.parent.name}-suspended", progress=print)
