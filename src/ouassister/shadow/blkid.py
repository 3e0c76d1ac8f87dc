"""What blkid(8) says of file systems: no device can be opened, but the guest's udev has asked.

libblkid answers from its cache what it may not read (EACCES), and takes the cache from where the
environment says. initramfs-tools asks so which fsck belongs into an initramfs.

Source: util-linux libblkid/src/{read,save,verify}.c (``blkid_verify``: "returning unverified
data"), systemd src/shared/device-private.c (``/run/udev/data``).
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Final

CACHE: Final = "/run/ouassister/blkid.tab"
ENVIRONMENT: Final = {"BLKID_FILE": CACHE}
_TAGS: Final = {
    b"ID_FS_LABEL": b"LABEL",
    b"ID_FS_UUID": b"UUID",
    b"ID_FS_TYPE": b"TYPE",
    b"ID_PART_ENTRY_NAME": b"PARTLABEL",
    b"ID_PART_ENTRY_UUID": b"PARTUUID",
}
_DATA: Final = re.compile(rb"b(\d{1,4}):(\d{1,7})")
_NODE: Final = re.compile(rb"\.\./([A-Za-z0-9._-]{1,64})")
_VALUE: Final = re.compile(rb"[A-Za-z0-9 ._:/+-]{1,128}")  # nothing that the cache would quote
_MAX_DEVICES: Final = 256
_MAX_BYTES: Final = 1 << 16
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


def write(root: bytes = b"") -> None:
    """Make the cache; called inside of the tree, before its first program.

    Bytes alone: a codec would be imported, and what is imported there is the guest's.
    """
    lines: list[bytes] = []
    with contextlib.suppress(OSError):  # a guest without udev
        for name in sorted(os.listdir(root + b"/run/udev/data"))[: 8 * _MAX_DEVICES]:  # noqa: PTH208 - bytes
            found = _DATA.fullmatch(name)
            if found is not None and len(lines) < _MAX_DEVICES:
                with contextlib.suppress(OSError):
                    lines.append(_line(root, name, int(found[1]), int(found[2])))
    with contextlib.suppress(OSError):
        descriptor = os.open(root + CACHE.encode(), _WRITE, 0o644)
        try:
            os.write(descriptor, b"".join(lines))
        finally:
            os.close(descriptor)


def _line(root: bytes, name: bytes, major: int, minor: int) -> bytes:
    """One device; nothing when no file system is known of it."""
    link = root + b"/dev/block/%d:%d" % (major, minor)
    node = _NODE.fullmatch(os.readlink(link))  # noqa: PTH115 - bytes
    descriptor = os.open(root + b"/run/udev/data/" + name, _READ)
    try:
        text = os.read(descriptor, _MAX_BYTES)
    finally:
        os.close(descriptor)
    told = dict(line[2:].partition(b"=")[::2] for line in text.splitlines() if line[:2] == b"E:")
    tags = [(tag, told[key]) for key, tag in _TAGS.items() if _VALUE.fullmatch(told.get(key, b""))]
    if node is None or b"TYPE" not in dict(tags):
        return b""
    words = b" ".join(b'%s="%s"' % pair for pair in tags)
    number = os.makedev(major, minor)
    return b'<device DEVNO="%#06x" TIME="1.0" %s>/dev/%s</device>\n' % (number, words, node[1])
