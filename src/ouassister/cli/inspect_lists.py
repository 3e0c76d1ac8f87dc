"""Long lists of `inspect`, each printed on request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.model import Subject
from ouassister.text import table, to_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.model import GuestView


def _maps(view: GuestView) -> list[str]:
    lines = []
    for process in view.maps or ():
        lines += [
            f"  {process.pid} {one.start:x}-{one.end:x} {one.permissions} {one.offset:x}"
            f" {one.major}:{one.minor} {one.inode} {to_text(one.path)}".rstrip()
            for one in process.vmas
        ]
    return lines


def _files(view: GuestView) -> list[str]:
    rows = [("PID", "FD", "MODE", "FLAGS", "POSITION", "PATH")]
    rows += [
        (
            str(process.pid), str(one.fd), "r" * one.readable + "w" * one.writable or "-",
            oct(one.flags), str(one.position), to_text(one.path),
        )
        for process in view.files or ()
        for one in process.files
    ]  # fmt: skip
    return [table(rows, "  ")]


def _file_systems(view: GuestView) -> list[str]:
    rows = [("NUMBER", "TYPE", "DISK", "UUID", "")]
    rows += [
        (
            f"{one.major}:{one.minor}", one.fstype, one.disk or "-", one.uuid or "-",
            " ".join(["read-only"] * one.read_only + ["frozen"] * one.frozen),
        )
        for one in view.superblocks or ()
    ]  # fmt: skip
    return [table(rows, "  ")]


def _sockets(view: GuestView) -> list[str]:
    rows = [("PROTOCOL", "ADDRESS", "PORT", "UID", "INODE", "")]
    rows += [
        (
            one.protocol, to_text(one.address), str(one.port or "-"), str(one.uid),
            str(one.inode), "listening" if one.listening else "",
        )
        for one in (view.sockets.bound if view.sockets else ())
    ]  # fmt: skip
    return [table(rows, "  ")]


def _modules(view: GuestView) -> list[str]:
    rows = [("MODULE", "SIZE", "USED", "BY")]
    rows += [
        (one.name, str(one.size), str(one.references), ",".join(one.used_by))
        for one in view.modules or ()
    ]
    return [table(rows, "  ")]


def _sysctls(view: GuestView) -> list[str]:
    return [
        f"  {one.name} = {to_text(one.value)}"
        if one.value is not None
        else f"  {one.name}: {one.why}"
        for one in view.sysctls or ()
    ]


def _tmpfs(view: GuestView) -> list[str]:
    lines = []
    for tree in view.tmpfs or ():
        lines.append(f"  {to_text(tree.target)} ({tree.major}:{tree.minor})")
        lines += [
            f"    {one.mode:06o} {one.uid}:{one.gid} {one.size} {to_text(one.path)}"
            + (f" -> {to_text(one.target)}" if one.target is not None else "")
            for one in tree.nodes
        ]
        lines += [f"    not known: {what}" for what in tree.unread]
    return lines


LISTS: Final[dict[str, tuple[Subject, Callable[[GuestView], list[str]], str]]] = {
    "maps": (Subject.MAPS, _maps, "memory mappings of each process"),
    "files": (Subject.FILES, _files, "open files of each process"),
    "file-systems": (Subject.FILE_SYSTEMS, _file_systems, "mounted file systems"),
    "sockets": (Subject.NETWORK, _sockets, "listening and named sockets"),
    "modules": (Subject.MODULES, _modules, "loaded modules"),
    "sysctls": (Subject.SYSCTLS, _sysctls, "values below /proc/sys"),
    "tmpfs": (Subject.TMPFS, _tmpfs, "what each tmpfs contains"),
}
"""What is printed on request: its subject, who prints it, and what it is."""
