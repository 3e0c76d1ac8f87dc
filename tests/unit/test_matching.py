"""Which image is which disk of the guest."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from ouassister.disk import images
from ouassister.disk.matching import Image, Known, match_disks
from ouassister.errors import UnsupportedGuestError

A, B, C = (Image(Path(f"/vms/{name}.qcow2"), "qcow2") for name in "abc")
ONE, TWO = (str(UUID(int=number)) for number in (1, 2))
MIB = 1 << 20
ROOT = Known("vda", MIB, "ext4", ONE)
HOME = Known("vdb", 0, "xfs", TWO)
CONTENT = {(A, 1024 + 0x68 + MIB): ONE, (B, 0x20): TWO}


def read(image: Image, offset: int, size: int) -> bytes:
    uuid = CONTENT.get((image, offset))
    return UUID(uuid).bytes if uuid else bytes(size)


def test_single_disk_is_the_disk() -> None:
    assert match_disks(["vda"], [], {}, [A], read) == {"vda": A}


def test_disks_are_known_by_what_lies_on_them() -> None:
    found = match_disks(["vda", "vdb"], [ROOT, HOME], {}, [B, A], read)
    assert found == {"vda": A, "vdb": B}
    assert match_disks(["vdb"], [HOME], {}, [A, B, C], read) == {"vdb": B}


def test_name_that_the_user_gave_is_taken() -> None:
    named = Image(C.path, "qcow2", "vda")
    assert match_disks(["vda"], [ROOT], {}, [A, named], read) == {"vda": named}


def test_copy_of_a_disk_is_ambiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENT, (C, 1024 + 0x68 + MIB), ONE)
    with pytest.raises(UnsupportedGuestError, match="2 images hold its file systems") as caught:
        match_disks(["vda"], [ROOT], {}, [A, C], read)
    assert 'guest = "vda"' in caught.value.hint


def test_last_disk_is_known_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "virtual_size", lambda *_: 8 * MIB)
    sizes = {"vda": 4 * MIB, "vdc": 8 * MIB}
    assert match_disks(["vda", "vdc"], [ROOT], sizes, [A, C], read) == {"vda": A, "vdc": C}
    with pytest.raises(UnsupportedGuestError, match="left over has 8388608 bytes"):
        match_disks(["vda", "vdc"], [ROOT], {"vdc": 9 * MIB}, [A, C], read)
    with pytest.raises(UnsupportedGuestError, match="nothing on it tells"):
        match_disks(["vda", "vdc", "vdd"], [ROOT], sizes, [A, B, C], read)


def test_disk_that_no_image_holds_is_refused() -> None:
    with pytest.raises(UnsupportedGuestError, match="which disk is vda"):
        match_disks(["vda"], [ROOT], {}, [B, C], read)
