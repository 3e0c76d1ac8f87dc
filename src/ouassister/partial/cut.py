"""Which packages must be left out of a change set, and which of its entries stay.

Left out are the owners of the paths that conflict, what shares an entry with them, and what the
database would be inconsistent without. An entry that has no owner stays as it was emulated: its
time tells who wrote it last, not who else did, and scripts may be run again on what they left
(Debian Policy 6.2, "Maintainer scripts idempotency"), as those of what is left out are. Only what
lies below a path that goes goes with it, and so does whoever may have written it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.model import Entry, Kind
from ouassister.partial import status
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from ouassister.model import Changeset
    from ouassister.partial_model import Portions

_DATABASE: Final = (status.PATH, status.OLD_PATH)


class WholeError(Exception):
    """The packages can only be left out all together; the words say why."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Names of packages that are left out, and the entries that stay; not the database's own.

    ``owners`` are those of ``left_out`` whose paths conflict: the others go with them.
    """

    owners: frozenset[str]
    left_out: frozenset[str]
    entries: tuple[Entry, ...]


def cut(
    changeset: Changeset,
    portions: Portions,
    paths: Collection[bytes],
    needed: Callable[[frozenset[str]], frozenset[str]],
) -> Cut:
    """Leave out what conflicts.

    Args:
        changeset: The whole.
        portions: What belongs to whom.
        paths: Those that conflict; all of them.
        needed: Given packages that are left out, those whose relations would not hold.

    Raises:
        WholeError: No less than all can be left out.
    """
    staged = {one.name for one in changeset.staged}
    emulated = frozenset(one.name for one in changeset.changes) - staged
    parts = tuple(zip(changeset.entries, portions.owners, portions.writers, strict=True))
    left_out = frozenset[str]()
    owners = more = frozenset(_owners_of_conflicts(parts, paths))
    while more - left_out:
        if strangers := more - emulated:
            raise WholeError(f"{_some(strangers)} would have to be left out, and cannot be")
        left_out |= more
        more = frozenset(_sharers(parts, left_out)) | needed(left_out)
    if left_out == emulated:
        raise WholeError("all packages would be left out")
    folder = changeset.staging_folder
    gone = _gone(parts, left_out)
    kept = tuple(
        entry
        for entry, own, _writers in parts
        if entry.path not in _DATABASE
        and not (folder and _is_archive(entry.path, folder))
        and entry.path not in gone
        and (own or gone.isdisjoint(_parents(entry.path)))
    )
    _refuse_torn(changeset.entries, kept)
    return Cut(owners, left_out, kept)


_Part = tuple["Entry", tuple[str, ...], tuple[str, ...]]


def _owners_of_conflicts(parts: tuple[_Part, ...], paths: Collection[bytes]) -> Iterator[str]:
    for path in paths:
        known = [(entry, owners) for entry, owners, _writers in parts]
        # What takes away, or makes anew, what the path is below; parents come first.
        above = [one for one in known if _holds(one[0].path, path)]
        # Else a directory that is gone: all that was to be put there.
        found = above[-1:] or [one for one in known if _holds(path, one[0].path)]
        for entry, owners in found:
            if not owners:
                raise WholeError(f"{to_text(entry.path)} belongs to no package")
            yield from owners
        if not found:
            raise WholeError(f"{to_text(path)} is in no package")


def _holds(folder: bytes, path: bytes) -> bool:
    return path == folder or path.startswith(folder + b"/")


def _sharers(parts: tuple[_Part, ...], left_out: frozenset[str]) -> Iterator[str]:
    """Packages that have a file together with one that is left out, or one below what goes."""
    gone = _gone(parts, left_out)
    for entry, owners, writers in parts:
        if owners:
            if entry.kind is not Kind.DIRECTORY and left_out.intersection(owners):
                yield from owners
        elif not gone.isdisjoint(_parents(entry.path)):
            if not writers:
                raise WholeError(f"nobody knows which package wrote {to_text(entry.path)}")
            yield from writers


def _gone(parts: tuple[_Part, ...], left_out: frozenset[str]) -> frozenset[bytes]:
    """Paths of the packages that are left out alone."""
    return frozenset(
        entry.path for entry, owners, _writers in parts if owners and left_out.issuperset(owners)
    )


def _parents(path: bytes) -> Iterator[bytes]:
    while path := path.rpartition(b"/")[0]:
        yield path


def _is_archive(path: bytes, folder: bytes) -> bool:
    """Of a staged package, or a folder above it that is there for that alone."""
    return _holds(folder, path) or path == folder.rpartition(b"/")[0]


def _refuse_torn(entries: tuple[Entry, ...], kept: tuple[Entry, ...]) -> None:
    """Nothing that stays may need what does not."""
    there = {entry.path for entry in kept}
    gone = {entry.path for entry in entries} - there
    for entry in kept:
        if entry.kind is Kind.HARDLINK and entry.target not in there:
            raise WholeError(f"{to_text(entry.path)} is a link to what is left out")
        if not gone.isdisjoint(_parents(entry.path)):
            raise WholeError(f"{to_text(entry.path)} is below what is left out")


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:4])
