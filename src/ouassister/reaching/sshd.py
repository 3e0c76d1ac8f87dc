"""Will the guest's sshd let us in as root? By its socket in memory, and the files on its disk.

Only what is certain refuses: what a ``Match`` or a program of the guest decides is not foretold.

Source: sshd_config(5), sshd(8) "AUTHORIZED_KEYS FILE FORMAT"; OpenSSH 9.2 (the first value of a
keyword counts).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ouassister.model import GuestView

FOLDER: Final = b"/etc/ssh"
CONFIGURATION: Final = b"/etc/ssh/sshd_config"
INCLUDED: Final = b"/etc/ssh/sshd_config.d"
AUTHORIZED: Final = (b"/root/.ssh/authorized_keys", b"/root/.ssh/authorized_keys2")
HOST_KEY: Final = re.compile(r"ssh_host_[a-z0-9]{1,32}_key\.pub")
_KEY: Final = re.compile(r"([a-z0-9@.-]{1,64}) ([A-Za-z0-9+/]{16,4096}={0,2})(?: .*)?")
_ANYWHERE: Final = (b"0.0.0.0", b"::")
_INCLUDE: Final = "/etc/ssh/sshd_config.d/*.conf"
_NO_LOGIN: Final = ("no", "forced-commands-only")
_ELSEWHERE: Final = ("authorizedkeysfile", "authorizedkeyscommand", "trustedusercakeys")
# Options before a key, with which it does not give a shell, or not from everywhere.
_NARROW: Final = ("command=", "from=", "expiry-time=")


def host_keys(files: Iterable[bytes | None]) -> tuple[str, ...]:
    """The guest's public keys, each as ``TYPE BASE64``; what is malformed is left out."""
    found = []
    for text in files:
        line = (text or b"").decode("ascii", "replace").strip()
        if match := _KEY.fullmatch(line):
            found.append(f"{match[1]} {match[2]}")
    return tuple(dict.fromkeys(found))


def problem(
    view: GuestView,
    port: int,
    settings: Mapping[str, str],
    authorized: Iterable[bytes | None],
    offered: Iterable[str],
) -> str:
    """Why root cannot be reached by ssh; "" when nothing speaks against it.

    Args:
        view: With open files and sockets.
        port: Where sshd shall listen.
        settings: Of its configuration; see `settings_of`.
        authorized: Files with root's authorized keys.
        offered: Our keys, each as ``TYPE BASE64``.
    """
    if view.sockets is None or view.files is None:
        return "memory does not tell who listens"
    owners = {task.pid for task in view.tasks if task.comm == b"sshd"} | {1}
    held = {file.path for one in view.files if one.pid in owners for file in one.files}
    if not any(
        one.listening
        and one.port == port
        and one.protocol in ("tcp", "tcp6")
        and one.address in _ANYWHERE
        and b"socket:[%d]" % one.inode in held
        for one in view.sockets.bound
    ):
        return f"no sshd listened on port {port} of every address when the guest fell asleep"
    if settings.get("permitrootlogin") in _NO_LOGIN:
        return f"the guest's sshd has PermitRootLogin {settings['permitrootlogin']}"
    if settings.get("pubkeyauthentication") == "no":
        return "the guest's sshd has PubkeyAuthentication no"
    wanted = set(offered)
    if not wanted:
        return "this host has no key to offer: name one, or add one to ssh-agent"
    if any(key in settings for key in _ELSEWHERE):
        return ""
    if not wanted & _authorized(authorized):
        return "root's authorized_keys in the guest has none of our keys"
    return ""


def settings_of(text: bytes | None, included: Iterable[bytes | None]) -> dict[str, str]:
    """Keywords of sshd_config, in lower case, with their first values, up to a ``Match``.

    Args:
        text: The file.
        included: Those that it includes by its usual line, in their order.
    """
    found: dict[str, str] = {}
    for line in (text or b"").decode("utf-8", "replace").splitlines():
        words = line.replace("=", " ", 1).split(None, 1)
        if len(words) < 2 or words[0].startswith("#"):
            continue
        key, value = words[0].lower(), words[1].strip().strip('"')
        if key == "match":
            break
        if key == "include" and value == _INCLUDE:
            for one in included:
                for name, setting in settings_of(one, ()).items():
                    found.setdefault(name, setting)
            continue
        found.setdefault(key, value)
    return found


def _authorized(files: Iterable[bytes | None]) -> set[str]:
    found = set()
    for text in files:
        for raw in (text or b"").decode("utf-8", "replace").splitlines():
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            for match in re.finditer(
                r"(?:^|\s)([a-z0-9@.-]{1,64}) ([A-Za-z0-9+/]{16,}={0,2})", line
            ):
                if not any(word in line[: match.start()] for word in _NARROW):
                    found.add(f"{match[1]} {match[2]}")
    return found
