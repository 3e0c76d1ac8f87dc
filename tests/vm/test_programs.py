"""Programs that look at the system print in the shadow what they print in the guest when it wakes.

Each difference that is allowed stands in `ALLOWED` or in a filter, with its reason.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import pytest
from tests.conftest import GUESTS
from tests.vm.world import World

from ouassister.provider import qemu
from ouassister.testing import Recipe, build_image, guest_run, make_suspended
from ouassister.testing import clone as make_clone

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

PACKAGES: Final = ("psmisc", "lsof", "needrestart", "chkrootkit")
COMMANDS: Final = {
    "ps": "ps axf -o pid,ppid,user,tty,stat,args",
    "pgrep": "pgrep -a nginx; pgrep -u www-data -l; pidof sshd; pgrep nothere; echo $?",
    "fuser": "fuser -v /usr/sbin/nginx /usr/sbin/sshd",
    "lsof": "lsof -w -n -P -K i -F pcftin",
    "ss": "ss -ltnp | sort; ss -lunp | sort; ss -lx | sort",
    "uptime": "uptime",
    "free": "free -k",
    "lsblk": "lsblk -o NAME,MAJ:MIN,RM,SIZE,RO,TYPE,MOUNTPOINTS,FSTYPE,UUID",
    "findmnt": "findmnt -o TARGET,SOURCE,FSTYPE,OPTIONS",
    "needrestart": "needrestart -b",
    "status": "systemctl --no-pager status nginx ssh",
    "units": "systemctl --no-pager list-units --type=service,socket,mount,slice",
    "unit files": "systemctl --no-pager list-unit-files",
    "chkrootkit": "chkrootkit -q aliens asp bindshell sniffer w55808 z2 ls ps netstat login sshd",
    "questions": "for unit in ssh nginx cron nothere; do systemctl is-active $unit;"
    " systemctl is-enabled $unit; done; systemctl show -p MainPID,ActiveState,SubState nginx;"
    " systemctl cat nginx; systemctl is-system-running",
    "sysv": "service nginx status >/dev/null; echo $?; invoke-rc.d --query nginx restart; echo $?",
}
_NETLINK: Final = (
    r"^Cannot open netlink socket.*\n"  # its answers would be the shadow's own sockets
)
# Lines of the output that may differ, each with its reason.
ALLOWED: Final = {
    # How long the guest runs is told as it was when it fell asleep.
    "uptime": r"[0-9]+|min|days?",
    # Log lines that are in memory alone are told by the journal in the guest. What a control group
    # used, its limits, and how earlier commands of a unit ended are in the manager's heap.
    "status": r"^ *(?:Memory|CPU|Active|Process): .*\n|^[A-Z][a-z]{2} \d+ [0-9:]{8} .*\n"
    r"|(?<=Tasks: \d) \(limit: \d+\)",
    # The slice has no process and no trace outside of the manager's heap.
    "units": r"^ *system-modprobe\.slice .*\n|^\d+ loaded units listed.*\n",
    # It asks by netlink once for each port, and then reads /proc. Packet sockets are not told, and
    # interfaces that ioctl(2) asks for are the shadow's. Its test "lkm", which asks for each of
    # four million pids, takes two minutes in the shadow and is left out.
    "chkrootkit": _NETLINK + r"|^WARNING: Output from ifpromisc:\n(?:.*PACKET SNIFFER.*\n)+\n",
}  # fmt: skip
_APART: Final = frozenset(("ps", "lsof", "ss", "free"))
# What the kernel and systemd-udevd keep for a while and end when they are idle.
_ENDS: Final = re.compile(r"\[?kworker|\(udev-worker\)")
# What wakes up by itself, too: it has other descriptors and states then.
_LIVELY: Final = re.compile(
    rf"{_ENDS.pattern}|systemd-journal|systemd-udevd|qemu-ga|rcu_|^systemd$"
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """What each command prints, in the shadow and in the guest."""
    folder = tmp_path_factory.mktemp("programs")
    world = World(make_clone(_base(), folder / "vm"), folder / "home")
    script = "".join(f"echo '=== {name}'; {{ {one}; }} 2>&1; " for name, one in COMMANDS.items())
    script = f"export LC_ALL=C.UTF-8 COLUMNS=200 TERM=dumb; exec </dev/null; {script}"
    ours = world.run("run", "--", "sh", "-c", script)
    assert ours.status == 0, ours
    with qemu.restore(world.config, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            live = guest_run(vm, script, timeout_s=300).stdout.decode(errors="replace")
        finally:
            vm.kill()
    shadow, guest = _parts(ours.result["output"]), _parts(live)
    return {name: (shadow[name], guest[name]) for name in COMMANDS}


def _base() -> Path:
    usual = Recipe()
    image = build_image(GUESTS, Recipe(packages=(*usual.packages, *PACKAGES)), progress=print)
    return make_suspended(image, GUESTS / f"{image.disk.parent.name}-suspended", progress=print)


def _parts(text: str) -> dict[str, str]:
    _, *parts = re.split(r"^=== (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - _APART))
def test_program_prints_the_same(seen: dict[str, tuple[str, str]], name: str) -> None:
    pattern = ALLOWED.get(name)
    ours, live = (
        re.sub(pattern, "", text, flags=re.MULTILINE) if pattern else text for text in seen[name]
    )
    assert ours == live
    assert len(ours.strip()) > 2 or name == "chkrootkit"  # it is quiet when all is well


def test_ps_lists_the_same_tree(seen: dict[str, tuple[str, str]]) -> None:
    """States but for sleeping ones are of a moment; the test's own processes are on both sides."""
    ours, live = (
        {
            int(line.split()[0]): re.sub(r"(?<= )[RSDI](?=[sl+<N]* )", "S", line)
            for line in text.splitlines()[1:]
            if not _ENDS.search(line)
        }
        for text in seen["ps"]
    )
    last = max(pid for pid in ours if pid < 4_000_000)
    ours, live = ({pid: line for pid, line in one.items() if pid <= last} for one in (ours, live))
    assert len(ours) > 50
    assert ours == live


def test_lsof_lists_the_same_files(seen: dict[str, tuple[str, str]]) -> None:
    """Device numbers are those of the shadow's mounts, and what has no type there shows another."""
    ours, live = (_open_files(text) for text in seen["lsof"])
    asleep = {pid for pid, *_ in ours}
    assert len(ours) > 100
    assert ours == {one for one in live if one[0] in asleep}


def _open_files(text: str) -> set[tuple[str, str, str]]:
    """Process, kind of descriptor, and name."""
    found = set()
    pid = command = kind = ""
    for line in text.splitlines():
        field, value = line[:1], line[1:]
        match field:
            case "p":
                pid = value
            case "c":
                command = value
            case "f":
                kind = value if value in ("cwd", "rtd", "txt", "mem") else "open"
            case "n" if not _LIVELY.search(command) and int(pid) < 4_000_000:
                name = value.partition(" (path ")[0]
                # Mapped files of another device than their path's are listed beside the program.
                # /proc/net/unix has the sockets with a name, and there is no /proc/net/netlink.
                if name.startswith(("/", "*:")):
                    found.add((pid, "txt" if kind == "mem" else kind, name))
    return found


def test_ss_lists_the_same_listeners(seen: dict[str, tuple[str, str]]) -> None:
    """/proc/net does not tell how many may wait, nor that an address of IPv6 is one."""
    ours, live = (
        {
            (words[-1], re.sub(r"^\*|^\[::\]|^0\.0\.0\.0", "", words[3]))
            for words in map(str.split, text.splitlines())
            if words[0] in ("LISTEN", "UNCONN") and "users:" in words[-1]
        }
        for text in seen["ss"]
    )
    assert ours == live
    assert {port for _, port in ours} >= {":22", ":80"}
    unix = [
        {words[4] for words in map(str.split, text.splitlines()) if words[1:2] == ["LISTEN"]}
        for text in seen["ss"]
    ]
    assert unix[0] == unix[1]
    assert "/run/systemd/private" in unix[0]


def test_free_tells_the_same_memory(seen: dict[str, tuple[str, str]]) -> None:
    ours, live = ([int(word) for word in re.findall(r"\d+", text)] for text in seen["free"])
    assert ours[0] == live[0]
    assert abs(ours[1] - live[1]) < live[0] // 20
