"""Save files written here, record by record, for the tests of their readers."""

from __future__ import annotations

import json
import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PAGE = 4096
JSON = json.dumps({"page_size": PAGE, "devices": [{"name": "timer"}]}).encode()
HEADER = b"QEVM" + struct.pack(">I", 3)
CONFIGURATION = b"\x07" + struct.pack(">I", 3) + b"q35"
FOOTER = b"\x7e" + struct.pack(">I", 2)
END_OF_RECORDS = struct.pack(">Q", 16) + FOOTER
END = b"\x03" + struct.pack(">I", 2)
TAIL = b"\0\x06" + struct.pack(">I", len(JSON)) + JSON
RAM_START = b"\x01" + struct.pack(">IB3sII", 2, 3, b"ram", 0, 4)


def content(page: int) -> bytes:
    return struct.pack("<Q", page) * (PAGE // 8)


def stream(blocks: dict[bytes, dict[int, bytes]], sizes: dict[bytes, int]) -> bytes:
    """A whole stream with these pages; the others of each block are zero."""
    out = HEADER + CONFIGURATION + RAM_START
    out += struct.pack(">Q", sum(sizes.values()) | 4)
    for name, size in sizes.items():
        out += struct.pack(">B", len(name)) + name + struct.pack(">Q", size)
    out += END_OF_RECORDS + END
    for name, size in sizes.items():
        for page in range(size // PAGE):
            data = blocks.get(name, {}).get(page)
            flags = 2 if data is None else 8
            head = struct.pack(">Q", page * PAGE | flags | (32 if page else 0))
            head += b"" if page else struct.pack(">B", len(name)) + name
            out += head + (b"\0" if data is None else data.ljust(PAGE, b"\0"))
    return out + END_OF_RECORDS + TAIL


def plain_stream(pages: int = 48) -> bytes:
    """One block in which every third page is zero."""
    stored = {page: content(page) for page in range(pages) if page % 3}
    return stream({b"pc.ram": stored}, {b"pc.ram": pages * PAGE})


def mapped_ram(
    sizes: dict[bytes, int],
    *,
    before: int = 0,
    change: Callable[[int, bytes], bytes] = lambda _block, header: header,
    records: bytes = b"",
    capabilities: Sequence[bytes] = (b"mapped-ram",),
) -> bytes:
    """A mapped-ram stream whose offsets count from ``before`` bytes ahead of it.

    Every third page has no bit, and rubbish at its place. ``change`` sees each header with its
    bitmap.
    """
    name = b"configuration/capabilities"
    subsection = b"\x05" + struct.pack(">B", len(name)) + name
    subsection += struct.pack(">II", 1, len(capabilities))
    for one in capabilities:
        subsection += struct.pack(">B", len(one)) + one
    out = bytes(before) + HEADER + CONFIGURATION + subsection + RAM_START
    out += struct.pack(">Q", sum(sizes.values()) | 4)
    for index, (block, size) in enumerate(sizes.items()):
        out += struct.pack(">B", len(block)) + block + struct.pack(">Q", size)
        pages = size // PAGE
        bits = sum(1 << page for page in range(pages) if page % 3)
        bitmap = bits.to_bytes((pages + 63) // 64 * 8, "little")
        at = len(out) + 28
        first = (at + len(bitmap) + 0xFFF) & ~0xFFF
        header = struct.pack(">IQQQ", 1, PAGE, at, first) + bitmap
        out += change(index, header)
        out = out.ljust(first, b"\0")
        out += b"".join(content(page) if page % 3 else b"\xdd" * PAGE for page in range(pages))
    return (out + END_OF_RECORDS + END + records + END_OF_RECORDS + TAIL)[before:]


XML = b"<domain type='qemu'>\n  <memory unit='KiB'>192</memory>\n</domain>\n"
COOKIE = b"<cookie/>\n"


def libvirt_header(
    format_number: int,
    *,
    xml: bytes = XML,
    cookie: bytes = COOKIE,
    magic: bytes = b"LibvirtQemudSave",
    running: int = 1,
    padding: int = 64,
) -> bytes:
    data = xml + b"\0"
    offset = len(data) if cookie else 0
    data += cookie + b"\0" if cookie else b""
    data += bytes(padding)
    return struct.pack("<16s5I56x", magic, 2, len(data), running, format_number, offset) + data


# --- qcow2 -----------------------------------------------------------------------------------

CLUSTER = 4096


def qcow2(
    states: dict[bytes, bytes],
    *,
    version: int = 3,
    features: int = 0,
    crypt: int = 0,
    bits: int = 12,
    entry: Callable[[int, int], int] = lambda _index, value: value,
) -> bytes:
    """An image whose snapshots have these VM states, in clusters that lie in reverse order."""
    disk_bytes = 1 << 20
    clusters: list[bytes] = [b""]  # the header

    def put(data: bytes) -> int:
        clusters.append(data.ljust(CLUSTER, b"\0"))
        return (len(clusters) - 1) * CLUSTER

    per_table = CLUSTER // 8
    table = b""
    for number, (name, state) in enumerate(states.items(), 1):
        pieces = [state[at : at + CLUSTER] for at in range(0, len(state), CLUSTER)]
        places = [put(piece) for piece in reversed(pieces)][::-1]
        words = [entry(index, place | 1 << 63) for index, place in enumerate(places)]
        tables = [words[at : at + per_table] for at in range(0, len(words), per_table)]
        level1 = [0, *(put(struct.pack(f">{len(one)}Q", *one)) | 1 << 63 for one in tables)]
        place = put(struct.pack(f">{len(level1)}Q", *level1))
        row_id = b"%d" % number
        row = struct.pack(">QIHHIIQII", place, len(level1), len(row_id), len(name), 1, 2, 3, 0, 16)
        row += struct.pack(">QQ", len(state), disk_bytes) + row_id + name
        table += row + bytes(-len(row) % 8)
    snapshots = len(clusters) * CLUSTER
    clusters.append(table)
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, 0, 0, bits, disk_bytes, crypt,
                       0, 0, 0, 0, len(states), snapshots)  # fmt: skip
    head += struct.pack(">QQQII", features, 0, 0, 4, 104)
    clusters[0] = head.ljust(CLUSTER, b"\0")
    return b"".join(clusters)


# --- dumps -----------------------------------------------------------------------------------


def elf(
    loads: list[tuple[int, int, bytes]],
    *,
    note: bytes = b"QEMU\0",
    bits: int = 2,
    kind: int = 4,
    machine: int = 62,
    extended: bool = False,
) -> bytes:
    """An ELF dump of (address, offset in the memory part, memory) ranges."""
    notes = struct.pack("<III", 5, 4, 1) + b"CORE\0\0\0\0" + bytes(4)
    notes += struct.pack("<III", len(note), 8, 0) + note.ljust(8, b"\0") + bytes(8)
    count = len(loads) + 1
    start = 64 + 56 * count + (64 if extended else 0)
    memory = start + len(notes)
    head = struct.pack("<4sBBB9x", b"\x7fELF", bits, 1, 1)
    head += struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, 64 + 56 * count if extended
                        else 0, 0, 64, 56, 0xFFFF if extended else count, 64, 0, 0)  # fmt: skip
    rows = struct.pack("<IIQQQQQQ", 4, 0, start, 0, 0, len(notes), len(notes), 0)
    size = 0
    for address, offset, data in loads:
        rows += struct.pack("<IIQQQQQQ", 1, 0, memory + offset, 0, address, len(data), len(data), 0)
        size = max(size, offset + len(data))
    section = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, count, 0, 0) if extended else b""
    out = bytearray(size)
    for _address, offset, data in loads:
        out[offset : offset + len(data)] = data
    return head + rows + section + notes + bytes(out)


def kdump(
    pages: dict[int, bytes],
    *,
    status: int = 1,
    compress: Callable[[bytes], bytes] = lambda page: zlib.compress(page, 1),
    version: int = 6,
    level: int = 1,
    block: int = PAGE,
    second: bool = True,
) -> bytes:
    """A dump of pages by number; those of zeros share one."""
    last = max(pages) + 1
    bits = sum(1 << page for page in pages).to_bytes(PAGE * -(-last // (PAGE * 8)), "little")
    head = struct.pack("<8sI390s22s10I", b"KDUMP   ", version, b"", b"", status, block, 1,
                       len(bits) // PAGE * 2, last, 0, 0, 0, 0, 1)  # fmt: skip
    sub = struct.pack("<QIIQQQQQQQQQQQ", 0, level, 0, *[0] * 10, last)
    out = (
        head.ljust(PAGE, b"\0")
        + sub.ljust(PAGE, b"\0")
        + bits
        + (bits if second else bytes(len(bits)))
    )
    start = len(out) + 24 * len(pages)
    rows, data = b"", bytes(PAGE)
    for page in sorted(pages):
        text = pages[page].ljust(PAGE, b"\0")
        if not text.strip(b"\0"):
            rows += struct.pack("<QIIQ", start, PAGE, 0, 0)
            continue
        packed = compress(text)
        flags = status if len(packed) < PAGE else 0
        packed = packed if flags else text
        rows += struct.pack("<QIIQ", start + len(data), len(packed), flags, 0)
        data += packed
    return out + rows + data


def flattened(data: bytes, piece: int = 5000, *, skip: range = range(0)) -> bytes:
    """The same in records, the last ones first; bytes in ``skip`` are left out."""
    records = []
    for at in range(0, len(data), piece):
        if at not in skip:
            part = data[at : at + piece]
            records.append(struct.pack(">qq", at, len(part)) + part)
    out = struct.pack(">16sqq", b"makedumpfile", 1, 1).ljust(4096, b"\0")
    return out + b"".join(reversed(records)) + struct.pack(">qq", -1, -1)
