"""Will the guest's sshd let us in? By its socket in memory, and the files on its disk.

Only what is certain refuses: what a ``Match`` or a program of the guest decides is not foretold,
nor what sudo lets another user than root do.

Source: sshd_config(5), sshd(8) "AUTHORIZED_KEYS FILE FORMAT"; OpenSSH 9.2 (the first value of a
keyword counts); passwd(5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.access import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ouassister.model import GuestView

FOLDER: Final = b"/etc/ssh"
CONFIGURATION: Final = b"/etc/ssh/sshd_config"
INCLUDED: Final = b"/etc/ssh/sshd_config.d"
USERS: Final = b"/etc/passwd"
SUDOERS: Final = b"/etc/sudoers"
_AUTHORIZED: Final = (b".ssh/authorized_keys", b".ssh/authorized_keys2")
# Shells that do not understand what they are told, and programs that are none.
_NO_SHELL: Final = ("nologin", "false", "csh", "tcsh", "fish", "git-shell", "sync")
HOST_KEY: Final = re.compile(r"ssh_host_[a-z0-9]{1,32}_key\.pub")
_KEY: Final = re.compile(r"([a-z0-9@.-]{1,64}) ([A-Za-z0-9+/]{16,4096}={0,2})(?: .*)?")
_ANYWHERE: Final = (b"0.0.0.0", b"::")
_INCLUDE: Final = "/etc/ssh/sshd_config.d/*.conf"
_NO_LOGIN: Final = ("no", "forced-commands-only")
_ELSEWHERE: Final = ("authorizedkeysfile", "authorizedkeyscommand", "trustedusercakeys")
# Options before a key, with which it does not give a shell, or not from everywhere.
_NARROW: Final = ("command=", "from=", "expiry-time=")


@dataclass(frozen=True, slots=True)
class User:
    """Who logs in: a line of /etc/passwd."""

    name: str
    home: bytes
    shell: bytes

    @property
    def authorized(self) -> tuple[bytes, ...]:
        """Files with the keys that let the user in."""
        return tuple(self.home.rstrip(b"/") + b"/" + name for name in _AUTHORIZED)


def user(text: bytes | None, name: str) -> User | None:
    """Find a user in /etc/passwd; root is there even when the file is not to be read."""
    for line in (text or b"").split(b"\n"):
        fields = line.split(b":")
        if len(fields) == 7 and fields[0] == name.encode() and fields[5].startswith(b"/"):
            return User(name, fields[5], fields[6] or b"/bin/sh")
    return User(ROOT, b"/root", b"/bin/sh") if name == ROOT else None


def refused_user(found: User | None, name: str, sudoers: bytes | None) -> str:
    """Why a user cannot be the one who logs in; "" when nothing speaks against it."""
    if found is None:
        return f"the guest's /etc/passwd has no user {name!r}"
    shell = found.shell.rpartition(b"/")[2].decode("ascii", "replace")
    if shell in _NO_SHELL:
        return f"{name} has {shell!r} for a shell in the guest"
    if name != ROOT and sudoers is None:
        return f"{name} is not root, and the guest has no sudo (/etc/sudoers)"
    return ""


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
    name: str = ROOT,
) -> str:
    """Why a user cannot be reached by ssh; "" when nothing speaks against it.

    Args:
        view: With open files and sockets.
        port: Where sshd shall listen.
        settings: Of its configuration; see `settings_of`.
        authorized: Files with the user's authorized keys.
        offered: Our keys, each as ``TYPE BASE64``.
        name: The user.
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
    if name == ROOT and settings.get("permitrootlogin") in _NO_LOGIN:
        return f"the guest's sshd has PermitRootLogin {settings['permitrootlogin']}"
    if settings.get("pubkeyauthentication") == "no":
        return "the guest's sshd has PubkeyAuthentication no"
    wanted = set(offered)
    if not wanted:
        return "this host has no key to offer: name one, or add one to ssh-agent"
    if any(key in settings for key in _ELSEWHERE):
        return ""
    if not wanted & _authorized(authorized):
        return f"{name}'s authorized_keys in the guest has none of our keys"
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
