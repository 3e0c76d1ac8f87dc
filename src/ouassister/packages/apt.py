"""The guest's own apt and dpkg, run in the shadow.

Refresh and download see the network; planning and the update itself do not. Package lists and
archives live in a cache folder of the VM on the host, so nothing of them enters the union layer
and an interrupted download goes on where it stopped.
"""

from __future__ import annotations

import functools
import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.errors import (
    DeadlineError,
    NoSolutionError,
    PackageNotFoundError,
    RepositoryError,
    UnsupportedGuestError,
    UpdaterError,
    UsageError,
    WorkDiskFullError,
)
from ouassister.model import Archive, LeftOut, PackageChange
from ouassister.packages import apt_mirrors, apt_output, apt_status
from ouassister.packages.apt_status import PackageError, Work
from ouassister.shadow.events import open_regular
from ouassister.shadow.fetch.proxy import PROXY
from ouassister.shadow.session import SCRIPT_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from ouassister.model import Request
    from ouassister.shadow.fetch.mirrors import Mirrors
    from ouassister.shadow.session import Shadow

# In the order in which apt takes them (apt pkgcache lock, then dpkg's frontend protocol).
LOCKS: Final = (
    b"/var/lib/dpkg/lock-frontend",
    b"/var/lib/dpkg/lock",
    b"/var/cache/apt/archives/lock",
)
UPDATERS: Final = frozenset(
    (b"/usr/bin/dpkg", b"/usr/bin/apt", b"/usr/bin/apt-get", b"/usr/bin/aptitude")
)

# Questions are answered by their defaults, and not marked as seen: an administrator who configures
# a package later is asked, as after any other run that nobody watched.
_ENVIRONMENT: Final = {"DEBIAN_FRONTEND": "noninteractive"}
_OPTIONS: Final = (
    "APT::Get::Assume-Yes=true",
    "APT::Color=0",
    "Dpkg::Use-Pty=0",
    # Recorders stand before the guest's own programs (ouassister.shadow.recorder).
    "DPkg::Path=/run/ouassister/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "DPkg::Lock::Timeout=0",
    "Acquire::Retries=2",
    "Acquire::ForceHash=SHA256",
    # The administrator's configuration files stay.
    "Dpkg::Options::=--force-confdef",
    "Dpkg::Options::=--force-confold",
)
# The second: a file larger than the room that was left when the program began (RLIMIT_FSIZE). The
# third is apt's own, before it fetches.
_NO_ROOM: Final = (
    "No space left on device",
    "File too large",
    "You don't have enough free space in",
)
_PINS: Final = "preferences"
_KEPT, _NEVER = 1001, -1  # apt_preferences(5), "How APT Interprets Priorities"
_TOLD: Final = (
    "-oAPT::Status-Fd=9",
    "-oDpkg::Options::=--log=/run/ouassister/log/dpkg.log",
)
_EMULATE: Final = (
    "cd /run/ouassister/log && : >dpkg.log && : >audit && date +%z >zone"
    ' && cd / && "$@" 9>/run/ouassister/log/status && dpkg --audit >/run/ouassister/log/audit'
)
# With all of a release's 60,000 packages in view, apt works for about a second before it calls dpkg
# (dependency cache, solution, request to the planner). The plan has answered all that, so the run
# itself sees the planned versions alone: of the same lists, with their Release files. The excerpt
# is made while archives are fetched, and used when apt simulates the same changes with it.
EXCERPT_SCRIPT: Final = Path(__file__).with_name("excerpt.awk")
_EXCERPT: Final = (
    "-oDir::State::lists=/run/ouassister/lists/",
    "-oDir::Cache::pkgcache=/run/ouassister/lists/pkgcache.bin",
    "-oDir::Cache::srcpkgcache=",
)
_MAKE_EXCERPT: Final = (
    "cd /var/lib/apt/lists && rm -f /run/ouassister/lists/*"
    " && { cp -p ./*Release ./*Release.gpg /run/ouassister/lists/ || true; }"
    " && awk -v target=/run/ouassister/lists -f /run/ouassister/bin/excerpt.awk"
    " /run/ouassister/log/simulate RS= ./*_Packages"
)
_READ_AHEAD: Final = (
    "find /var/lib/dpkg /usr/share/perl5/Debconf* /usr/share/debconf /var/cache/debconf"
    " /usr/bin/dpkg* /usr/sbin/dpkg* /usr/bin/tar /usr/bin/rm /usr/bin/sh /usr/bin/perl"
    " /usr/bin/locale /usr/sbin/ldconfig* /usr/lib/*/perl-base /usr/lib/*/liblzma*"
    " /usr/lib/*/libzstd* /usr/lib/*/libmd.* /usr/lib/*/libacl* /usr/lib/*/libselinux*"
    " -type f -exec cat {} +"
)


@dataclass(frozen=True, slots=True)
class Simulation:
    """What apt would do, and what it has to fetch for that; ``output`` is what it printed."""

    changes: tuple[PackageChange, ...]
    archives: tuple[Archive, ...]
    kept_back: tuple[LeftOut, ...]
    output: str = ""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a run of apt in the shadow went.

    Attributes:
        problem: What apt and dpkg said; "" when all went well.
        timed_out: It did not end in time, and was killed.
        errors: Packages that dpkg gave up.
        works: What dpkg worked on, in order.
    """

    problem: str
    timed_out: bool
    errors: tuple[PackageError, ...]
    works: tuple[Work, ...]


class Apt:
    """apt-get in one shadow.

    Args:
        shadow: Where it runs.
        tell: Takes one line of progress.
        timeout_s: Limit of each call, in seconds.
        local_mirrors: Addresses of this host that are meant when a source names them.
        script_timeout_s: Limit of each script of a package, in seconds.
    """

    def __init__(
        self,
        shadow: Shadow,
        tell: Callable[[str], None],
        timeout_s: float,
        local_mirrors: tuple[tuple[str, int], ...] = (),
        script_timeout_s: float = SCRIPT_TIMEOUT_S,
    ) -> None:
        self._shadow = shadow
        self._tell = tell
        self._timeout_s = timeout_s
        self._local_mirrors = local_mirrors
        self._script_timeout_s = script_timeout_s
        self._calls = 0
        self._pins: tuple[PackageChange, ...] = ()
        self._staged: tuple[PackageChange, ...] = ()
        self._narrow = False

    def refresh(self) -> tuple[str, ...]:
        """Fetch the package lists.

        Returns:
            What could not be fetched; apt goes on with what it has of that.

        Raises:
            RepositoryError: No list could be fetched.
        """
        # What dpkg will read is read meanwhile: the network is slower than the disk.
        script = f'({_READ_AHEAD}) >/dev/null 2>&1 & exec "$@"'
        argv = ["sh", "-c", script, "apt-get", *self._apt_get(network=True), "update"]
        status, output = self._run(argv, network=True)
        if "No space left on device" in output:
            raise WorkDiskFullError(f"no room for package lists: {apt_output.error_lines(output)}")
        # apt-get ends with 100 when a server answers 404 for one list, with 0 when it is away.
        unreachable = apt_output.unreachable_indexes(output)
        if status != 0 and not apt_output.reached_indexes(output):
            raise RepositoryError(f"apt-get update: {apt_output.error_lines(output)}")
        if status != 0 and not unreachable:
            unreachable = (apt_output.error_lines(output),)
        return unreachable

    def plan(self, request: Request, *, fetch: bool = False, again: bool = False) -> Simulation:
        """Simulate; nothing is changed.

        Args:
            request: What is wanted.
            fetch: Fetch the archives meanwhile; apt works out the same solution for that.
            again: This is what `emulate` is asked for next, after less was fetched for more.

        Raises:
            PackageNotFoundError: A package that was asked for has no candidate.
            NoSolutionError: apt-get finds none.
            WorkDiskFullError: There is no room for the archives.
        """
        words = _words(request)
        get = shlex.join(self._apt_get())
        fetching = shlex.join(self._apt_get(network=True)) if fetch else ""
        wish = shlex.join(words)
        # What lies in the cache is left out of the list: apt is told of another one, without any.
        uris = f"{get} -o Dir::Cache::Archives=/run/ouassister/none/ --print-uris {wish}"
        chains = [{"simulate": f"{get} -s {wish}"}, {"uris": uris}]
        if fetch:
            self._shadow.provide(EXCERPT_SCRIPT.name, EXCERPT_SCRIPT.read_bytes())
            chains[0]["excerpt"] = _MAKE_EXCERPT
            chains[0]["simulate-excerpt"] = f"{get} {shlex.join(_EXCERPT)} -s {wish}"
            chains.append({"download": f"{fetching} --download-only {wish}"})
        elif again and self._narrow:
            chains[0]["simulate-excerpt"] = f"{get} {shlex.join(_EXCERPT)} -s {wish}"
        results = self._run_together(chains, network=fetch)
        status, output = results["simulate"]
        if status != 0:
            missing = apt_output.missing_packages(output)
            if missing:
                raise PackageNotFoundError(
                    f"the guest's repositories have no package {', '.join(missing)}"
                )
            detail = apt_output.error_lines(output)
            broken = apt_output.broken_packages(output)
            raise NoSolutionError(f"apt-get finds no solution: {detail}", broken)
        changes = apt_output.parse_changes(output)
        kept = apt_output.parse_kept_back(output)
        status, output = results["uris"]
        if status != 0:
            raise UpdaterError(f"apt-get --print-uris: {apt_output.error_lines(output)}")
        if fetch and any(words in results["download"][1] for words in _NO_ROOM):
            detail = apt_output.error_lines(results["download"][1])
            raise WorkDiskFullError(f"no room for archives: {detail}")
        if "simulate-excerpt" in chains[0]:
            self._narrow = apt_output.same_changes(changes, results["simulate-excerpt"][1])
            if not self._narrow:
                self._tell("apt-get will read all package lists again: the excerpt does not do")
        archives = apt_output.parse_archives(output)
        return Simulation(changes, archives, kept, results["simulate"][1])

    def lacking(self, archives: tuple[Archive, ...]) -> tuple[Archive, ...]:
        """Those that are not there, or whose digest is not the one of the package lists."""
        folder = self._shadow.spec.cache / "apt" / "archives"
        return tuple(archive for archive in archives if not _is_whole(archive, folder))

    def pin_away(self, changes: tuple[PackageChange, ...]) -> None:
        """From now on, plan as if these versions did not exist; see apt_preferences(5)."""
        self._pins += changes
        self._write_pins()

    def stage(self, changes: tuple[PackageChange, ...]) -> None:
        """From now on, plan as if these packages had to stay as they are; see `pin_away`.

        Other versions of them would do no better, and are not the ones that were planned.
        """
        self._staged += changes
        self._write_pins()

    def automatic(self, names: Collection[str]) -> frozenset[str]:
        """Which of these installed packages nobody asked for by name."""
        status, output = self._run(["apt-mark", "showauto", *names])
        if status != 0:
            raise UpdaterError(f"apt-mark: {apt_output.error_lines(output)}")
        return frozenset(output.split()) & frozenset(names)

    def emulate(self, request: Request, automatic: Collection[str] = ()) -> Ran:
        """Install, offline; what did not go well is in the answer.

        Args:
            request: What to install.
            automatic: Of that, names of packages that nobody asked for.

        Raises:
            WorkDiskFullError: The union layer found no room.
        """
        narrow = _EXCERPT if self._narrow else ()
        command = [*self._apt_get(), *_TOLD, *narrow, "--no-download", *_words(request)]
        argv = ["sh", "-c", _EMULATE, "apt-get", *command]
        timed_out = False
        try:
            status, output = self._run(argv)
        except DeadlineError as error:
            timed_out, status, output = True, 1, f"E: {error.message}"
        if status != 0 and any(words in output for words in _NO_ROOM):
            raise WorkDiskFullError(f"the union layer: {apt_output.error_lines(output)}")
        if status == 0 and automatic:
            status, output = self._run(["apt-mark", "auto", *automatic])
        problem = f"apt-get: {apt_output.error_lines(output)}" if status != 0 else ""
        if status == 0 and (audit := self._shadow.read_log("audit")).strip():
            problem = f"dpkg --audit after the run: {apt_output.error_lines(audit)}"
        errors = apt_status.parse_errors(self._shadow.read_log("status"))
        log, zone = self._shadow.read_log("dpkg.log"), self._shadow.read_log("zone")
        return Ran(problem, timed_out, errors, apt_status.parse_log(log, zone))

    def _apt_get(self, *, network: bool = False) -> list[str]:
        argv = ["apt-get", "-q"]
        for option in (*_OPTIONS, *(self._fetching[1] if network else ())):
            argv += ["-o", option]
        if self._pins or self._staged:
            argv += ["-o", f"Dir::Etc::Preferences=/run/ouassister/bin/{_PINS}"]
        return argv

    @functools.cached_property
    def _fetching(self) -> tuple[Mirrors, tuple[str, ...]]:
        """Where apt goes, and the settings that send it through the proxy."""
        status, output = self._run(["sh", "-c", apt_mirrors.ASK])
        if status != 0:
            detail = apt_output.error_lines(output)
            raise UpdaterError(f"apt-get does not tell its mirrors: {detail}")
        settings = self._shadow.read_log(apt_mirrors.SETTINGS)
        uris = self._shadow.read_log(apt_mirrors.URIS)
        return (
            apt_mirrors.mirrors(uris, settings, self._local_mirrors),
            apt_mirrors.options(settings, PROXY),
        )

    def _run_together(
        self, chains: Sequence[Mapping[str, str]], *, network: bool
    ) -> dict[str, tuple[int, str]]:
        """Run shell commands, the chains side by side; status and output of each, by name."""
        folder = "/run/ouassister/log"
        parts = []
        for chain in chains:
            steps = "".join(
                f"( {command}; ) >{folder}/{name} 2>&1; echo $? >{folder}/{name}.status; "
                for name, command in chain.items()
            )
            parts.append(f"{{ {steps}}} &")
        status, output = self._run(["sh", "-c", " ".join([*parts, "wait"])], network=network)
        if status != 0:
            raise UpdaterError(f"the guest's shell failed: {apt_output.error_lines(output)}")
        results = {}
        for name in (name for chain in chains for name in chain):
            code = self._shadow.read_log(f"{name}.status").strip()
            text = self._shadow.read_log(name)
            if code == "127" and name == "simulate":
                raise UnsupportedGuestError("the guest has no apt-get")
            results[name] = (0 if code == "0" else 1, text)
        return results

    def _run(self, argv: list[str], *, network: bool = False) -> tuple[int, str]:
        self._calls += 1
        name = f"{self._calls:02d}-{Path(argv[0]).name}.log"
        status = self._shadow.run(
            argv,
            mirrors=self._fetching[0] if network else None,
            output=name,
            timeout_s=self._timeout_s,
            script_timeout_s=self._script_timeout_s,
            environment=_ENVIRONMENT,
            on_output=self._progress,
        )
        path = self._shadow.output_path(name)
        if status == 127:
            raise UnsupportedGuestError(f"the guest has no {argv[0]}")
        return status, path.read_text(errors="backslashreplace")

    def _progress(self, lines: list[str]) -> None:
        for line in apt_output.progress(lines):
            self._tell(line)

    def _write_pins(self) -> None:
        text = self._read_guest("/etc/apt/preferences")
        for change in self._staged:
            if change.old:  # the first record that speaks of a version counts
                text += _pin(change, f"version {change.old}", _KEPT)
            text += _pin(change, "version *", _NEVER)
        for change in self._pins:
            text += _pin(change, f"version {change.new}", _NEVER)
        self._shadow.provide(_PINS, text.encode("utf-8", "surrogateescape"))

    def _read_guest(self, path: str) -> str:
        status, output = self._run(["cat", path])
        return output if status == 0 else ""


def check_request(request: Request) -> None:
    """Refuse words that are no package names before anything starts.

    Raises:
        UsageError: Names the word.
    """
    for word in request.install:
        if apt_output.PACKAGE.fullmatch(word) is None:
            raise UsageError(f"{word!r} is not a package name")


def _pin(change: PackageChange, what: str, priority: int) -> str:
    """One record of apt_preferences(5)."""
    # "NAME:all" matches nothing (apt 2.6); such a package is of the native architecture.
    package = change.name
    if change.architecture not in ("all", ""):
        package += f":{change.architecture}"
    return f"\nPackage: {package}\nPin: {what}\nPin-Priority: {priority}\n"


def _words(request: Request) -> tuple[str, ...]:
    if request.install:
        return ("install", *request.install)
    return ("upgrade", "--with-new-pkgs")


def _is_whole(archive: Archive, folder: Path) -> bool:
    algorithm, _, expected = archive.digest.partition(":")
    try:
        with open_regular(folder / archive.file_name) as file:
            return hashlib.file_digest(file, algorithm.lower()).hexdigest() == expected
    except FileNotFoundError:
        return False
