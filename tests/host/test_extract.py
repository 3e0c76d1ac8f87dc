"""Extraction against the kernel: lower tree + change set == what the union showed.

The oracle is overlayfs itself: the merged tree is described path by path before it is unmounted;
then entries, and the layer read by the standard library's tarfile, are each applied to the
description of the lower tree. For ext4-view the oracle is the host kernel's own ext4.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import pytest
from tests.host.extract_inside import ACL
from tests.host.extract_rig import (
    Rig,
    apply_entries,
    apply_layer,
    assert_same,
    by_path,
    check_layer,
    lines,
    mend_links,
    opened,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.host


@pytest.fixture
def rig() -> Iterator[Rig]:
    with opened() as found:
        yield found


@pytest.mark.parametrize("seed", range(8))
def test_extract_random_operations_equals_merged_view(rig: Rig, seed: int) -> None:
    rig.build(seed)
    result = rig.update(seed=seed, operations=60)
    before, after = rig.seen("before"), rig.seen("after")
    mend_links(after, before)
    wanted = lines(after, before)
    assert_same(lines(apply_entries(before, result.entries), before), wanted)
    by_tar = apply_layer(before, rig.work / "layer.tar", result.entries)
    assert_same(lines(by_tar, before), wanted)
    check_layer(result, rig.work / "layer.tar")
    for entry in result.entries:
        for path, expected in [(entry.path, entry.expected), *entry.below]:
            if expected is not None:
                item = before[path.hex()]
                assert expected.inode == item["ino"]
                assert (expected.mtime_ns, expected.ctime_ns) == (
                    item["mtime_ns"],
                    item["ctime_ns"],
                )


@pytest.mark.parametrize("seed", range(4))
def test_extract_over_ext4_view_is_merged_view_and_kernels_own_stat(rig: Rig, seed: int) -> None:
    rig.build_image(seed)
    result = rig.update(seed=seed, operations=60)
    truth, after = rig.seen("built"), rig.seen("after")
    mend_links(after, rig.seen("before"))
    check_layer(result, rig.work / "layer.tar")
    wanted = lines(after, truth)
    found = apply_entries(truth, result.entries)
    assert_same(lines(found, truth), wanted)
    for entry in result.entries:
        for path, expected in [(entry.path, entry.expected), *entry.below]:
            if expected is not None:
                item = truth[path.hex()]
                fields = ("ino", "mode", "size", "mtime_ns", "ctime_ns")
                assert dataclasses.astuple(expected) == tuple(item[f] for f in fields)


HIDDEN = (
    "open('kernel/guarded', 'w').write('x')",
    "os.setxattr('kernel/guarded', 'system.posix_acl_access', ACL)",
    "os.setxattr('kernel/guarded', 'user.long', bytes(200))",  # moves all to a block of their own
    "os.mkdir('kernel/inherit')",
    "os.setxattr('kernel/inherit', 'system.posix_acl_default', ACL)",
)


TWICE: Final = ("one", "two")
RENAMED: Final = (
    "os.utime('kernel/guarded', ns=(5, 1_600_000_000_123_456_789))",
    *(f"open('kernel/{name}', 'w').write('same')" for name in TWICE),
    *(f"os.utime('kernel/{name}', ns=(5, 1_600_000_001_{nines}))"
      for name, nines in zip(TWICE, ("111_111_111", "222_222_222"), strict=True)),
)  # fmt: skip


def test_extract_file_that_was_only_renamed_keeps_its_time_and_acl(rig: Rig) -> None:
    rig.build_image(0, (*HIDDEN, *RENAMED))
    result = rig.update(
        (
            "os.rename('merged/guarded', 'merged/guarded.old')",
            "open('merged/guarded', 'w').write('new')",
            "os.rename('merged/one', 'merged/three')",
        )
    )
    entries = by_path(result)
    assert entries[b"/guarded.old"].mtime_ns == 1_600_000_000_123_456_789
    assert "system.posix_acl_access" in dict(entries[b"/guarded.old"].xattrs)
    assert "system.posix_acl_access" not in dict(entries[b"/guarded"].xattrs)
    assert entries[b"/three"].mtime_ns == 1_600_000_001_111_111_111


def test_extract_acls_survive_a_copy_up_and_are_inherited(rig: Rig) -> None:
    rig.build_image(0, HIDDEN)
    result = rig.update(
        (
            "os.chmod('merged/guarded', 0o660)",
            "os.chmod('merged/inherit', 0o700)",
            "open('merged/inherit/new', 'w').close()",
        )
    )
    entries = by_path(result)
    # chmod(2) on a file with an ACL: the group bits are the mask.
    masked = ACL[: 4 + 3 * 8 + 2] + b"\x06" + ACL[4 + 3 * 8 + 3 : -6] + b"\0" + ACL[-5:]
    assert dict(entries[b"/guarded"].xattrs) == {
        "system.posix_acl_access": masked,
        "user.long": bytes(200),
    }
    assert dict(entries[b"/inherit"].xattrs) == {"system.posix_acl_default": ACL}
    heir = dict(entries[b"/inherit/new"].xattrs)["system.posix_acl_access"]
    assert heir[:12] + heir[-8:] == ACL[:12] + ACL[-8:]  # its version and owner; what others may
    assert result.notes == ()


def test_extract_rewritten_file_that_had_an_acl_travels_whole(rig: Rig) -> None:
    rig.build_image(0, (*HIDDEN, "open('kernel/plain', 'w').write('x')"))
    script = "open('merged/new', 'w').write('x'); os.rename('merged/new', 'merged/{}')"
    result = rig.update((script.format("guarded"), script.format("plain")))
    entries = by_path(result)
    assert (entries[b"/guarded"].same, entries[b"/plain"].same) == (False, True)
