"""A real user of this host with subordinate ids, for as long as a test takes.

The checkout may lie where no other user can go, so the user has a copy of everything: the package
in a virtual environment of its own, and the guest.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.conftest import lacking, need
from tests.vm.world import Done

import ouassister
from ouassister.provider import vmtoml
from ouassister.testing import clone, overlay

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).parents[2]
_NAME: Final = "ouassister-test"
_IDS: Final = 65536
_FIRST_ID: Final = 0x6F000000  # where neither useradd nor systemd hands any out
_PATH: Final = "/usr/local/bin:/usr/bin:/bin"  # as a user of Debian has it
# In a mount namespace of its own, devices are open to the user as udev would have them: $1 is an
# empty folder, $2 the user's name. What this host has them like is not touched.
_ENTER: Final = r"""set -eu
mount -t tmpfs -o mode=755 tmpfs "$1"
for name in fuse kvm; do
    [ -c "/dev/$name" ] || continue
    mknod -m 666 "$1/$name" c $(stat -c '0x%t 0x%T' "/dev/$name")
    mount --bind "$1/$name" "/dev/$name"
done
id=$2
shift 2
exec setpriv --reuid "$id" --regid "$(id -g "$id")" --init-groups --inh-caps=-all -- "$@"
"""


@dataclass(frozen=True)
class User:
    """Who owns a guest and nothing else."""

    name: str
    uid: int
    gid: int
    place: Path

    @property
    def home(self) -> Path:
        return self.place / "home"

    @property
    def state(self) -> Path:
        """Where the command line keeps its state for a user."""
        return self.home / ".local/share/ouassister"

    @property
    def ids(self) -> range:
        return range(_FIRST_ID, _FIRST_ID + _IDS)

    def command(self, argv: Sequence[str]) -> list[str]:
        """An argument list that runs another as the user."""
        enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, "sh"]
        return [*enter, str(self.place / "dev"), self.name, *argv]

    def run(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a program, with an environment as a login makes it."""
        environment = {"HOME": str(self.home), "USER": self.name, "PATH": _PATH}
        return subprocess.run(
            self.command(argv),
            env=environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def ouassister(self, verb: str, *words: str) -> Done:
        """The command line."""
        python = str(self.place / "venv" / "bin" / "python")
        done = self.run([python, "-I", "-m", "ouassister", verb, "--json", *words])
        assert "Traceback" not in done.stderr, done.stderr
        value: Any = json.loads(done.stdout) if done.stdout else {}
        return Done(done.returncode, value, done.stderr)

    def processes(self) -> list[str]:
        """Who runs with the user's id, or with a subordinate one."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                uid = entry.stat().st_uid
                status = (entry / "status").read_text()
                real = int(re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]
                if {uid, real} & {self.uid, *self.ids}:
                    found.append(f"{entry.name} {(entry / 'comm').read_text().strip()}")
        return found

    def await_no_processes(self) -> None:
        """Let the kernel end what was killed."""
        end = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        assert left == []

    def foreign(self) -> list[str]:
        """What in the user's folders belongs to somebody else."""
        return [
            f"{path} ({path.lstat().st_uid}:{path.lstat().st_gid})"
            for path in (self.home, *self.home.rglob("*"))
            if (path.lstat().st_uid, path.lstat().st_gid) != (self.uid, self.gid)
        ]


@contextlib.contextmanager
def temporary_user() -> Iterator[User]:
    """Make the user, with an installation of ours; nothing of it is left afterwards."""
    if os.geteuid() != 0:
        lacking("making a user takes root")
    for tool in ("useradd", "usermod", "userdel", "setpriv", "newuidmap", "qemu-img"):
        need(tool)
    lock = Path(tempfile.gettempdir(), f"{_NAME}.lock")
    with lock.open("w") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        _remove()  # of a run that was killed, as the folders
        for left in Path("/var/tmp").glob("ouassister-user-*"):  # noqa: S108
            shutil.rmtree(left)
        place = Path(tempfile.mkdtemp(prefix="ouassister-user-", dir="/var/tmp"))
        try:
            place.chmod(0o755)
            (place / "dev").mkdir()
            home = ["--create-home", "--home-dir", str(place / "home")]
            _do("useradd", "--user-group", *home, "--shell", "/bin/sh", _NAME)
            ids = f"{_FIRST_ID}-{_FIRST_ID + _IDS - 1}"
            _take_all()  # what useradd handed out
            _do("usermod", "--add-subuids", ids, "--add-subgids", ids, _NAME)
            entry = pwd.getpwnam(_NAME)
            _install(place / "venv")
            yield User(_NAME, entry.pw_uid, entry.pw_gid, place)
        finally:
            _remove()
            shutil.rmtree(place)


def give_guest(user: User, suspended: Path) -> Path:
    """Give the user a twin of a suspended guest; return its ``vm.toml``.

    As docs/how-to/unprivileged.md wants it: save file and topmost image are the user's; what is
    behind needs only be readable.
    """
    config = vmtoml.load(suspended)
    folder = user.home / "vm"
    toml = clone(suspended, folder)
    twin = vmtoml.load(toml)
    (disk,) = twin.disks
    base = user.place / "base.qcow2"
    _do("qemu-img", "convert", "-O", "qcow2", str(config.disks[0].path), str(base))
    disk.path.unlink()
    overlay(disk.path, base, "qcow2")
    twin.save.unlink()
    shutil.copyfile(config.save.resolve(), twin.save)
    command = list(twin.command)
    for option in ("-kernel", "-initrd"):
        at = command.index(option) + 1
        shutil.copyfile(command[at], user.place / option.lstrip("-"))
        command[at] = str(user.place / option.lstrip("-"))
    toml.write_text(vmtoml.dump(replace(twin, command=tuple(command))))
    for path in (base, user.place / "kernel", user.place / "initrd"):
        path.chmod(0o644)
    for path in (folder, *folder.iterdir()):
        shutil.chown(path, user.uid, user.gid)
        path.chmod(0o700 if stat.S_ISDIR(path.stat().st_mode) else 0o600)
    return toml


def take_ids(user: User) -> None:
    """Take the subordinate ids away."""
    last = user.ids[-1]
    _do("usermod", "--del-subuids", f"{user.ids[0]}-{last}", user.name)
    _do("usermod", "--del-subgids", f"{user.ids[0]}-{last}", user.name)


def _install(folder: Path) -> None:
    """Put the package and what it needs, without what only tests need, into an environment."""
    _do(_interpreter(), "-m", "venv", "--without-pip", str(folder))
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder)})
    target = Path(purelib)
    names = re.findall(r"^([\w.-]+)==", (ROOT / "requirements/runtime.txt").read_text(), re.M)
    for name in names:
        for file in importlib.metadata.files(name) or ():
            if ".." not in file.parts:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(str(file.locate())), target / file)
    package = Path(ouassister.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, target / "ouassister", ignore=ignored)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))


def _interpreter() -> str:
    """A Python of our version that everybody may run: extension modules fit no other."""
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in (os.path.realpath(sys.executable), f"/usr/bin/python{ours}"):
        path = Path(name).resolve()
        if path.exists() and all(one.stat().st_mode & 0o001 for one in (path, *path.parents)):
            return str(path)
    return lacking(f"no Python {ours} that users may run ('make deps' installs Debian's)")


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _take_all() -> None:
    for table, option in (("subuid", "--del-subuids"), ("subgid", "--del-subgids")):
        path = Path("/etc", table)
        for line in path.read_text().splitlines() if path.exists() else ():
            name, _, rest = line.partition(":")
            if name == _NAME:
                first, _, count = rest.partition(":")
                _do("usermod", option, f"{first}-{int(first) + int(count) - 1}", _NAME)


def _remove() -> None:
    subprocess.run(["userdel", "--force", _NAME], check=False, capture_output=True)
    with contextlib.suppress(KeyError):
        pwd.getpwnam(_NAME)
        raise AssertionError(f"the user {_NAME} cannot be removed")
