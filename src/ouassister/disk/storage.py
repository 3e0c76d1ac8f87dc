"""Private copies of the guest's file systems: a qcow2 overlay each, served by QEMU's own daemon.

The suspended disks are opened read-only and without image locks: a VM that somebody starts during
the update must get its locks, and the update notices (`ouassister.state.running`). Where a volume
lies on its disks is known from the guest's memory; this host's LVM never sees them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ouassister.disk import images

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ouassister.disk.layout import Volume
    from ouassister.disk.matching import Image

_SECTOR: Final = 512


@dataclass(frozen=True, slots=True)
class Export:
    """A node that is served as a file; ``name`` is relative to the folder of exports."""

    node: str
    name: str
    writable: bool


@dataclass(frozen=True, slots=True)
class Daemon:
    """One qemu-storage-daemon: its command line without exports, and these.

    ``files`` are written into the folder of exports before it starts there.
    """

    argv: tuple[str, ...]
    exports: tuple[Export, ...]
    files: tuple[tuple[str, str], ...] = ()


def volume_name(index: int) -> str:
    """The file that serves a volume, in the folder of exports."""
    return f"volume{index}"


def create_overlays(
    volumes: Sequence[Volume], disks: Mapping[str, Image], folder: Path
) -> tuple[Daemon, ...]:
    """Create the overlays and describe the daemons that serve the volumes from them.

    A volume of several pieces needs two daemons: QEMU joins files only where they have names
    (VMDK's flat extents), so that the first one serves whole disks, read-only, to the second one.

    Args:
        volumes: Each is served under `volume_name`.
        disks: Their disks.
        folder: Where the overlays are put.

    Raises:
        HostNotReadyError: qemu-img is missing.
        UnsupportedError: An image cannot be opened as its format.
        WorkDiskFullError: There is no room for an overlay.
    """
    names = {name: f"disk{number}" for number, name in enumerate(disks)}
    nodes = [_disk(names[name], image) for name, image in disks.items()]
    exports: list[Export] = []
    joined_nodes: list[dict[str, Any]] = []
    joined_exports: list[Export] = []
    descriptions: list[tuple[str, str]] = []
    for index, volume in enumerate(volumes):
        overlay = folder / f"{volume_name(index)}.qcow2"
        images.create_qcow2(overlay, volume.size)
        node = volume_name(index)
        export = Export(node, node, writable=True)
        if len(volume.pieces) == 1:
            piece = volume.pieces[0]
            place = {"offset": piece.start, "size": piece.size, "read-only": True}
            base = {"driver": "raw", "file": names[piece.disk], **place}
            nodes += _private(node, overlay, base)
            exports.append(export)
        else:
            text = _description(volume, names)
            descriptions.append((f"{node}.vmdk", text))
            base = {"driver": "vmdk", "read-only": True, "file": _file(f"{node}.vmdk")}
            joined_nodes += _private(node, overlay, base)
            joined_exports.append(export)
            for name in {names[piece.disk] for piece in volume.pieces}:
                if not any(one.name == name for one in exports):
                    exports.append(Export(name, name, writable=False))
    daemons = [Daemon(_argv(nodes), tuple(exports))]
    if joined_nodes:
        daemons.append(Daemon(_argv(joined_nodes), tuple(joined_exports), tuple(descriptions)))
    return tuple(daemons)


def _argv(nodes: Sequence[Mapping[str, object]]) -> tuple[str, ...]:
    argv = ["qemu-storage-daemon"]
    for node in nodes:
        argv += ["--blockdev", json.dumps(node)]
    return tuple(argv)


def _file(name: str) -> dict[str, object]:
    return {
        "driver": "file",
        "filename": name,
        "read-only": True,
        "locking": "off",
        "auto-read-only": False,
    }


def _disk(node: str, image: Image) -> dict[str, object]:
    file = _file(str(image.path))
    return {"node-name": node, "driver": image.format, "read-only": True, "file": file}


def _private(node: str, overlay: Path, base: dict[str, object]) -> list[dict[str, object]]:
    below = {"node-name": f"{node}-base", **base}
    # Lost with the run in any case: nothing to flush for.
    file = {"driver": "file", "filename": str(overlay), "cache": {"no-flush": True}}
    above: dict[str, object] = {
        "node-name": node,
        "driver": "qcow2",
        "backing": f"{node}-base",
        "file": file,
        "cache": {"no-flush": True},
        "discard": "unmap",
    }
    return [below, above]


def _description(volume: Volume, names: Mapping[str, str]) -> str:
    """A VMDK descriptor (VMware Virtual Disk Format 1.1, "The Extent Description")."""
    lines = ["# Disk DescriptorFile", "version=1", "CID=fffffffe", "parentCID=ffffffff"]
    lines += ['createType="twoGbMaxExtentFlat"', ""]
    for piece in volume.pieces:
        count, start = piece.size // _SECTOR, piece.start // _SECTOR
        lines.append(f'RW {count} FLAT "{names[piece.disk]}" {start}')
    return "\n".join(lines) + "\n"
