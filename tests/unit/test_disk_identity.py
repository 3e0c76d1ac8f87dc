"""What of ours lies on a guest's disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister.disk.identity import unfinished

if TYPE_CHECKING:
    from pathlib import Path


def test_journal_of_the_applier_alone_says_that_something_is_half_done(tmp_path: Path) -> None:
    argument = {"root": str(tmp_path), "path": "/var/lib/ouassister"}
    assert not unfinished(argument)
    folder = tmp_path / "var/lib/ouassister"
    folder.mkdir(parents=True)
    for name in ("applied", "lock", "undo-0123456789ab"):
        (folder / name).touch()
    assert not unfinished(argument)
    (folder / "journal-0123456789ab").touch()
    assert unfinished(argument)
