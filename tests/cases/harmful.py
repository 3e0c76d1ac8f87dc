"""Packages that do not end well, or that want out of the sandbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vm.repository import Package


def packages(folder: Path) -> tuple[Package, ...]:
    """All of them."""
    del folder
    return ()
