"""A save file that was resumed must not be used again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister.errors import StateError

if TYPE_CHECKING:
    from pathlib import Path


def rename_save(save: Path) -> None:
    """Put a save file aside, under a name that says so.

    Raises:
        StateError: It cannot be renamed.
    """
    try:
        save.rename(save.with_name(f"{save.name}.resumed"))
        # rename(2) does nothing between two names of one file, as a snapshot may leave them.
        save.unlink(missing_ok=True)
    except FileNotFoundError:
        return  # an earlier resume has done it
    except OSError as error:
        raise StateError(
            f"the save file {save} cannot be put aside: {error.strerror}",
            hint="make its folder writable: a save file that was resumed must not be used again",
        ) from error
