"""Find what the update changed: the union's upper tree against the lower one.

`run` is for a process inside the user namespace of the update, as its root, so that owners, ACLs
and capabilities read as the guest has them; `collect` reads on the outside what it left. As a
program of its own, which prints one JSON object that `outcome` reads::

    python -I -m ouassister.changeset.extract '{"trees": [{"upper": ..., "lower": ...}],
                                                "layer": ..., "record": ..., "extra_rules": []}'

docs/design/0004-changeset.md tells what is dropped, kept and refused, and why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouassister import codec
from ouassister.changeset.filter import RULES, Filter, Rule
from ouassister.changeset.layer import READABLE, LayerWriter
from ouassister.changeset.node import Tree
from ouassister.changeset.walk import Found, Walk
from ouassister.errors import (
    InternalError,
    OUassisterError,
    UsageError,
    WorkDiskFullError,
    from_code,
)
from ouassister.model import Entry, Kind
from ouassister.text import from_text, to_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

USER_PREFIX = "user.overlay."
TRUSTED_PREFIX = "trusted.overlay."

_SUMMARY_LIMIT = 1 << 16


@dataclass(frozen=True, slots=True)
class Extraction:
    """What `extract` found; `entries` stand in depth-first order of their path's components."""

    entries: tuple[Entry, ...]
    filtered: tuple[bytes, ...]
    notes: tuple[str, ...]
    content_bytes: int
    layer_sha256: str
    layer_size: int


@dataclass(frozen=True, slots=True)
class Trees:
    """The two trees of one file system.

    Attributes:
        upper: overlayfs's upper directory; nobody writes to it any more.
        lower: The mounted file system.
        places: Where its parts stand in the guest: path in the trees, path in the guest.
    """

    upper: Path
    lower: Path
    places: tuple[tuple[bytes, bytes], ...] = ((b"/", b"/"),)

    def guest(self, path: bytes) -> bytes:
        """Where a path of these trees stands in the guest.

        What is above of every part is no place; it is said to stand at the first one.
        """
        for root, target in self.places:
            if root == b"/":
                return path if target == b"/" else target + (path if path != b"/" else b"")
            if path == root or path.startswith(root + b"/"):
                return (b"" if target == b"/" else target) + path[len(root) :] or b"/"
        return self.places[0][1]


def extract(
    trees: tuple[Trees, ...],
    layer_out: Path,
    filters: Filter | None = None,
    *,
    prefix: str = USER_PREFIX,
    devices: Mapping[int, str] | None = None,
) -> Extraction:
    """Compare the trees and write the layer.

    Args:
        trees: Those of each file system.
        layer_out: Where the layer will be; written aside and renamed. Or a pipe (`make_pipe`).
        filters: What stays behind; the table of `filter` by default.
        prefix: Of overlayfs's attributes: `USER_PREFIX`, or `TRUSTED_PREFIX` for a mount
            without ``userxattr``.
        devices: Files of the upper trees that stand for device nodes, by inode: ``c 1 3``.

    Raises:
        UnsupportedGuestError: Something that a change set cannot say.
        InternalError: The trees are not what the shadow makes.
        WorkDiskFullError: No room for the layer; nothing is left of it.
    """
    kept: list[_Kept] = []
    filtered: list[bytes] = []
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        for one in trees:
            walk = Walk(
                stack.enter_context(Tree(one.upper, prefix)),
                stack.enter_context(Tree(one.lower, prefix)),
                filters or Filter(),
                one.guest,
                devices=devices or {},
            )
            chosen, left = _select(list(walk.run()))
            kept += [_Kept(item, walk, one.guest(item.entry.path)) for item in chosen]
            filtered += [one.guest(path) for path in left]
            notes += [*walk.notes, *_parted(chosen, one)]
        kept.sort(key=lambda item: item.path.split(b"/"))
        writer = stack.enter_context(LayerWriter(layer_out))
        entries = tuple(_write(writer, kept))
        sha256, size = writer.finish()
    content = sum(entry.size for entry in entries if not entry.same)
    return Extraction(entries, tuple(filtered), tuple(notes), content, sha256, size)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What travels, whose walk found it, and where it stands in the guest."""

    found: Found
    walk: Walk
    path: bytes


def _select(found: list[Found]) -> tuple[list[Found], tuple[bytes, ...]]:
    """Separate what travels from what is filtered, and forget what is neither."""
    groups: dict[tuple[int, int], list[Found]] = {}
    for item in found:
        if item.link is not None and not item.filtered:
            groups.setdefault(item.link, []).append(item)
    for group in groups.values():
        # Names of one inode travel together when one changed, or was no name of it before.
        together = group[0].lower_link is not None and len({i.lower_link for i in group}) == 1
        if (len(group) == 1 or together) and not any(item.changed for item in group):
            continue
        for item in group:
            item.changed = True
    changed = [item for item in found if item.changed]

    empty: set[bytes] = set()  # new directories that hold filtered paths and nothing else
    full: set[bytes] = set()
    for item in reversed(changed):
        path, parent = item.entry.path, item.entry.path.rpartition(b"/")[0]
        new = item.entry.kind is Kind.DIRECTORY and item.entry.expected is None
        if not item.filtered and new and path in empty and path not in full:
            item.filtered = True
        (empty if item.filtered else full).add(parent)
    kept = [item for item in changed if not item.filtered]
    return kept, tuple(item.entry.path for item in changed if item.filtered)


def _parted(kept: list[Found], trees: Trees) -> Iterator[str]:
    """Say which files keep some of their names in the guest with what they had.

    A live update that writes in place would change them under all names; in the union, as in one
    that replaces files, it is the names that were touched.
    """
    names: dict[tuple[int, int], list[Found]] = {}
    for item in kept:
        if item.lower_link is not None:
            names.setdefault(item.lower_link, []).append(item)
    for group in names.values():
        left = group[0].lower_names - len(group)
        if left > 0 and any(item.entry.kind is not Kind.DELETE for item in group):
            path = to_text(trees.guest(group[0].entry.path))
            yield f"{path} changes; {left} more names of that file in the guest do not"


def _write(writer: LayerWriter, kept: list[_Kept]) -> Iterator[Entry]:
    first: dict[tuple[int, int], bytes] = {}
    for item in kept:
        found, guest = item.found, item.walk.guest
        entry = found.entry
        if item.path != entry.path or entry.below:
            below = tuple((guest(path), state) for path, state in entry.below)
            entry = dataclasses.replace(entry, path=item.path, below=below)
        if found.link is not None:
            target = first.setdefault(found.link, entry.path)
            if target != entry.path:
                yield writer.add(
                    dataclasses.replace(entry, kind=Kind.HARDLINK, target=target, size=0, xattrs=())
                )
                continue
        if entry.same:
            yield entry
            continue
        if entry.kind is not Kind.FILE:
            yield writer.add(entry)
            continue
        source = item.walk.upper.open(found.entry.path)
        try:
            yield writer.add(entry, source)
        finally:
            os.close(source)


def collect(summary: dict[str, int | str], record: Path) -> Extraction:
    """Read the record that `run` left.

    Args:
        summary: What `run` returned.
        record: The file that its argument named.

    Raises:
        InternalError: The record is not the one that the summary speaks of.
    """
    raw = record.read_bytes()
    if hashlib.sha256(raw).hexdigest() != summary.get("record_sha256"):
        raise InternalError(f"{record} is not what the extraction of the change set wrote")
    try:
        return codec.from_value(Extraction, json.loads(raw))
    except ValueError as error:
        raise InternalError(f"{record} does not fit: {error}") from error


def outcome(stdout: bytes, record: Path) -> Extraction:
    """`collect` for the program: from all that it printed.

    Raises:
        OUassisterError: The error that the program ended with.
        InternalError: It ended without saying how, or `collect` says so.
    """
    try:
        summary = json.loads(stdout[:_SUMMARY_LIMIT])
        error = summary.get("error")
        if error is not None:
            error = from_code(error["code"], error["message"], error["hint"])
    except (ValueError, AttributeError, KeyError) as cause:
        raise InternalError("the extraction of the change set ended without a result") from cause
    if error is not None:
        raise error
    return collect(summary, record)


@dataclass(frozen=True, slots=True)
class _Request:
    trees: tuple[Trees, ...]
    layer: Path
    record: Path
    prefix: str
    rules: tuple[Rule, ...]
    devices: dict[int, str]


def _request(request: object) -> _Request:
    known = {"trees", "layer", "record", "prefix", "extra_rules", "devices"}
    try:
        if not isinstance(request, dict) or request.keys() - known:
            raise UsageError(f"a request has the keys {', '.join(sorted(known))}")
        return _Request(
            trees=tuple(_trees(one) for one in request["trees"]),
            layer=Path(request["layer"]),
            record=Path(request["record"]),
            prefix=request.get("prefix", USER_PREFIX),
            rules=tuple(Rule(from_text(p), why) for p, why in request.get("extra_rules", [])),
            devices={int(inode): str(mark) for inode, mark in request.get("devices", [])},
        )
    except KeyError as error:
        raise UsageError(f"the request lacks {error.args[0]}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"the request does not fit: {error}") from error


def _trees(value: dict[str, Any]) -> Trees:
    return Trees(
        Path(value["upper"]),
        Path(value["lower"]),
        tuple((from_text(r), from_text(t)) for r, t in value.get("places", [["/", "/"]])),
    )


def make_pipe(path: str) -> None:
    """Make the pipe through which a layer of `run` goes to the outside; an older one goes."""
    pipe = Path(path)
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    pipe.chmod(READABLE)


def run(argument: object) -> dict[str, int | str]:
    """Extract, and leave the layer and the record where ``argument`` says.

    Args:
        argument: ``trees``: for each file system ``upper`` and ``lower``, and perhaps ``places``
            (see `Trees`); ``layer``, ``record``: paths; optional are ``prefix``
            (see `extract`), ``extra_rules``: pairs of a pattern and a reason, and ``devices``:
            pairs of an inode and what it stands for.

    Returns:
        What `collect` needs, and figures for the story.

    Raises:
        UsageError: The argument is something else.
        OUassisterError: See `extract`.
    """
    request = _request(argument)
    result = extract(
        request.trees,
        request.layer,
        Filter(RULES + request.rules),
        prefix=request.prefix,
        devices=request.devices,
    )
    raw = codec.canonical(result)
    _write_record(request.record, raw)
    return {
        "entries": len(result.entries),
        "deletions": sum(entry.kind is Kind.DELETE for entry in result.entries),
        "filtered": len(result.filtered),
        "content_bytes": result.content_bytes,
        "layer_sha256": result.layer_sha256,
        "layer_size": result.layer_size,
        "record_sha256": hashlib.sha256(raw).hexdigest(),
    }


def _write_record(path: Path, raw: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            os.fchmod(file.fileno(), READABLE)
            file.write(raw)
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WorkDiskFullError(f"no room for {path}") from error
        raise


def main(arguments: list[str] | None = None) -> int:
    """Extract by the JSON request given as the only argument, or on standard input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    status = 0
    try:
        answer: object = run(_parse(arguments[0] if arguments else sys.stdin.read()))
    except OUassisterError as error:
        answer = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
        status = error.exit_status
    except OSError as error:
        # The trees are ours to read: whatever the kernel refuses here is a defect of the shadow.
        message = f"extraction failed: {error.strerror} ({error.filename!r})"
        hint = InternalError.default_hint
        answer = {"error": {"code": InternalError.code, "message": message, "hint": hint}}
        status = InternalError.exit_status
    json.dump(answer, sys.stdout)
    sys.stdout.write("\n")
    return status


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError("the request is not JSON") from error


if __name__ == "__main__":
    sys.exit(main())
