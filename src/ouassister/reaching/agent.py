"""Will qemu-guest-agent run our programs? By its process in memory, and its configuration.

What it was told on its command line counts before its file. A file that was changed since the agent
started is taken as it is now.

Source: QEMU v7.2.0 ``qga/main.c`` (``config_load``, ``config_parse``; ``block-rpcs`` is called
``blacklist`` before 7.2, ``allow-rpcs`` came with 8.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.model import GuestView, Task

CONFIGURATION: Final = b"/etc/qemu/qemu-ga.conf"
_COMM: Final = b"qemu-ga"
_PORTS: Final = (b"/dev/vport", b"/dev/virtio-ports/")
_NEEDED: Final = ("guest-exec", "guest-exec-status")
_BLOCK: Final = ("block-rpcs", "blacklist")
_ALLOW: Final = "allow-rpcs"
_SHORT: Final = {"-b": "block-rpcs", "-a": _ALLOW, "-c": "config", "-m": "method", "-p": "path"}


def configuration(view: GuestView) -> bytes:
    """Where the agent that runs has its configuration."""
    for task in _agents(view):
        given = dict(_given(task.cmdline)).get("config")
        if given and given.startswith("/"):
            return given.encode("utf-8", "surrogateescape")
    return CONFIGURATION


def problem(view: GuestView, text: bytes | None) -> str:
    """Why the agent cannot be used; "" when nothing speaks against it.

    Args:
        view: With open files.
        text: Its configuration; None when there is none.
    """
    agents = _agents(view)
    if not agents:
        return "no qemu-ga ran when the guest fell asleep"
    if view.files is None:
        return "memory does not tell who has the agent's port open"
    pids = {task.pid for task in agents}
    held = [file for one in view.files if one.pid in pids for file in one.files]
    if not any(file.path.startswith(_PORTS) for file in held):
        return "qemu-ga had no virtio port open"
    settings = dict(_stored(text or b""))
    for task in agents:
        settings.update(_given(task.cmdline))
    blocked = {word for key in _BLOCK for word in _listed(settings.get(key, ""))}
    forbidden = [name for name in _NEEDED if name in blocked]
    if _ALLOW in settings:
        allowed = set(_listed(settings[_ALLOW]))
        forbidden += [name for name in _NEEDED if name not in allowed and name not in blocked]
    if forbidden:
        return f"the guest's configuration of qemu-ga forbids {', '.join(forbidden)}"
    return ""


def _agents(view: GuestView) -> list[Task]:
    return [task for task in view.tasks if task.comm == _COMM and not task.kernel_thread]


def _given(cmdline: tuple[bytes, ...]) -> Iterator[tuple[str, str]]:
    """Options of a command line, by their long names."""
    words = iter([word.decode("utf-8", "surrogateescape") for word in cmdline[1:]])
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            name = name[2:]
            if not equals and name in (*_BLOCK, _ALLOW, "config"):
                value = next(words, "")
            yield name, value
        elif word[:2] in _SHORT:
            yield _SHORT[word[:2]], word[2:] or next(words, "")


def _stored(text: bytes) -> Iterator[tuple[str, str]]:
    """Keys of the file's group "general", which is a GKeyFile."""
    inside = False
    for raw in text.decode("utf-8", "surrogateescape").splitlines():
        line = raw.strip()
        if line.startswith("["):
            inside = line == "[general]"
        elif inside and not line.startswith("#"):
            key, equals, value = line.partition("=")
            if equals:
                yield key.strip(), value.strip()


def _listed(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]
