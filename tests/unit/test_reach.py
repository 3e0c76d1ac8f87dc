"""Which units nobody on a network reaches, and what of them waits for the open gate."""

from __future__ import annotations

import dataclasses
import socket

import pytest
from tests.unit.fake_guest import FakeGuest

from ouassister.errors import CorruptGuestError
from ouassister.guest_model import (
    GuestPid,
    OpenFile,
    ProcessFiles,
    Socket,
    Sockets,
    TaskDetail,
)
from ouassister.kernel.socket_ends import SocketEnds
from ouassister.model import Action, Exposed, GuestView, Restart, Task, Uts, Verdict
from ouassister.restart import reach

NAMED = 77


def task(pid: int, unit: str, *, kernel: bool = False) -> Task:
    detail = TaskDetail(GuestPid(pid), (), 0, 0, 0, (), None, None, None, (), unit, "", "")
    return Task(GuestPid(pid), GuestPid(1), b"x", "S", 0, None, (), 0, kernel, detail)


def sock(family: int, inode: int = 5, peer: bytes = b"") -> OpenFile:
    name = b"socket:[%d]" % inode
    return OpenFile(
        3, name, 2, True, True, 0, 0, 8, inode, 0o140777, False, family=family, peer=peer
    )


FILE = OpenFile(1, b"/var/log/x", 1, False, True, 0, 254, 1, 12, 0o100644, False)


def view(files: dict[int, tuple[OpenFile, ...]], *tasks: Task) -> GuestView:
    return GuestView(
        uts=Uts("", "", "", "", "", ""), boot_id="", suspended_at_s=0, uptime_s=0, cpus=1,
        memory_bytes=0, tasks=tasks, mounts=(),
        files=tuple(ProcessFiles(GuestPid(pid), some) for pid, some in files.items()),
        sockets=Sockets((Socket("unix-stream", b"/run/x", 0, True, 0, NAMED),), 0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("files", "away"),
    [
        ((), True),
        ((FILE,), True),
        ((sock(socket.AF_UNIX, peer=b"/run/systemd/journal/stdout"),), True),
        ((sock(socket.AF_NETLINK),), True),
        ((sock(socket.AF_UNIX), FILE, sock(socket.AF_INET)), False),
        ((sock(socket.AF_INET6),), False),
        ((sock(socket.AF_PACKET),), False),
        ((sock(-1),), False),  # it cannot be told
        ((sock(socket.AF_UNIX, NAMED),), False),  # who listens may ask it
        ((sock(socket.AF_UNIX, peer=b"/run/dbus/system_bus_socket"),), False),
        ((sock(socket.AF_UNIX, peer=b"/var/run/dbus/system_bus_socket"),), False),
    ],
)
def test_unit_is_out_of_reach_by_all_that_its_processes_have_open(
    files: tuple[OpenFile, ...], away: bool
) -> None:
    found = view({7: (FILE,), 8: files}, task(7, "cron.service"), task(8, "cron.service"))
    assert reach.out_of_reach(found) == ({"cron.service"} if away else set())


def test_what_memory_does_not_tell_is_in_reach() -> None:
    both = (task(7, "cron.service"), task(8, "db.service"), task(2, "", kernel=True))
    known = view({7: (), 8: (), 2: ()}, *both)
    assert reach.out_of_reach(known) == {"cron.service", "db.service"}
    assert reach.out_of_reach(view({7: ()}, *both)) == {"cron.service"}
    assert reach.out_of_reach(dataclasses.replace(known, sockets=None)) == set()
    assert reach.out_of_reach(dataclasses.replace(known, files=None)) == set()
    lost = dataclasses.replace(task(9, ""), detail=None)
    assert reach.out_of_reach(view({7: ()}, *both, lost)) == set()


def test_names_that_are_no_service_are_never_out_of_reach() -> None:
    tasks = (task(7, "session-1.scope"), task(8, ""), task(9, "a b.service"))
    assert reach.out_of_reach(view({7: (), 8: (), 9: ()}, *tasks)) == set()


def actions(*lines: str) -> tuple[Action, ...]:
    return tuple(Action(tuple(line.split())) for line in lines)


TIMER = "systemd-run --on-active=30 systemctl try-restart qemu-guest-agent.service"


def restart(unit: str, *pids: int, verdict: Verdict = Verdict.RESTART) -> Restart:
    return Restart(unit, verdict, "", tuple(Exposed(GuestPid(pid), b"x", ()) for pid in pids))


KNOWN = (
    restart("ssh.service", 7, 8),
    restart("web.service", 9),
    restart("cron.service", 5),
    restart("dbus.service", 4, verdict=Verdict.ADVISE),
)


def test_gate_waits_for_all_but_restarts_of_what_ran_and_until_that_has_ended() -> None:
    order = actions(
        "systemctl daemon-reexec",
        "systemctl try-restart cron.service",
        "update-grub",
        "deb-systemd-invoke start new.service",
        "deb-systemd-invoke restart ssh.service",
        "invoke-rc.d web restart",
        "systemctl try-restart atd.service cron.service",
        TIMER,
    )
    parts = reach.part(order, KNOWN, {"cron.service", "atd.service"})
    assert parts.begun == (*order[:2], *order[3:7])
    assert parts.awaited == 3
    assert parts.pids == (7, 8, 9)  # not cron's: nobody reaches it
    assert parts.left == (order[2], order[7])
    assert parts.follow == (*order[4:7], order[2], order[7])


@pytest.mark.parametrize(
    "last",
    [
        "systemctl restart firewall.service",  # has no process
        "systemctl restart dbus.service",  # is not to be restarted: its processes stay
        "systemctl stop ssh.service",
        "systemctl reload ssh.service",
        "sysctl -w a=b",
        "systemctl restart ssh.service new.service",
    ],
)
def test_gate_waits_for_what_is_more_than_a_restart(last: str) -> None:
    order = actions("systemctl restart ssh.service", last)
    assert reach.part(order, KNOWN, ()) == reach.Parts(order, 2, (), ())


def test_timer_alone_is_not_worth_a_second_look() -> None:
    both = actions("systemctl start new.service", TIMER)
    assert reach.part(both, KNOWN, ()) == reach.Parts(both, 2, (), ())
    assert reach.part((), KNOWN, ()) == reach.Parts((), 0, (), ())


def test_change_set_names_those_of_its_actions_alone() -> None:
    some = actions("systemctl restart ssh.service cron.service", "invoke-rc.d atd restart")
    away = frozenset(("cron.service", "atd.service", "mdadm.service"))
    assert reach.of_actions(some, away) == ("atd.service", "cron.service")


# --- from memory ---


def guest_with_sockets() -> FakeGuest:
    guest = FakeGuest()
    guest.struct("inode", ("i_ino", "Q"))
    guest.struct("socket", ("state", "Q"), ("sk", "p"))
    guest.struct("socket_alloc", ("socket", "socket"), ("vfs_inode", "inode"))
    guest.struct("sock_common", ("skc_num", "H"), ("skc_family", "H"), ("pad", 4))
    guest.struct("unix_address", ("refcnt", "I"), ("len", "i"), ("name", 110))
    guest.struct("unix_sock", ("sk", "sock_common"), ("addr", "p"), ("peer", "p"))
    return guest


def ends(guest: FakeGuest, sk: int) -> tuple[int, bytes]:
    alloc = guest.put("socket_alloc", socket__sk=sk)
    return SocketEnds(guest.kernel).read(alloc + 16)


def unix(guest: FakeGuest, name: bytes, **more: int) -> int:
    address = guest.put("unix_address", len=len(name) + 2, name=b"\x01\0" + name)
    return guest.put("unix_sock", sk__skc_family=1, addr=address, **more)


def test_socket_is_told_by_its_family_and_the_name_at_its_other_end() -> None:
    guest = guest_with_sockets()
    assert ends(guest, guest.put("unix_sock", sk__skc_family=10)) == (10, b"")
    assert ends(guest, 0) == (-1, b"")
    lonely = unix(guest, b"/run/own\0")
    assert ends(guest, lonely) == (1, b"")
    for name, told in ((b"/run/other\0", b"/run/other"), (b"\0bus", b"@bus")):
        client = guest.put("unix_sock", sk__skc_family=1, peer=unix(guest, name))
        assert ends(guest, client) == (1, told)
    pair = guest.put("unix_sock", sk__skc_family=1, peer=guest.put("unix_sock", sk__skc_family=1))
    assert ends(guest, pair) == (1, b"")


def test_name_longer_than_any_is_corrupt() -> None:
    guest = guest_with_sockets()
    address = guest.put("unix_address", len=4000)
    client = guest.put("unix_sock", sk__skc_family=1, peer=guest.put("unix_sock", addr=address))
    with pytest.raises(CorruptGuestError, match="name of 3998 bytes"):
        ends(guest, client)
