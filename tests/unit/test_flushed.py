"""What of XFS, btrfs and FAT is in memory alone: every reason has a guest that shows it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.fake_guest import FakeGuest

from ouassister.errors import CorruptGuestError, UnsupportedGuestError
from ouassister.kernel import btrfs, flushed, superblocks, unflushed, xfs
from ouassister.kernel.cached_inodes import CachedFileSystem, CachedInode

if TYPE_CHECKING:
    from ouassister.kernel.btf_types import BtfTypes

EMPTY, PCP_SPACE = 1 << 1, 1 << 2


def types_of(guest: FakeGuest) -> BtfTypes:
    return guest.kernel.types


# --- XFS ---


def xfs_guest(*, flags: bool = True, **mount: int) -> tuple[FakeGuest, int, int, int]:
    """A guest, and the addresses of xfs_mount, CIL and its context."""
    guest = FakeGuest()
    guest.struct("list_head", ("next", "Q"), ("prev", "Q"))
    guest.struct(
        "xfs_mount", ("m_log", "p"), ("m_opstate", "Q"), ("m_features", "Q"),
        ("m_ddev_targp", "p"), ("m_logdev_targp", "p"), ("m_rtdev_targp", "p"),
    )  # fmt: skip
    guest.struct("xlog", ("l_cilp", "p"), ("l_opstate", "Q"))
    guest.struct("xfs_cil_ctx", ("space_used", "I"))
    items = ("xc_flags", "Q") if flags else ("xc_cil", "list_head")
    guest.struct("xfs_cil", items, ("xc_ctx", "p"), ("xc_committing", "list_head"))
    context = guest.put("xfs_cil_ctx")
    cil = guest.put("xfs_cil", xc_ctx=context)
    committing = cil + (16 if flags else 24)
    guest.set("xfs_cil", cil, xc_committing__next=committing)
    if flags:
        guest.set("xfs_cil", cil, xc_flags=EMPTY | PCP_SPACE)
    else:
        guest.set("xfs_cil", cil, xc_cil__next=cil)
    log = guest.put("xlog", l_cilp=cil, l_opstate=mount.pop("l_opstate", 0))
    values = {"m_opstate": 0x62, "m_features": 0x19BF6AA, "m_ddev_targp": 8, "m_logdev_targp": 8}
    return guest, guest.put("xfs_mount", m_log=log, **(values | mount)), cil, context


@pytest.mark.parametrize("flags", [True, False])
def test_xfs_with_everything_in_its_log(flags: bool) -> None:
    guest, mount, _, _ = xfs_guest(flags=flags)
    assert xfs.unlogged(guest.kernel, types_of(guest), mount) == ""


def test_xfs_with_transactions_in_its_cil() -> None:
    guest, mount, cil, _ = xfs_guest()
    guest.set("xfs_cil", cil, xc_flags=PCP_SPACE)
    assert "CIL is not empty" in xfs.unlogged(guest.kernel, types_of(guest), mount)


@pytest.mark.parametrize("what", ["list", "space"])
def test_xfs_before_the_flag(what: str) -> None:
    guest, mount, cil, context = xfs_guest(flags=False)
    if what == "list":
        guest.set("xfs_cil", cil, xc_cil__next=0x5000)
    else:  # a push has emptied the list already
        guest.set("xfs_cil_ctx", context, space_used=100)
    assert "CIL is not empty" in xfs.unlogged(guest.kernel, types_of(guest), mount)


@pytest.mark.parametrize("flags", [True, False])
def test_xfs_with_a_checkpoint_on_its_way(flags: bool) -> None:
    guest, mount, cil, _ = xfs_guest(flags=flags)
    guest.set("xfs_cil", cil, xc_committing__next=0x5000)
    assert "on their way" in xfs.unlogged(guest.kernel, types_of(guest), mount)


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ({"m_opstate": 0x66}, "has shut itself down"),
        ({"l_opstate": 4}, "has shut itself down"),
        ({"m_features": 1 << 62}, "norecovery"),
        ({"m_logdev_targp": 16}, "log on another device"),
        ({"m_rtdev_targp": 16}, "realtime device"),
    ],
)
def test_xfs_that_another_host_would_not_show_so(members: dict[str, int], what: str) -> None:
    guest, mount, _, _ = xfs_guest(**members)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedGuestError, match=what):
        xfs.unlogged(guest.kernel, types_of(guest), mount)


def test_xfs_whose_mount_leads_nowhere() -> None:
    guest, mount, _, _ = xfs_guest()
    guest.set("xfs_mount", mount, m_log=0xFFFF_8000)
    with pytest.raises(CorruptGuestError, match="leads nowhere"):
        xfs.unlogged(guest.kernel, types_of(guest), mount)


# --- btrfs ---


def btrfs_guest(*, pointer: bool = True, devices: int = 1) -> tuple[FakeGuest, dict[str, int]]:
    """A guest, and the addresses of its structures."""
    guest = FakeGuest()
    guest.struct("list_head", ("next", "Q"), ("prev", "Q"))
    guest.struct("atomic", ("counter", "I"))
    guest.struct("btrfs_delayed_root", ("nodes", "I"), ("items", "atomic"))
    guest.struct("btrfs_super_block", ("log_root", "Q"))
    guest.struct("btrfs_device", ("dev_list", "list_head"), ("bdev", "p"))
    guest.struct(
        "btrfs_fs_devices", ("num_devices", "Q"), ("devices", "list_head"),
        ("seed_list", "list_head"),
    )  # fmt: skip
    error = () if pointer else (("fs_error", "i"),)
    root = "btrfs_delayed_root *" if pointer else "btrfs_delayed_root"
    guest.struct(
        "btrfs_fs_info", ("running_transaction", "p"), ("trans_list", "list_head"),
        ("ordered_roots", "list_head"), ("super_copy", "p"), ("fs_state", "Q"),
        ("fs_devices", "p"), ("delayed_root", root), *error,
    )  # fmt: skip
    at = {"super": guest.put("btrfs_super_block"), "info": guest.put("btrfs_fs_info")}
    info = at["info"]
    at["devices"] = guest.put("btrfs_fs_devices", num_devices=devices)
    head = at["devices"] + 8
    at["device"] = guest.put("btrfs_device", bdev=0x7000, dev_list__next=head)
    guest.set("btrfs_fs_devices", at["devices"], devices__next=at["device"],
              seed_list__next=head + 16)  # fmt: skip
    guest.set("btrfs_fs_info", info, super_copy=at["super"], trans_list__next=info + 8,
              ordered_roots__next=info + 24, fs_devices=at["devices"])  # fmt: skip
    at["delayed"] = info + 64
    if pointer:
        at["delayed"] = guest.put("btrfs_delayed_root")
        guest.set("btrfs_fs_info", info, delayed_root=at["delayed"])
    return guest, at


@pytest.mark.parametrize("pointer", [True, False])
def test_btrfs_with_everything_committed(pointer: bool) -> None:
    guest, at = btrfs_guest(pointer=pointer)
    assert btrfs.uncommitted(guest.kernel, at["info"]) == ""
    guest.set("btrfs_delayed_root", at["delayed"], items__counter=3)
    assert btrfs.uncommitted(guest.kernel, at["info"]) == "3 delayed items"


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ({"running_transaction": 0x5000}, "a transaction that is not committed"),
        ({"trans_list__next": 0x5000}, "a transaction that is not committed"),
        ({"ordered_roots__next": 0x5000}, "ordered extents"),
    ],
)
def test_btrfs_with_something_in_memory_alone(members: dict[str, int], what: str) -> None:
    guest, at = btrfs_guest()
    guest.set("btrfs_fs_info", at["info"], **members)
    assert what in btrfs.uncommitted(guest.kernel, at["info"])


def test_btrfs_that_another_host_would_not_show_so() -> None:
    guest, at = btrfs_guest()
    guest.set("btrfs_super_block", at["super"], log_root=0x1000)
    with pytest.raises(UnsupportedGuestError, match="log of the guest's btrfs was not replayed"):
        btrfs.uncommitted(guest.kernel, at["info"])
    guest.set("btrfs_fs_info", at["info"], fs_state=1)
    with pytest.raises(UnsupportedGuestError, match="found errors"):
        btrfs.uncommitted(guest.kernel, at["info"])
    newer, at = btrfs_guest(pointer=False)
    newer.set("btrfs_fs_info", at["info"], fs_error=-5)
    with pytest.raises(UnsupportedGuestError, match="found errors"):
        btrfs.uncommitted(newer.kernel, at["info"])


def test_btrfs_has_one_device() -> None:
    guest, at = btrfs_guest()
    assert btrfs.device(guest.kernel, at["info"]) == 0x7000
    guest.set("btrfs_device", at["device"], bdev=0)
    with pytest.raises(UnsupportedGuestError, match="is missing"):
        btrfs.device(guest.kernel, at["info"])
    guest.set("btrfs_fs_devices", at["devices"], seed_list__next=0x5000)
    with pytest.raises(UnsupportedGuestError, match="seed device"):
        btrfs.device(guest.kernel, at["info"])
    guest.set("btrfs_fs_devices", at["devices"], devices__next=at["devices"] + 8)
    with pytest.raises(UnsupportedGuestError, match="lies on 1 devices"):
        btrfs.device(guest.kernel, at["info"])
    several, at = btrfs_guest(devices=2)
    with pytest.raises(UnsupportedGuestError, match="lies on 2 devices"):
        btrfs.device(several.kernel, at["info"])


# --- all of them ---


def super_block(guest: FakeGuest, fstype: bytes, *, frozen: int = 0, owner: int = 0) -> int:
    guest.struct("list_head", ("next", "Q"), ("prev", "Q"))
    guest.struct("writers", ("frozen", "I"))
    guest.struct("inode", ("i_state", "Q"))
    guest.struct("module", ("name", 56))
    guest.struct("file_system_type", ("name", "p"), ("owner", "module *"))
    guest.struct(
        "super_block", ("s_list", "list_head"), ("s_dev", "I"), ("s_blocksize", "Q"),
        ("s_type", "p"), ("s_bdev", "p"), ("s_root", "p"), ("s_id", 32), ("s_uuid", 16),
        ("s_fs_info", "p"), ("s_writers", "writers"),
    )  # fmt: skip
    kind = guest.put("file_system_type", name=guest.string(fstype), owner=owner)
    head = guest.variables["super_blocks"] = guest.new(16)
    address = guest.put("super_block", s_dev=254 << 20 | 3, s_type=kind, s_id=b"vda3", s_root=8,
                        s_list__next=head, s_fs_info=0x6000, s_writers__frozen=frozen)  # fmt: skip
    guest.place(head, "Q", address)
    return address


def inode(**what: Any) -> CachedInode:  # noqa: ANN401
    values = {name: 0 for name in CachedInode._fields} | {"number": 12, "links": 1}
    return CachedInode(**(values | what))


def ask(
    monkeypatch: pytest.MonkeyPatch, guest: FakeGuest, *inodes: CachedInode, pages: int = 0
) -> str:
    page = SimpleNamespace(position=0x3000)
    cache = SimpleNamespace(pages=lambda _head, **_how: [page] * pages)
    monkeypatch.setattr(flushed, "PageCache", lambda _kernel: cache)
    found = SimpleNamespace(inodes=lambda _one: inodes)
    monkeypatch.setattr(flushed, "InodeCache", lambda _kernel: found)
    return flushed.unflushed_part(guest.kernel, 254, 3)


@pytest.mark.parametrize(
    ("fstype", "what", "told"),
    [
        (b"vfat", inode(marks=1), "pages of inode 12"),
        (b"vfat", inode(marks=1, links=0), "pages of inode 12"),
        (b"xfs", inode(marks=1), "pages of inode 12"),
        (b"xfs", inode(lazy=True), "times of inode 12"),
        (b"btrfs", inode(number=1, marks=1), "blocks of its trees"),
    ],
)
def test_inode_that_is_not_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, fstype: bytes, what: CachedInode, told: str
) -> None:
    guest = FakeGuest()
    super_block(guest, fstype)
    assert ask(monkeypatch, guest, what) == told


def test_block_that_is_not_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = FakeGuest()
    super_block(guest, b"vfat")
    assert ask(monkeypatch, guest, pages=1) == "block at 0x3000"


def test_inode_of_fat_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = FakeGuest()
    super_block(guest, b"vfat")
    assert ask(monkeypatch, guest, inode(address=guest.put("inode"))) == ""
    dirty = guest.put("inode", i_state=2)
    assert ask(monkeypatch, guest, inode(address=dirty)) == "inode 12"


def test_file_without_a_name_is_nobodys_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    guest, mount, _, _ = xfs_guest()
    address = super_block(guest, b"xfs")
    guest.set("super_block", address, s_fs_info=mount)
    assert ask(monkeypatch, guest, inode(links=0, marks=1, lazy=True)) == ""


@pytest.mark.parametrize("frozen", [0, 1, 4])
def test_frozen_is_told(frozen: int) -> None:
    guest = FakeGuest()
    super_block(guest, b"vfat", frozen=frozen)
    one = flushed.find(guest.kernel, 254, 3)
    assert one is not None
    assert (one.label, one.fstype) == ("vda3", "vfat")
    assert flushed.is_frozen(guest.kernel, one) == bool(frozen)


def test_what_is_not_mounted() -> None:
    guest = FakeGuest()
    super_block(guest, b"vfat")
    assert flushed.unflushed_part(guest.kernel, 254, 4) == "it is not mounted any more"


@pytest.mark.parametrize(("frozen", "clean"), [(0, False), (3, False), (4, True)])
def test_xfs_without_types_has_to_be_frozen(
    monkeypatch: pytest.MonkeyPatch, frozen: int, clean: bool
) -> None:
    guest = FakeGuest()
    super_block(guest, b"xfs", frozen=frozen)
    told = ask(monkeypatch, guest)
    assert (told == "") == clean
    assert clean or "keeps no types of modules, and xfs is one), and it is not frozen" in told
    assert ask(monkeypatch, guest, inode(marks=1)) == "pages of inode 12"


@pytest.mark.parametrize(
    ("fstype", "owner", "own", "served"),
    [
        ("ext4", b"", False, True),
        ("ext3", b"", False, True),
        ("ext2", b"ext4", False, True),
        ("ext2", b"", False, True),
        ("ext2", b"ext2", False, False),
        ("ext2", b"", True, False),
    ],
)
def test_who_serves_ext2(fstype: str, owner: bytes, own: bool, served: bool) -> None:
    guest = FakeGuest()
    address = super_block(guest, fstype.encode())
    if owner:
        (kind,) = (int.from_bytes(guest.read(address + 28, 8), "little"),)
        guest.set("file_system_type", kind, owner=guest.put("module", name=owner))
    if own:
        guest.struct("ext2_inode_info", ("i_flags", "I"))
    one = CachedFileSystem(address, fstype, 254, 3, bytes(16), 4096, 0, "vda3")
    assert unflushed._by_ext4(guest.kernel, one) == served
    assert superblocks.module_of(guest.kernel, address) == owner.decode()
