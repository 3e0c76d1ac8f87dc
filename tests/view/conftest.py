"""One suspended guest of each release, prepared once and cloned for each seed."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.conftest import need
from tests.view import rig

from ouassister.testing import Recipe, build_image, make_suspended

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUILD: Final = Path(__file__).parents[2] / "build"
# Kernels go from the security archive of a release that is not supported any more.
KERNELS: Final = {"bullseye": "bullseye"}
TOOLS: Final = ("qemu-system-x86_64", "qemu-img", "mmdebstrap", "mke2fs", "e2fsck")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``VIEW_SEEDS`` seeds on the first release, three at most on others (``make view-test``)."""
    if {"release", "seed"} <= set(metafunc.fixturenames):
        seeds = int(os.environ.get("VIEW_SEEDS", "1"))
        releases = os.environ.get("VIEW_RELEASES", "bookworm").split()
        pairs = [
            (release, seed)
            for number, release in enumerate(releases)
            for seed in range(1, 1 + (seeds if number == 0 else min(seeds, 3)))
        ]
        metafunc.parametrize(("release", "seed"), pairs)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the ``vm.toml`` of a release's prepared guest. Read only: work on a clone."""

    @cache
    def make(release: str) -> Path:
        for tool in (*TOOLS, "make", "musl-gcc"):
            need(tool)
        subprocess.run(["make", "-s", "-C", str(Path(__file__).parent)], check=True)
        recipe = Recipe(suite=release, kernel_suite=KERNELS.get(release, ""))
        image = build_image(BUILD / "guests", recipe, progress=print)
        folder = BUILD / "guests" / f"{image.disk.parent.name}-suspended"
        suspended = make_suspended(image, folder, progress=print)
        return rig.prepare(suspended, tmp_path_factory.mktemp(release) / "base", rig.EXTRAS)

    return make


@pytest.fixture(scope="session")
def results() -> Iterator[dict[str, Any]]:
    """What is found out about each seed goes to ``build/view-test.json``."""
    found: dict[str, Any] = {}
    yield found
    (BUILD / "view-test.json").write_text(json.dumps(found, indent=1) + "\n")
