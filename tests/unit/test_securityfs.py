"""What security modules show, from dentries and tables; what contradicts itself is refused."""

from __future__ import annotations

import stat

import pytest
from drgn import Object
from tests.unit.fake_guest import FakeGuest

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel import securityfs
from ouassister.kernel.securityfs import Security, SecurityFile

TABLE, PROFILES, MODULES, STACKED = 0x10, 0x20, 0x30, 0x40
FILE, FOLDER = stat.S_IFREG | 0o444, stat.S_IFDIR | 0o755


class Tree(FakeGuest):
    """A securityfs that is made by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.struct("hlist_node", ("next", "p"), ("pprev", "p"))
        self.struct("hlist_head", ("first", "p"))
        self.struct("qstr", ("hash", "I"), ("len", "I"), ("name", "p"))
        self.struct("kuid_t", ("val", "I"))
        self.struct("inode", ("i_mode", "H"), ("i_uid", "kuid_t"), ("i_gid", "kuid_t"),
                    ("i_ino", "Q"), ("i_nlink", "I"), ("i_rdev", "I"), ("i_fop", "p"),
                    ("i_private", "p"), ("i_link", "p"))  # fmt: skip
        self.struct("dentry", ("d_hash", "hlist_node"), ("d_name", "qstr"), ("d_inode", "inode *"),
                    ("d_sib", "hlist_node"), ("d_children", "hlist_head"))  # fmt: skip
        self.struct("values", ("boolean", "B"))
        self.struct("aa_sfs_entry", ("v_type", "I"), ("v", "values"))
        self.variables |= {
            "aa_sfs_seq_file_ops": TABLE, "aa_sfs_profiles_fops": PROFILES, "lsm_ops": MODULES,
            "seq_ns_stacked_fops": STACKED,
        }  # fmt: skip
        self.root = self.put("dentry")

    def node(self, name: bytes, mode: int = FILE, **inode: int) -> int:
        at = self.put("inode", i_mode=mode, i_nlink=1, **inode)
        return self.put("dentry", d_hash__pprev=1, d_name__len=len(name), d_inode=at,
                        d_name__name=self.string(name))  # fmt: skip

    def fill(self, folder: int, *children: int) -> None:
        """Hang children into a folder, in the order in which they are told."""
        first = 0
        for child in reversed(children):
            self.set("dentry", child, d_sib__next=first)
            first = self.container("struct dentry", "d_hash", child).d_sib.address_of_().value_()
        self.set("dentry", folder, d_children__first=first)

    def told(self) -> list[SecurityFile]:
        root = Object(self.prog, self.type("struct dentry *"), self.root)
        return list(Security(self.kernel).read(root, 7, 100))


def test_tree_is_told_in_the_kernels_order_with_parents_before_children() -> None:
    guest = Tree()
    one, other = guest.node(b"apparmor", FOLDER, i_ino=5), guest.node(b"tomoyo", FOLDER)
    query, stacked = guest.node(b"query", 0o100600), guest.node(b".stacked", i_fop=STACKED)
    null = guest.node(b".null", stat.S_IFCHR | 0o666, i_rdev=1 << 20 | 3)
    gone = guest.node(b"gone")
    guest.set("dentry", gone, d_hash__pprev=0)
    link = guest.node(b"ima", stat.S_IFLNK | 0o444, i_link=guest.string(b"integrity/ima"))
    guest.fill(guest.root, one, link, other)
    guest.fill(one, null, stacked, gone)
    guest.fill(other, query)
    found = guest.told()
    assert [(file.parent, file.name, file.content) for file in found] == [
        (7, b"apparmor", None), (7, b"ima", b"integrity/ima"), (7, b"tomoyo", None),
        (100, b".null", None), (100, b".stacked", b"no\n"), (102, b"query", None),
    ]  # fmt: skip
    assert (found[0].mode, found[0].number, found[0].links) == (FOLDER, 5, 1)
    assert found[3].device == 0x103


def test_values_of_the_table_are_told_as_the_kernel_prints_them() -> None:
    guest = Tree()
    guest.enum("aa_sfs_type", AA_SFS_TYPE_BOOLEAN=0, AA_SFS_TYPE_STRING=1, AA_SFS_TYPE_U64=2,
               AA_SFS_TYPE_FOPS=3)  # fmt: skip
    for kind, letter in (("boolean", "B"), ("u64", "Q"), ("string", "p")):
        guest.struct(f"values_{kind}", (kind, letter))
    union = [one.members[0] for one in (guest.type(f"values_{x}") for x in
                                        ("boolean", "u64", "string"))]  # fmt: skip
    guest.structs["values"] = guest.prog.union_type("values", 8, union)
    guest.struct("aa_sfs_entry", ("v_type", "I"), ("v", "values"))
    for number, value, text in (
        (0, 1, b"yes\n"), (0, 0, b"no\n"), (2, 0xFFFFFF, b"0xffffff\n"), (2, 1, b"0x000001\n"),
        (2, 0, b"00000000\n"), (1, guest.string(b"read trace"), b"read trace\n"),
    ):  # fmt: skip
        entry = guest.new(16)
        guest.place(entry, "IQ", number, value)
        guest.fill(guest.root, guest.node(b"mask", i_fop=TABLE, i_private=entry))
        assert [file.content for file in guest.told()] == [text]
    guest.place(entry, "IQ", 3, 0)
    with pytest.raises(UnsupportedGuestError, match="of kind 3"):
        guest.told()


def policies(guest: Tree) -> tuple[int, int]:
    """Layouts, an empty name space, and a file that lists its profiles; the head of the list."""
    guest.struct("list_head", ("next", "p"), ("prev", "p"))
    guest.struct("aa_policy", ("hname", "p"), ("list", "list_head"), ("profiles", "list_head"))
    guest.struct("aa_ns", ("base", "aa_policy"))
    guest.struct("aa_profile", ("base", "aa_policy"), ("mode", "Q"))
    guest.enum("profile_mode", APPARMOR_ENFORCE=0, APPARMOR_COMPLAIN=1)
    space = guest.put("aa_ns")
    guest.variables["root_ns"] = guest.place(guest.new(8), "Q", space)
    head = space + 24
    guest.place(head, "QQ", head, head)
    guest.fill(guest.root, guest.node(b"profiles", i_fop=PROFILES))
    return space, head


def profile(guest: Tree, name: bytes, mode: int, head: int) -> int:
    """Put a profile at the head of a list; returns the head of those in it."""
    at = guest.put("aa_profile", base__hname=guest.string(name), mode=mode)
    (first,) = (int.from_bytes(guest.read(head, 8), "little"),)
    guest.place(at + 8, "QQ", first, head)
    guest.place(head, "Q", at + 8)
    guest.place(at + 24, "QQ", at + 24, at + 24)
    return at + 24


def test_profiles_are_told_each_before_those_in_it() -> None:
    guest = Tree()
    _, head = policies(guest)
    assert [file.content for file in guest.told()] == [b""]
    profile(guest, b"last", 1, head)
    inner = profile(guest, b"first", 0, head)
    profile(guest, b"first//hat", 0, inner)
    text = b"first (enforce)\nfirst//hat (enforce)\nlast (complain)\n"
    assert [file.content for file in guest.told()] == [text]


def test_profiles_that_contain_themselves_are_corrupt() -> None:
    guest = Tree()
    _, head = policies(guest)
    inner = profile(guest, b"first", 0, head)
    guest.place(inner, "Q", inner - 16)  # its first child is itself
    guest.place(inner - 16, "Q", inner)
    with pytest.raises(CorruptGuestError, match="too many profiles, or too deep"):
        guest.told()


def test_tree_that_contains_itself_or_is_too_deep_is_corrupt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = Tree()
    folder = guest.node(b"a", FOLDER)
    guest.fill(guest.root, folder)
    guest.fill(folder, folder)
    with pytest.raises(CorruptGuestError, match="cyclic"):
        guest.told()
    guest = Tree()
    above = guest.root
    for _ in range(20):
        folder = guest.node(b"a", FOLDER)
        guest.fill(above, folder)
        above = folder
    with pytest.raises(CorruptGuestError, match="too deep"):
        guest.told()
    guest = Tree()
    guest.fill(guest.root, *(guest.node(b"%d" % number) for number in range(9)))
    monkeypatch.setattr(securityfs, "_MAX_NODES", 7)
    with pytest.raises(CorruptGuestError, match="too large"):
        guest.told()
