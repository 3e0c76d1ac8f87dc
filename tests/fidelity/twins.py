"""Two twins of one suspended guest: one updates itself, the other is updated in its sleep."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.fidelity import facts
from tests.fidelity.facts import Facts
from tests.vm import ssh_session
from tests.vm.world import World

from ouassister.errors import AgentError, DeadlineError, OUassisterError, StateError
from ouassister.provider import qemu, vmtoml
from ouassister.testing import Recipe, build_image, clone, guest_run, make_suspended
from ouassister.testing.guest import locked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ouassister.provider.qemu import RunningVM

BUILD: Final = Path(__file__).parents[2] / "build"
_LIMIT_S: Final = 7200.0
_SETTLED_S: Final = 300.0
_MARGIN_S: Final = 10.0  # the save file is finished some time after the guest fell asleep
_MEMORY_MIB: Final = 1024
# Sources of which the newest version is in the last point release, so that a guest without updates
# would have nothing to upgrade.
_OLDER: Final[dict[str, tuple[str, ...]]] = {
    "bookworm": ("glibc", "systemd", "openssh"),
    "trixie": ("openssh", "openssl"),
}
# The mirrors have lost the newest kernel of a release that ends.
_KERNELS: Final = {"bullseye": "bullseye"}
# Nothing but the update shall change the twins: they have slept for long, so all timers are due.
QUIET: Final = "systemctl stop '*.timer'; sync"
# As a careful administrator would: nobody is asked, and what was edited stays.
_APT: Final = (
    "DEBIAN_FRONTEND=noninteractive apt-get -q -y"
    " -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold"
)
# Jobs, and what was put off: the restart of the guest's agent, half a minute after a resume.
_PENDING: Final = (
    "systemctl list-jobs --no-legend;"
    " systemctl list-units --no-legend --plain 'run-*.timer' 'run-*.service'"
)
# The repository of a test is on the host's loopback, which a guest has at this address (slirp).
# The list is in memory: the guest's own says what it says to both twins.
_HOST: Final = "10.0.2.2"
_SOURCES: Final = "/dev/shm/twin.list"  # noqa: S108 - of the guest
_ONLY: Final = f" -o Dir::Etc::SourceList={_SOURCES} -o Dir::Etc::SourceParts=-"


_LAST_WORDS: Final = (
    "systemctl --failed --no-pager --plain; journalctl -b --no-pager -o short-monotonic"
    " | grep -v guest-exec | tail -n 40"
)


_UNIT: Final = "twin-of-a-test.service"
_OUTPUT: Final = "/dev/shm/twin.log"  # noqa: S108 - of the guest
_LOOK_S: Final = 30.0
# What a look ends with while the agent, or the service manager, is just being started anew.
_RESTARTED: Final = (AgentError, DeadlineError, StateError)
_POLL_S: Final = 4.0  # each look costs an emulated guest half a second


class UpdateFailedError(Exception):
    """A twin could not be updated; says which, and how it ended."""


class NothingToDoError(UpdateFailedError):
    """What was asked for is there already, and current."""


@dataclass(frozen=True)
class Wish:
    """What both shall do: install packages, or upgrade everything when there are none."""

    packages: tuple[str, ...] = ()
    local_port: int = 0  # of the only repository, on the host's loopback; 0: the guest's sources
    may_fail: bool = False  # some package of it does not install, in the twin either
    shown: tuple[str, ...] = ()  # files whose text is wanted


@dataclass(frozen=True)
class Pair:
    """What came of one update of both twins.

    ``since_s``: when they fell asleep, or a little earlier. ``update`` and ``resume`` are the
    reports of the one that was updated in its sleep.
    """

    theirs: Facts
    ours: Facts
    since_s: float
    update: Mapping[str, Any]
    resume: Mapping[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def staged(self) -> dict[str, str]:
        """Packages that the guest's own dpkg installed, and why."""
        modes = self.update["modes"]
        return {one["name"]: one["reason"] for one in modes if one["mode"] == "staged"}


def sleeping(
    release: str, packages: tuple[str, ...], *, outdated: bool, held: tuple[str, ...] = ()
) -> Path:
    """The ``vm.toml`` of a suspended guest with these packages beside the usual ones; cached.

    ``held`` are packages that neither twin upgrades, as when the mirror has lost them.
    """
    usual = Recipe(suite=release)
    packages = (*usual.packages, *packages)
    recipe = Recipe(suite=release, packages=packages, kernel_suite=_KERNELS.get(release, ""))
    older = _OLDER.get(release, ()) if outdated else ()
    image = build_image(BUILD / "guests", recipe, outdated=outdated, older=older, progress=print)
    folder = BUILD / "guests" / f"{image.disk.parent.name}-{_MEMORY_MIB}-suspended"
    usual_one = make_suspended(image, folder, memory_mib=_MEMORY_MIB, progress=print)
    quiet = folder.with_name("-".join((folder.name, "session", *held)))
    with locked(quiet.with_name(f"{quiet.name}.lock")):
        if not (quiet / "save.img").is_file() or (quiet / "save.img").is_symlink():
            shutil.rmtree(quiet, ignore_errors=True)
            with again(clone(usual_one, quiet)) as vm:
                guest_run(vm, QUIET, timeout_s=120)
                if held:
                    guest_run(vm, ["apt-mark", "hold", *held], timeout_s=120)
                guest_run(vm, ssh_session.OPEN, timeout_s=120)
                assert guest_run(vm, ssh_session.ask("before"), timeout_s=90).stdout
    return quiet / "vm.toml"


@contextlib.contextmanager
def again(toml: Path) -> Iterator[RunningVM]:
    """A clone that runs for a block, behind its gate, and is suspended again at the end of it."""
    config = vmtoml.load(toml)
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            yield vm
            config.save.unlink()  # a link to that of the guest that it is a clone of
            vm.suspend()
        except BaseException:
            vm.kill()
            raise


def update_both(base: Path, folder: Path, wish: Wish) -> Pair:
    """Update a pair of twins, each its way, and ask both.

    Raises:
        UpdateFailedError: One of them could not be updated.
    """
    programs = ["make", "-s", "-C", str(Path(__file__).parents[1] / "view")]
    # A make that runs this would pass its variables on.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    subprocess.run(programs, check=True, env=environment)
    seconds: dict[str, float] = {}
    save = base.with_name("save.img").resolve()
    since_s = save.stat().st_mtime - _MARGIN_S
    # Inside out at the end: guests that are killed answer nobody, so that the thread ends, too.
    with ThreadPoolExecutor(1) as beside, contextlib.ExitStack() as stack:
        config = vmtoml.load(clone(base, folder / "twin"))
        twin = stack.enter_context(_ended(qemu.restore(config, links_up=True)))
        twin.qga()
        twin.cont()
        awake = beside.submit(_by_itself, twin, wish, since_s, seconds)
        with _timed(seconds, "ours"):
            own, update, resume = _in_its_sleep(clone(base, folder / "ours"), folder / "home", wish)
            stack.enter_context(_ended(own))
        with _timed(seconds, "ask ours"):
            ours = _settled_facts(own, since_s, wish.shown)
            own.qmp.execute("stop")
        theirs = awake.result()
        both = facts.one_sided(theirs, ours)
        theirs = facts.with_digests(theirs, facts.digests(twin, both))
        own.cont()
        ours = facts.with_digests(ours, facts.digests(own, both))
    return Pair(theirs, ours, since_s, update, resume, seconds)


def _by_itself(vm: RunningVM, wish: Wish, since_s: float, seconds: dict[str, float]) -> Facts:
    with _timed(seconds, "twin"):
        _update_awake(vm, wish)
    with _timed(seconds, "ask the twin"):
        return _settled_facts(vm, since_s, wish.shown)


def _update_awake(vm: RunningVM, wish: Wish) -> None:
    guest_run(vm, f"date -s @{time.time():.0f}")  # the agent would write /etc/adjtime
    apt = _APT
    if wish.local_port:
        source = f"deb [trusted=yes] http://{_HOST}:{wish.local_port}/ ./\n"
        vm.qga().write_file(_SOURCES, source.encode())
        apt += _ONLY
    words = shlex.join(wish.packages)
    # What a mirror has lost does not keep the rest away, asleep either.
    what = f"install {words}" if words else "upgrade --with-new-pkgs --fix-missing"
    for command in (f"{apt} update", f"{apt} {what}"):
        status, told = as_unit(vm, command)
        if status != 0 and not (wish.may_fail and what in command):
            raise UpdateFailedError(f"the twin: {command!r}: {told}")


def as_unit(vm: RunningVM, command: str) -> tuple[int, str]:
    """Run a command as a unit of its own: the guest's agent may be among what is updated.

    Returns:
        Its exit status, and the last that it printed.
    """
    options = [f"--property=Standard{one}=file:{_OUTPUT}" for one in ("Output", "Error")]
    unit = ["systemd-run", "--quiet", f"--unit={_UNIT}", "--remain-after-exit", *options]
    guest_run(vm, [*unit, "sh", "-c", command])
    end = time.monotonic() + _LIMIT_S
    state: dict[str, str] = {}
    while state.get("SubState", "running") in ("running", "start"):
        if time.monotonic() > end:
            raise UpdateFailedError(f"the twin: {command!r} does not end")
        must_live(vm)
        time.sleep(_POLL_S)  # between two looks
        with contextlib.suppress(*_RESTARTED):
            told = guest_run(vm, f"systemctl show -p SubState,ExecMainStatus {_UNIT}")
            state = dict(line.split("=", 1) for line in told.stdout.decode().splitlines())
    done = guest_run(vm, f"systemctl stop {_UNIT}; systemctl reset-failed {_UNIT};"
                     f" tail -c 1500 {_OUTPUT}", check=False)  # fmt: skip
    return int(state["ExecMainStatus"]), done.stdout.decode(errors="replace")


def _in_its_sleep(
    toml: Path, home: Path, wish: Wish
) -> tuple[RunningVM, dict[str, Any], dict[str, Any]]:
    world = World(toml, home, _LIMIT_S)
    try:
        return _updated(world, wish)
    except BaseException:
        with contextlib.suppress(OUassisterError), qemu.attach(world.config) as lost:
            lost.kill()
        raise


def _updated(world: World, wish: Wish) -> tuple[RunningVM, dict[str, Any], dict[str, Any]]:
    reports = []
    install = [f"--install={name}" for name in wish.packages]
    for verb, arguments in (("update", install), ("resume", [])):
        done = world.run(verb, *arguments)
        if done.status == 10:
            raise NothingToDoError("ours: there is nothing to do")
        if (verb, done.status, wish.may_fail) == ("resume", 41, True):  # the gate stays closed
            reports.append({"failed_actions": [done.value["error"]["message"]]})
            continue
        if done.status not in (0, 11, 12):
            told = done.value.get("error")
            raise UpdateFailedError(f"ours: {verb} ended with {done.status}: {told}")
        reports.append(done.result)
    update, resume = reports
    vm = qemu.attach(world.config)
    if resume["failed_actions"] and not wish.may_fail:
        with _ended(vm):
            words = guest_run(vm, _LAST_WORDS, check=False).stdout.decode(errors="replace")
            raise UpdateFailedError(f"ours: {'; '.join(resume['failed_actions'])}\n{words}")
    return vm, update, resume


def _settled_facts(vm: RunningVM, since_s: float, shown: tuple[str, ...]) -> Facts:
    end = time.monotonic() + _SETTLED_S
    pending = "the agent does not answer"
    while pending:
        if time.monotonic() > end:
            raise UpdateFailedError(f"jobs do not end: {pending}")
        must_live(vm)
        time.sleep(1)  # between two looks
        with contextlib.suppress(*_RESTARTED):
            told = guest_run(vm, _PENDING, timeout_s=_LOOK_S)
            pending = told.stdout.decode(errors="replace").strip()
    return facts.ask(vm, since_s, shown)


def must_live(vm: RunningVM) -> None:
    """Make sure that a guest is still there to be asked.

    Raises:
        UpdateFailedError: It is not: the other one could not be updated.
    """
    if not Path(f"/proc/{vm.pid}").exists():
        raise UpdateFailedError("the guest has been ended")


@contextlib.contextmanager
def _ended(vm: RunningVM) -> Iterator[RunningVM]:
    """The guest does not outlive the block."""
    try:
        yield vm
    finally:
        vm.kill()


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 2)
