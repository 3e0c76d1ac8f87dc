"""What files below /sys say, rendered from made-up structures of old and new kernels."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from tests.unit.fake_guest import FakeGuest

from ouassister.cli import support_verb
from ouassister.errors import CorruptGuestError
from ouassister.guest_model import BlockDevice, MappedDevice
from ouassister.kernel import rodata
from ouassister.kernel.kernfs import KernfsNode
from ouassister.shadow.sysfs import look as looking
from ouassister.shadow.sysfs.block import Blocks
from ouassister.shadow.sysfs.buses import Buses
from ouassister.shadow.sysfs.inputs import Inputs
from ouassister.shadow.sysfs.look import Look, Structure, UntoldError, cpu_list, signed
from ouassister.shadow.sysfs.modules import Modules
from ouassister.shadow.sysfs.table import TABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "support.md"


def tree(*paths: str, **private: int) -> list[KernfsNode]:
    """Folders end with a slash; private addresses are given by name."""
    nodes = [KernfsNode(0, b"", stat.S_IFDIR | 0o755, 0, 0, 2, 1, 0, 0, None)]
    places = {"": 0}
    for path in paths:
        above, _, name = path.rstrip("/").rpartition("/")
        kind = stat.S_IFDIR | 0o755 if path.endswith("/") else stat.S_IFREG | 0o644
        places[path.rstrip("/")] = len(nodes)
        nodes.append(
            KernfsNode(places[above], name.encode(), kind, 0, 0, 1, len(nodes), 4096,
                       private.get(name, 0), None)
        )  # fmt: skip
    return nodes


def said(look: Look) -> dict[bytes, bytes]:
    return {look.path(index): content for index, content in look.contents.items()}


class Kernel(FakeGuest):
    """A guest with devices."""

    def __init__(self) -> None:
        super().__init__()
        self.struct("kobject", ("name", "p"), ("parent", "p"))
        self.struct("device", ("type", "p"), ("kobj", "kobject"))


# --- how things are rendered ---


def test_lists_of_processors() -> None:
    assert cpu_list([]) == b"\n"
    assert cpu_list([3, 0, 1, 7, 2]) == b"0-3,7\n"
    assert [signed(0xFFFF_FFFF), signed(1), signed(0xFF, 8)] == [-1, 1, -1]


def test_structure_is_read_without_what_it_lacks() -> None:
    guest = Kernel()
    guest.struct("inner", ("a", "I"))
    guest.struct("thing", ("x", "I"), ("in", "inner"))
    address = guest.put("thing", x=5)
    guest.place(address + 4, "I", 7)
    read = Structure(guest.kernel, "struct thing", "x", "gone", "in.a", "in.gone", "no.way")
    values = read.read(address)
    assert dict(values) == {"x": 5, "in.a": 7}
    with pytest.raises(UntoldError, match="gone"):
        values["gone"]
    with pytest.raises(UntoldError):
        read.read(0)
    assert Structure(guest.kernel, "struct thing", "gone").read(address) == {}


def test_only_files_that_are_there_are_given_something() -> None:
    guest = Kernel()
    look = Look(guest.kernel, tree("a/", "a/b"))
    look.give(1, b"b", b"x" * 5000)
    look.give(1, b"missing", b"x")
    look.give(0, b"a", b"x")
    assert said(look) == {b"/a/b": b"x" * 4095}


def test_contents_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "_MAX_CONTENTS", 10)
    look = Look(Kernel().kernel, tree("a"))
    look.give(0, b"a", b"12345")
    with pytest.raises(CorruptGuestError, match="more than they can"):
        look.give(0, b"a", b"123456")


# --- disks ---

DISK = BlockDevice("vda", 254, 0, "vda", 0, 0, 1 << 30, False, "", "", b"/vda")
PART = BlockDevice("vda1", 254, 1, "vda", 1, 1 << 20, 1 << 29, True, "", "", b"/vda/vda1")
QUEUE = ("rotational", "write_cache", "fua", "nomerges", "rq_affinity", "max_sectors_kb",
         "scheduler", "read_ahead_kb", "zoned", "write_same_max_bytes", "discard_max_bytes"
         )  # fmt: skip
PATHS = ("vda/", "vda/size", "vda/removable", "vda/hidden", "vda/diskseq", "vda/stat", "vda/ro",
         "vda/alignment_offset", "vda/dm/", "vda/dm/name", "vda/vda1/", "vda/vda1/size",
         "vda/vda1/start", "vda/vda1/ro", "vda/vda1/partition", "vda/vda1/alignment_offset",
         "vda/queue/", *(f"vda/queue/{name}" for name in QUEUE))  # fmt: skip


def disk(
    limits: Sequence[tuple[str, object]], disk_more: Sequence[tuple[str, object]] = ()
) -> tuple[Kernel, int, int]:
    guest = Kernel()
    guest.struct("backing_dev_info", ("ra_pages", "Q"))
    guest.struct("block_device_operations", ("devnode", "p"))
    guest.struct("queue_limits", ("logical_block_size", "I"), ("physical_block_size", "I"),
                 ("io_min", "I"), ("max_sectors", "I"), ("max_discard_sectors", "I"),
                 ("alignment_offset", "I"), ("misaligned", "B"), *limits)  # fmt: skip
    guest.struct("request_queue", ("queue_flags", "Q"), ("nr_requests", "Q"),
                 ("limits", "queue_limits"))  # fmt: skip
    guest.struct("gendisk", ("flags", "I"), ("minors", "I"), ("queue", "p"), ("bdi", "p"),
                 ("fops", "p"), *disk_more)  # fmt: skip
    queue = guest.put("request_queue", limits__logical_block_size=512, limits__io_min=4096,
                      limits__physical_block_size=4096, limits__max_sectors=2560,
                      limits__max_discard_sectors=8)  # fmt: skip
    one = guest.put("gendisk", flags=1, minors=16, queue=queue,
                    bdi=guest.put("backing_dev_info", ra_pages=32),
                    fops=guest.put("block_device_operations"))  # fmt: skip
    return guest, one, queue


def rendered(guest: Kernel, one: int) -> dict[bytes, bytes]:
    look = Look(guest.kernel, tree(*PATHS))
    mapped = MappedDevice("vda", "vg-ro\\x1bot", "", ())
    blocks = Blocks(look, (DISK, PART), {"vda": one}, (mapped,))
    for path in (b"vda", b"vda/vda1"):
        folder = look.find(path)
        assert folder is not None
        blocks.render(folder)
    return said(look)


def test_disk_of_a_kernel_with_numbered_flags() -> None:
    guest, one, queue = disk([("zoned", "I")], [("diskseq", "Q")])
    guest.set("request_queue", queue, queue_flags=1 << 17 | 1 << 3 | 1 << 4 | 1 << 12)
    guest.set("gendisk", one, diskseq=9)
    found = rendered(guest, one)
    assert found == {
        b"/vda/size": b"2097152\n", b"/vda/removable": b"1\n", b"/vda/hidden": b"0\n",
        b"/vda/diskseq": b"9\n", b"/vda/ro": b"0\n", b"/vda/alignment_offset": b"0\n",
        b"/vda/dm/name": b"vg-ro\x1bot\n", b"/vda/vda1/size": b"1048576\n",
        b"/vda/vda1/start": b"2048\n", b"/vda/vda1/ro": b"1\n", b"/vda/vda1/partition": b"1\n",
        b"/vda/vda1/alignment_offset": b"0\n", b"/vda/queue/rotational": b"1\n",
        b"/vda/queue/write_cache": b"write back\n", b"/vda/queue/fua": b"0\n",
        b"/vda/queue/nomerges": b"2\n", b"/vda/queue/rq_affinity": b"2\n",
        b"/vda/queue/max_sectors_kb": b"1280\n", b"/vda/queue/read_ahead_kb": b"128\n",
        b"/vda/queue/zoned": b"none\n", b"/vda/queue/write_same_max_bytes": b"0\n",
        b"/vda/queue/discard_max_bytes": b"4096\n",
    }  # fmt: skip


def test_disk_of_a_kernel_with_features() -> None:
    guest, one, queue = disk([("features", "I"), ("flags", "I")])
    names = {"QUEUE_FLAG_NOMERGES": 1, "QUEUE_FLAG_NOXMERGES": 5, "QUEUE_FLAG_SAME_COMP": 2}
    kernel = guest.kernel
    kernel.types.constant = (  # type: ignore[method-assign]
        lambda name: FakeConstant(names[name]) if name in names else None
    )
    guest.set("request_queue", queue, queue_flags=1 << 5, limits__features=1 << 0 | 1 << 10)
    look = Look(kernel, tree(*PATHS))
    Blocks(look, (DISK,), {"vda": one}, ()).render(1)
    found = said(look)
    assert found[b"/vda/queue/rotational"] == b"0\n"
    assert found[b"/vda/queue/write_cache"] == b"write back\n"
    assert found[b"/vda/queue/zoned"] == b"host-managed\n"
    assert found[b"/vda/queue/nomerges"] == b"1\n"
    assert b"/vda/queue/rq_affinity" not in found  # a flag that this kernel has not
    assert b"/vda/diskseq" not in found
    guest.set("request_queue", queue, limits__flags=1)
    look = Look(kernel, tree(*PATHS))
    Blocks(look, (DISK,), {"vda": one}, ()).render(1)
    assert said(look)[b"/vda/queue/write_cache"] == b"write through\n"


class FakeConstant:
    def __init__(self, value: int) -> None:
        self._value = value

    def value_(self) -> int:
        return self._value


def test_partition_that_begins_within_a_block() -> None:
    guest, one, queue = disk([("zoned", "I")])
    guest.set("request_queue", queue, limits__alignment_offset=512)
    assert rendered(guest, one)[b"/vda/vda1/alignment_offset"] == b"512\n"
    guest.set("request_queue", queue, limits__misaligned=1)
    assert rendered(guest, one)[b"/vda/vda1/alignment_offset"] == b"-1\n"


# --- modules ---


class Loaded(FakeGuest):
    """A kernel with one module."""

    OPS: ClassVar = {name: 0x100 + 8 * number for number, name in enumerate(
        ("param_ops_int", "param_ops_bool", "param_ops_invbool", "param_ops_charp",
         "param_ops_string", "param_array_ops", "param_ops_hexint", "param_ops_byte"))}  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.struct("kobject", ("name", "p"), ("ktype", "p"))
        self.struct("module_kobject", ("kobj", "kobject"), ("mod", "p"))
        self.struct("atomic", ("counter", "i"))
        self.struct("module_layout", ("base", "p"), ("size", "I"))
        self.struct("module", ("state", "I"), ("refcnt", "atomic"), ("taints", "Q"),
                    ("version", "p"), ("srcversion", "p"), ("core_layout", "module_layout"),
                    ("init_layout", "module_layout"))  # fmt: skip
        self.struct("param_attribute", ("mattr", 16), ("param", "p"))
        self.struct("kernel_param", ("name", "p"), ("ops", "p"), ("arg", "p"))
        self.struct("kparam_string", ("maxlen", "I"), ("string", "p"))
        self.struct("kparam_array", ("max", "I"), ("elemsize", "I"), ("num", "p"), ("ops", "p"),
                    ("elem", "p"))  # fmt: skip
        self.variables = {**self.OPS, "module_ktype": 0x50}

    def param(self, ops: str | int, arg: int) -> int:
        address = ops if isinstance(ops, int) else self.OPS[ops]
        return self.put("param_attribute", param=self.put("kernel_param", ops=address, arg=arg))

    def parameters(self, **params: int) -> dict[bytes, bytes]:
        paths = ["mod/", "mod/parameters/", *(f"mod/parameters/{name}" for name in params)]
        holder = self.put("module_kobject", kobj__ktype=0x50)
        look = Look(self.kernel, tree(*paths, mod=holder, **params))
        Modules(look).render(1)
        return {path.rpartition(b"/")[2]: content for path, content in said(look).items()}


def test_parameters_are_printed_as_their_kind_is() -> None:
    guest = Loaded()
    number = guest.place(guest.new(4), "i", -5)
    numbers = guest.place(guest.new(12), "iii", 1, -2, 3)
    yes, no = guest.place(guest.new(1), "B", 1), guest.place(guest.new(8), "Q", 0)
    two = guest.place(guest.new(4), "I", 2)
    array = guest.put("kparam_array", max=3, elemsize=4, num=two, ops=guest.OPS["param_ops_int"],
                      elem=numbers)  # fmt: skip
    whole = guest.put("kparam_array", max=3, elemsize=4, ops=guest.OPS["param_ops_int"],
                      elem=numbers)  # fmt: skip
    empty = guest.put("kparam_array", max=3, elemsize=4, num=no, ops=guest.OPS["param_ops_int"],
                      elem=numbers)  # fmt: skip
    text = guest.place(guest.new(8), "Q", guest.string(b"some text"))
    string = guest.put("kparam_string", maxlen=4, string=guest.string(b"abcdefgh"))
    found = guest.parameters(
        i=guest.param("param_ops_int", number), y=guest.param("param_ops_bool", yes),
        n=guest.param("param_ops_invbool", yes), c=guest.param("param_ops_charp", text),
        z=guest.param("param_ops_charp", no), s=guest.param("param_ops_string", string),
        a=guest.param("param_array_ops", array), w=guest.param("param_array_ops", whole),
        e=guest.param("param_array_ops", empty), h=guest.param("param_ops_hexint", two),
        b=guest.param("param_ops_byte", number), odd=guest.param(0x999, number),
        none=guest.param("param_ops_int", 0),
    )  # fmt: skip
    assert found == {
        b"i": b"-5\n", b"y": b"Y\n", b"n": b"N\n", b"c": b"some text\n", b"z": b"(null)\n",
        b"s": b"abcd\n", b"a": b"1,-2\n", b"w": b"1,-2,3\n", b"e": b"", b"h": b"0x000002\n",
        b"b": b"251\n",
    }  # fmt: skip


def test_arrays_that_a_hostile_guest_makes_are_not_told() -> None:
    guest = Loaded()
    ops = guest.OPS["param_array_ops"]
    inner = guest.put("kparam_array", max=3, elemsize=4, ops=ops, elem=0x100)
    long = guest.put("kparam_array", max=1 << 30, elemsize=0, ops=guest.OPS["param_ops_int"],
                     elem=0x100)  # fmt: skip
    assert guest.parameters(a=guest.param("param_array_ops", inner),
                            b=guest.param("param_array_ops", long)) == {}  # fmt: skip


def test_module_that_is_loaded() -> None:
    guest = Loaded()
    module = guest.put("module", refcnt__counter=3, taints=1 << 12 | 1 << 13,
                       srcversion=guest.string(b"ABC"), core_layout__size=4096)  # fmt: skip
    holder = guest.put("module_kobject", kobj__ktype=0x50, mod=module)
    names = ("coresize", "initsize", "initstate", "refcnt", "taint", "version", "srcversion")
    look = Look(guest.kernel, tree("mod/", *(f"mod/{name}" for name in names), mod=holder))
    Modules(look).render(1)
    assert said(look) == {
        b"/mod/coresize": b"4096\n", b"/mod/initsize": b"0\n", b"/mod/initstate": b"live\n",
        b"/mod/refcnt": b"2\n", b"/mod/taint": b"OE\n", b"/mod/srcversion": b"ABC\n",
    }  # fmt: skip


def test_module_of_the_image_has_its_version() -> None:
    guest = Loaded()
    guest.struct("module_version_attribute", ("mattr", 16), ("version", "p"))
    version = guest.put("module_version_attribute", version=guest.string(b"1.0"))
    holder = guest.put("module_kobject", kobj__ktype=0x50)
    look = Look(guest.kernel, tree("nvme/", "nvme/version", nvme=holder, version=version))
    Modules(look).render(1)
    assert said(look) == {b"/nvme/version": b"1.0\n"}


def test_folder_that_is_no_module_is_left_alone() -> None:
    guest = Loaded()
    holder = guest.put("module_kobject", kobj__ktype=0x58, mod=8)
    look = Look(guest.kernel, tree("compression/", "compression/coresize", compression=holder))
    Modules(look).render(1)
    assert said(look) == {}


# --- buses ---


def test_machine_is_called_as_modprobe_knows_it() -> None:
    guest = Kernel()
    fields = ("NONE", "BIOS_VENDOR", "SYS_VENDOR", "PRODUCT_NAME", "STRING_MAX", "OEM_STRING")
    guest.enum("dmi_field", **{f"DMI_{name}": number for number, name in enumerate(fields)})
    table = guest.new(40)
    guest.place(table, "QQQQ", 0, guest.string(b"Sea BIOS: 1"), guest.string(b"QEMU"), 0)
    guest.variables["dmi_ident"] = table
    guest.struct("gendisk", ("diskseq", "Q"))
    look = Look(guest.kernel, tree("id/", "id/bios_vendor", "id/product_name", "id/modalias"))
    buses = Buses(look)
    buses.machine(1)
    buses.render(1, b"/class/dmi")
    assert said(look) == {
        b"/id/bios_vendor": b"Sea BIOS: 1\n",
        b"/id/modalias": b"dmi:bvnSeaBIOS1:svnQEMU:\n",
    }


def test_machine_with_a_number_of_stock_on_an_old_kernel_has_no_alias() -> None:
    guest = Kernel()
    guest.enum("dmi_field", DMI_NONE=0, DMI_PRODUCT_SKU=1, DMI_STRING_MAX=2)
    table = guest.place(guest.new(16), "QQ", 0, guest.string(b"12-3"))
    guest.variables["dmi_ident"] = table
    guest.struct("gendisk", ("flags", "I"))
    with pytest.raises(UntoldError):
        Buses(Look(guest.kernel, tree("id/"))).alias(1, b"/class/dmi")
    guest.struct("gendisk", ("diskseq", "Q"))
    assert Buses(Look(guest.kernel, tree("id/"))).alias(1, b"/class/dmi") == b"dmi:sku12-3:"


def test_kernel_is_searched_for_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Kernel()
    guest.memory[0x2000:0x2010] = b"A PARTUUID=%s\0xx"
    guest.variables |= {"__start_rodata": 0x1000, "__end_rodata": 0x3000}
    for piece in (1, 7, 0x1003, 1 << 20):
        monkeypatch.setattr(rodata, "_PIECE", piece)
        assert rodata.has_text(guest.kernel, b"PARTUUID=%s")
        assert not rodata.has_text(guest.kernel, b"PARTUUID=%")
    guest.variables["__end_rodata"] = 0x200D
    assert not rodata.has_text(guest.kernel, b"PARTUUID=%s")
    guest.variables["__end_rodata"] = 1 << 40
    with pytest.raises(CorruptGuestError, match="constants take"):
        rodata.has_text(guest.kernel, b"x")


def test_device_of_an_unknown_bus_has_no_name_for_modprobe() -> None:
    with pytest.raises(UntoldError):
        Buses(Look(Kernel().kernel, tree("a/", "a/modalias"))).alias(1, b"/bus/usb")


def test_keyboard_is_called_as_modprobe_knows_it() -> None:
    guest = Kernel()
    guest.struct("input_id", *((name, "H") for name in ("bustype", "vendor", "product", "version")))
    bits = [(f"{name}bit", ("Q", 1)) for name in ("prop", "ev", "rel", "abs", "msc", "led", "snd",
                                                  "ff", "sw")]  # fmt: skip
    guest.struct("input_dev", ("name", "p"), ("phys", "p"), ("uniq", "p"), ("id", "input_id"),
                 *bits, ("keybit", ("Q", 12)), ("dev", "device"))  # fmt: skip
    one = guest.put("input_dev", name=guest.string(b"Power Button"), id__bustype=0x19,
                    id__product=1)  # fmt: skip
    guest.place(one + 32 + 8, "Q", 3)  # EV_SYN, EV_KEY
    guest.place(one + 32 + 72, "QQ", 0, 1 << 0x34 | 1)
    kobject = one + 32 + 72 + 96 + 8
    names = ("uevent", "modalias", "name", "uniq", "id/", "id/bustype", "capabilities/",
             "capabilities/key", "capabilities/ev", "capabilities/led", "event0/")  # fmt: skip
    look = Look(guest.kernel, tree("in/", *(f"in/{name}" for name in names), **{"in": kobject}))
    inputs = Inputs(look)
    inputs.render(1)
    alias = b"input:b0019v0000p0001e0000-e0,1,k74,ramlsfw"
    assert said(look) == {
        b"/in/modalias": alias + b"\n", b"/in/name": b"Power Button\n", b"/in/uniq": b"\n",
        b"/in/id/bustype": b"0019\n", b"/in/capabilities/key": b"10000000000001 0\n",
        b"/in/capabilities/ev": b"3\n", b"/in/capabilities/led": b"0\n",
    }  # fmt: skip
    assert inputs.lines(1) == [
        b"PRODUCT=19/0/1/0", b'NAME="Power Button"', b"PROP=0", b"EV=3",
        b"KEY=10000000000001 0", b"MODALIAS=" + alias,
    ]  # fmt: skip
    handler = look.find(b"in/event0")
    assert handler is not None
    assert inputs.lines(handler) == []


# --- the table ---


def test_page_is_the_table() -> None:
    text = PAGE.read_text()
    start = text.index("## Files of /sys and /dev")
    section = text[start : text.index("\n## ", start + 1)]
    found = re.findall(r"^\| (?!Files|---).*\|$", section, re.MULTILINE)
    assert found == [f"| `{row.name}` | {row.shown} | {row.note} |" for row in TABLE]


def test_support_prints_the_table() -> None:
    value: Any
    _, value, shown = support_verb.run(None)  # type: ignore[arg-type]
    assert [row["name"] for row in value["sysfs"]] == [row.name for row in TABLE]
    assert all(row.name in shown for row in TABLE)
