"""What the tests of the applier begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.host.applier_run import Appliers, build
from tests.host.applier_world import World

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def appliers() -> Appliers:
    return build()


@pytest.fixture
def world(tmp_path: Path) -> World:
    root = tmp_path / "root"
    root.mkdir()
    return World.make(root)
