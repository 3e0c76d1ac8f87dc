"""What scripts made and removed in the guest's /run, done again in the running guest.

/run is memory, so no file of a change set can be there; yet a service may need a folder that its
package's script made, and people look for ``/run/reboot-required``. What is there in the shadow
and was not when the guest fell asleep, and what is gone, becomes actions, which come before all
others.

Not carried: what the service manager, udev and sessions keep there, sockets and pipes, names of
pids and locks (they are of processes of the shadow), and what lies where others than root may
write.
"""

from __future__ import annotations

import re
import stat
from typing import TYPE_CHECKING, Any, Final

from ouassister.model import WRITE_FILE, Action
from ouassister.text import from_text, to_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ouassister.model import TmpfsNode
    from ouassister.shadow.events import Event

RUN: Final = b"/run"
RULES: Final = (b"/usr/lib/tmpfiles.d", b"/etc/tmpfiles.d")
# At its top: each is another's, who makes it anew or is told otherwise.
APART: Final = (
    "systemd", "udev", "user", "ouassister", "log", "lock", "dbus", "mount", "credentials",
    "initramfs", "utmp", "adduser",
)  # fmt: skip
_PROGRAMS: Final = ("install", "ln", "rm", "rmdir", WRITE_FILE)
_RM: Final = ("rm", "-f")
_RMDIR: Final = ("rmdir", "--ignore-fail-on-non-empty")
_CARRIED: Final = frozenset((stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK))
_OF_PROCESSES: Final = (b".pid", b".lock", b".lck", b".sock", b".socket")
_WORD: Final = re.compile(rb"/run/[A-Za-z0-9:_.@=/+-]{1,200}")
_TARGET: Final = re.compile(rb"[A-Za-z0-9:_.@=/+][A-Za-z0-9:_.@=/+-]{0,249}")
_PERMISSIONS: Final = 0o7777
_OTHERS_WRITE: Final = 0o022
_WORD_CHARS: Final = 240  # of base64 in one word
# Of all files, in base64: they are words of one command (MAX_ARG_STRLEN is 128 KiB).
_MOST_CHARS: Final = 16 << 10
_MOST_ACTIONS: Final = 128
_MOST_NAMED: Final = 8


def actions_for(
    nodes: Iterable[Mapping[str, Any]],
    before: Sequence[TmpfsNode],
    events: Iterable[Event] = (),
    gone: Iterable[bytes] = (),
) -> tuple[tuple[Action, ...], tuple[str, ...]]:
    """Make actions of what is new, and of what is gone.

    Args:
        nodes: Of the tmpfs at /run, as `ouassister.shadow.tmpfs_made` tells them.
        before: What it had when the guest fell asleep; paths start at its root.
        events: What scripts did; where they called systemd-tmpfiles(8), which is done again in the
            guest, what rules speak of is its own.
        gone: Paths that programs could see before they ran, and that are not there any more.

    Returns:
        The actions: what goes, folders after what is in them, then what comes, folders before; and
        notes on what is not carried.
    """
    known = {node.path.rstrip(b"/") or b"/": node for node in before}
    owners = {path: (node.uid, node.mode) for path, node in known.items()}
    owners.setdefault(b"/", (0, 0o755))
    actions: list[Action] = []
    left: list[str] = []
    room = _MOST_CHARS
    by_rules = any(event.words[:1] == ("systemd-tmpfiles",) for event in events)
    for node in nodes:
        path, mode = from_text(node["path"]), int(node["mode"])
        owners[path] = int(node["uid"]), mode
        if path.endswith(_OF_PROCESSES) or (by_rules and node["ruled"]):
            continue
        if _is_as_before(node, known.get(path)):
            continue
        if stat.S_IFMT(mode) not in _CARRIED:
            continue
        made = _action(RUN + path, node) if _is_roots(path, owners) else None
        room -= len(node["content"] or "") if made is not None else 0
        if made is None or room < 0 or len(actions) == _MOST_ACTIONS:
            left.append(to_text(RUN + path))
        else:
            actions.append(made)
    for path in sorted(gone):  # what is in a folder is put before it
        old = known.get(path)
        if old is None or path.endswith(_OF_PROCESSES) or stat.S_IFMT(old.mode) not in _CARRIED:
            continue
        where = _WORD.fullmatch(RUN + path)
        if not _is_roots(path, owners) or where is None or len(actions) == _MOST_ACTIONS:
            left.append(to_text(RUN + path))
        else:
            how = _RMDIR if stat.S_ISDIR(old.mode) else _RM
            actions.insert(0, Action((*how, where[0].decode("ascii"))))
    if not left:
        return tuple(actions), ()
    named = f"{', '.join(left[:_MOST_NAMED])}{' and others' * (len(left) > _MOST_NAMED)}"
    return tuple(actions), (f"changed by scripts in memory, and not in the guest: {named}",)


def is_made(action: Action) -> bool:
    """Whether it is one of these; scripts' own calls have other programs."""
    return action.argv[0] in _PROGRAMS


def _is_as_before(node: Mapping[str, Any], old: TmpfsNode | None) -> bool:
    if old is None or (old.mode, old.uid, old.gid) != (node["mode"], node["uid"], node["gid"]):
        return False
    if stat.S_ISREG(old.mode):
        return (old.size, old.mtime_ns) == (node["size"], node["mtime_ns"])
    return old.target is None or old.target == from_text(node["target"] or "")


def _is_roots(path: bytes, owners: Mapping[bytes, tuple[int, int]]) -> bool:
    """Whether nobody but root can put something else in the way."""
    while path != b"/":
        path = path.rpartition(b"/")[0] or b"/"
        uid, mode = owners.get(path, (-1, 0))
        if uid != 0 or mode & _OTHERS_WRITE:
            return False
    return True


def _action(path: bytes, node: Mapping[str, Any]) -> Action | None:
    """What makes one of them; None where words of a command cannot say it."""
    if _WORD.fullmatch(path) is None:
        return None
    where = path.decode("ascii")
    mode = int(node["mode"])
    rights = f"{mode & _PERMISSIONS:04o}"
    uid, gid = str(int(node["uid"])), str(int(node["gid"]))
    if stat.S_ISDIR(mode):
        return Action(("install", "-d", "-m", rights, "-o", uid, "-g", gid, where))
    if stat.S_ISLNK(mode):
        target = from_text(node["target"] or "")
        if _TARGET.fullmatch(target) is None:
            return None
        return Action(("ln", "-sfn", target.decode("ascii"), where))
    content = node["content"]
    if content is None:
        return None
    pieces = (content[at : at + _WORD_CHARS] for at in range(0, len(content), _WORD_CHARS))
    return Action((WRITE_FILE, where, rights, uid, gid, *pieces))
