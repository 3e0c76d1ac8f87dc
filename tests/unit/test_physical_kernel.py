"""Finding the kernel in memory: its note, its symbols, and walks that a hostile guest prepared."""

from __future__ import annotations

import re
import struct
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from drgn import Architecture, Object, Platform, PlatformFlags, Program, TypeMember

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.kernel import vmcoreinfo, walk
from ouassister.kernel.kallsyms import Kallsyms
from ouassister.kernel.program import check_banner, check_release, guest_reads
from ouassister.memory import NotMappedError
from ouassister.model import PhysAddr, VirtAddr

if TYPE_CHECKING:
    from collections.abc import Callable

    from drgn import Type

    from ouassister.kernel.program import Kernel
    from ouassister.memory import VirtualMemory

NOTE = b"""OSRELEASE=6.1.0-test
PAGESIZE=4096
SYMBOL(swapper_pg_dir)=ffffffff82000000
NUMBER(phys_base)=-4096
KERNELOFFSET=1000000
"""


def parse(text: bytes) -> vmcoreinfo.Vmcoreinfo | None:
    return vmcoreinfo.parse(text.ljust(4096, b"\0"), PhysAddr(0))


def test_note_whole_is_parsed() -> None:
    note = parse(NOTE)
    assert note is not None
    assert note.release == "6.1.0-test"
    assert note.symbol("swapper_pg_dir") == 0xFFFFFFFF82000000
    assert note.number("NUMBER(phys_base)") == -4096
    assert note.symbol("nothing") is None
    assert note.number("OSRELEASE") is None
    assert note.text == NOTE


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"OSRELEASE=%s\n",
        NOTE.rstrip(b"\n"),
        NOTE.replace(b"PAGESIZE=4096", b"PAGESIZE=65536"),
        NOTE.replace(b"swapper_pg_dir", b"swapper"),
        NOTE.replace(b"NUMBER(phys_base)", b"NUMBER(kimage_voffset)"),
        NOTE + b"no equals sign\n",
        NOTE + b"KEY=\x1b[2J\n",
        NOTE + b"KEY=\xff\n",
        NOTE + b"A=" + b"a" * 4096,  # does not end within its page
    ],
)
def test_note_look_alike_is_refused(text: bytes) -> None:
    assert parse(text) is None


# --- kallsyms ------------------------------------------------------------------------------


class FakeMemory:
    """Virtual memory of a few pieces, at the addresses they are put to."""

    def __init__(self) -> None:
        self.pieces: dict[int, bytes] = {}

    def read(self, address: VirtAddr, size: int) -> bytes:
        for start, data in self.pieces.items():
            if start <= address and address + size <= start + len(data):
                return data[address - start : address - start + size]
        raise NotMappedError(address)


BASE = 0xFFFFFFFF81000000
SYMBOLS = {"_stext": 0, "init_task": 0x1000, "init_uts_ns": 0x2340, "x" * 130: 0x5000}


def symbol_table(*, absolute_percpu: bool) -> tuple[FakeMemory, str]:
    """Compose a table whose tokens are the single letters and one pair."""
    tokens = [bytes((code,)) if 33 <= code < 127 else b"\x01" for code in range(256)]
    tokens[200] = b"init_"
    names = b""
    for name in SYMBOLS:
        codes = ("D" + name).encode().replace(b"init_", b"\xc8")
        length = len(codes)
        names += bytes((length,) if length < 128 else (length & 0x7F | 0x80, length >> 7)) + codes
    table, index = b"", []
    for token in tokens:
        index.append(len(table))
        table += token + b"\0"
    offsets = [
        -1 - offset if absolute_percpu else offset for offset in SYMBOLS.values()
    ]  # relative to the base, either way
    memory = FakeMemory()
    memory.pieces = {
        0x1000: struct.pack("<I", len(SYMBOLS)),
        0x2000: names.ljust(0x1000, b"\0"),
        0x3000: table.ljust(0x1000, b"\0"),
        0x4000: struct.pack("<256H", *index),
        0x5000: struct.pack(f"<{len(offsets)}i", *offsets),
        0x6000: struct.pack("<Q", BASE),
    }
    keys = {"num_syms": 0x1000, "names": 0x2000, "token_table": 0x3000, "token_index": 0x4000,
            "offsets": 0x5000, "relative_base": 0x6000}  # fmt: skip
    text = "".join(f"SYMBOL(kallsyms_{key})={at:x}\n" for key, at in keys.items())
    return memory, text + f"SYMBOL(_stext)={BASE:x}\n"


def symbols(memory: FakeMemory, text: str) -> Kallsyms:
    note = parse(NOTE + text.encode())
    assert note is not None
    return Kallsyms(cast("VirtualMemory", memory), note)


@pytest.mark.parametrize("absolute_percpu", [False, True])
def test_symbols_are_found_by_name(absolute_percpu: bool) -> None:
    table = symbols(*symbol_table(absolute_percpu=absolute_percpu))
    table.learn(("init_task", "nothing"))
    for name, offset in SYMBOLS.items():
        assert table.address(name) == BASE + offset
    for absent in ("nothing", "init_", "task", "init_task2", ""):
        assert table.address(absent) is None


def encode(random: Random, tokens: list[bytes], name: bytes) -> bytes:
    """One of the ways to write a name with these tokens."""
    codes = b""
    while name:
        code = random.choice([c for c, token in enumerate(tokens) if name.startswith(token)])
        codes += bytes((code,))
        name = name[len(tokens[code]) :]
    return codes


@pytest.mark.parametrize("seed", range(4))
def test_symbols_are_found_however_they_are_written(seed: int) -> None:
    """Any cut into tokens, names of one token, the same name twice, and names of many tokens."""
    random = Random(seed)  # noqa: S311
    tokens = [b"%c" % code if chr(code) in "TDtd_abcsex" else b"\x01" for code in range(256)]
    for code in range(200, 256):
        tokens[code] = bytes(random.choices(b"_abc", k=random.randrange(2, 5)))
    tokens[199], tokens[198], tokens[197] = b"Tabc", b"tab", b"T_"
    every = [bytes(random.choices(b"_abc", k=random.randrange(1, 9))) for _ in range(300)]
    every += [b"abc", b"ab", b"abc" * 60, b"a" * 127, b"_" * 126, b"ab"]
    every[0] = b"_stext"
    memory, text = symbol_table(absolute_percpu=False)
    names = b""
    for name in every:
        codes = encode(random, tokens, random.choice((b"T", b"t", b"D", b"d")) + name)
        length = len(codes)
        names += bytes((length,) if length < 128 else (length & 0x7F | 0x80, length >> 7)) + codes
    table, index = b"", []
    for token in tokens:
        index.append(len(table))
        table += token + b"\0"
    memory.pieces |= {
        0x1000: struct.pack("<I", len(every)),
        0x2000: names,
        0x10000: table.ljust(0x1000, b"\0"),
        0x20000: struct.pack("<256H", *index),
        0x30000: struct.pack(f"<{len(every)}i", *range(0, 16 * len(every), 16)),
        0x2000 + len(names): struct.pack("<Q", BASE),
    }
    for key, at in (("token_table", 0x10000), ("token_index", 0x20000), ("offsets", 0x30000)):
        text = re.sub(rf"(kallsyms_{key}\)=)\w+", rf"\g<1>{at:x}", text)
    # The next table behind the names tells where they end.
    found = symbols(
        memory, re.sub(r"(relative_base\)=)\w+", rf"\g<1>{0x2000 + len(names):x}", text)
    )
    want = {name.decode(): BASE + 16 * n for n, name in reversed(list(enumerate(every)))}
    asked = list(want)
    random.shuffle(asked)
    found.learn(asked[: len(asked) // 2])
    for one in asked:
        assert found.address(one) == want[one]
    for absent in ("abcabcabcabc", "b" * 126, "b" * 300, "Tabc", "_stex", "stext"):
        assert found.address(absent) is None


def test_symbols_relative_to_their_own_place_are_found() -> None:
    memory, text = symbol_table(absolute_percpu=False)
    memory.pieces[0xFFFFFFFF80005000] = struct.pack(
        f"<{len(SYMBOLS)}i",
        *(BASE + offset - 0xFFFFFFFF80005000 - 4 * i for i, offset in enumerate(SYMBOLS.values())),
    )
    text = text.replace("(kallsyms_relative_base)", "(other)")
    table = symbols(memory, text.replace("offsets)=5000", "offsets)=ffffffff80005000"))
    for name, offset in SYMBOLS.items():
        assert table.address(name) == BASE + offset


def test_symbols_without_their_place_are_refused_by_name() -> None:
    memory, text = symbol_table(absolute_percpu=True)
    with pytest.raises(UnsupportedGuestError, match="does not tell where its symbol table is"):
        symbols(memory, text.replace("SYMBOL(kallsyms_names)", "SYMBOL(other)"))


def test_symbols_that_miss_stext_are_refused() -> None:
    memory, text = symbol_table(absolute_percpu=True)
    with pytest.raises(CorruptGuestError, match="_stext"):
        symbols(memory, text.replace(f"{BASE:x}", f"{BASE + 1:x}"))


@pytest.mark.parametrize(
    ("address", "data"),
    [
        (0x1000, struct.pack("<I", 0)),
        (0x1000, struct.pack("<I", 1 << 31)),
        (0x2000, b"\xff" * 0x1000),
        (0x4000, struct.pack("<256H", *range(256))),
    ],
)
def test_symbols_absurd_table_is_corrupt(address: int, data: bytes) -> None:
    memory, text = symbol_table(absolute_percpu=True)
    if address == 0x1000 and data[-1]:
        memory.pieces[0x5000] = bytes(64)
    memory.pieces[address] = data
    with pytest.raises(CorruptGuestError):
        symbols(memory, text)


# --- is it the kernel that the note names? ---------------------------------------------------


@pytest.mark.parametrize(("place", "key"), [(0, ""), (4, ""), (24, "24")])
def test_release_is_found_where_the_kernel_has_it(place: int, key: str) -> None:
    text = NOTE + b"SYMBOL(init_uts_ns)=1000\n"
    if key:
        text += f"OFFSET(uts_namespace.name)={key}\n".encode()
    note = parse(text)
    assert note is not None
    memory = FakeMemory()
    virtual = cast("VirtualMemory", memory)
    name = bytes(place) + b"Linux".ljust(65, b"\0") * 2 + b"6.1.0-test\0"
    memory.pieces[0x1000] = name.ljust(512, b"\0")
    check_release(virtual, note)
    memory.pieces[0x1000] = name.replace(b"test", b"best").ljust(512, b"\0")
    with pytest.raises(CorruptGuestError, match=r"6\.1\.0-test"):
        check_release(virtual, note)


def test_note_without_uts_is_unsupported() -> None:
    note = parse(NOTE)
    assert note is not None
    with pytest.raises(UnsupportedGuestError, match="init_uts_ns"):
        check_release(cast("VirtualMemory", FakeMemory()), note)


def test_banner_of_another_kernel_is_corrupt() -> None:
    note = parse(NOTE)
    assert note is not None
    memory = FakeMemory()
    table = cast("Kallsyms", SimpleNamespace(address={"linux_banner": 0x2000}.get))
    memory.pieces[0x2000] = b"Linux version 6.1.0-test (gcc)"
    check_banner(cast("VirtualMemory", memory), note, table)
    memory.pieces[0x2000] = b"Linux version 6.1.0-testing (gcc)"
    with pytest.raises(CorruptGuestError, match="linux_banner"):
        check_banner(cast("VirtualMemory", memory), note, table)


# --- walks ---------------------------------------------------------------------------------

MEMORY_SIZE = 0x10000


def kernel_of(words: dict[int, int]) -> Kernel:
    """Make a kernel of bare memory: words at addresses, zero elsewhere."""
    memory = bytearray(MEMORY_SIZE)
    for address, value in words.items():
        struct.pack_into("<Q", memory, address, value)

    def read(address: int, count: int, _offset: int, _physical: bool) -> bytes:
        return bytes(memory[address : address + count])

    flags = PlatformFlags.IS_64_BIT | PlatformFlags.IS_LITTLE_ENDIAN
    prog = Program(Platform(Architecture.X86_64, flags))
    prog.add_memory_segment(0, MEMORY_SIZE, read)
    return cast("Kernel", SimpleNamespace(prog=prog))


def test_list_is_walked_to_its_head() -> None:
    kernel = kernel_of({0x100: 0x200, 0x200: 0x300, 0x300: 0x100})
    assert list(walk.list_nodes(kernel, 0x100)) == [0x200, 0x300]
    assert list(walk.list_nodes(kernel_of({0x100: 0x100}), 0x100)) == []


@pytest.mark.parametrize("back", [0x200, 0x300])
def test_list_that_contains_itself_is_corrupt(back: int) -> None:
    kernel = kernel_of({0x100: 0x200, 0x200: 0x300, 0x300: back})
    with pytest.raises(CorruptGuestError, match="contains itself"):
        list(walk.list_nodes(kernel, 0x100))


def test_list_longer_than_its_limit_is_corrupt() -> None:
    kernel = kernel_of({at: at + 8 for at in range(0x100, 0x4000, 8)})
    with pytest.raises(CorruptGuestError, match="more than 50"):
        list(walk.list_nodes(kernel, 0x100, limit=50))


def test_list_that_leads_nowhere_is_corrupt() -> None:
    kernel = kernel_of({0x100: 0xDEAD0000})
    with (
        pytest.raises(CorruptGuestError, match="leads nowhere") as caught,
        guest_reads("walking a list"),
    ):
        list(walk.list_nodes(kernel, 0x100))
    assert caught.value.context == "walking a list"


def test_hash_list_that_contains_itself_is_corrupt() -> None:
    assert list(walk.hlist_nodes(kernel_of({0x100: 0x200}), 0x100)) == [0x200]
    with pytest.raises(CorruptGuestError, match="contains itself"):
        list(walk.hlist_nodes(kernel_of({0x100: 0x200, 0x200: 0x300, 0x300: 0x200}), 0x100))


def tree(words: dict[int, int]) -> Callable[[], list[int]]:
    prog = kernel_of(words).prog
    node: Type = prog.struct_type(
        "rb_node",
        24,
        (
            TypeMember(lambda: prog.pointer_type(node), "rb_left", 0),
            TypeMember(lambda: prog.pointer_type(node), "rb_right", 64),
        ),
    )
    root = prog.struct_type("rb_root", 8, (TypeMember(prog.pointer_type(node), "rb_node", 0),))
    return lambda: list(walk.rbtree_nodes(Object(prog, root, address=0x100)))


def test_tree_is_walked_in_order() -> None:
    assert tree({0x100: 0x300, 0x300: 0x200, 0x308: 0x400})() == [0x200, 0x300, 0x400]
    assert tree({})() == []


def test_tree_that_contains_itself_is_corrupt() -> None:
    for words in ({0x300: 0x300}, {0x300: 0x200, 0x200: 0x300}, {0x308: 0x300}):
        with pytest.raises(CorruptGuestError, match="contains itself"):
            tree({0x100: 0x300, **words})()


# --- one place for errors --------------------------------------------------------------------


def test_missing_names_become_unsupported_guest() -> None:
    prog = kernel_of({}).prog
    with pytest.raises(UnsupportedGuestError, match="nothing"), guest_reads("reading"):
        prog["nothing"]
    with pytest.raises(UnsupportedGuestError, match="nothing"), guest_reads("reading"):
        prog.type("struct nothing")


def test_absent_page_passes_with_its_context() -> None:
    with pytest.raises(PageAbsentError) as caught, guest_reads("listing processes"):
        raise PageAbsentError(0x1000)
    assert caught.value.context == "listing processes"


def test_our_own_defects_are_not_blamed_on_the_guest() -> None:
    with pytest.raises(KeyError), guest_reads("reading"):
        _ = dict[str, int]()["key"]
    with pytest.raises(AttributeError), guest_reads("reading"):
        _ = object().nothing  # type: ignore[attr-defined]
