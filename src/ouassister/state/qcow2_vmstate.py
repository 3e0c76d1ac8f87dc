"""The migration stream of an internal snapshot, out of the qcow2 image that holds it.

QEMU writes the stream of ``savevm`` like disk content, behind the end of the virtual disk, and
keeps it reachable through the snapshot's own L1 table. The clusters are found once; they are
read in place, like any other save file. Compressed, encrypted and unallocated clusters, and
extended L2 entries, are refused: ``savevm`` writes none into the state.

Source: QEMU v7.2.0 ``docs/interop/qcow2.txt`` ("Cluster mapping", "Snapshots"),
``block/qcow2-snapshot.c`` (``qcow2_do_read_snapshots``), ``block/qcow2.h``
(``qcow2_vm_state_offset``), ``migration/savevm.c`` (``save_snapshot``).
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.errors import NotSuspendedError, UnsupportedStateError
from ouassister.state.data import MappedFile, Reader, Stretches
from ouassister.text import to_text

if TYPE_CHECKING:
    from pathlib import Path

_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_VERSIONS: Final = (2, 3)
_FEATURES_AT: Final = 72  # incompatible_features, from version 3 on
_SNAPSHOT: Final = struct.Struct(">QIHHIIQII")
_EXTRA: Final = struct.Struct(">QQ")  # size of the VM state, size of the disk
_MAX_SNAPSHOTS: Final = 65536  # QCOW_MAX_SNAPSHOTS
_MAX_EXTRA: Final = 1024  # QCOW_MAX_SNAPSHOT_EXTRA_DATA
_MAX_L1_BYTES: Final = 32 << 20  # QCOW_MAX_L1_SIZE
_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00  # bits 9 to 55
_COMPRESSED: Final = 1 << 62
_COPIED: Final = 1 << 63
_DIRTY: Final = 1 << 0
_COMPRESSION_TYPE: Final = 1 << 3  # of compressed clusters, of which the state has none
_HARMLESS: Final = _DIRTY | _COMPRESSION_TYPE


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry of the snapshot table.

    Attributes:
        id: Its id, as QEMU prints it.
        name: Its name.
        time_s: When it was taken.
        state_bytes: Length of the VM state; 0 without one.
    """

    id: bytes
    name: bytes
    time_s: int
    state_bytes: int
    l1_offset: int
    l1_entries: int
    disk_bytes: int
    at: int


class Qcow2:
    """A mapped qcow2 image, as far as its snapshots.

    Args:
        path: The image, for messages.
        file: Its bytes.

    Attributes:
        snapshots: The snapshot table.

    Raises:
        TruncatedStateError: It ends early.
        UnsupportedStateError: Something in it was never seen before.
    """

    def __init__(self, path: Path, file: MappedFile) -> None:
        self._path = path
        self._file = file
        self._read = Reader(file, str(path))
        head = self._read.bytes(0, _HEADER.size, "qcow2 header")
        _magic, version, *_, bits, size, crypt, _, _, _, _, count, table = _HEADER.unpack(head)
        if version not in _VERSIONS:
            raise UnsupportedStateError("version", 4, version)
        if not 9 <= bits <= 21:
            raise UnsupportedStateError("cluster_bits", 20, bits)
        if crypt:
            raise UnsupportedStateError("crypt_method", 32, crypt, "encrypted images are not read")
        if version > 2:
            features = self._read.be64(_FEATURES_AT, "incompatible_features")
            if features & ~_HARMLESS:
                raise UnsupportedStateError("incompatible_features", _FEATURES_AT, hex(features))
        self._bits = bits
        self._disk_bytes = size
        self.snapshots = self._snapshots(table, count)

    def _snapshots(self, position: int, count: int) -> list[Snapshot]:
        if count > _MAX_SNAPSHOTS:
            raise UnsupportedStateError("nb_snapshots", 60, count)
        found = []
        for _ in range(count):
            at = position
            head = self._read.bytes(at, _SNAPSHOT.size, "snapshot table entry")
            l1, entries, id_size, name_size, seconds, _, _, small, extra = _SNAPSHOT.unpack(head)
            if extra > _MAX_EXTRA:
                raise UnsupportedStateError("extra_data_size", at + 36, extra)
            position += _SNAPSHOT.size
            state, disk = small, self._disk_bytes
            if extra >= _EXTRA.size:
                raw = self._read.bytes(position, _EXTRA.size, "snapshot table entry")
                state, disk = _EXTRA.unpack(raw)
            position += extra
            names = self._read.bytes(position, id_size + name_size, "snapshot table entry")
            position += id_size + name_size
            position += -position % 8
            found.append(
                Snapshot(names[:id_size], names[id_size:], seconds, state, l1, entries, disk, at)
            )
        return found

    def choose(self, wanted: str = "") -> Snapshot:
        """Return the snapshot of a name or id, or the only one that has a VM state.

        Raises:
            NotSuspendedError: There is none, or several and none was named.
        """
        saved = [one for one in self.snapshots if one.state_bytes]
        if wanted:
            raw = wanted.encode("utf-8", "surrogateescape")
            named = [one for one in saved if one.name == raw]  # as QEMU: names first, then ids
            saved = named or [one for one in saved if one.id == raw]
        if len(saved) == 1:
            return saved[0]
        listed = ", ".join(to_text(one.name or one.id) for one in self.snapshots) or "none"
        raise NotSuspendedError(
            f"{self._path} has {len(saved)} internal snapshots with a VM state"
            f"{f' called {wanted}' if wanted else ''}; its snapshots: {listed}",
            hint="name one snapshot that 'savevm' made",
        )

    def state(self, snapshot: Snapshot) -> Stretches:
        """Return the stream of a snapshot; it takes over the mapped file.

        Raises:
            TruncatedStateError: The image ends early.
            UnsupportedStateError: A cluster of it is of an unknown kind.
        """
        size = snapshot.state_bytes
        cluster = 1 << self._bits
        per_table = cluster // 8
        first = _up(snapshot.disk_bytes, cluster * per_table)  # L1 entries of the disk
        clusters = _up(size, cluster)
        last = first + _up(clusters, per_table)
        if size > self._read.size or last > snapshot.l1_entries or last * 8 > _MAX_L1_BYTES:
            raise UnsupportedStateError("vm_state_size", snapshot.at + 40, size)
        starts, places = array("Q"), array("q")
        end = -1
        for index in range(clusters):
            if index % per_table == 0:
                table = self._table(snapshot.l1_offset + (first + index // per_table) * 8)
            place = self._cluster(table, index % per_table)
            self._read.need(place, min(cluster, size - index * cluster), "cluster of the VM state")
            if place != end:
                starts.append(index * cluster)
                places.append(place)
            end = place + cluster
        return Stretches(self._file, starts, places, size)

    def _table(self, at: int) -> int:
        entry = self._read.be64(at, "L1 table entry")
        offset = entry & _OFFSET
        if entry & ~(_OFFSET | _COPIED) or not offset or offset % (1 << self._bits):
            raise UnsupportedStateError("L1 table entry of the VM state", at, hex(entry))
        self._read.need(offset, 1 << self._bits, "L2 table")
        return offset

    def _cluster(self, table: int, index: int) -> int:
        at = table + index * 8
        entry = int.from_bytes(self._file[at : at + 8], "big")
        offset = entry & _OFFSET
        if entry & _COMPRESSED:
            raise UnsupportedStateError(
                "L2 table entry of the VM state", at, hex(entry), "a compressed cluster"
            )
        if entry & ~(_OFFSET | _COPIED) or not offset or offset % (1 << self._bits):
            raise UnsupportedStateError("L2 table entry of the VM state", at, hex(entry))
        return offset


def _up(number: int, unit: int) -> int:
    return (number + unit - 1) // unit
