"""The host's side of a shadow: start it, run programs in it, end it."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ouassister import codec
from ouassister.disk.layout import Layout
from ouassister.disk.storage import Daemon
from ouassister.errors import (
    DeadlineError,
    HostNotReadyError,
    InternalError,
    UnsupportedGuestError,
    UpdaterError,
    WorkDiskFullError,
    from_code,
)
from ouassister.model import Uts
from ouassister.shadow import blkid, cgroups, ids, raw, sandbox, watch
from ouassister.shadow.events import (
    Event,
    open_regular,
    read_events,
    read_syscalls,
    read_values,
)
from ouassister.shadow.fetch.proxy import REFUSED
from ouassister.shadow.keeper import Configuration
from ouassister.shadow.limits import Limits
from ouassister.shadow.procfs import VALUES
from ouassister.shadow.scripts import Expired
from ouassister.shadow.servicemanager import RECORDS
from ouassister.shadow.servicemanager.recorders import NAMES
from ouassister.shadow.syscalls.records import SYSCALLS
from ouassister.shadow.sysfs.record import ATTRIBUTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ouassister.shadow.fetch.mirrors import Mirrors

TOOLS: Final = Path(__file__).parent / "recorder"
_MAX_REFUSED: Final = 1 << 16
SCRIPT_TIMEOUT_S: Final = 300.0
_FOLLOW_S: Final = 0.25
_MAX_LOG: Final = 64 << 20
_BASE_ENVIRONMENT: Final = {
    "PATH": sandbox.SEARCH_PATH,
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TERM": "dumb",
    # sd-device(3) would refuse a /sys that statfs(2) does not call sysfs (systemd v251 and later,
    # docs/ENVIRONMENT.md).
    "SYSTEMD_DEVICE_VERIFY_SYSFS": "0",
    **blkid.ENVIRONMENT,
}
# What the supervisor and the keeper call it; errors of `call` have their own codes.
_KINDS: Final = {"host": HostNotReadyError.code, "file-system": UnsupportedGuestError.code}


@dataclass(frozen=True, slots=True)
class ShadowSpec:
    """What a shadow is made of.

    ``work`` and ``cache`` are folders of ours, below a private one.
    ``storage`` serves private copies of the volumes of ``layout``.
    """

    work: Path
    cache: Path
    storage: tuple[Daemon, ...]
    layout: Layout
    uts: Uts
    avoid: tuple[Path, ...]  # host files that must stay reachable
    limits: Limits = field(default_factory=Limits)

    @property
    def shared(self) -> Path:
        """The part of the work folder that subordinate ids own: union layer, output, log."""
        return self.work / "shadow"


class Shadow:
    """A started shadow; made by `open_shadow`."""

    def __init__(self, control: socket.socket, spec: ShadowSpec, tools: Path) -> None:
        self._control = control
        self._lines = control.makefile("rb")
        self._tools = tools
        self.spec = spec
        self.expired: list[Expired] = []  # scripts that were killed, in all runs

    def __enter__(self) -> Shadow:
        """Let go of the control socket at the end of the block; the launch ends the shadow."""
        return self

    def __exit__(self, *_error: object) -> None:
        """See `__enter__`."""
        self._lines.close()

    def mount(self) -> None:
        """Mount the volumes as they are now; programs can run then.

        Raises:
            UnsupportedGuestError: One of them cannot be mounted.
            HostNotReadyError: The host refuses a mount.
        """
        self._ask(op="mount")

    def reset(self) -> None:
        """Forget what programs wrote and recorded; the caller makes each tmpfs again.

        Raises:
            HostNotReadyError: The host does not let the union be mounted again.
        """
        self._ask(op="reset")

    def run(
        self,
        argv: Sequence[str],
        *,
        mirrors: Mirrors | None = None,
        package_cache: bool = True,
        output: str | None = None,
        timeout_s: float = 3600,
        script_timeout_s: float = SCRIPT_TIMEOUT_S,
        environment: Mapping[str, str] | None = None,
        on_output: Callable[[list[str]], None] | None = None,
    ) -> int:
        """Run a program of the guest in the guest's view.

        Args:
            argv: The command; it is looked up in the guest.
            mirrors: Reachable through the proxy; otherwise there is loopback alone.
            package_cache: Package lists and archives are the kept ones.
            output: A file name under `output_path` for what it prints; None passes ours on.
            timeout_s: Seconds until it is killed, with everything that it started.
            script_timeout_s: Seconds until a package's script is killed (`expired`); the program
                goes on.
            environment: Added to a minimal one.
            on_output: Called with new lines of the output file while it runs.

        Returns:
            Its exit status, 128 and more for a signal.

        Raises:
            DeadlineError: The time ran out.
            WorkDiskFullError: Only a reserve is left of the disk that it writes to.
            HostNotReadyError: The host would not let the tree be built.
        """
        self._tell(
            op="run",
            argv=list(argv),
            environment={**_BASE_ENVIRONMENT, **(environment or {})},
            mirrors=None if mirrors is None else codec.to_value(mirrors),
            package_cache=package_cache,
            output=output,
            timeout_s=timeout_s,
            script_timeout_s=float(script_timeout_s),
        )
        if output is not None and on_output is not None:
            self._follow(self.output_path(output), on_output)
        answer = self._hear()["result"]
        self.expired += [codec.from_value(Expired, one) for one in answer["expired"]]
        match answer["over"]:
            case watch.FULL:
                place = self.spec.cache if answer["where"] == sandbox.CACHE else self.spec.work
                raise WorkDiskFullError(f"{argv[0]} was ended: only a reserve is left at {place}")
            case watch.UNCONTAINED:
                raise DeadlineError(f"{self.expired[-1]}, and could not be ended by itself")
            case watch.TIMED_OUT:
                raise DeadlineError(
                    f"{argv[0]} did not end within {timeout_s:.0f} s and was killed"
                )
        return int(answer["status"])

    def provide(self, name: str, content: bytes) -> None:
        """Put a file where programs in the shadow read it: ``/run/ouassister/bin/NAME``."""
        (self._tools / name).write_bytes(content)

    def output_path(self, name: str) -> Path:
        """Where `run` leaves an output on the host."""
        return self.spec.shared / "output" / name

    def read_log(self, name: str) -> str:
        """Read what a program in the shadow wrote to ``/run/ouassister/log/NAME``.

        Raises:
            UpdaterError: There is no such file, or none that a shell would have written.
        """
        try:
            with open_regular(self.spec.shared / "log" / name) as file:
                raw = file.read(_MAX_LOG + 1)
        except FileNotFoundError as error:
            raise UpdaterError(f"a program in the shadow removed {name}") from error
        if len(raw) > _MAX_LOG:
            raise UpdaterError(f"a program in the shadow wrote over {_MAX_LOG >> 20} MiB to {name}")
        return raw.decode("utf-8", "backslashreplace")

    def refused_hosts(self) -> tuple[str, ...]:
        """Hosts that programs asked for and that are no mirror, each with the reason."""
        path = self.output_path(REFUSED)
        if not path.exists():
            return ()
        with path.open(encoding="ascii", errors="backslashreplace") as file:
            lines = file.read(_MAX_REFUSED).splitlines()
        return tuple(dict.fromkeys(line.replace("\t", ": ") for line in lines))

    def know(self) -> None:
        """Take what `ouassister.shadow.told` wrote into the shared folder.

        Programs that ran before saw nothing of the guest's processes.
        """
        self._ask(op="know")

    def events(self) -> tuple[Event, ...]:
        """What programs did that belongs to the running guest.

        Calls of the service manager come first, in their order, then values below /proc/sys and
        /sys, then system calls.

        Raises:
            InternalError: What was recorded is not whole.
        """
        output = self.spec.shared / "output"
        return (
            *read_events(output / RECORDS),
            *read_values(output / VALUES),
            *read_values(output / ATTRIBUTES),
            *read_syscalls(output / SYSCALLS),
        )

    def call(self, module: str, function: str, argument: object) -> Any:  # noqa: ANN401 - JSON
        """Call ``module.function(argument)`` where files have the guest's owners.

        The module was named to `launch`. Paths inside are those of
        `ouassister.shadow.sandbox`.
        """
        return self.finish(self.begin(module, function, argument))

    def begin(self, module: str, function: str, argument: object) -> int:
        """Start a `call` that goes on beside others, and beside programs."""
        call: int = self._ask(op="begin", module=module, function=function, argument=argument)
        return call

    def finish(self, call: int) -> Any:  # noqa: ANN401 - JSON
        """Wait for what was begun, and return what it returned."""
        return self._ask(op="finish", call=call)

    def await_ready(self, identity: ids.Ids, keeper: int) -> None:
        """Wait until the volumes are served."""
        while self._hear()["event"] != "ready":
            ids.map_for_user(keeper, identity)
            self._control.sendall(b"m")

    def _ask(self, **request: object) -> Any:  # noqa: ANN401 - JSON
        self._tell(**request)
        return self._hear()["result"]

    def _tell(self, **request: object) -> None:
        self._control.sendall(json.dumps(request).encode() + b"\n")

    def _follow(self, path: Path, on_output: Callable[[list[str]], None]) -> None:
        """Pass new lines on until the answer comes."""
        position, pending = 0, b""
        waiting = True
        while waiting:
            waiting = not select.select([self._control], [], [], _FOLLOW_S)[0]
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(position)
                *lines, pending = (pending + file.read()).split(b"\n")
                position = file.tell()
                on_output([line.decode("utf-8", "backslashreplace") for line in lines])

    def _hear(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise InternalError("the shadow ended without a word")
        message: dict[str, Any] = json.loads(line)
        if message["event"] == "error":
            kind = _KINDS.get(message["kind"], message["kind"])
            raise from_code(kind, message["message"])
        return message


@dataclass(frozen=True, slots=True)
class Launch:
    """A keeper that runs and waits for its configuration."""

    control: socket.socket
    keeper: subprocess.Popen[bytes]


@contextlib.contextmanager
def launch(preload: Sequence[str]) -> Iterator[Launch]:
    """Start the keeper; at the end, however it comes, no process or mount of the shadow is left.

    This needs nothing of the guest, so it can be done while the guest's memory is read.

    Args:
        preload: Modules that `Shadow.call` is for.
    """
    raw.require_x86_64()
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", "-m", "ouassister.shadow.keeper", str(theirs.fileno())]
    with ours:
        with theirs:
            keeper = subprocess.Popen([*command, *preload], pass_fds=[theirs.fileno()], cwd="/")
        with keeper:
            try:
                yield Launch(ours, keeper)
            finally:
                keeper.terminate()  # it kills the init and waits for it: then all is gone
                keeper.wait()
                cgroups.forget(keeper.pid)  # if it was killed


@contextlib.contextmanager
def open_shadow(launched: Launch, spec: ShadowSpec) -> Iterator[Shadow]:
    """Build the shadow in a launched keeper; it lasts until the launch ends.

    The volumes are served as files, and nothing is mounted yet (`Shadow.mount`).

    Raises:
        HostNotReadyError: The host lacks a tool, or refuses a namespace or mount.
    """
    identity = ids.choose()
    for folder in (spec.shared, spec.cache):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)  # subordinate ids pass; the folder above is private
    with tempfile.TemporaryDirectory(prefix="recorders-", dir=spec.work) as tools:
        _install_recorders(Path(tools))
        configuration = Configuration(
            own_userns=identity.own_userns,
            base_uid=1 if identity.own_userns else identity.base_uid,
            base_gid=1 if identity.own_userns else identity.base_gid,
            stage=_choose_stage((spec.work, spec.cache, *spec.avoid)),
            work=str(spec.shared),
            cache=str(spec.cache),
            tools=tools,
            storage=spec.storage,
            layout=spec.layout,
            uts=spec.uts,
            limits=spec.limits,
        )
        launched.control.sendall(json.dumps(codec.to_value(configuration)).encode() + b"\n")
        with Shadow(launched.control, spec, Path(tools)) as shadow:
            shadow.await_ready(identity, launched.keeper.pid)
            yield shadow


def _install_recorders(folder: Path) -> None:
    folder.chmod(0o755)
    script = folder / "recorder"
    script.write_bytes((TOOLS / "record.sh").read_bytes())
    script.chmod(0o755)
    for name in sorted(NAMES):
        (folder / name).symlink_to("recorder")


def _choose_stage(needed: Sequence[Path]) -> str:
    """A folder whose contents the shadow can do without."""
    places = [*needed, Path(sys.prefix), Path(sys.executable), Path(__file__)]
    resolved = [place.resolve() for place in places]
    for stage in sandbox.STAGES:
        path = Path(stage)
        if path.is_dir() and not any(place.is_relative_to(path) for place in resolved):
            return stage
    raise HostNotReadyError(f"all of {', '.join(sandbox.STAGES)} are in use as folders of the run")
