"""One suspended guest for the whole run, cloned for each test that needs one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need

from ouassister.provider import sockets, vmtoml
from ouassister.testing import build_image, make_suspended
from ouassister.testing import clone as make_clone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CACHE = Path(__file__).parents[2] / "build" / "guests"


@pytest.fixture(scope="session")
def suspended() -> Path:
    """The ``vm.toml`` of a suspended guest. Read only: work on a clone."""
    for tool in ("qemu-system-x86_64", "qemu-img", "mmdebstrap", "mke2fs", "sfdisk"):
        need(tool)
    image = build_image(CACHE, progress=print)
    return make_suspended(image, CACHE / f"{image.disk.parent.name}-suspended", progress=print)


@pytest.fixture
def clones(suspended: Path, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Make twins of the suspended guest; what still runs of them at the end is killed."""
    made: list[Path] = []

    def one() -> Path:
        made.append(make_clone(suspended, tmp_path / f"clone{len(made)}"))
        return made[-1]

    yield one
    for path in made:
        _kill(vmtoml.load(path))


@pytest.fixture
def clone(clones: Callable[[], Path]) -> Path:
    """The ``vm.toml`` of one fresh twin."""
    return clones()


def _kill(config: vmtoml.VmConfig) -> None:
    try:
        with sockets.connect(config.qmp) as sock:
            os.kill(sockets.peer_pid(sock), signal.SIGKILL)
    except (FileNotFoundError, ConnectionRefusedError):
        return
