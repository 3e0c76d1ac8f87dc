"""Makes the snapshot of /sys from a guest's memory: the whole tree, and what files are told."""

from __future__ import annotations

import functools
import stat
from typing import TYPE_CHECKING, Final

from ouassister.errors import CorruptGuestError, PageAbsentError, UnsupportedGuestError
from ouassister.kernel import rodata, securityfs
from ouassister.kernel.kernfs import Kernfs, link_text
from ouassister.kernel.program import guest_reads
from ouassister.shadow.served.snapshot import Node
from ouassister.shadow.sysfs import modules, system
from ouassister.shadow.sysfs.block import Blocks
from ouassister.shadow.sysfs.buses import Buses
from ouassister.shadow.sysfs.inputs import Inputs
from ouassister.shadow.sysfs.look import Look, UntoldError
from ouassister.shadow.sysfs.modules import Modules
from ouassister.shadow.sysfs.net import Networks
from ouassister.shadow.sysfs.system import System
from ouassister.shadow.sysfs.uevent import Uevents
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ouassister.kernel import GuestReader
    from ouassister.kernel.kernfs import KernfsNode
    from ouassister.kernel.securityfs import SecurityFile

_MAX_READS: Final = 4 << 20  # a small server takes 30 thousand
_MAX_LEFT_OUT: Final = 256
_FIRST: Final = (b"", b"/fs")
_SLABS: Final = b"/kernel/slab"
_MODULE: Final = b"/module/"
_SECURITY: Final = b"/sys/kernel/security"
_ADDRESSES: Final = (b"/sections", b"/notes")
_NOWHERE: Final = b"(absent)"
_MAX_IDS: Final = 65536  # that the user namespace has
_OVERFLOW_ID: Final = 65534
_PATH_MAX: Final = 4095


def collect(
    reader: GuestReader, names: Mapping[tuple[bool, int, int], bytes]
) -> tuple[list[Node], list[str]]:
    """Render everything that the shadow's /sys shows of a guest.

    Args:
        reader: The guest's kernel.
        names: What the guest's devtmpfs calls a device, by being a disk, and its number.

    Returns:
        The tree, and what of it this kernel does not tell.

    Raises:
        UnsupportedGuestError: This kernel's sysfs is laid out otherwise.
        CorruptGuestError: Its tree contradicts itself.
        PageAbsentError: A part of the tree was never saved.
    """
    kernel = reader.kernel
    # In one pass over the table of symbols; each alone would take one.
    kernel.symbols.learn(
        ("sysfs_root_kn", "init_net", "dmi_ident", "acpi_device_fwnode_ops", "devlist",
         "boot_cpu_data", *modules.SYMBOLS, *system.SYMBOLS,
         *securityfs.SYMBOLS, *rodata.SYMBOLS)
    )  # fmt: skip
    with kernel.virtual.bounded(_MAX_READS):
        nodes = Kernfs(kernel).read(_is_left_out)
        collector = _Collector(reader, Look(kernel, nodes), names)
        contents = collector.look.contents
    tree = [_node(nodes, index, contents) for index in range(len(nodes))]
    return [*tree, *collector.security], collector.left_out


def collect_first(reader: GuestReader) -> list[Node]:
    """Describe what is in the root and in /fs, where every program with libselinux looks.

    Raises:
        UnsupportedGuestError: This kernel's sysfs is laid out otherwise.
        CorruptGuestError: What is there contradicts itself.
        PageAbsentError: It was never saved.
    """
    nodes = Kernfs(reader.kernel).read(lambda path: path not in _FIRST)
    return [_node(nodes, index, {}) for index in range(len(nodes))]


def _is_left_out(path: bytes) -> bool:
    """Whether nobody needs what is in a folder: thousands of counters, and addresses."""
    return path == _SLABS or (path.startswith(_MODULE) and path.endswith(_ADDRESSES))


def _node(nodes: list[KernfsNode], index: int, contents: dict[int, bytes]) -> Node:
    one = nodes[index]
    if stat.S_ISLNK(one.mode):
        text = link_text(nodes, index) or b""
        content: bytes | None = text if 0 < len(text) <= _PATH_MAX else _NOWHERE
    else:
        content = contents.get(index)
    uid, gid = (owner if owner < _MAX_IDS else _OVERFLOW_ID for owner in (one.uid, one.gid))
    return Node(one.parent, one.name, one.mode, uid, gid, one.links, one.number,
                max(one.size, 0), 0, 0, content)  # fmt: skip


def _security_node(one: SecurityFile) -> Node:
    content = one.content
    if stat.S_ISLNK(one.mode):
        content = content or _NOWHERE
    uid, gid = (owner if owner < _MAX_IDS else _OVERFLOW_ID for owner in (one.uid, one.gid))
    return Node(one.parent, one.name, one.mode, uid, gid, one.links, one.number, 0, one.device, 0,
                content)  # fmt: skip


class _Collector:
    def __init__(
        self, reader: GuestReader, look: Look, names: Mapping[tuple[bool, int, int], bytes]
    ) -> None:
        self.look = look
        self.left_out: list[str] = []
        self.security: list[Node] = []
        self._reader = reader
        self._ask("devices", functools.partial(self._devices, names))
        self._ask("module", self._modules)
        self._ask("kernel/security", self._security)
        made = System(look)
        for path, render in (
            (b"kernel", made.kernel),
            (b"kernel/mm/transparent_hugepage", made.huge_pages),
            (b"devices/system/cpu", made.processors),
            (b"devices/system/cpu", Buses(look).processors),
            (b"devices/system/node", made.memory_nodes),
            (b"firmware/dmi/tables", Buses(look).tables),
        ):
            folder = look.find(path)
            if folder is not None:
                self._ask(path.decode(), functools.partial(render, folder))

    def _ask(self, what: str, question: Callable[[], None]) -> None:
        try:
            with guest_reads(f"rendering /sys/{what}"):
                question()
        except UntoldError as error:
            self._leave_out(f"/sys/{what}: this kernel does not tell {error}")
        except (UnsupportedGuestError, CorruptGuestError, PageAbsentError) as error:
            self._leave_out(f"/sys/{what}: {error.message}")

    def _leave_out(self, line: str) -> None:
        if len(self.left_out) < _MAX_LEFT_OUT:
            self.left_out.append(line)

    def _security(self) -> None:
        """A file system of its own, where programs load policies; it hangs on an empty folder."""
        place = self.look.find(_SECURITY.removeprefix(b"/sys/"))
        for target, sb in self._reader.security_mounts():
            if target == _SECURITY and place is not None:
                made = securityfs.Security(self.look.kernel)
                found = made.read(sb.s_root.read_(), place, len(self.look.nodes))
                self.security = [_security_node(one) for one in found]

    def _modules(self) -> None:
        folder = self.look.find(b"module")
        made = Modules(self.look)
        for name, index in self.look.below.get(folder or 0, {}).items() if folder else ():
            self._ask(f"module/{to_text(name)}", functools.partial(made.render, index))

    def _devices(self, names: Mapping[tuple[bool, int, int], bytes]) -> None:
        look = self.look
        devices = self._reader.block_devices
        mapped = self._reader.mapped_devices()
        blocks = Blocks(look, devices.all, devices.disks, mapped)
        buses, networks, inputs = Buses(look), Networks(look), Inputs(look)
        uevents = Uevents(look, buses, blocks, networks, inputs, names)
        places: dict[bytes, Callable[[int], None]] = {
            b"/class/block": blocks.render,
            b"/class/net": networks.render,
            b"/class/dmi": buses.machine,
            b"/class/input": inputs.render,
        }
        for folder, inside in look.below.items():
            subsystem = look.subsystem(folder)
            path = b"" if b"uevent" not in inside else look.path(folder)
            if not path.startswith(b"/devices/"):
                continue
            if subsystem is None:  # neither a bus nor a class: nothing adds to it
                look.give(folder, b"uevent", b"")
                continue
            what = to_text(path[1:])
            if subsystem in places:
                self._ask(what, functools.partial(places[subsystem], folder))
            self._quietly(what, functools.partial(buses.render, folder, subsystem))
            self._quietly(what, functools.partial(self._device, folder, subsystem, uevents))

    def _quietly(self, what: str, question: Callable[[], None]) -> None:
        """Ask for what by its kind is not always told; the table of support names it."""

        def asked() -> None:
            try:
                question()
            except UntoldError:
                return

        self._ask(what, asked)

    def _device(self, folder: int, subsystem: bytes, uevents: Uevents) -> None:
        device = self.look.common(folder)["devt"]
        if device:
            self.look.give(folder, b"dev", b"%d:%d\n" % (device >> 20, device & 0xFFFFF))
        self.look.give(folder, b"uevent", uevents.text(folder, subsystem))
