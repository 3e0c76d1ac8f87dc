"""Each saved-state format, against the program that writes it."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conformance import libvirt, newer
from tests.conformance.make_sample import GIB, running
from tests.conftest import need

from ouassister.memory import SaveFile, open_save
from ouassister.state.formats import Support
from ouassister.testing.state_format import Truth, check_memory, check_state_format

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = pytest.mark.host

LARGE_MIB = 4608
EDGES = 48 << 20  # pmemsave reads 1 KiB at a time: too slow for all of so much
QEMU = "qemu-system-x86_64"


def opener(name: str, hole: int = 0, spool: Path | None = None) -> Callable[[Path], SaveFile]:
    """Open a save and hold it to be of one format; the layout is as QEMU was told."""

    def open_it(path: Path) -> SaveFile:
        save = open_save(path, spool=spool)
        assert save.format.name == name
        if hole:
            save.proven(save.layout(hole))
        return save

    return open_it


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_every_format_of_one_paused_guest(machine: str, tmp_path: Path) -> None:
    need(QEMU)
    image = tmp_path / "disk.qcow2"
    make_disk(image)
    disk = ["-drive", f"file={image.name},if=none,id=disk,format=qcow2"]
    with running(tmp_path, machine, 512, 4 * GIB, disk) as guest:
        truth = guest.truth()
        guest.dump("paging.elf", "elf", paging=True)
        guest.dump("flat.elf", "elf")
        methods = guest.qmp.execute("query-dump-guest-memory-capability")["formats"]
        kdumps = sorted(method for method in methods if method.startswith("kdump"))
        assert "kdump-zlib" in kdumps  # Debian's QEMU is built without the other two
        for method in kdumps:
            guest.dump(method, method)
        answer = guest.qmp.execute("human-monitor-command", command_line="savevm before")
        assert answer == "", answer
        guest.migrate_to(tmp_path / "save.img")
    work = tmp_path / "spoilt"
    work.mkdir()
    check = partial(check_state_format, truth=truth, folder=work)
    check(opener("qemu-stream"), tmp_path / "save.img")
    check(opener("elf-dump"), tmp_path / "flat.elf")
    check_memory(opener("elf-dump"), tmp_path / "paging.elf", truth)
    for large in tmp_path.glob("*.elf"):  # pytest keeps the folder
        large.unlink()
    check(opener("qcow2-vmstate"), image, ends_exactly=False)
    for method in kdumps:
        check(opener("kdump"), tmp_path / method)
    with open_save(tmp_path / "save.img") as save, open_save(image) as snapshot:
        assert snapshot.machine == save.machine
        assert snapshot.blocks.keys() == save.blocks.keys()


def make_disk(path: Path) -> None:
    argv = [need("qemu-img"), "create", "-q", "-f", "qcow2", str(path), "1G"]
    subprocess.run(argv, check=True)


@pytest.mark.parametrize(
    ("machine", "memory_mib", "hole", "edges"),
    [
        ("pc", LARGE_MIB, 3 * GIB, EDGES),
        ("q35", LARGE_MIB, 2 * GIB, EDGES),
        ("q35,max-ram-below-4g=1G", 1280, 1 * GIB, 0),
    ],
)
def test_memory_above_the_pci_hole(
    machine: str, memory_mib: int, hole: int, edges: int, tmp_path: Path
) -> None:
    need(QEMU)
    with running(tmp_path, machine, memory_mib, hole, ["-smp", "4"]) as guest:
        truth = guest.truth(edges)
        if not edges:
            guest.dump("dump", "kdump-zlib")
        guest.migrate("exec:cat > save.img")
    check_memory(opener("qemu-stream", hole), tmp_path / "save.img", truth)
    if edges:
        return
    check_memory(opener("kdump"), tmp_path / "dump", truth)
    with open_save(tmp_path / "dump") as dump:
        assert dump.memory.hole == hole
        assert dump.ram_bytes == memory_mib << 20


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        ("ram", (192, 320)),
        ("ram", (256, 256)),
        ("memfd", (512,)),
        ("memfd", (320, 64, 128)),
        ("file", (256, 64)),
    ],
)
def test_memory_of_named_back_ends(backend: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    need(QEMU)
    options = ["-smp", str(len(sizes))]
    for node, size in enumerate(sizes):
        path = f",mem-path=node{node}.mem" if backend == "file" else ""
        options += ["-object", f"memory-backend-{backend},id=ram-node{node},size={size}M{path}"]
        if len(sizes) > 1:
            options += ["-numa", f"node,nodeid={node},cpus={node},memdev=ram-node{node}"]
    machine = "q35" if len(sizes) > 1 else "q35,memory-backend=ram-node0"
    with running(tmp_path, machine, sum(sizes), 4 * GIB, options) as guest:
        truth = guest.truth()
        guest.migrate_to(tmp_path / "save.img")
    with open_save(tmp_path / "save.img") as save:
        assert b"pc.ram" not in save.blocks
        assert save.ram_bytes == sum(sizes) << 20
    check_memory(opener("qemu-stream"), tmp_path / "save.img", truth)


def test_check_finds_a_reader_that_returns_wrong_memory(tmp_path: Path) -> None:
    need(QEMU)
    with running(tmp_path, "pc", 64, 4 * GIB) as guest:
        truth = guest.truth()
        guest.migrate_to(tmp_path / "save.img")
    digests = (*truth[1].digests[:3], bytes(32), *truth[1].digests[4:])
    wrong = (truth[0], Truth(truth[1].address, truth[1].size_bytes, digests))
    with pytest.raises(AssertionError, match="memory differs at 0x400000"):
        check_state_format(open_save, tmp_path / "save.img", wrong, tmp_path)


# --- what only a newer QEMU and libvirt write ------------------------------------------------


@pytest.fixture(scope="module")
def tree() -> Path:
    return newer.build()


@pytest.mark.parametrize("channels", ["one channel", "multifd", "multifd and direct-io"])
def test_mapped_ram_holds_every_rule(channels: str, tree: Path, tmp_path: Path) -> None:
    def inside(argv: Sequence[str]) -> list[str]:
        return newer.inside(tree, tmp_path, argv)

    machine, memory_mib, hole = {
        "one channel": ("q35,max-ram-below-4g=1G", 1280, 1 * GIB),
        "multifd": ("pc", 512, 4 * GIB),
        "multifd and direct-io": ("q35", 512, 4 * GIB),
    }[channels]
    with running(tmp_path, machine, memory_mib, hole, inside=inside) as guest:
        truth = guest.truth()
        names = ["mapped-ram", *(["multifd"] if "multifd" in channels else [])]
        wanted = [{"capability": name, "state": True} for name in names]
        guest.qmp.execute("migrate-set-capabilities", capabilities=wanted)
        direct: dict[str, object] = {"direct-io": True} if "direct-io" in channels else {}
        guest.migrate("file:save.img", direct)
    open_it = opener("qemu-mapped-ram", hole)
    if memory_mib > 512:
        check_memory(open_it, tmp_path / "save.img", truth)
    else:
        work = tmp_path / "spoilt"
        work.mkdir()
        check_state_format(open_it, tmp_path / "save.img", truth, work, cuts=4)


@pytest.fixture(scope="module")
def daemon(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[libvirt.Libvirt]:
    with libvirt.running(tree, tmp_path_factory.mktemp("libvirt")) as daemon:
        yield daemon


@pytest.mark.parametrize("method", ["raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse"])
def test_libvirt_image_holds_every_rule(
    method: str, daemon: libvirt.Libvirt, tmp_path: Path
) -> None:
    if method in ("lzop", "zstd"):
        need(method)
    with daemon.guest() as truth:
        daemon.virsh("save", "guest", f"{newer.WORK}/saved", "--image-format", method)
    sample = tmp_path / "saved"
    (daemon.folder / "saved").rename(sample)
    work = tmp_path / "spoilt"
    work.mkdir()
    open_it = opener(f"libvirt-{method}", spool=tmp_path / "spool")
    check_state_format(open_it, sample, truth, work, cuts=4)
    with open_it(sample) as save:
        assert save.format.support is Support.FULL
        assert save.libvirt is not None
        assert save.libvirt.format == method
        assert not save.libvirt.was_running
        assert b"<name>guest</name>" in save.libvirt.xml
        assert save.libvirt.memory_bytes() == libvirt.MEMORY_MIB << 20


@pytest.mark.parametrize("release", ["host", "newer"])
def test_libvirt_managed_save_is_read(
    release: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if release == "host":
        need("libvirtd")
        with libvirt.running(Path("/"), tmp_path) as daemon:
            check_managed(daemon)
    else:
        check_managed(request.getfixturevalue("daemon"))


def check_managed(daemon: libvirt.Libvirt) -> None:
    with daemon.guest("q35") as truth:
        daemon.virsh("managedsave", "guest", "--running")
        sample = daemon.folder / "root/var/lib/libvirt/qemu/save/guest.save"
        check_memory(opener("libvirt-raw"), sample, truth)
        with open_save(sample) as save:
            assert save.libvirt is not None
            assert save.libvirt.was_running
            assert save.machine.startswith("pc-q35-")
