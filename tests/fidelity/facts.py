"""What one of the twins says of itself, after its update."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.view import manifest
from tests.vm import ssh_session

from ouassister.testing import guest_run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.provider.qemu import RunningVM

PROGRAM: Final = Path(__file__).parents[2] / "build" / "view" / "manifest"
UNCHANGED: Final = "-"  # the digest of a file that was not touched: its inode's time says so
ABSENT: Final = "absent"
_PLACE: Final = "/dev/shm/manifest"  # noqa: S108 - of the guest
_LIST: Final = "/dev/shm/paths"  # noqa: S108 - of the guest
_LIMIT_S: Final = 900.0
_ESCAPED: Final = re.compile(rb"\\x([0-9a-f]{2})")

# Each is one table: lines that are compared as a set. {since} is when both fell asleep.
QUESTIONS: Final[dict[str, str]] = {
    "packages": "dpkg-query -W -f '${{Package}}:${{Architecture}} ${{Version}} ${{Status}}\\n'",
    "automatic": "apt-mark showauto",
    # Of packages that were installed since: an emulated guest takes half a minute for all.
    "verify": "find /var/lib/dpkg/info -name '*.list' -newermt @{since}"
    " | sed 's|.*/||; s|[.]list$||' | xargs -r dpkg --verify || :",
    "audit": "dpkg --audit",
    "alternatives": "update-alternatives --get-selections",
    "diversions": "dpkg-divert --list",
    "statoverrides": "dpkg-statoverride --list || :",
    "users": "getent passwd; getent group",
    "unit files": "systemctl list-unit-files --no-legend --no-pager | tr -s ' '",
    "active units": "systemctl list-units --no-legend --no-pager --plain"
    " --type=service,socket,timer,path,target --state=active,failed,activating"
    " | awk '{{print $1, $3, $4}}'",
    "failed units": "systemctl --failed --plain --no-legend --no-pager | awk '{{print $1}}'",
    "listening": "ss -Hltun | awk '{{print $1, $5}}';"
    " ss -Hlx | awk '$5 ~ /^[/@]/ {{print $1, $5}}'",
    "initramfs": "find /boot -maxdepth 1 -name 'initrd.img-*' -newermt @{since}"
    " -exec lsinitramfs -l {{}} ';' | awk '{{print $1, $3, $4, $5, $9, $10, $11}}'",
    # What services and udev keep there is theirs; their units and devices are compared above.
    "run": "find /run -xdev -printf '%p %y %m %u %g\\n'"
    " | grep -Ev '^/run/(systemd|udev|log|user|dbus|lock|ouassister|blkid|network)(/| )' || :",
    "devices": "find /dev -xdev '(' -type l -o -type b -o -type c ')' -printf '%p %m %u %g %l\\n'",
    "session": ssh_session.ask("after"),  # one that was open when they fell asleep
    # Their files are their servers' own: what is in them is asked of the servers.
    "databases": "[ ! -S /run/mysqld/mysqld.sock ] || {{ mariadb-check -A; mariadb -N -e '"
    "select table_schema, table_name, engine, table_type from information_schema.tables;"
    " select user, host, plugin from mysql.user;'; }};"
    " [ ! -S /run/postgresql/.s.PGSQL.5432 ] || runuser -u postgres -- pg_dumpall"
    " | grep -Ev '^.(un)?restrict '",  # with a key that each dump makes at random
    "profiles": "cat /sys/kernel/security/apparmor/profiles || :",
    "modules": "awk '{{print $1}}' /proc/modules",
    # The applier gives them another name, where it keeps them for a rollback.
    "replaced files in use": "grep -lsE ' (/usr/.* .deleted.|/var/lib/ouassister/old-.*)$'"
    " /proc/[0-9]*/maps"
    " | sed 's|maps$|comm|' | xargs -r cat | sort -u",
}
_MARK: Final = "oua-table"


@dataclass(frozen=True)
class Facts:
    """Every path of the root file system, the tables, and the text of some files, to look at."""

    nodes: Mapping[str, manifest.Node]
    tables: Mapping[str, frozenset[str]]
    texts: Mapping[str, str] = field(default_factory=dict)


def ask(vm: RunningVM, since_s: float, shown: Iterable[str] = ()) -> Facts:
    """Let a running guest tell; of files that did not change since then, not the digest."""
    texts = {
        name: guest_run(vm, ["cat", name]).stdout.decode(errors="backslashreplace")
        for name in shown
    }
    tables = _tables(vm, since_s)
    vm.qga().write_file(_PLACE, PROGRAM.read_bytes())
    script = f"chmod 755 {_PLACE}; exec {_PLACE} -s {int(since_s)} /"
    result = guest_run(vm, script, timeout_s=_LIMIT_S)
    assert not result.truncated, "the agent cuts long outputs: the tree is too large for it"
    return Facts(manifest.parse(result.stdout), tables, texts)


def _tables(vm: RunningVM, since_s: float) -> dict[str, frozenset[str]]:
    """Ask all questions by one command: each costs an emulated guest half a second."""
    script = "export SYSTEMD_BUS_TIMEOUT=600\n" + "".join(  # 25 s do not do on a busy host
        f"echo '{_MARK} {name}'\n{{ {command.format(since=int(since_s))}; }} || exit\n"
        for name, command in QUESTIONS.items()
    )
    told = guest_run(vm, script, timeout_s=_LIMIT_S).stdout.decode(errors="backslashreplace")
    tables: dict[str, set[str]] = {}
    for line in filter(None, map(str.strip, told.splitlines())):
        if line.startswith(_MARK):
            current = tables.setdefault(line.removeprefix(_MARK).strip(), set())
        else:
            current.add(line)
    assert tables.keys() == QUESTIONS.keys()
    return {name: frozenset(lines) for name, lines in tables.items()}


def digests(vm: RunningVM, paths: Iterable[str]) -> dict[str, str]:
    """SHA-256 of some files of a running guest, by their names as the manifest writes them."""
    names = list(paths)
    if not names:
        return {}
    vm.qga().write_file(_LIST, b"".join(b"/" + plain(name) + b"\0" for name in names))
    script = f"xargs -0 sha256sum -z -- <{_LIST}"
    lines = guest_run(vm, script, timeout_s=_LIMIT_S).stdout.split(b"\0")[:-1]
    assert len(lines) == len(names), "a file went while it was hashed"
    return {name: line[:64].decode() for name, line in zip(names, lines, strict=True)}


def plain(name: str) -> bytes:
    """The bytes of a path that the manifest wrote."""
    return _ESCAPED.sub(lambda match: bytes.fromhex(match[1].decode()), name.encode())


def one_sided(one: Facts, other: Facts) -> list[str]:
    """Files that one twin has touched, and the other has not: only one digest is known."""
    return [
        path
        for path in sorted(one.nodes.keys() & other.nodes.keys())
        if (one.nodes[path].digest == UNCHANGED) != (other.nodes[path].digest == UNCHANGED)
        and one.nodes[path].mode == other.nodes[path].mode
        and one.nodes[path].size == other.nodes[path].size
    ]


def with_digests(facts: Facts, known: Mapping[str, str]) -> Facts:
    """The same with some digests replaced."""
    changed = {path: facts.nodes[path]._replace(digest=value) for path, value in known.items()}
    return replace(facts, nodes={**facts.nodes, **changed})
