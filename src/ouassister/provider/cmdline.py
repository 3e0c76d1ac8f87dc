"""What a QEMU command line says about block nodes, devices and sockets.

The syntax is QEMU's: ``-option value`` or ``--option value``; a value is JSON, or ``key=value``
pairs between commas, where ``,,`` is a comma (QEMU documentation, "System Emulation: Invocation";
util/keyval.c).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Options = dict[str, str]

# Options by which the provider starts, stops, restores or finds QEMU, or that would undo that.
_RESERVED = frozenset(
    (
        "incoming",
        "S",
        "qmp",
        "qmp-pretty",
        "daemonize",
        "loadvm",
        "preconfig",
        "snapshot",
        "pidfile",
        "readconfig",
    )
)
# The name of the first, key-less value (qemu-options.hx).
_IMPLIED = {
    "chardev": "backend",
    "device": "driver",
    "netdev": "type",
    "blockdev": "driver",
    "machine": "type",
    "M": "type",
}
_COMMAS = re.compile(r"((?:,,|[^,])*)(?:,|$)")


def reserved_option(command: Sequence[str]) -> str | None:
    """Return the first option that only the provider may give, as it was spelled."""
    for word in command[1:]:
        if word.startswith("-") and word.removeprefix("-").removeprefix("-") in _RESERVED:
            return word
    return None


def words(command: Sequence[str]) -> list[tuple[str, Options]]:
    """Pair each option with its parsed value; an option without one gets no values."""
    pairs = zip(command[1:], [*command[2:], "-"], strict=False)
    return [
        (name, {} if value.startswith("-") else parse(value, _IMPLIED.get(name, "")))
        for name, value in ((word.lstrip("-"), value) for word, value in pairs if word[:1] == "-")
    ]


def repeated(command: Sequence[str], option: str) -> list[list[tuple[str, str]]]:
    """The pairs of each such option, in their order: a key may be there more than once.

    Values in JSON have none.
    """
    return [
        _pairs(value, _IMPLIED.get(option, ""))
        for word, value in zip(command[1:], [*command[2:], "-"], strict=False)
        if word in (f"-{option}", f"--{option}") and not value.startswith(("-", "{"))
    ]


def parse(value: str, implied: str = "") -> Options:
    """Parse one option value into flat keys: ``file={"filename":...}`` is ``file.filename``."""
    if value.startswith("{"):
        try:
            return dict(_flat(json.loads(value), ""))
        except (ValueError, RecursionError):
            return {}
    return dict(_pairs(value, implied))


def _pairs(value: str, implied: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for index, match in enumerate(_COMMAS.finditer(value)):
        key, equals, text = match[1].replace(",,", ",").partition("=")
        if equals:
            pairs.append((key, text))
        elif key and index == 0 and implied:
            pairs.append((implied, key))
    return pairs


def quote(value: str) -> str:
    """Escape a value for ``key=value`` syntax."""
    return value.replace(",", ",,")


def node_names(options: list[tuple[str, Options]]) -> set[str]:
    """All block nodes that the command names."""
    return {values["node-name"] for values in _blockdevs(options) if "node-name" in values}


def disk_files(options: list[tuple[str, Options]], node: str) -> set[str]:
    """The file names that a block node opens itself, through its ``file`` children."""
    nodes = {values.get("node-name", ""): values for values in _blockdevs(options)}
    found: set[str] = set()
    seen: set[str] = set()
    while node in nodes and node not in seen:
        seen.add(node)
        values = nodes[node]
        found |= {text for key, text in values.items() if re.fullmatch(r"(file\.)*filename", key)}
        node = values.get("file", "")
    return found


def devices(options: list[tuple[str, Options]]) -> list[Options]:
    """The values of every ``-device``."""
    return [values for name, values in options if name == "device"]


def sockets_at(options: list[tuple[str, Options]], path: Path, folder: Path) -> set[str]:
    """Ids of the socket ``-chardev``s at a path; relative ones lie in ``folder``."""
    return {
        values.get("id", "")
        for name, values in options
        if name == "chardev"
        and values.get("backend") == "socket"
        and "path" in values
        and folder / values["path"] == path
    }


def port_names(options: list[tuple[str, Options]], path: Path, folder: Path) -> set[str]:
    """Names of the virtio ports whose other end is the socket at a path."""
    ends = sockets_at(options, path, folder)
    return {one.get("name", "") for one in devices(options) if one.get("chardev") in ends}


def is_scsi_bus(command: Sequence[str], bus: str) -> bool:
    """Tell whether a bus belongs to a virtio-scsi controller of the command (``ID.0``)."""
    owner = bus.rpartition(".")[0]
    return any(
        values.get("id") == owner and values.get("driver", "").startswith("virtio-scsi")
        for values in devices(words(command))
    )


def _blockdevs(options: list[tuple[str, Options]]) -> list[Options]:
    return [values for name, values in options if name == "blockdev"]


def _flat(value: object, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, str):
        yield prefix, value
