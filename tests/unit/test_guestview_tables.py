"""Tables of the kernel with absurd counts and lists that lead in circles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from tests.unit.fake_guest import FakeGuest

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.guest_model import MappedLeg
from ouassister.kernel import sockets
from ouassister.kernel.devicemapper import DeviceMapper
from ouassister.kernel.loaded_modules import read_modules
from ouassister.kernel.netdevs import NetworkDevices
from ouassister.kernel.sockets import SocketTables
from ouassister.kernel.swap import read_swaps
from ouassister.kernel.sysctl_handlers import HANDLERS, Kind
from ouassister.kernel.sysctls import Sysctls

if TYPE_CHECKING:
    from ouassister.kernel.blockdevs import BlockDevices
    from ouassister.kernel.file_names import FileNames

# --- sysctl --------------------------------------------------------------------------------

S_IFDIR, READABLE = 0o040555, 0o100444
INT, STRING, UNKNOWN = 0x100, 0x200, 0x300


class SysctlGuest(FakeGuest):
    """Directories and tables of sysctl."""

    def __init__(self) -> None:
        super().__init__()
        self.struct("rb_node", ("rb_right", "p"), ("rb_left", "p"))
        self.struct("ctl_node", ("node", "rb_node"), ("header", "p"))
        self.struct("ctl_table_header", ("ctl_table", "p"), ("node", "p"))
        self.struct("rb_root", ("rb_node", "p"))
        self.struct("ctl_dir", ("header", "ctl_table_header"), ("root", "rb_root"))
        self.struct("ctl_table", ("procname", "p"), ("data", "p"), ("maxlen", "i"), ("mode", "H"),
                    ("pad", 2), ("proc_handler", "p"))  # fmt: skip
        self.struct("ctl_table_set", ("dir", "ctl_dir"))
        self.struct("ctl_table_root", ("default_set", "ctl_table_set"))
        self.struct("net", ("sysctls", "ctl_table_set"))
        for name in ("pid_namespace", "user_namespace", "ipc_namespace"):
            self.struct(name, ("level", "I"))
        self.variables = {"proc_dointvec": INT, "proc_dostring": STRING,
                          "sysctl_table_root": self.put("ctl_table_root"),
                          "init_net": self.put("net")}  # fmt: skip
        self.top = self.variables["sysctl_table_root"]

    def entry(self, directory: int, name: bytes, /, header: int = 0, **values: object) -> int:
        """Add an entry to a directory; return its node."""
        table = self.put("ctl_table", procname=self.string(name), **values)
        node = self.put("ctl_node")
        owner = header or self.put("ctl_table_header")
        self.set("ctl_table_header", owner, ctl_table=table, node=node)
        self.set("ctl_node", node, header=owner, node__rb_left=self.root(directory))
        self.set("ctl_dir", directory, root__rb_node=node)
        return node

    def root(self, directory: int) -> int:
        return int.from_bytes(self.read(directory + 16, 8), "little")

    def values(self) -> dict[str, bytes | None]:
        return {one.name: one.value for one in Sysctls(self.kernel).read()}


def test_sysctl_values_by_their_handlers() -> None:
    guest = SysctlGuest()
    below = guest.put("ctl_dir")
    guest.entry(guest.top, b"kernel", header=below, mode=S_IFDIR)
    numbers = guest.place(guest.new(8), "2i", -1, 7)
    guest.entry(below, b"pair", data=numbers, maxlen=8, mode=READABLE, proc_handler=INT)
    guest.entry(below, b"name", data=guest.string(b"oua"), maxlen=64, mode=READABLE,
                proc_handler=STRING)  # fmt: skip
    guest.entry(below, b"a.b", mode=READABLE, data=1, maxlen=4, proc_handler=UNKNOWN)
    guest.entry(below, b"secret", mode=0o100200, data=numbers, maxlen=4, proc_handler=INT)
    assert guest.values() == {
        "kernel.pair": b"-1\t7", "kernel.name": b"oua", "kernel.a/b": None}  # fmt: skip


def test_sysctl_of_a_byte_may_have_been_an_int() -> None:
    guest = SysctlGuest()
    guest.variables |= {"proc_dou8vec_minmax": 0x400, "proc_dobool": 0x500}
    word = guest.place(guest.new(8), "i", -3)
    for name, size, handler in ((b"byte", 1, 0x400), (b"int", 4, 0x400), (b"flag", 4, 0x500)):
        guest.entry(guest.top, name, data=word, maxlen=size, mode=READABLE, proc_handler=handler)
    assert guest.values() == {"byte": b"253", "int": b"-3", "flag": b"1"}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"maxlen": 1 << 30}, "bytes"),
        ({"maxlen": 5}, "not a multiple"),
        ({"maxlen": -4}, "bytes"),
        ({"data": 0xDEAD00000000}, "no page is mapped"),
        ({"data": 0}, "computed"),
    ],
)
def test_sysctl_that_cannot_be_told_says_why(values: dict[str, int], why: str) -> None:
    guest = SysctlGuest()
    word = {"data": guest.new(8), "maxlen": 4, "mode": READABLE, "proc_handler": INT}
    guest.entry(guest.top, b"odd", **(word | values))
    (one,) = Sysctls(guest.kernel).read()
    assert one.value is None
    assert why in one.why


def test_sysctl_directory_within_itself_is_corrupt() -> None:
    guest = SysctlGuest()
    guest.entry(guest.top, b"again", header=guest.top, mode=S_IFDIR)
    with pytest.raises(CorruptGuestError, match="contain themselves"):
        guest.values()


def test_sysctl_tree_that_contains_itself_is_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouassister.kernel.sysctls._MAX_ENTRIES", 50)
    guest = SysctlGuest()
    node = guest.entry(guest.top, b"x", mode=READABLE)
    guest.set("ctl_node", node, node__rb_left=node)
    with pytest.raises(CorruptGuestError, match="more than 50"):
        guest.values()


def test_sysctl_entry_of_no_table_is_corrupt() -> None:
    guest = SysctlGuest()
    node = guest.entry(guest.top, b"x", mode=READABLE)
    header = int.from_bytes(guest.read(node + 16, 8), "little")
    guest.set("ctl_table_header", header, node=node + 8)
    with pytest.raises(CorruptGuestError, match="belongs to no table"):
        guest.values()


def test_sysctl_handlers_are_names() -> None:
    assert all(name.isidentifier() for name in HANDLERS)
    assert {HANDLERS[name] for name in HANDLERS} == set(Kind)


# --- sockets -------------------------------------------------------------------------------


def guest_with_sockets() -> FakeGuest:
    guest = FakeGuest()
    guest.struct("in6_u", ("u6_addr8", 16))
    guest.struct("in6_addr", ("in6_u", "in6_u"))
    guest.struct("possible_net", ("net", "p"))
    guest.struct("sock_common", ("skc_rcv_saddr", "I"), ("skc_num", "H"), ("skc_family", "H"),
                 ("skc_state", "B"), ("pad", 7), ("skc_net", "possible_net"),
                 ("skc_v6_rcv_saddr", "in6_addr"), ("skc_node", "p"))  # fmt: skip
    guest.struct("kuid", ("val", "I"))
    guest.struct("sock", ("common", "sock_common"), ("sk_socket", "p"), ("sk_uid", "kuid"),
                 ("sk_type", "H"))  # fmt: skip
    guest.struct("inode", ("i_ino", "Q"))
    guest.struct("socket", ("state", "Q"))
    guest.struct("socket_alloc", ("socket", "socket"), ("vfs_inode", "inode"))
    guest.struct("inet_listen_hashbucket", ("lock", "Q"), ("nulls_head", "p"))
    guest.struct("inet_hashinfo", ("ehash", "p"), ("ehash_mask", "I"), ("lhash2_mask", "I"),
                 ("lhash2", "p"))  # fmt: skip
    guest.struct("udp_hslot", ("head", "p"), ("count", "I"), ("lock", "I"))
    guest.struct("udp_table", ("hash", "p"), ("hash2", "p"), ("mask", "I"))
    guest.struct("unix_table", ("locks", "p"), ("buckets", "p"))
    guest.struct("netns_unix", ("table", "unix_table"))
    guest.struct("net", ("unx", "netns_unix"))
    guest.struct("unix_address", ("refcnt", "I"), ("len", "i"), ("name", 110))
    guest.struct("unix_sock", ("sk", "sock"), ("addr", "p"))
    buckets = guest.new(512 * 8)
    net = guest.put("net", unx__table__buckets=buckets)
    listening, connected = guest.new(32), guest.new(16)
    guest.place(listening, "4Q", 0, 1, 0, 3)
    guest.place(connected, "2Q", 1, 3)
    guest.variables = {
        "init_net": net,
        "tcp_hashinfo": guest.put("inet_hashinfo", ehash=connected, ehash_mask=1, lhash2_mask=1,
                                  lhash2=listening),
        "udp_table": guest.put("udp_table", hash=guest.new(16), mask=0),
    }  # fmt: skip
    return guest


def listener(guest: FakeGuest) -> int:
    holder = guest.put("socket_alloc", vfs_inode__i_ino=4711)
    return guest.put(
        "sock", common__skc_num=22, common__skc_family=2, common__skc_state=10,
        common__skc_net__net=guest.variables["init_net"], common__skc_rcv_saddr=0x0100007F,
        common__skc_node=5, sk_socket=holder, sk_uid__val=33, sk_type=1,
    )  # fmt: skip


def test_listener_and_unix_socket() -> None:
    guest = guest_with_sockets()
    sock = listener(guest)
    table = guest.variables["tcp_hashinfo"]
    lhash2 = int.from_bytes(guest.read(table + 16, 8), "little")
    node = sock + 48 - 8
    guest.place(lhash2 + 8, "Q", node)
    address = guest.put("unix_address", len=7, name=b"\x01\0\0abcd")
    unix = guest.put(
        "unix_sock", sk__common__skc_state=1, sk__sk_type=2, addr=address,
        sk__common__skc_net__net=guest.variables["init_net"],
    )  # fmt: skip
    buckets = int.from_bytes(guest.read(guest.variables["init_net"] + 8, 8), "little")
    guest.place(buckets + 8 * 100, "Q", unix + 40)
    tcp, named = SocketTables(guest.kernel).read().bound
    assert (tcp.protocol, tcp.address, tcp.port, tcp.uid, tcp.inode, tcp.listening) == (
        "tcp", b"127.0.0.1", 22, 33, 4711, True)  # fmt: skip
    assert (named.protocol, named.address, named.inode) == ("unix-dgram", b"@abcd", 0)


def test_sockets_that_lead_in_circles_are_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_MAX_SOCKETS", 100)
    guest = guest_with_sockets()
    node = listener(guest) + 40
    guest.place(node, "Q", node)
    lhash2 = int.from_bytes(guest.read(guest.variables["tcp_hashinfo"] + 16, 8), "little")
    guest.place(lhash2 + 8, "Q", node)
    with pytest.raises(CorruptGuestError, match="more than 100 sockets"):
        SocketTables(guest.kernel).read()


def test_absurd_table_of_sockets_is_corrupt() -> None:
    guest = guest_with_sockets()
    guest.set("inet_hashinfo", guest.variables["tcp_hashinfo"], ehash_mask=0xFFFF_FFFF)
    with pytest.raises(CorruptGuestError, match="buckets"):
        SocketTables(guest.kernel).read()


def test_unix_socket_with_an_absurd_name_is_corrupt() -> None:
    guest = guest_with_sockets()
    address = guest.put("unix_address", len=4000)
    unix = guest.put("unix_sock", addr=address,
                     sk__common__skc_net__net=guest.variables["init_net"])  # fmt: skip
    buckets = int.from_bytes(guest.read(guest.variables["init_net"] + 8, 8), "little")
    guest.place(buckets, "Q", unix + 40)
    with pytest.raises(CorruptGuestError, match="name of 3998 bytes"):
        SocketTables(guest.kernel).read()


# --- swap, modules, network devices ----------------------------------------------------------


@pytest.mark.parametrize("count", [33, 0xFFFF_FFFF])
def test_absurd_number_of_swap_areas_is_corrupt(count: int) -> None:
    guest = FakeGuest()
    guest.variables["nr_swapfiles"] = guest.place(0x2000, "I", count)
    with pytest.raises(CorruptGuestError, match=f"{count} swap areas"):
        read_swaps(guest.kernel, cast("FileNames", None))


def guest_with_modules() -> FakeGuest:
    guest = FakeGuest()
    guest.struct("list_head", ("next", "p"), ("prev", "p"))
    guest.struct("layout", ("size", "I"))
    guest.struct("atomic", ("counter", "i"))
    guest.struct("module", ("state", "I"), ("list", "list_head"), ("name", 56), ("taints", "Q"),
                 ("refcnt", "atomic"), ("core_layout", "layout"), ("init_layout", "layout"),
                 ("source_list", "list_head"))  # fmt: skip
    guest.struct("module_use", ("source_list", "list_head"), ("source", "p"))
    guest.variables["modules"] = guest.place(0x2000, "2Q", 0x2000, 0x2000)
    return guest


def add_module(guest: FakeGuest, name: bytes) -> int:
    at = guest.put("module", name=name, refcnt__counter=2, core_layout__size=100,
                   init_layout__size=1)  # fmt: skip
    head = guest.read(0x2000, 8)
    guest.set("module", at, list__next=head)
    guest.place(0x2000, "Q", at + 4)
    uses = guest.structs["module"].size or 0
    guest.place(at + uses - 16, "2Q", at + uses - 16, at + uses - 16)
    return at


def test_modules_and_who_uses_them() -> None:
    guest = guest_with_modules()
    used = add_module(guest, b"used")
    user = add_module(guest, b"user")
    use = guest.put("module_use", source=user)
    head = used + (guest.structs["module"].size or 0) - 16
    guest.place(head, "Q", use)
    guest.place(use, "Q", head)
    found = [(m.name, m.size, m.references, m.used_by, m.state) for m in read_modules(guest.kernel)]
    assert found == [("user", 101, 1, (), "live"), ("used", 101, 1, ("user",), "live")]


def test_modules_that_lead_in_circles_are_corrupt() -> None:
    guest = guest_with_modules()
    one = add_module(guest, b"one")
    guest.set("module", one, list__next=one + 4)
    with pytest.raises(CorruptGuestError, match="contains itself"):
        read_modules(guest.kernel)


def guest_with_network() -> FakeGuest:
    guest = FakeGuest()
    guest.struct("list_head", ("next", "p"), ("prev", "p"))
    guest.struct("net", ("dev_base_head", "list_head"))
    guest.struct("net_device", ("name", 16), ("dev_list", "list_head"), ("ifindex", "i"),
                 ("flags", "I"), ("mtu", "I"), ("operstate", "B"), ("addr_len", "B"), ("pad", 2),
                 ("dev_addr", "p"), ("ip_ptr", "p"), ("rtnl_link_ops", "p"),
                 ("perm_addr", 32), ("state", "Q"))  # fmt: skip
    guest.struct("rtnl_link_ops", ("kind", "p"))
    guest.struct("in_device", ("ifa_list", "p"))
    guest.struct("in_ifaddr", ("ifa_next", "p"), ("ifa_local", "I"), ("ifa_prefixlen", "B"))
    net = guest.variables["init_net"] = guest.put("net")
    guest.place(net, "Q", net)
    return guest


def add_device(guest: FakeGuest, **values: object) -> int:
    net = guest.variables["init_net"]
    at = guest.put("net_device", dev_list__next=guest.read(net, 8), **values)
    guest.place(net, "Q", at + 16)
    return at


def test_network_device_with_addresses() -> None:
    guest = guest_with_network()
    second = guest.put("in_ifaddr", ifa_local=0x020200C0, ifa_prefixlen=24)
    first = guest.put("in_ifaddr", ifa_local=0x0100007F, ifa_prefixlen=8, ifa_next=second)
    add_device(guest, name=b"br0", ifindex=3, flags=0x1003, mtu=1500, operstate=6, addr_len=6,
               dev_addr=guest.string(b"\x52\x54\0\1\2\3"),
               rtnl_link_ops=guest.put("rtnl_link_ops", kind=guest.string(b"bridge")),
               ip_ptr=guest.put("in_device", ifa_list=first))  # fmt: skip
    (device,) = NetworkDevices(guest.kernel).read()
    assert (device.name, device.kind, device.operstate) == ("br0", "bridge", "up")
    assert device.hardware_address == "52:54:00:01:02:03"
    assert device.addresses == ("127.0.0.1/8", "192.0.2.2/24")
    assert (device.permanent_address, device.carrier) == ("", True)


def test_network_card_has_its_own_address_and_tells_of_its_link() -> None:
    guest = guest_with_network()
    add_device(
        guest,
        name=b"eth0",
        ifindex=2,
        flags=0x1003,
        addr_len=6,
        state=0b111,
        dev_addr=guest.string(b"\2\2\2\2\2\2"),
        perm_addr=b"\x52\x54\0\x12\x34\x56",
    )
    (device,) = NetworkDevices(guest.kernel).read()
    assert device.hardware_address == "02:02:02:02:02:02"
    assert (device.permanent_address, device.carrier) == ("52:54:00:12:34:56", False)


def test_network_device_with_an_absurd_address_is_corrupt() -> None:
    guest = guest_with_network()
    add_device(guest, addr_len=200, dev_addr=0x1000)
    with pytest.raises(CorruptGuestError, match="200 bytes"):
        NetworkDevices(guest.kernel).read()


def test_addresses_that_lead_in_circles_are_corrupt() -> None:
    guest = guest_with_network()
    address = guest.put("in_ifaddr")
    guest.set("in_ifaddr", address, ifa_next=address)
    add_device(guest, ip_ptr=guest.put("in_device", ifa_list=address))
    with pytest.raises(CorruptGuestError, match="addresses"):
        NetworkDevices(guest.kernel).read()


# --- device-mapper ---------------------------------------------------------------------------


def guest_with_mapper() -> FakeGuest:
    guest = FakeGuest()
    guest.struct("list_head", ("next", "p"), ("prev", "p"))
    guest.struct("gendisk", ("private_data", "p"))
    guest.struct("block_device", ("bd_dev", "I"))
    guest.struct("mapped_device", ("interface_ptr", "p"), ("map", "p"))
    guest.struct("hash_cell", ("name", "p"), ("uuid", "p"))
    guest.struct("dm_table", ("num_targets", "I"), ("pad", 4), ("targets", "p"),
                 ("devices", "list_head"))  # fmt: skip
    guest.struct("dm_target", ("type", "p"), ("begin", "Q"), ("len", "Q"), ("private", "p"))
    guest.struct("target_type", ("name", "p"))
    guest.struct("dm_dev", ("bdev", "p"))
    guest.struct("dm_dev_internal", ("list", "list_head"), ("dm_dev", "p"))
    guest.struct("linear_c", ("dev", "p"), ("start", "Q"))
    guest.struct("stripe", ("dev", "p"), ("physical_start", "Q"))
    guest.struct("stripe_c", ("stripes", "I"), ("pad", 4), ("stripe", ("Q", 0)))
    return guest


def mapper(guest: FakeGuest, table: int) -> DeviceMapper:
    cell = guest.put("hash_cell", name=guest.string(b"vg-root"), uuid=guest.string(b"LVM-1"))
    mapped = guest.put("mapped_device", interface_ptr=cell, map=table)
    devices = SimpleNamespace(
        disks={"dm-0": guest.put("gendisk", private_data=mapped), "vda": 0},
        name=lambda number: f"disk{number}",
    )
    return DeviceMapper(guest.kernel, cast("BlockDevices", devices))


def dm_dev(guest: FakeGuest, number: int) -> int:
    return guest.put("dm_dev", bdev=guest.put("block_device", bd_dev=number))


def test_logical_volume_over_two_disks() -> None:
    guest = guest_with_mapper()
    linear = guest.put("target_type", name=guest.string(b"linear"))
    targets = guest.new(64)
    for index, (dev, start) in enumerate(((1, 8), (2, 0))):
        private = guest.put("linear_c", dev=dm_dev(guest, dev), start=start)
        guest.place(targets + index * 32, "4Q", linear, index * 100, 100, private)
    (found,) = mapper(guest, guest.put("dm_table", num_targets=2, targets=targets)).read()
    assert (found.device, found.name, found.uuid) == ("dm-0", "vg-root", "LVM-1")
    assert [(one.start, one.size, one.target, one.below) for one in found.ranges] == [
        (0, 51200, "linear", (MappedLeg("disk1", 4096),)),
        (51200, 51200, "linear", (MappedLeg("disk2", 0),)),
    ]


def test_target_that_does_not_tell_names_its_disks() -> None:
    guest = guest_with_mapper()
    kind = guest.put("target_type", name=guest.string(b"snapshot"))
    targets = guest.place(guest.new(32), "4Q", kind, 0, 100, 0)
    table = guest.put("dm_table", num_targets=1, targets=targets)
    used = guest.put("dm_dev_internal", dm_dev=dm_dev(guest, 5))
    guest.place(table + 16, "Q", used)
    guest.place(used, "Q", table + 16)
    (found,) = mapper(guest, table).read()
    assert found.ranges[0].below == (MappedLeg("disk5", None),)


def test_absurd_table_of_the_mapper_is_corrupt() -> None:
    guest = guest_with_mapper()
    with pytest.raises(CorruptGuestError, match="targets"):
        mapper(guest, guest.put("dm_table", num_targets=1 << 30)).read()


def test_absurd_number_of_stripes_is_corrupt() -> None:
    guest = guest_with_mapper()
    kind = guest.put("target_type", name=guest.string(b"striped"))
    private = guest.put("stripe_c", stripes=1 << 20)
    targets = guest.place(guest.new(32), "4Q", kind, 0, 100, private)
    with pytest.raises(CorruptGuestError, match="stripes"):
        mapper(guest, guest.put("dm_table", num_targets=1, targets=targets)).read()


def test_kernel_without_types_of_modules_is_unsupported() -> None:
    guest = FakeGuest()
    guest.struct("list_head", ("next", "p"), ("prev", "p"))
    devices = cast("BlockDevices", SimpleNamespace(disks={}))
    with pytest.raises(UnsupportedGuestError, match="dm_mod"):
        DeviceMapper(guest.kernel, devices)


def test_tables_that_name_more_disks_than_there_may_be_are_corrupt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ouassister.kernel.devicemapper._MAX_LEGS", 2)
    guest = guest_with_mapper()
    linear = guest.put("target_type", name=guest.string(b"linear"))
    private = guest.put("linear_c", dev=dm_dev(guest, 1))
    targets = guest.new(96)
    for index in range(3):
        guest.place(targets + index * 32, "4Q", linear, index, 1, private)
    with pytest.raises(CorruptGuestError, match="more than 2 disks"):
        mapper(guest, guest.put("dm_table", num_targets=3, targets=targets)).read()


def test_modules_that_use_more_than_there_may_be_are_corrupt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ouassister.kernel.loaded_modules._MAX_USES", 1)
    guest = guest_with_modules()
    used = add_module(guest, b"used")
    uses = [guest.put("module_use", source=used) for _ in range(3)]
    head = used + (guest.structs["module"].size or 0) - 16
    for here, after in zip([head, *uses], [*uses, head], strict=True):
        guest.place(here, "Q", after)
    with pytest.raises(CorruptGuestError, match="more than 1 nodes"):
        read_modules(guest.kernel)
