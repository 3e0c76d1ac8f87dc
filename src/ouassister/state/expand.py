"""Compressed save images, expanded once into a spool file that can be mapped.

The spool file is as readable as the image is to nobody but its owner: it holds the guest's
memory. It lies in the folder that the caller gives and stays there, keyed by the image as it is,
until the caller removes the folder; without one it has no name from the start, so that nothing is
left, however the process ends. What an image may expand to is bounded by the domain's memory.

Source: libvirt v11.3.0 ``src/qemu/qemu_saveimage.c`` (``qemuSaveImageGetCompressionCommand``:
the programs and their options); RFC 1952 (members follow one another), ``xz(1)``, ``bzip2(1)``.
"""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import lzma
import os
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ouassister.errors import (
    HostNotReadyError,
    TruncatedStateError,
    UnsupportedStateError,
    WorkDiskFullError,
)
from ouassister.state.c_qevm import PAGE_SIZE, PAGE_STRIDE
from ouassister.state.data import MappedFile, map_file

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import BinaryIO

_CHUNK: Final = 1 << 20
_SPARSE: Final = 64 << 10
_SLACK: Final = 1 << 30  # video memory, ROMs and device state besides the domain's memory
_KEEP_FREE: Final = 256 << 20  # of the spool's file system
_XZ_MEMORY: Final = 256 << 20  # xz -9 needs 65 MiB to expand
_PROGRAMS: Final = {"lzop": ("lzop", "-dc", "--ignore-warn"), "zstd": ("zstd", "-dcq")}


class _Engine(Protocol):
    """What `bz2.BZ2Decompressor` and `lzma.LZMADecompressor` have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    """zlib's engine in the same manner."""

    def __init__(self) -> None:
        self._engine = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._engine.eof

    @property
    def needs_input(self) -> bool:
        return not self._engine.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._engine.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._engine.decompress(self._engine.unconsumed_tail + data, max_length)


_ENGINES: Final[dict[str, Callable[[], _Engine]]] = {
    "gzip": _Gzip,
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY),
}


def default_spool() -> Path:
    """Return the folder of spool files that nobody keeps."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
    return base / "ouassister" / "spool"


def expand(
    path: Path, image: MappedFile, start: int, method: str, memory_bytes: int, spool: Path | None
) -> MappedFile:
    """Return the expanded stream, mapped.

    Args:
        path: The image.
        image: The same, mapped.
        start: Where the compressed stream starts in it.
        method: ``gzip``, ``bzip2``, ``xz``, ``lzop`` or ``zstd``.
        memory_bytes: Of the domain; the stream may not be much larger.
        spool: Where the result stays; None for a file without a name.

    Raises:
        HostNotReadyError: The program that expands it is not installed.
        TruncatedStateError: The image ends early.
        UnsupportedStateError: It is no such stream, or expands to more than memory can be.
        WorkDiskFullError: There is no room.
    """
    kept = None if spool is None else spool / f"{_key(path)}.stream"
    if kept is not None and kept.exists():
        return map_file(kept)
    folder = default_spool() if spool is None else spool
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    limit = memory_bytes // PAGE_SIZE * PAGE_STRIDE + _SLACK
    descriptor, name = tempfile.mkstemp(prefix=".expand-", dir=folder)
    try:
        if method in _ENGINES:
            pieces = _expanded(_ENGINES[method](), image, start, method, str(path))
        else:
            pieces = _by_program(path, start, method)
        with contextlib.closing(pieces), open(descriptor, "wb", closefd=False) as file:
            _write(file, pieces, start, limit, folder)
        result = map_file(Path(name))
        if kept is not None:
            Path(name).rename(kept)
        return result
    finally:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)


def _key(path: Path) -> str:
    status = path.stat()
    words = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return hashlib.sha256(repr(words).encode()).hexdigest()[:32]


def _write(file: BinaryIO, pieces: Iterator[bytes], start: int, limit: int, folder: Path) -> None:
    """Write what is not zero; the rest are holes."""
    size = 0
    checked = -_KEEP_FREE
    for piece in pieces:
        if size + len(piece) > limit:
            raise UnsupportedStateError(
                "expanded size", start, size + len(piece), f"more than {limit}, of so much memory"
            )
        if size - checked >= _KEEP_FREE // 4:
            checked = size
            if shutil.disk_usage(folder).free < _KEEP_FREE:
                raise WorkDiskFullError(
                    f"no room in {folder} to expand the save image",
                    hint="free space there, or give another spool folder",
                )
        for at in range(0, len(piece), _SPARSE):
            part = piece[at : at + _SPARSE]
            if part.count(0) == len(part):
                file.seek(len(part), os.SEEK_CUR)
            else:
                file.write(part)
        size += len(piece)
    file.truncate(size)


def _expanded(
    engine: _Engine, image: MappedFile, start: int, method: str, name: str
) -> Generator[bytes, None, None]:
    position = start
    data = b""
    while True:
        if engine.eof:
            data = engine.unused_data or image[position : position + _CHUNK]
            if not engine.unused_data:
                position += len(data)
            if not data:
                return
            engine = _ENGINES[method]()
        elif engine.needs_input:
            data = image[position : position + _CHUNK]
            if not data:
                raise TruncatedStateError(f"{name} ends at offset {len(image):#x} within {method}")
            position += len(data)
        try:
            piece = engine.decompress(data, _CHUNK)
        except (zlib.error, OSError, lzma.LZMAError, EOFError) as error:
            raise UnsupportedStateError(
                f"{method} stream", position - len(data), str(error), "not what libvirt writes"
            ) from error
        data = b""
        if piece:
            yield piece


def _by_program(path: Path, start: int, method: str) -> Generator[bytes, None, None]:
    program = _PROGRAMS[method]
    if shutil.which(program[0]) is None:
        raise HostNotReadyError(
            f"{path} is compressed with {method}, and the program is not installed",
            hint=f"install the package {program[0]}",
        )
    with path.open("rb", buffering=0) as image, tempfile.TemporaryFile() as errors:
        image.seek(start)
        with subprocess.Popen(
            program, stdin=image, stdout=subprocess.PIPE, stderr=errors
        ) as process:
            try:
                assert process.stdout is not None  # noqa: S101
                while piece := process.stdout.read(_CHUNK):
                    yield piece
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            errors.seek(0)
            said = errors.read(200).decode(errors="replace").strip()
            raise TruncatedStateError(
                f"{path} is not whole: {method} ended with {process.returncode}: {said}"
            )
