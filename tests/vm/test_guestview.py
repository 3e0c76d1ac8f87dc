"""All that the save file tells of a rich guest, against what the guest itself tells when it wakes.

What may differ has its reason beside it: the agent that asks runs meanwhile, and so do the init
system and the kernel's own counters.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.vm import guestview_guest
from tests.vm.guestview_guest import Seen

from ouassister.guest_model import Subject
from ouassister.kernel import GuestReader, introspect, open_guest
from ouassister.kernel.process_memory import PageState
from ouassister.memory import open_save
from ouassister.provider import qemu, vmtoml
from ouassister.testing import clone as make_clone
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

FILES = tuple(
    f"/proc/{name}"
    for name in ("locks", "1/mountinfo", "partitions", "swaps", "modules", "net/tcp", "net/tcp6",
                 "net/udp", "net/udp6", "net/unix", "net/if_inet6")
)  # fmt: skip


@pytest.fixture(scope="module")
def seen(suspended: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("guestview")
    toml = make_clone(suspended, folder / "vm")
    config = vmtoml.load(toml)
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            for name, text in (("mapper.pl", guestview_guest.MAPPER),
                               ("probe.pl", guestview_guest.PROBE),
                               ("live.pl", guestview_guest.LIVE)):  # fmt: skip
                vm.qga().write_file(f"/root/{name}", text.encode())
            guest_run(vm, guestview_guest.PREPARE, timeout_s=240)
            (folder / "vm" / "save.img").unlink()  # a link to the other guest's
            vm.suspend()
        except BaseException:
            vm.kill()
            raise
    with open_save(config.save) as save:
        view = introspect(save, frozenset(Subject))
        reader = GuestReader(open_guest(save))
        (probe,) = (t.pid for t in view.tasks if t.cmdline[-1:] == (b"/root/probe.pl",))
        memory = reader.memory(probe)
        assert memory is not None
        environment = memory.environment()
        states = {memory.state(vma.start) for vma in reader.maps(probe) if vma.path != b"[vvar]"}
        (content,) = (one for one in reader.tmpfs_content() if one.tmpfs.target == b"/mnt/oua")
    with qemu.restore(config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        arguments = ["/usr/bin/env", f"OUA_PROBE={probe}", "/usr/bin/perl", "/root/live.pl", *FILES]
        live = guest_run(vm, arguments, timeout_s=120).stdout.decode()
        found = guest_run(vm, f"cd /mnt/oua && {guestview_guest.FIND}").stdout
        run = guest_run(vm, f"cd /run && {guestview_guest.FIND}").stdout
        sums = guest_run(vm, guestview_guest.SUMS, timeout_s=120).stdout
        vm.kill()
    lines = [line.split(b"  ", 1) for line in sums.split(b"\0") if line]
    return Seen(
        view, probe, environment, states, content, _sections(live), _rows(found),
        _rows(run), {name: digest.decode() for digest, name in lines},
    )  # fmt: skip


def _sections(text: str) -> dict[str, list[str]]:
    parts = re.split(r"^=== (\S+)\n", text, flags=re.MULTILINE)
    return {name: body.splitlines() for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def _rows(found: bytes) -> list[list[bytes]]:
    return [line.split(b"\t") for line in found.split(b"\0") if line]


def test_nothing_is_untold(seen: Seen) -> None:
    assert seen.view.degraded == ()


def test_mappings(seen: Seen) -> None:
    live: dict[int, list[str]] = {}
    for line in seen.sections["maps"]:
        pid, rest = line.split(" ", 1)
        if "[vsyscall]" not in rest:
            live.setdefault(int(pid), []).append(re.sub(r" +", " ", rest))
    compared = 0
    assert seen.view.maps is not None
    for process in seen.view.maps:
        if process.pid not in live or process.pid in seen.agents or not process.vmas:
            continue
        ours = [
            f"{v.start:08x}-{v.end:08x} {v.permissions} {v.offset:08x} {v.major:02x}:{v.minor:02x}"
            f" {v.inode} {v.path.decode()}".rstrip()
            + (" " if not v.path else "")
            for v in process.vmas
        ]
        theirs = live[process.pid]
        if process.pid != seen.probe:  # those that run meanwhile allocate and free
            ours = [line for line in ours if not _anonymous(line)]
            theirs = [line for line in theirs if not _anonymous(line)]
        assert [line.rstrip() for line in ours] == [line.rstrip() for line in theirs], process.pid
        compared += 1
    assert compared >= 8


def _anonymous(line: str) -> bool:
    return line.endswith("[heap]") or " 00:00 0" in line


def test_open_files(seen: Seen) -> None:
    live: dict[int, dict[int, tuple[bytes, int, int]]] = {}
    for line in seen.sections["files"]:
        pid, fd, name, flags, position = line.split(" ")
        live.setdefault(int(pid), {})[int(fd)] = (
            bytes.fromhex(name), int(flags), int(position))  # fmt: skip
    compared = 0
    assert seen.view.files is not None
    for process in seen.view.files:
        if process.pid not in live or process.pid in seen.agents:
            continue
        ours = {f.fd: (f.path, f.flags, f.position) for f in process.files}
        theirs = live[process.pid]
        if seen.task(process.pid).comm in (b"systemd", b"systemd-journal", b"systemd-udevd"):
            # These open, read and write meanwhile; what stays open is the same file.
            common = ours.keys() & theirs.keys()
            assert len(common) >= len(ours) * 0.8
            ours = {fd: (ours[fd][0], ours[fd][1], 0) for fd in common}
            theirs = {fd: (theirs[fd][0], theirs[fd][1], 0) for fd in common}
        assert ours == theirs, process.pid
        compared += len(ours)
    assert compared >= 60


def test_open_files_of_probe(seen: Seen) -> None:
    assert seen.view.files is not None
    (probe,) = (p for p in seen.view.files if p.pid == seen.probe)
    by_path = {file.path: file for file in probe.files}
    gone = by_path[b"/root/unlinked (deleted)"]
    assert (gone.deleted, gone.position, gone.readable, gone.writable) == (True, 1234, True, True)
    memfd = by_path[b"/memfd:oua-memfd (deleted)"]
    assert memfd.deleted
    kinds = {re.sub(rb"\d+", b"N", path) for path in by_path}
    assert {b"socket:[N]", b"pipe:[N]", b"net:[N]", b"anon_inode:[eventpoll]",
            b"anon_inode:[eventfd]", b"anon_inode:[timerfd]", b"anon_inode:inotify"
            } <= kinds  # fmt: skip
    assert by_path[b"/root/appended"].flags & os.O_APPEND


def test_tasks(seen: Seen) -> None:
    compared = 0
    for line in seen.sections["tasks"]:
        (pid, cgroup, cwd, root, uid, gid, egid, groups, namespaces, threads, cmdline,
         parent) = line.split(" ")  # fmt: skip
        tasks = [task for task in seen.view.tasks if task.pid == int(pid)]
        if not tasks or int(pid) in seen.agents or not uid:  # it ended while it was asked
            continue
        (task,) = tasks
        detail = task.detail
        assert detail is not None
        assert detail.tgid == task.pid
        assert (task.uid, detail.gid, detail.egid) == (int(uid), int(gid), int(egid))
        ours = "".join(
            f"{one.hierarchy}:{one.controllers}:{one.path.decode()}\n" for one in detail.cgroups
        )
        assert ours == bytes.fromhex(cgroup).decode(), pid
        assert task.parent == int(parent)
        if not task.kernel_thread:
            assert (detail.cwd or b"", detail.root or b"") == (
                bytes.fromhex(cwd), bytes.fromhex(root))  # fmt: skip
            assert sorted(detail.threads) == [int(one) for one in threads.split(",")]
            assert detail.groups == tuple(int(one) for one in groups.split(",") if one != "-")
            assert task.cmdline == tuple(bytes.fromhex(cmdline).removesuffix(b"\0").split(b"\0")), (
                pid
            )
        n = detail.namespaces
        assert n is not None
        assert (n.cgroup, n.ipc, n.mnt, n.net, n.pid, n.time, n.user, n.uts) == tuple(
            int(one) for one in namespaces.split(",")
        )
        compared += 1
    assert compared >= 30
    probe = seen.task(seen.probe).detail
    assert probe is not None
    assert (probe.unit, probe.slice, probe.cwd) == (
        "oua-probe@one.service", "oua-odd.slice", b"/mnt/oua/deep")  # fmt: skip


def test_environment_of_probe(seen: Seen) -> None:
    live = bytes.fromhex("".join(seen.sections["environ"]))
    assert seen.environment == tuple(live.removesuffix(b"\0").split(b"\0"))
    assert any(one.startswith(b"INVOCATION_ID=") for one in seen.environment)
    assert PageState.PRESENT in seen.states
    assert PageState.UNMAPPED not in seen.states


def test_locks(seen: Seen) -> None:
    live = set()
    for line in seen.sections["/proc/locks"]:
        _, kind, _, access, pid, file, start, end = line.split()
        major, minor, inode = file.split(":")
        live.add((kind, access, int(pid), int(major, 16), int(minor, 16), int(inode), start, end))
    words = {"posix": "POSIX", "ofd": "OFDLCK", "flock": "FLOCK", "lease": "LEASE"}
    assert seen.view.held_locks is not None
    ours = {
        (words[lock.kind], "WRITE" if lock.write else "READ", lock.pid, lock.major, lock.minor,
         lock.inode, str(lock.start), "EOF" if lock.end is None else str(lock.end))
        for lock in seen.view.held_locks
    }  # fmt: skip
    assert ours == live
    probe = {(one.kind, one.path) for one in seen.view.held_locks if one.path.startswith(b"/root/")}
    assert probe == {("flock", b"/root/flocked"), ("posix", b"/root/recorded"),
                     ("ofd", b"/root/flocked")}  # fmt: skip


def test_file_systems(seen: Seen) -> None:
    assert seen.view.superblocks is not None
    ours = {(one.major, one.minor): one.fstype for one in seen.view.superblocks}
    for line in seen.sections["/proc/1/mountinfo"]:
        before, after = line.split(" - ")
        major, minor = before.split(" ")[2].split(":")
        assert ours[int(major), int(minor)] == after.split(" ")[0].partition(".")[0]
    root = next(one for one in seen.view.superblocks if one.fstype == "ext4")
    assert root.uuid
    assert root.disk


def test_block_devices(seen: Seen) -> None:
    live = {}
    for line in seen.sections["block"]:
        name, number, start, size, read_only, sysfs = line.split(" ")
        live[name] = (number, int(start) * 512, int(size) * 512, read_only == "1", sysfs)
    assert seen.view.block_devices is not None
    ours = {
        one.name: (f"{one.major}:{one.minor}", one.start, one.size, one.read_only,
                   one.sysfs.decode())
        for one in seen.view.block_devices
    }  # fmt: skip
    assert ours == live
    assert "dm-0" in ours


def test_mapped_devices(seen: Seen) -> None:
    assert seen.view.mapped_devices is not None
    (device,) = seen.view.mapped_devices
    assert (device.device, device.name, device.uuid) == ("dm-0", "oua-lin--ear", "LVM-ouatest1")
    assert [(r.start, r.size, r.target) for r in device.ranges] == [
        (0, 8192 * 512, "linear"), (8192 * 512, 4096 * 512, "linear")]  # fmt: skip
    legs = [(leg.device, leg.start) for one in device.ranges for leg in one.below]
    assert legs == [("loop0", 2048 * 512), ("loop1", 64 * 512)]


def test_swap(seen: Seen) -> None:
    assert seen.view.swaps is not None
    (area,) = seen.view.swaps
    path, kind, size, used, priority = seen.sections["/proc/swaps"][1].split()
    assert (area.path.decode(), "partition" if area.partition else "file") == (path, kind)
    assert (area.size, area.priority) == (int(size) * 1024, int(priority))
    assert area.used > 0
    assert abs(area.used - int(used) * 1024) <= area.used / 4  # pages come back when looked at


def test_modules(seen: Seen) -> None:
    live = {}
    for line in seen.sections["/proc/modules"]:
        name, size, _references, users, state, _address, *_ = line.split()
        live[name] = (int(size), {one for one in users.split(",") if one not in ("", "-")}, state)
    assert seen.view.modules is not None
    ours = {
        one.name: (one.size, set(one.used_by), one.state.capitalize()) for one in seen.view.modules
    }
    assert ours == live


def test_network(seen: Seen) -> None:
    assert seen.view.network_devices is not None
    bridge = next(one for one in seen.view.network_devices if one.name == "ouabr")
    assert (bridge.kind, bridge.addresses[0]) == ("bridge", "192.0.2.7/29")
    live = set()
    for line in seen.sections["/proc/net/if_inet6"]:
        address, _, prefix, _, _, name = line.split()
        live.add((name, bytes.fromhex(address), int(prefix, 16)))
    ours = {
        (one.name, socket.inet_pton(socket.AF_INET6, address.split("/")[0]),
         int(address.split("/")[1]))
        for one in seen.view.network_devices for address in one.addresses if ":" in address
    }  # fmt: skip
    assert ours == live


def test_sockets(seen: Seen) -> None:
    assert seen.view.sockets is not None
    live = set()
    for kind, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in seen.sections[f"/proc/net/{kind}"][1:]:
            words = line.split()
            if words[3] == state:
                port = int(words[1].rpartition(":")[2], 16)
                live.add((kind, port, int(words[7]), int(words[9])))
    inet = [one for one in seen.view.sockets.bound if not one.protocol.startswith("unix")]
    assert {(one.protocol, one.port, one.uid, one.inode) for one in inet} == live
    established = [
        line for kind in ("tcp", "tcp6") for line in seen.sections[f"/proc/net/{kind}"][1:]
        if line.split()[3] == "01"
    ]  # fmt: skip
    assert seen.view.sockets.established == len(established) == 2
    names = {0x1: "unix-stream", 0x2: "unix-dgram", 0x5: "unix-seqpacket"}
    live_unix = set()
    for line in seen.sections["/proc/net/unix"][1:]:
        words = line.split(maxsplit=7)
        listening = int(words[3], 16) & 0x10000  # __SO_ACCEPTCON
        if len(words) == 8 and (listening or int(words[4], 16) == 2):
            live_unix.add((names[int(words[4], 16)], words[7].encode(), int(words[6])))
    ours = {(one.protocol, one.address, one.inode) for one in seen.view.sockets.bound
            if one.protocol.startswith("unix")}  # fmt: skip
    assert {one for one in ours ^ live_unix if b"qemu" not in one[1]} == set()
    assert ("unix-dgram", b"@oua\x07name") in {one[:2] for one in ours}


def test_open_sockets_are_told_by_their_family_and_by_the_name_at_the_other_end(seen: Seen) -> None:
    live = {}
    tables = {"tcp": (9, 2), "tcp6": (9, 10), "udp": (9, 2), "udp6": (9, 10), "unix": (6, 1)}
    for kind, (column, family) in tables.items():
        for line in seen.sections[f"/proc/net/{kind}"][1:]:
            live[int(line.split()[column])] = family
    ours = {
        file.inode: file
        for process in seen.view.files or ()
        for file in process.files
        if file.path.startswith(b"socket:[")
    }
    both = live.keys() & ours.keys()
    assert {inode: ours[inode].family for inode in both} == {inode: live[inode] for inode in both}
    assert {1, 2, 10} <= {live[inode] for inode in both}
    # Whatever is in no table is netlink, or a packet socket (of the client of DHCP), raw, or of
    # IPv4 and not bound.
    others = {file.family for inode, file in ours.items() if inode not in live}
    assert 16 in others
    assert not others & {-1, 10}
    assert {b"/run/dbus/system_bus_socket", b"/run/systemd/journal/stdout"} <= {
        file.peer for file in ours.values()
    }
    assert all(file.family == 1 for file in ours.values() if file.peer)


# Counters, and what the asking itself changes.
_VOLATILE = re.compile(
    r"kernel\.sched_domain\..*|fs\.(dentry-state|inode-nr|inode-state|file-nr|aio-nr)|kernel\.(ns_last_pid|random\..*"
    r"|perf_event_max_sample_rate|pty\.nr)|net\.netfilter\.nf_conntrack_count"
)


def test_sysctls(seen: Seen) -> None:
    live = {}
    for line in seen.sections["sysctl"]:
        name, _, value = line.partition(" ")
        text = bytes.fromhex(name).decode()
        live[text.replace(".", "\0").replace("/", ".").replace("\0", "/")] = bytes.fromhex(value)
    assert seen.view.sysctls is not None
    ours = {one.name: one for one in seen.view.sysctls}
    missing = {name for name in live.keys() - ours.keys() if not name.startswith("fs.binfmt_misc.")}
    assert missing == set()  # binfmt_misc is a file system of its own
    told = {name: one.value for name, one in ours.items() if one.value is not None}
    wrong = {
        name: (value, live.get(name))
        for name, value in told.items()
        if name in live and not _VOLATILE.fullmatch(name) and live[name].rstrip(b"\n") != value
    }
    assert wrong == {}
    assert len(told) >= len(ours) * 3 // 4
    assert told["vm.swappiness"] == b"37"
    assert told["kernel.domainname"] == b"oua.test"
    assert told["net.ipv4.ip_forward"] == b"1"


def test_tmpfs_tree(seen: Seen) -> None:
    ours = _nodes(seen, b"/mnt/oua")
    assert ours == {row[0]: _row(row) for row in seen.found}
    for name in (b"fifo", b"char", b"block", b"short", b"long", b"socket", b"hole", b"hard"):
        assert name in ours
    assert b"odd\x1b[31m\nname" in ours


# What systemd, udev and logind write when the guest wakes and the agent runs commands.
_RUN_CHANGES = re.compile(
    rb"(systemd/(units|timesync|transient|journal|propagate|sessions|users)|udev|log|mount|lock"
    rb"|credentials|user|dbus|blkid|qemu-ga.*|network|dhclient.*|agetty.*)?(/.*)?|systemd"
)


def test_run_tree(seen: Seen) -> None:
    ours, live = _nodes(seen, b"/run"), {row[0]: _row(row) for row in seen.run}
    assert len(ours) > 100
    differing = {
        name for name in ours.keys() | live.keys()
        if ours.get(name) != live.get(name) and not _RUN_CHANGES.fullmatch(name)
    }  # fmt: skip
    assert differing == set()


def _nodes(seen: Seen, target: bytes) -> dict[bytes, tuple[object, ...]]:
    assert seen.view.tmpfs is not None
    (tmpfs,) = (one for one in seen.view.tmpfs if one.target == target)
    return {
        n.path[1:]: (
            n.inode, n.mode & 0o7777, stat.filemode(n.mode)[0].replace("-", "f"), n.uid, n.gid,
            n.links, n.size, n.mtime_ns, n.target or b"",
        )
        for n in tmpfs.nodes
    }  # fmt: skip


def _row(row: list[bytes]) -> tuple[object, ...]:
    _, inode, mode, kind, uid, gid, links, size, mtime, target = row
    seconds, _, rest = mtime.partition(b".")
    return (
        int(inode), int(mode, 8), kind.decode(), int(uid), int(gid), int(links), int(size),
        int(seconds) * 10**9 + int(rest[:9]), target,
    )  # fmt: skip


def test_tmpfs_content(seen: Seen) -> None:
    content = seen.content
    nodes = {node.path: node for node in content.tmpfs.nodes}
    first = dict(content.hard_links)
    runs = {file.path: file.runs for file in content.files}
    for name, digest in seen.sums.items():
        path = name.removeprefix(b".")
        if path == b"/swapped":
            assert path not in runs
            continue
        data = bytearray(nodes[path].size)
        for position, part in runs[first.get(path, path)]:
            data[position : position + len(part)] = part
        assert len(data) == nodes[path].size, name
        assert hashlib.sha256(data).hexdigest() == digest, name
    assert runs.keys() | first.keys() | {b"/swapped"} == {
        name.removeprefix(b".") for name in seen.sums
    }
    assert sum(len(data) for _, data in runs[b"/hole"]) < 1 << 20
    assert runs[b"/empty"] == ()
    assert first == {b"/hard": b"/deep/er/file"}
    assert nodes[b"/long"].target == b"l" * 300
    assert nodes[b"/deep/er/file"].mtime_ns == 981173106789000000
    assert content.size_bytes == 64 << 20
    assert content.noexec == ()


def test_content_is_of_the_tree_that_is_told(seen: Seen) -> None:
    assert seen.view.tmpfs is not None
    (tree,) = (one for one in seen.view.tmpfs if one.target == b"/mnt/oua")
    # All but how many pages are not there: for that each is looked at.
    uncounted = tuple(replace(node, swapped=0, absent=0) for node in tree.nodes)
    assert replace(seen.content.tmpfs, unread=()) == replace(tree, nodes=uncounted, unread=())


def test_swapped_pages_are_named(seen: Seen) -> None:
    assert seen.view.tmpfs is not None
    (tmpfs,) = (one for one in seen.view.tmpfs if one.target == b"/mnt/oua")
    (node,) = (one for one in tmpfs.nodes if one.path == b"/swapped")
    assert node.swapped > 1000
    assert node.absent == 0
    assert any(line.startswith("/swapped: ") for line in tmpfs.unread)
    # The inode knows as many as there are entries in its page cache.
    assert seen.content.left_out == ((b"/swapped", f"{node.swapped} pages are swapped out"),)


def test_attributes(seen: Seen) -> None:
    assert seen.view.tmpfs is not None
    nodes = {(one.target, node.path): node for one in seen.view.tmpfs for node in one.nodes}
    attributes = dict(nodes[b"/mnt/oua", b"/random"].xattrs)
    assert attributes[b"trusted.oua"] == b"v\0x"
    journal = nodes.get((b"/run", b"/log/journal"))
    if journal is not None:
        assert [name for name, _ in journal.xattrs] == [
            b"system.posix_acl_access", b"system.posix_acl_default"]  # fmt: skip
