"""Writes the seeds of the corpus: ``python -m tests.fuzz.make_corpus``.

Inputs that once were findings lie beside them, named ``found-*``; this leaves them alone.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz.engine import CORPUS
from tests.unit import state_samples as samples
from tests.unit import test_kallsyms_scan as kallsyms
from tests.unit.test_btf import Composer
from tests.unit.test_changeset_archive import build
from tests.unit.test_coherent_handover import Ram
from tests.unit.test_coherent_handover import sample as handed_over
from tests.unit.test_staged_reflection import changeset as staged_changeset

from ouassister import codec
from ouassister.disk import handover
from ouassister.kernel.btf import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

_PAGES = 4
_SIZE = _PAGES * samples.PAGE


def _content(page: int) -> bytes:
    return bytes((0x40 + page,)) * samples.PAGE


def _stream() -> bytes:
    stored = {page: _content(page) for page in range(_PAGES) if page % 3}
    return samples.stream({b"pc.ram": stored, b"vga.vram": {}}, {b"pc.ram": _SIZE,
                          b"vga.vram": samples.PAGE})  # fmt: skip


def _program(*command: str) -> Callable[[bytes], bytes]:
    def run(data: bytes) -> bytes:
        return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout

    return run


def saves() -> dict[str, bytes]:
    """One of each format."""
    stream = _stream()
    numa = {b"ram-node0": _SIZE, b"ram-node1": _SIZE}
    pages = {0: _content(0), 1: b"", 2: _content(2), 9: _content(1)}
    kdump = samples.kdump(pages)
    out = {
        "stream": stream,
        "stream-numa": samples.stream({b"ram-node1": {1: _content(1)}}, numa),
        "mapped-ram": samples.mapped_ram({b"pc.ram": _SIZE, b"vga.vram": samples.PAGE}),
        "elf": samples.elf([(0, 0, _content(1) * 2), (1 << 32, 8192, _content(2))]),
        "elf-extended": samples.elf([(0, 0, _content(1))], extended=True),
        "kdump": kdump,
        "kdump-flattened": samples.flattened(kdump),
        "qcow2": samples.qcow2({b"one": stream}),
        "qcow2-two": samples.qcow2({b"one": stream[:5000], b"two": stream}),
    }
    packers: list[Callable[[bytes], bytes]] = [
        bytes, gzip.compress, bz2.compress, lzma.compress, _program("lzop", "-c"),
        _program("zstd", "-c"),
    ]  # fmt: skip
    for method, pack in enumerate(packers):
        out[f"libvirt-{method}"] = samples.libvirt_header(method) + pack(stream)
    header = samples.libvirt_header(6)
    out["libvirt-6"] = header + samples.mapped_ram({b"pc.ram": _SIZE}, before=len(header))
    return out


def types() -> dict[str, bytes]:
    """Tables with every kind."""
    out = Composer()
    integer, byte = out.integer("int", 4, 1), out.integer("unsigned char", 1)
    out.integer("_Bool", 1, 4)
    out.add(Kind.FLOAT, "double", 8)
    array = out.add(Kind.ARRAY, "", 0, (byte, integer, 3))
    out.add(Kind.UNION, "both", 4, (out.string("a"), integer, 0), count=1)
    out.add(Kind.ENUM, "color", 4, (out.string("RED"), 1, out.string("BLUE"), 2), count=2)
    out.add(Kind.ENUM64, "large", 8, (out.string("TOP"), 1, 2), count=1)
    const = out.add(Kind.CONST, "", integer)
    tagged = out.add(Kind.TYPE_TAG, "user", out.add(Kind.VOLATILE, "", const))
    pointer = out.add(Kind.RESTRICT, "", out.add(Kind.PTR, "", tagged))
    proto = out.add(Kind.FUNC_PROTO, "", integer, (out.string("x"), pointer, 0, 0), count=2)
    out.add(Kind.FUNC, "call", proto, count=1)
    out.add(Kind.VAR, "value", integer, (1,))
    out.add(Kind.DATASEC, ".data", 4, (integer, 0, 4), count=1)
    out.add(Kind.DECL_TAG, "tag", integer, (0xFFFF_FFFF,))
    out.add(Kind.FWD, "list", 0)
    link = out.add(Kind.PTR, "", out.next_id + 2)
    inner = out.struct("", 4, [("in", integer, 0)])
    node = out.struct("list", 24, [("next", link, 0), ("low", byte, 3 << 24 | 64),
                                   ("high", byte, 5 << 24 | 67), ("", inner, 96),
                                   ("name", array, 128)], flag=True)  # fmt: skip
    out.add(Kind.TYPEDEF, "list_t", node)
    return {"kinds": out.section()}


def symbols() -> dict[str, bytes]:
    """An image that a note describes, and one that is searched; the gap in it is cut out."""
    image, where = kallsyms.build()
    shift = kallsyms.RODATA - kallsyms.STEXT
    plain = kallsyms.note()
    told = kallsyms.note(
        f"SYMBOL(init_uts_ns)={kallsyms.DATA:x}\n"
        + "".join(f"SYMBOL({name})={at - shift:x}\n" for name, at in where.items())
    )
    end = where["kallsyms_token_index"] - kallsyms.RODATA + 512
    rodata = bytes(image.rodata[: -(-end // 4096) * 4096])
    return {
        name: note.text.ljust(4096, b"\0") + rodata
        for name, note in (("told", told), ("searched", plain))
    }


def page_tables() -> dict[str, bytes]:
    """Four levels that lead to pages of 4 KiB, 2 MiB and 1 GiB, and to themselves."""
    pages = [[0] * 512 for _ in range(5)]
    pages[0][0], pages[0][511], pages[0][1] = 0x1003, 0x1003, 0x0003
    pages[1][0], pages[1][1], pages[1][511] = 0x2003, 0x83, 0x2003
    pages[2][0], pages[2][1], pages[2][511] = 0x3003, 0x83, 0x3003
    for slot in (0, 1, 511):
        pages[3][slot] = 0x4003
    return {"levels": b"".join(struct.pack("<512Q", *page) for page in pages)}


def handed() -> dict[str, bytes]:
    """What memory holds of one small file system."""
    with tempfile.TemporaryDirectory() as folder:
        handover.write(Path(folder) / "unflushed", handed_over(), Ram())
        return {"small": (Path(folder) / "unflushed").read_bytes()}


def manifests() -> dict[str, bytes]:
    """A change set with each kind of entry, and one with staged packages."""
    return {"entries": codec.canonical(build()), "staged": codec.canonical(staged_changeset())}


def main() -> None:
    """Write them all."""
    for tool in ("lzop", "zstd"):
        assert shutil.which(tool), f"{tool} is not installed"
    made = {"save": saves(), "btf": types(), "kallsyms": symbols(), "pagetables": page_tables(),
            "handover": handed(), "manifest": manifests()}  # fmt: skip
    for folder, files in made.items():
        (CORPUS / folder).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (CORPUS / folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
