"""The tree of sysfs in a made-up kernel, right and made by a hostile guest."""

from __future__ import annotations

import stat

import pytest
from drgn import TypeMember
from tests.unit.fake_guest import FakeGuest

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel import kernfs
from ouassister.kernel.kernfs import Kernfs, link_text, path_of

DIR, FILE, LINK = 1, 2, 4
NETWORK, OTHER = 0x700, 0x800


class Sysfs(FakeGuest):
    """A guest with a sysfs."""

    def __init__(self, parent: str = "parent") -> None:
        super().__init__()
        self.struct("net", ("ns", "Q"))
        self.struct("atomic", ("counter", "i"))
        self.struct("kuid", ("val", "I"))
        self.struct("kernfs_iattrs", ("ia_uid", "kuid"), ("ia_gid", "kuid"))
        self.struct("rb_root", ("rb_node", "p"))
        self.struct("rb_node", ("color", "Q"), ("rb_right", "p"), ("rb_left", "p"))
        self.struct("dir", ("subdirs", "Q"), ("children", "rb_root"), ("root", "p"))
        self.struct("symlink", ("target_kn", "p"))
        self.struct("attr", ("ops", "p"), ("open", "p"), ("size", "q"))
        union = self.prog.union_type(
            None, 24,
            [TypeMember(self.structs[name], name, 0) for name in ("dir", "symlink", "attr")],
        )  # fmt: skip
        layout = [("active", "atomic"), ("hash", "I"), (parent, "p"), ("name", "p"),
                  ("rb", "rb_node"), ("ns", "p")]  # fmt: skip
        rest = [("priv", "p"), ("id", "Q"), ("flags", "H"), ("mode", "H"), ("pad", "I"),
                ("iattr", "p")]  # fmt: skip
        fields, at = [], 0
        for name, kind in layout:
            of, size = self._kind(kind)
            fields.append(TypeMember(of, name, at * 8))
            at += size
        fields.append(TypeMember(union, None, at * 8))
        at += 24
        for name, kind in rest:
            of, size = self._kind(kind)
            fields.append(TypeMember(of, name, at * 8))
            at += size
        self.structs["kernfs_node"] = self.prog.struct_type("kernfs_node", at, fields)
        self.root = self.node(b"", DIR, 0o755)
        self.variables = {"init_net": NETWORK,
                          "sysfs_root_kn": self.place(self.new(8), "Q", self.root)}  # fmt: skip

    def node(self, name: bytes, kind: int, mode: int = 0o444, **more: int) -> int:
        return self.put("kernfs_node", name=self.string(name) if name else 0, flags=kind,
                        mode=mode, **more)  # fmt: skip

    def fill(self, folder: int, *children: int) -> None:
        """Hang children into a folder, as a tree that leans to the right."""
        rb = 24
        head = folder + 24 + 24 + 8 + 8
        for child in children:
            self.place(head, "Q", child + rb)
            head = child + rb + 8


def paths(nodes: list[kernfs.KernfsNode]) -> dict[bytes, kernfs.KernfsNode]:
    return {path_of(nodes, index): node for index, node in enumerate(nodes)}


@pytest.mark.parametrize("parent", ["parent", "__parent"])
def test_tree_of_folders_files_and_links(parent: str) -> None:
    guest = Sysfs(parent)
    devices, disk = guest.node(b"devices", DIR, 0o755), guest.node(b"vda", DIR, 0o755, id=77)
    owner = guest.put("kernfs_iattrs", ia_uid__val=5, ia_gid__val=6)
    size = guest.node(b"size", FILE, 0o644, iattr=owner, priv=0x123)
    guest.set("kernfs_node", size, attr__size=4096)
    block = guest.node(b"block", DIR, 0o755)
    link = guest.node(b"vda", LINK, 0o777, symlink__target_kn=disk)
    up = guest.node(b"device", LINK, 0o777, symlink__target_kn=devices)
    guest.set("kernfs_node", devices, dir__subdirs=1)
    guest.fill(guest.root, devices, block)
    guest.fill(devices, disk)
    guest.fill(disk, size, up)
    guest.fill(block, link)
    nodes = Kernfs(guest.kernel).read()
    found = paths(nodes)
    assert list(found) == [b"", b"/devices", b"/devices/vda", b"/devices/vda/size",
                           b"/devices/vda/device", b"/block", b"/block/vda"]  # fmt: skip
    one = found[b"/devices/vda/size"]
    assert (one.mode, one.uid, one.gid, one.size) == (stat.S_IFREG | 0o644, 5, 6, 4096)
    assert (one.links, one.private) == (1, 0x123)
    assert found[b"/devices"].links == 3
    assert found[b"/devices/vda"].number == 77
    texts = {path: link_text(nodes, index) for index, path in enumerate(found)
             if stat.S_ISLNK(found[path].mode)}  # fmt: skip
    # The second leads two levels up and down again, though its target is just above it.
    assert texts == {b"/block/vda": b"../devices/vda", b"/devices/vda/device": b"../../devices"}


def test_what_others_see_and_what_is_being_removed_is_left_out() -> None:
    guest = Sysfs()
    mine, others = guest.node(b"eth0", DIR, ns=NETWORK), guest.node(b"eth1", DIR, ns=OTHER)
    gone = guest.node(b"gone", DIR, active__counter=-(1 << 31) + 1)
    guest.fill(guest.root, mine, others, gone)
    assert list(paths(Kernfs(guest.kernel).read())) == [b"", b"/eth0"]


def test_folder_that_nobody_needs_is_empty() -> None:
    guest = Sysfs()
    slab, inside = guest.node(b"slab", DIR), guest.node(b"x", FILE)
    link = guest.node(b"link", LINK, symlink__target_kn=inside)
    guest.fill(guest.root, slab, link)
    guest.fill(slab, inside)
    nodes = Kernfs(guest.kernel).read(lambda path: path == b"/slab")
    assert list(paths(nodes)) == [b"", b"/slab", b"/link"]
    assert link_text(nodes, 2) is None


@pytest.mark.parametrize("name", [b"a/b", b".", b".."])
def test_name_that_is_none_is_corrupt(name: bytes) -> None:
    guest = Sysfs()
    guest.fill(guest.root, guest.node(name, FILE))
    with pytest.raises(CorruptGuestError, match="is named"):
        Kernfs(guest.kernel).read()


def test_two_of_a_name_are_corrupt() -> None:
    guest = Sysfs()
    guest.fill(guest.root, guest.node(b"a", FILE), guest.node(b"a", DIR))
    with pytest.raises(CorruptGuestError, match="twice"):
        Kernfs(guest.kernel).read()


def test_node_of_no_kind_is_corrupt() -> None:
    guest = Sysfs()
    guest.fill(guest.root, guest.node(b"a", 8))
    with pytest.raises(CorruptGuestError, match="of kind 8"):
        Kernfs(guest.kernel).read()


def test_folder_within_itself_is_corrupt() -> None:
    guest = Sysfs()
    folder = guest.node(b"a", DIR)
    guest.fill(guest.root, folder)
    guest.fill(folder, folder)
    with pytest.raises(CorruptGuestError, match="cyclic"):
        Kernfs(guest.kernel).read()


def test_children_that_lead_in_circles_are_corrupt() -> None:
    guest = Sysfs()
    one, two = guest.node(b"a", FILE), guest.node(b"b", FILE)
    guest.fill(guest.root, one, two, one)
    with pytest.raises(CorruptGuestError, match="contains itself"):
        Kernfs(guest.kernel).read()


def test_wild_pointer_is_corrupt() -> None:
    guest = Sysfs()
    guest.fill(guest.root, 0xDEAD_BEEF_0000)
    with pytest.raises(CorruptGuestError, match="leads nowhere"):
        Kernfs(guest.kernel).read()


def test_depth_has_a_bound() -> None:
    guest = Sysfs()
    above = guest.root
    for _ in range(70):
        folder = guest.node(b"a", DIR)
        guest.fill(above, folder)
        above = folder
    with pytest.raises(CorruptGuestError, match="too deep"):
        Kernfs(guest.kernel).read()


def test_number_and_paths_have_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Sysfs()
    guest.fill(guest.root, *(guest.node(b"%d" % number, FILE) for number in range(20)))
    with monkeypatch.context() as patch:
        patch.setattr(kernfs, "MAX_NODES", 10)
        with pytest.raises(CorruptGuestError):
            Kernfs(guest.kernel).read()
    with monkeypatch.context() as patch:
        patch.setattr(kernfs, "_MAX_PATHS", 10)
        with pytest.raises(CorruptGuestError, match="too much"):
            Kernfs(guest.kernel).read()
    assert len(Kernfs(guest.kernel).read()) == 21


def test_kernel_with_another_layout_is_unsupported() -> None:
    guest = Sysfs()
    guest.structs["kernfs_node"] = guest.struct("kernfs_node", ("name", "p"))
    with pytest.raises(UnsupportedGuestError):
        Kernfs(guest.kernel)
