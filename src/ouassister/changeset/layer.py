"""Write the layer: one uncompressed tar in the OCI image layer format.

Deletions are empty files named ``.wh.NAME`` (OCI image-spec, layer.md, "Whiteouts"). Extended
attributes are PAX records ``SCHILY.xattr.NAME``, as star, GNU tar and Go's archive/tar write
them. The same entries and contents give the same bytes. Each byte is read once, and hashed for
its file and for the layer on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import tarfile
from typing import TYPE_CHECKING, Self

from ouassister.errors import InternalError, UnsupportedGuestError, WorkDiskFullError
from ouassister.model import Entry, Kind
from ouassister.text import to_text

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

WHITEOUT = b".wh."
READABLE = 0o644  # written as root of a user namespace, read from outside of it

_CHUNK = 1 << 20
_HOLE = 4096  # guest/stage.c leaves blocks of this size out
_ZEROS = bytes(_HOLE)
_TYPES = {
    Kind.FILE: tarfile.REGTYPE,
    Kind.DIRECTORY: tarfile.DIRTYPE,
    Kind.SYMLINK: tarfile.SYMTYPE,
    Kind.HARDLINK: tarfile.LNKTYPE,
    Kind.FIFO: tarfile.FIFOTYPE,
    Kind.CHAR: tarfile.CHRTYPE,
    Kind.BLOCK: tarfile.BLKTYPE,
    Kind.DELETE: tarfile.REGTYPE,
}


class LayerWriter:
    """Writes a layer under a temporary name; `finish` gives it its own.

    Leaving the context without `finish` leaves no file.

    Args:
        path: Where the layer will be; or a pipe, whose reader hashes it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_pipe = path.is_fifo()
        self._partial = path if self._is_pipe else path.with_name(f".{path.name}.partial")
        self._hash = hashlib.sha256()
        self._buffer = memoryview(bytearray(_CHUNK))
        self.size = 0
        if self._is_pipe:
            self._file = path.open("wb", buffering=_CHUNK)
            return
        self._partial.unlink(missing_ok=True)
        self._file = self._partial.open("xb", buffering=_CHUNK)
        os.fchmod(self._file.fileno(), READABLE)

    def __enter__(self) -> Self:
        """Start writing."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove what was not finished; a full disk becomes an error of ours."""
        # After a failed write, close tries the rest of the buffer once more and fails again.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self._file.close()
        self._partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WorkDiskFullError(f"no room for the layer at {self._path}") from error

    def add(self, entry: Entry, source: int | None = None, start: int | None = None) -> Entry:
        """Append one entry.

        Args:
            entry: What to write; a file's ``size`` is what must be read.
            source: Descriptor of the content, for a file.
            start: Where the content begins in a larger file, another layer: the holes of the
                entry stay as they are told. None: it is the whole file.

        Returns:
            The entry; for a file with its offset in the layer, its SHA-256 and its holes.

        Raises:
            UnsupportedGuestError: A name that the format keeps for deletions.
            InternalError: The content is shorter or longer than the entry says.
        """
        if entry.path.rpartition(b"/")[2].startswith(WHITEOUT):
            raise UnsupportedGuestError(
                f"{to_text(entry.path)}: a layer cannot carry a name that starts with .wh.",
                hint="the package that owns this file cannot be updated offline; leave it out",
            )
        self._write(_header(entry))
        if entry.kind is not Kind.FILE:
            return entry
        if source is None:
            raise InternalError(f"no content for {to_text(entry.path)}")
        offset = self.size
        sha256, holes = self._copy(source, entry, start)
        self._write(bytes(-self.size % tarfile.BLOCKSIZE))
        return dataclasses.replace(entry, offset=offset, sha256=sha256, holes=holes)

    def finish(self) -> tuple[str, int]:
        """Write the end mark and give the file its name.

        It is not made durable: `archive.keep` does so with what the store takes.

        Returns:
            SHA-256 and size of the layer; "" for the hash of what went into a pipe.
        """
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.close()
        if self._is_pipe:
            return "", self.size
        self._partial.rename(self._path)
        return self._hash.hexdigest(), self.size

    def _copy(self, source: int, entry: Entry, start: int | None) -> tuple[str, int]:
        content = hashlib.sha256()
        part = start is not None
        left, holes = entry.size, entry.holes if part else 0
        sparse = not part and _is_sparse(source)
        if start is not None:
            os.lseek(source, start, os.SEEK_SET)
        while count := os.readv(source, [self._buffer[: left if part else left + 1]]):
            if count > left:
                break
            if sparse:
                holes += _zero_blocks(self._buffer[:count], entry.size - left)
            left -= count
            content.update(self._buffer[:count])
            self._write(self._buffer[:count])
        if left or count:
            raise InternalError(f"size of {to_text(entry.path)} changed while it was read")
        return content.hexdigest(), holes

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        if not self._is_pipe:
            self._hash.update(data)
        self.size += len(data)


def _is_sparse(file: int) -> bool:
    """Whether a file has a hole: fewer blocks than its size, and one that lseek(2) finds."""
    status = os.fstat(file)
    if status.st_blocks * 512 >= status.st_size:
        return False
    try:
        hole = os.lseek(file, 0, os.SEEK_HOLE)  # at the end: there is none, or nobody tells
    finally:
        os.lseek(file, 0, os.SEEK_SET)
    return hole < status.st_size


def _zero_blocks(data: memoryview, position: int) -> int:
    """Bytes in whole blocks of zeros; ``position`` is that of the data in its file."""
    first = -position % _HOLE
    blocks = (data[at : at + _HOLE] for at in range(first, len(data) - _HOLE + 1, _HOLE))
    return sum(_HOLE for block in blocks if block == _ZEROS)


def decimal_seconds(time_ns: int) -> str:
    """Nanoseconds as the exact decimal that a PAX ``mtime`` record holds."""
    seconds, rest = divmod(abs(time_ns), 1_000_000_000)
    text = f"{seconds}.{rest:09}".rstrip("0").rstrip(".")
    return f"-{text}" if time_ns < 0 else text


def _header(entry: Entry) -> bytes:
    info = tarfile.TarInfo(_text(entry.path[1:]))
    info.type = _TYPES[entry.kind]
    if entry.kind is Kind.DELETE:
        folder, _, name = entry.path[1:].rpartition(b"/")
        info.name = _text((folder + b"/" if folder else b"") + WHITEOUT + name)
        info.mode = 0
    else:
        info.mode = entry.mode
        info.uid, info.gid = entry.uid, entry.gid
        info.mtime = entry.mtime_ns // 1_000_000_000
        info.devmajor, info.devminor = entry.major, entry.minor
        records = {f"SCHILY.xattr.{_keyword(name)}": _text(value) for name, value in entry.xattrs}
        if entry.mtime_ns % 1_000_000_000:
            records["mtime"] = decimal_seconds(entry.mtime_ns)
        info.pax_headers = records
    if entry.kind is Kind.FILE:
        info.size = entry.size
    if entry.kind is Kind.SYMLINK:
        info.linkname = _text(entry.target)
    if entry.kind is Kind.HARDLINK:
        info.linkname = _text(entry.target[1:])
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _keyword(name: str) -> str:
    # "=" ends a PAX keyword; GNU tar's src/xheader.c writes it as %3D, and "%" as %25.
    return name.replace("%", "%25").replace("=", "%3D")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
