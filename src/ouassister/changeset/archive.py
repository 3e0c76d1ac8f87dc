"""Change sets on the host's disk: made once, never changed, checked whenever they are read.

``FOLDER/CHANGESET_ID/manifest.json`` is the canonical JSON of the record (`codec`), and
``layer.tar`` the layer. The id covers the manifest, the manifest covers the layer.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import stat
from typing import TYPE_CHECKING

from ouassister import codec
from ouassister.access import BY_AGENT
from ouassister.changeset.landing import LAYER as LAYER
from ouassister.changeset.landing import Landing
from ouassister.changeset.landing import discard as discard
from ouassister.durable import sync_folder
from ouassister.errors import InternalError, TamperedError, WorkDiskFullError
from ouassister.model import Changeset, Kind, StepKind
from ouassister.text import plain, to_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ouassister.access import Access
    from ouassister.changeset.extract import Extraction
    from ouassister.model import (
        Action,
        Entry,
        Fence,
        Identity,
        LeftOut,
        PackageChange,
        Portions,
        Restart,
        Staged,
        StagedStep,
    )

MANIFEST = "manifest.json"

_ID = re.compile(r"[0-9a-f]{64}")
# Debian Policy 5.6.1, 5.6.8; what reaches a command line in the guest.
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]{0,254}")
_ARCHITECTURE = re.compile(r"[a-z0-9-]{0,64}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~%_-]{0,250}\.deb")
_FOLDER = re.compile(rb"(?:/[A-Za-z0-9._-]{1,64}){2,6}")
_MANIFEST_LIMIT = 1 << 30


def build(
    extraction: Extraction,
    *,
    vm: str,
    created_at_s: int,
    fence: Fence,
    identity: Identity,
    changes: tuple[PackageChange, ...],
    left_out: tuple[LeftOut, ...],
    actions: tuple[Action, ...],
    lock_paths: tuple[bytes, ...],
    reboot_needed: bool,
    notes: tuple[str, ...] = (),
    restarts: tuple[Restart, ...] = (),
    staged: tuple[Staged, ...] = (),
    staged_steps: tuple[StagedStep, ...] = (),
    staging_folder: bytes = b"",
    access: Access = BY_AGENT,
    out_of_reach: tuple[str, ...] = (),
    instead_of: str = "",
    portions: Portions | None = None,
) -> Changeset:
    """Make the record of a change set; its id follows from all the rest.

    Raises:
        InternalError: The entries contradict each other.
    """
    draft = Changeset(
        changeset_id="",
        vm=vm,
        created_at_s=created_at_s,
        fence=fence,
        identity=identity,
        changes=changes,
        left_out=left_out,
        entries=extraction.entries,
        actions=actions,
        lock_paths=lock_paths,
        layer_sha256=extraction.layer_sha256,
        layer_size=extraction.layer_size,
        reboot_needed=reboot_needed,
        filtered=extraction.filtered,
        notes=(*extraction.notes, *notes),
        restarts=restarts,
        staged=staged,
        staged_steps=staged_steps,
        staging_folder=staging_folder,
        access=access,
        out_of_reach=out_of_reach,
        instead_of=instead_of,
        portions=portions,
    )
    for defect in _defects(draft):
        raise InternalError(f"change set of {vm}: {defect}")
    return dataclasses.replace(draft, changeset_id=codec.digest(draft, without="changeset_id"))


def save(changeset: Changeset, layer: Path, folder: Path) -> Path:
    """Store a change set whose layer is a file elsewhere; see `keep`.

    Args:
        changeset: Made by `build`.
        layer: Its layer; copied.
        folder: Of all change sets of a VM; made when it is not there.

    Raises:
        InternalError: Record or layer are not what the id says.
        WorkDiskFullError: No room; nothing is left of it.
    """
    with Landing(folder) as landing:
        source = os.open(layer, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            landing.receive(source)
        finally:
            os.close(source)
        return keep(changeset, landing)


def keep(changeset: Changeset, landing: Landing) -> Path:
    """Store a change set; a crash at any point leaves all of it or nothing under its id.

    Args:
        changeset: Made by `build`.
        landing: Has its layer.

    Returns:
        The change set's own folder.

    Raises:
        InternalError: Record or layer are not what the id says.
        WorkDiskFullError: No room; nothing is left of it.
    """
    raw, digest = codec.canonical_and_digest(changeset, without="changeset_id")
    if digest != changeset.changeset_id:
        raise InternalError(f"change set of {changeset.vm} does not have the id of its content")
    if (landing.sha256, landing.size) != (changeset.layer_sha256, changeset.layer_size):
        raise InternalError(f"what landed is not the layer of the change set of {changeset.vm}")
    place = landing.place
    folder = place.parent
    target = folder / changeset.changeset_id
    try:
        if target.exists():  # the same content: what is there serves
            load(folder, changeset.changeset_id)
            verify_layer(changeset, target / LAYER)
            return target
        with (place / MANIFEST).open("xb") as file:
            os.fchmod(file.fileno(), 0o400)
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        landing.sync()
        sync_folder(place)
        place.chmod(0o500)
        landing.take(target)
        sync_folder(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WorkDiskFullError(f"no room for a change set in {folder}") from error
        raise
    return target


def load(folder: Path, changeset_id: str) -> tuple[Changeset, Path]:
    """Read a change set back; the layer's bytes are for `verify_layer`.

    Returns:
        The record, and the path of its layer.

    Raises:
        TamperedError: Something is not as it was saved; the message names the file.
    """
    if not _ID.fullmatch(changeset_id):
        raise TamperedError(f"{changeset_id!r} is not the id of a change set")
    path = folder / changeset_id / MANIFEST
    layer = folder / changeset_id / LAYER
    try:
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise TamperedError(f"{path} is larger than any manifest")
        raw = path.read_bytes()
        changeset = codec.from_value(Changeset, json.loads(raw))
    except FileNotFoundError as error:
        raise TamperedError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise TamperedError(f"{path} is not the manifest that was saved: {error}") from error
    if changeset.changeset_id != changeset_id or raw != codec.canonical(changeset):
        raise TamperedError(f"{path} is not the manifest that was saved")
    if codec.digest(changeset, without="changeset_id") != changeset_id:
        raise TamperedError(f"{path} does not hash to its id")
    for defect in _defects(changeset):
        raise TamperedError(f"{path}: {defect}")
    if not layer.is_file() or layer.is_symlink():
        raise TamperedError(f"{layer} is missing")
    return changeset, layer


def verify_layer(changeset: Changeset, layer: Path) -> None:
    """Hash the layer.

    Raises:
        TamperedError: Its bytes are not those that the manifest was made for.
    """
    with layer.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size != changeset.layer_size:
            raise TamperedError(f"{layer} has {size} bytes instead of {changeset.layer_size}")
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != changeset.layer_sha256:
        raise TamperedError(f"{layer} has the SHA-256 {digest} instead of {changeset.layer_sha256}")


def describe(changeset: Changeset) -> Iterator[str]:
    """Lines for a person; safe for a terminal."""
    deleted = sum(entry.kind is Kind.DELETE for entry in changeset.entries)
    same = sum(entry.same for entry in changeset.entries)
    size = sum(entry.size for entry in changeset.entries if not entry.same)
    yield f"change set {changeset.changeset_id[:12]} for {plain(changeset.vm)}"
    yield f"  {len(changeset.changes)} packages"
    for change in changeset.changes:
        step = {
            (True, False): f"remove {change.old}",
            (False, True): f"install {change.new}",
        }.get((bool(change.old), bool(change.new)), f"{change.old} -> {change.new}")
        yield plain(f"    {change.name}:{change.architecture}  {step}")
    for one in changeset.staged:
        yield plain(f"  staged: {one.name}: {one.reason}")
    for left in changeset.left_out:
        yield plain(f"  left out: {left.package}: {left.reason}")
    written = len(changeset.entries) - deleted - same
    yield f"  {written} paths written, {deleted} deleted, {size} bytes"
    if same:
        yield f"  {same} paths as they are but for their time"
    yield f"  {len(changeset.actions)} actions, {len(changeset.filtered)} paths stay behind"
    if changeset.reboot_needed:
        yield "  needs a reboot"
    for note in changeset.notes:
        yield plain(f"  note: {note}")


def describe_entries(changeset: Changeset) -> Iterator[str]:
    """One line for each path; safe for a terminal."""
    for entry in changeset.entries:
        sign = "-" if entry.kind is Kind.DELETE else "+" if entry.expected is None else "~"
        arrow = f" -> {to_text(entry.target)}" if entry.target else ""
        yield f"{sign} {to_text(entry.path)}{arrow}"


def _defects(changeset: Changeset) -> Iterator[str]:
    """What no reader of a change set should have to expect."""
    before: list[bytes] = []
    seen: set[bytes] = set()
    for entry in changeset.entries:
        name = to_text(entry.path)
        parts = entry.path.split(b"/")
        if parts[0] or len(parts) < 2 or {b"", b".", b".."} & set(parts[1:]) or b"\0" in entry.path:
            yield f"{name} is not an absolute, normal path"
        if parts <= before:
            yield f"{name} is out of order"
        if entry.kind is Kind.HARDLINK and entry.target not in seen:
            yield f"{name} links to no earlier entry"
        end = entry.offset + entry.size
        if entry.same:
            if not _may_be_same(entry):
                yield f"{name} changes in more than its time"
        elif entry.kind is Kind.FILE and not 0 <= entry.offset <= end <= changeset.layer_size:
            yield f"content of {name} is outside of the layer"
        if not 0 <= entry.holes <= entry.size or entry.holes % 4096:
            yield f"{name} has more holes than bytes"
        if entry.holes and (entry.same or entry.kind is not Kind.FILE):
            yield f"{name} has holes and no content"
        before = parts
        if entry.kind not in (Kind.DELETE, Kind.DIRECTORY, Kind.HARDLINK) and not entry.same:
            seen.add(entry.path)
    if changeset.instead_of and not _ID.fullmatch(changeset.instead_of):
        yield f"{plain(changeset.instead_of)} is no change set that it could stand in for"
    yield from _staging_defects(changeset)


def _may_be_same(entry: Entry) -> bool:
    """Whether only the time of what must stand at the path changes (guest/table.c, same_ok)."""
    old = entry.expected
    if old is None or old.mtime_ns == entry.mtime_ns:
        return False
    if entry.kind is Kind.SYMLINK:
        return stat.S_ISLNK(old.mode)
    known = (old.mode, old.size) == (stat.S_IFREG | entry.mode, entry.size)
    return entry.kind is Kind.FILE and known


def _staging_defects(changeset: Changeset) -> Iterator[str]:
    """Every archive is an entry with its digest; every staged package has its steps."""
    files = {entry.path: entry for entry in changeset.entries if entry.kind is Kind.FILE}
    folder = _FOLDER.fullmatch(changeset.staging_folder) is not None
    if bool(changeset.staged) != folder:
        yield f"{to_text(changeset.staging_folder)} is no folder for staged packages"
    for one in changeset.staged:
        names = (_NAME.fullmatch(one.name), _ARCHITECTURE.fullmatch(one.architecture))
        if not all(names) or (one.file if not one.new else not _FILE.fullmatch(one.file)):
            yield f"{plain(one.name)} is no package that could be staged"
            continue
        entry = files.get(changeset.staging_folder + b"/" + one.file.encode("ascii"))
        if one.new and (entry is None or (entry.sha256, entry.size) != (one.sha256, one.size)):
            yield f"the archive of {one.name} is not in the change set"
    left = set(range(len(changeset.staged)))
    for step in changeset.staged_steps:
        known = [changeset.staged[at] for at in step.packages if at in range(len(changeset.staged))]
        removes = step.kind is StepKind.REMOVE
        if (
            len(known) != len(step.packages)
            or not known
            or any(removes == bool(x.new) for x in known)
        ):
            yield f"a step of staged packages ({step.kind}) does not match them"
        left -= set(step.packages)
    if left:
        yield "a staged package has no step"
