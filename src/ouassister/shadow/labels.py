"""SELinux labels of new files, as the guest's own policy has them.

No kernel that runs here knows the policy, so nothing in the shadow gets a label, and none is shown
(ext4-view hides them: the union could not take them along). The guest's matchpathcon(8) says, from
the policy as it is after the update, which label belongs to which path; what is put in place in the
guest gets it before it gets its name. restorecon(8) asks the same question of the same library.

Source: libselinux 3.4, ``utils/matchpathcon.c`` (``-n``: labels alone, a line each; ``-N``: as the
kernel spells them; ``-m``: the kind of file, by its first letter; ``<<none>>`` where the policy
leaves it to the kernel); Linux v6.1 ``fs/xattr.c`` and ``security/selinux/hooks.c``
(``selinux_inode_setxattr``: the stored value ends with a zero byte, as libselinux passes it).
"""

from __future__ import annotations

import re
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ouassister.errors import UnsupportedGuestError
from ouassister.model import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ouassister.model import Entry
    from ouassister.shadow.session import Shadow

XATTR: Final = "security.selinux"
POLICY: Final = re.compile(rb"/etc/selinux/[^/]+/policy/policy\.[0-9]+")
_TOOL: Final = ("matchpathcon", "-n", "-N", "-m")
_OUTPUT: Final = "labels"
_NONE: Final = "<<none>>"
_LABEL: Final = re.compile(r"[\x21-\x7e]{1,4095}")
_KINDS: Final = {
    Kind.FILE: "file",
    Kind.DIRECTORY: "dir",
    Kind.SYMLINK: "lnk_file",
    Kind.FIFO: "pipe",
    Kind.CHAR: "chr_file",
    Kind.BLOCK: "blk_file",
}
_MOST_BYTES: Final = 128 << 10  # of paths in one call; a program takes 2 MiB (execve(2))
_TIMEOUT_S: Final = 120.0


def require(shadow: Shadow) -> None:
    """Make sure that the guest can tell labels.

    Raises:
        UnsupportedGuestError: It cannot.
    """
    _ask(shadow, Kind.FILE, [b"/etc/passwd"])


def label(shadow: Shadow, entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Give what is new, or takes the place of something, the label that it will have.

    What stays where it is, with another time or owner, keeps the label that it has. So does
    what the policy does not speak of: it gets what the kernel gives to anything that is made there.

    Raises:
        UnsupportedGuestError: The guest's program does not tell them.
    """
    found: dict[bytes, str] = {}
    for kind in _KINDS:
        wanted = [one.path for one in entries if one.kind is kind and _is_made(one)]
        for paths in _parts(wanted):
            found.update(zip(paths, _ask(shadow, kind, paths), strict=True))
    return tuple(
        _with(entry, found[entry.path]) if found.get(entry.path, _NONE) != _NONE else entry
        for entry in entries
    )


def _with(entry: Entry, text: str) -> Entry:
    value = text.encode("ascii") + b"\0"
    return replace(entry, xattrs=tuple(sorted((*entry.xattrs, (XATTR, value)))))


def _is_made(entry: Entry) -> bool:
    if entry.kind is Kind.DIRECTORY:
        return entry.expected is None or not stat.S_ISDIR(entry.expected.mode)
    return not entry.same


def _parts(paths: Iterable[bytes]) -> Iterator[list[bytes]]:
    part: list[bytes] = []
    size = 0
    for path in paths:
        if part and size + len(path) > _MOST_BYTES:
            yield part
            part, size = [], 0
        part.append(path)
        size += len(path) + 9  # its end, and the pointer to it
    if part:
        yield part


def _ask(shadow: Shadow, kind: Kind, paths: Sequence[bytes]) -> list[str]:
    argv = [
        *_TOOL,
        _KINDS[kind],
        "--",
        *(path.decode("utf-8", "surrogateescape") for path in paths),
    ]
    status = shadow.run(argv, output=_OUTPUT, timeout_s=_TIMEOUT_S, package_cache=False)
    text = shadow.output_path(_OUTPUT).read_text("utf-8", "backslashreplace")
    labels = text.splitlines()
    if status != 0 or len(labels) != len(paths) or not all(map(_LABEL.fullmatch, labels)):
        told = "; ".join(text.strip().splitlines()[-2:])[:300] or f"status {status}"
        raise UnsupportedGuestError(
            f"the guest has loaded an SELinux policy, and does not tell its labels: {told}",
            hint="install selinux-utils (matchpathcon) in the guest, or update it awake",
        )
    return labels
