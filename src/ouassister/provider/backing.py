"""The files below a disk: its backing chain, read without a lock and without probing.

Each image is opened alone (``qemu-img info`` without ``--backing-chain``), so that a backing file
is only ever opened as the format that the image above declares. A probed format would let a
guest that writes a qcow2 header into its raw disk choose a host file to read (QEMU
documentation, "Security: image format probing").
"""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING, Any

from ouassister.errors import DeadlineError, HostNotReadyError, StateError, UnsupportedError
from ouassister.provider.cmdline import quote

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.provider.disks import Disk

_FORMATS = ("qcow2", "raw")
_DEPTH = 64
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def backing_chain(disk: Disk) -> tuple[Path, ...]:
    """All files that hold a disk's contents: the disk first, then what lies below it.

    Raises:
        StateError: A file is missing or damaged, or the chain has a cycle.
        UnsupportedError: A layer is of a kind that is in no table: its format undeclared or
            unknown, encrypted, with an external data file, or not a local file; or the chain is
            not the one that the VM's description has.
    """
    chain: list[Path] = []
    below: list[tuple[Path, str]] = []
    seen: set[tuple[int, int]] = set()
    path, kind = disk.path, disk.format
    while True:
        try:
            stat = path.stat()
        except OSError as error:
            raise StateError(f"cannot read the disk image {path}: {error.strerror}") from error
        if (stat.st_dev, stat.st_ino) in seen or len(chain) == _DEPTH:
            raise StateError(
                f"the backing chain of {disk.path} comes back to {path}, or is endless",
                hint="repair the backing files with 'qemu-img rebase -u'",
            )
        seen.add((stat.st_dev, stat.st_ino))
        chain.append(path)
        info = _info(path, kind)
        _check(path, info)
        name = info.get("backing-filename")
        if name is None:
            _compare(disk, tuple(below))
            return tuple(chain)
        kind = str(info.get("backing-filename-format"))
        if kind not in _FORMATS:
            message = f"{path} declares its backing file {name!r} as {kind}: not qcow2 or raw"
            hint = "declare the format: 'qemu-img rebase -u -b FILE -F FORMAT IMAGE'"
            raise UnsupportedError(message, hint=hint)
        if _PROTOCOL.match(str(name)):
            raise UnsupportedError(f"the backing file {name!r} of {path} is no local file")
        path = path.resolve().parent / str(name)
        below.append((path, kind))


def _compare(disk: Disk, below: tuple[tuple[Path, str], ...]) -> None:
    """What the VM's description says of the chain must be what the images say."""
    if disk.declared is None:
        return
    declared = tuple((path.resolve(), kind) for path, kind in disk.declared)
    if declared != tuple((path.resolve(), kind) for path, kind in below):
        raise UnsupportedError(
            f"the backing chain of {disk.path} is {_chain(below)} by its images,"
            f" and {_chain(disk.declared)} by the VM's description",
            hint="make them agree: 'qemu-img rebase -u', or the description's backingStore",
        )


def _chain(files: tuple[tuple[Path, str], ...]) -> str:
    return ", ".join(f"{path} ({kind})" for path, kind in files) or "empty"


def _check(path: Path, info: dict[str, Any]) -> None:
    data = info.get("format-specific", {}).get("data", {})
    if info.get("encrypted"):
        raise UnsupportedError(f"{path} is an encrypted image")
    if data.get("data-file") is not None:
        raise UnsupportedError(f"{path} keeps its data in another file, {data['data-file']!r}")
    if info.get("dirty-flag") or data.get("corrupt"):
        raise StateError(f"{path} is marked dirty or corrupt", hint="look at 'qemu-img check'")


def _info(path: Path, kind: str) -> dict[str, Any]:
    """``qemu-img info`` of one image; ``-U`` takes no lock and does not mind a writer's."""
    options = f"driver={kind},file.driver=file,file.filename={quote(str(path))}"
    command = ["qemu-img", "info", "--output=json", "-U", "--image-opts", options]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=30)
    except FileNotFoundError as error:
        raise HostNotReadyError("qemu-img is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(f"qemu-img info does not end for {path}") from error
    if done.returncode != 0:
        reason = done.stderr.decode("utf-8", "replace").strip()[-300:]
        raise StateError(f"{path} is no sound {kind} image: {reason!r}")
    info: dict[str, Any] = json.loads(done.stdout)
    return info
