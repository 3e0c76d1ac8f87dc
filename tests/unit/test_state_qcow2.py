"""The VM state of an internal snapshot, in clusters that lie anywhere."""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING

import pytest
from tests.unit.state_samples import CLUSTER, PAGE, content, plain_stream, qcow2

from ouassister.errors import (
    NotSuspendedError,
    OUassisterError,
    TruncatedStateError,
    UnsupportedStateError,
)
from ouassister.memory import open_save
from ouassister.model import PhysAddr
from ouassister.state.formats import Support

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STREAM = plain_stream()
LONG = plain_stream(3 * CLUSTER // 8)  # more clusters than one L2 table maps


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "disk.qcow2"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("stream", [STREAM, LONG], ids=["one table", "several tables"])
@pytest.mark.parametrize("version", [2, 3])
def test_state_is_read_across_clusters(
    write: Callable[[bytes], Path], stream: bytes, version: int
) -> None:
    pages = 48 if stream is STREAM else 3 * CLUSTER // 8
    with open_save(write(qcow2({b"before": stream}, version=version))) as save:
        assert save.format.support is Support.PARTIAL
        for page in range(pages):
            want = content(page) if page % 3 else bytes(PAGE)
            assert save.memory.read(PhysAddr(page * PAGE), PAGE) == want
        assert next(iter(save.memory.find(content(8)[:16]))) == 8 * PAGE
        assert save.description()["devices"] == [{"name": "timer"}]
        with pytest.raises(UnsupportedStateError, match="no update: its disk is the snapshot's"):
            save.require_full("update")


def test_snapshot_is_chosen_by_name_then_by_id(write: Callable[[bytes], Path]) -> None:
    other = plain_stream(96)
    path = write(qcow2({b"first": STREAM, b"1": other, b"disk only": b""}))
    for wanted, pages in (("first", 48), ("1", 96), ("2", 96)):
        with open_save(path, snapshot=wanted) as save:
            assert save.ram_bytes == pages * PAGE
    for wanted in ("", "nothing", "disk only", "3"):
        with pytest.raises(NotSuspendedError, match="its snapshots: first, 1, disk only"):
            open_save(path, snapshot=wanted)


def test_image_without_snapshot_is_not_suspended(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(NotSuspendedError, match="its snapshots: none"):
        open_save(write(qcow2({})))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": 4}, "version"),
        ({"bits": 8}, "cluster_bits"),
        ({"bits": 30}, "cluster_bits"),
        ({"crypt": 2}, "crypt_method"),
        ({"features": 1 << 1}, "incompatible_features"),  # corrupt
        ({"features": 1 << 2}, "incompatible_features"),  # external data file
        ({"features": 1 << 4}, "incompatible_features"),  # extended L2 entries
        ({"features": 1 << 40}, "incompatible_features"),
    ],
)
def test_header_unseen_is_refused_by_name(
    write: Callable[[bytes], Path], change: dict[str, int], field: str
) -> None:
    with pytest.raises(UnsupportedStateError) as caught:
        open_save(write(qcow2({b"a": STREAM}, **change)))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_image_in_use_when_the_host_went_down_is_read(write: Callable[[bytes], Path]) -> None:
    open_save(write(qcow2({b"a": STREAM}, features=1))).close()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1 << 62 | CLUSTER, "a compressed cluster"),
        (0, "not seen before"),  # unallocated
        (CLUSTER | 1, "not seen before"),  # reads as zeros
        (CLUSTER + 512, "not seen before"),
        (1 << 56 | CLUSTER, "not seen before"),
    ],
)
def test_cluster_of_another_kind_is_refused(
    write: Callable[[bytes], Path], value: int, reason: str
) -> None:
    data = qcow2({b"a": STREAM}, entry=lambda index, place: value if index == 3 else place)
    with pytest.raises(UnsupportedStateError, match=reason) as caught:
        open_save(write(data))
    assert caught.value.field == "L2 table entry of the VM state"
    assert caught.value.value == hex(value)


def test_cluster_beyond_the_image_is_truncated(write: Callable[[bytes], Path]) -> None:
    data = qcow2({b"a": STREAM}, entry=lambda index, place: 1 << 40 if index == 3 else place)
    with pytest.raises(TruncatedStateError, match="cluster of the VM state"):
        open_save(write(data))


def snapshot_field(data: bytes, at: int, form: str, value: int) -> bytes:
    table = struct.unpack_from(">Q", data, 64)[0]
    changed = bytearray(data)
    struct.pack_into(form, changed, table + at, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("at", "form", "value", "error"),
    [
        (0, ">Q", 1 << 50, TruncatedStateError),  # L1 table
        (8, ">I", 1, UnsupportedStateError),  # too few entries
        (36, ">I", 1 << 20, UnsupportedStateError),  # extra data
        (40, ">Q", 1 << 50, UnsupportedStateError),  # VM state larger than its table
        (40, ">Q", 1 << 60, UnsupportedStateError),
        (48, ">Q", 1 << 62, UnsupportedStateError),  # disk so large that the state has no place
    ],
)
def test_snapshot_entry_absurd_is_refused(
    write: Callable[[bytes], Path], at: int, form: str, value: int, error: type[OUassisterError]
) -> None:
    with pytest.raises(error):
        open_save(write(snapshot_field(qcow2({b"a": STREAM}), at, form, value)))


def test_snapshot_count_absurd_is_refused(write: Callable[[bytes], Path]) -> None:
    data = bytearray(qcow2({b"a": STREAM}))
    struct.pack_into(">I", data, 60, 1 << 31)
    with pytest.raises(UnsupportedStateError, match="nb_snapshots"):
        open_save(write(bytes(data)))


def test_flipped_bytes_never_crash(write: Callable[[bytes], Path]) -> None:
    few = plain_stream(6)
    data = qcow2({b"a": few, b"b": few})
    tables = [at for at in range(0, len(data), CLUSTER) if data[at] & 0x80]
    places = [*range(112), *range(len(data) - 160, len(data))]
    places += [at + offset for at in tables for offset in range(0, 64, 3)]
    for at in places:
        for flip in (1, 0xFF):
            spoilt = bytearray(data)
            spoilt[at] ^= flip
            with contextlib.suppress(OUassisterError):
                open_save(write(bytes(spoilt)), snapshot="a").close()
