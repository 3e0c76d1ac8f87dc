"""Serves one shadow from inside its user namespace: mounts the tree, runs programs in it.

It is the first process of the shadow's pid namespace: with it ends everything in the shadow. Its
requests are JSON objects, one a line, on a socket that the host's side holds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import socket
import stat
import subprocess
import time
from typing import TYPE_CHECKING, Any, Final

from ouassister import codec
from ouassister.shadow import raw, runner, sandbox
from ouassister.shadow.fetch import proxy
from ouassister.shadow.fetch.mirrors import Mirrors
from ouassister.shadow.syscalls.facts import GuestFacts
from ouassister.shadow.syscalls.handlers import handlers
from ouassister.shadow.syscalls.notify import serve_one
from ouassister.shadow.syscalls.records import SYSCALLS, JsonLines

if TYPE_CHECKING:
    from ouassister.disk.layout import Layout
    from ouassister.model import Uts

_MAX_REQUEST: Final = 1 << 20
_FUSE2FS: Final = "fuse2fs"
# The file system never changes, so the kernel may keep all that it was told: pages across opens
# (kernel_cache), names, attributes and the absence of names (mount.fuse). fuse2fs by default asks
# for attributes each time (attr_timeout=0, misc/fuse2fs.c, main), which took 13,800 of the 19,000
# requests of a small installation and doubled its time.
_MOUNT_OPTIONS: Final = (
    "ro",
    "suid",
    "dev",
    "default_permissions",
    "no_default_opts",
    "use_ino",
    "kernel_cache",
    "entry_timeout=86400",
    "attr_timeout=86400",
    "negative_timeout=86400",
)


class SupervisorError(Exception):
    """A step inside the shadow failed; ``kind`` tells the host's side which error to raise."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Supervisor:
    """The loop. One request at a time; notifications of running programs in between."""

    def __init__(
        self,
        control: socket.socket,
        stage: str,
        layout: Layout,
        uts: Uts,
        facts: GuestFacts | None = None,
    ) -> None:
        self._control = control
        self._stage = stage
        self._layout = layout
        self._uts = uts
        recorder = JsonLines(f"{stage}/{sandbox.WORK}/output/{SYSCALLS}")
        self._handlers = handlers(facts or GuestFacts(uts), recorder)
        self._calls: dict[int, int] = {}  # pid, and where its answer comes from
        self._mirrors = Mirrors(())
        self._proxy = 0  # its pid, while there is one
        self._buffer = b""

    def serve(self) -> None:
        """Say that the volumes are served, and answer until the host's side closes the socket."""
        os.chdir(self._stage)
        self._say(event="ready")
        while (request := self._receive()) is not None:
            try:
                self._say(event="done", result=self._handle(request))
            except SupervisorError as error:
                self._say(event="error", kind=error.kind, message=str(error))

    def _handle(self, request: dict[str, Any]) -> object:
        match request["op"]:
            case "mount":
                self._mount()
                return None
            case "run":
                return self._run(request)
            case "begin":
                return self._begin(request)
            case "finish":
                return self._finish(request["call"])
        raise SupervisorError("internal", f"unknown request {request['op']!r}")

    # --- the tree ---

    def _mount(self) -> None:
        """Mount each volume read-only, and lay its union layer over it."""
        for number, volume in enumerate(self._layout.volumes):
            if volume.fstype == "vfat":
                _copy_vfat(number)
                continue
            if volume.is_ext:
                _mount_ext(number)
            # else the keeper has (`ouassister.shadow.host_mounts`)
            _liken(sandbox.upper(number), sandbox.lower(number))
            layers = f"lowerdir={sandbox.lower(number)},upperdir={sandbox.upper(number)}"
            options = f"{layers},workdir={sandbox.overlay_work(number)}"
            try:
                raw.mount(
                    "overlay",
                    sandbox.merged(number),
                    "overlay",
                    0,
                    f"{options},userxattr,volatile,xino=off",
                )
            except OSError as error:
                below = "fuse2fs" if volume.is_ext else f"{volume.fstype} with mapped ids"
                raise SupervisorError(
                    "host", f"overlayfs over {below}: {error.strerror}"
                ) from error

    # --- programs ---

    def _run(self, request: dict[str, Any]) -> dict[str, object]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = runner.Program(
            argv=tuple(request["argv"]),
            environment=dict(request["environment"]),
            fetches=request["mirrors"] is not None,
            package_cache=request["package_cache"],
            output=f"{sandbox.WORK}/output/{request['output']}" if request["output"] else None,
        )
        if request["mirrors"] is not None:
            self._mirrors = codec.from_value(Mirrors, request["mirrors"])
        child = os.fork()
        if child == 0:
            ours.close()
            self._control.close()
            runner.run(program, self._stage, self._layout, self._uts, theirs)
        theirs.close()
        deadline = time.monotonic() + request["timeout_s"]
        try:
            return self._wait(child, ours, deadline)
        finally:
            ours.close()
            if self._proxy:
                os.kill(self._proxy, signal.SIGKILL)
                os.waitpid(self._proxy, 0)
                self._proxy = 0

    def _wait(self, child: int, channel: socket.socket, deadline: float) -> dict[str, object]:
        """Serve notifications until the child ends; kill it at the deadline or on hang-up."""
        pidfd = os.pidfd_open(child)
        first = child  # the first process of the program's pid namespace, once it is known
        failure: str | None = None
        timed_out = False
        with selectors.DefaultSelector() as selector:
            selector.register(pidfd, selectors.EVENT_READ, "exit")
            selector.register(channel, selectors.EVENT_READ, "channel")
            selector.register(self._control, selectors.EVENT_READ, "control")
            running = True
            while running:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and time.monotonic() >= deadline and not timed_out:
                    timed_out = True
                    deadline += 30  # for the kernel to end the namespace
                    os.kill(first, signal.SIGKILL)
                for key, events in ready:
                    match key.data:
                        case "exit":
                            running = False
                        case "channel":
                            message = self._take_channel(selector, channel)
                            if message.startswith("pid "):
                                first = int(message[4:])
                            elif message:
                                failure = message
                        case "control":  # the host's side went away, or speaks out of turn
                            raise SystemExit(1)
                        case "listener" if events & selectors.EVENT_READ:
                            with contextlib.suppress(BlockingIOError):
                                self._serve(selector, key.fd)
        os.close(pidfd)
        _pid, status = os.waitpid(child, 0)
        if timed_out:
            return {"timed_out": True, "status": 124}
        if failure is not None:
            raise SupervisorError("host", failure)
        return {"timed_out": False, "status": os.waitstatus_to_exitcode(status)}

    def _serve(self, selector: selectors.BaseSelector, listener: int) -> None:
        try:
            serve_one(listener, self._handlers)
        except OSError:  # no process has the filter any more
            selector.unregister(listener)
            os.close(listener)

    def _take_channel(self, selector: selectors.BaseSelector, channel: socket.socket) -> str:
        """Take the listener, the pid, or the message of a set-up that failed."""
        message, descriptors, _flags, _address = socket.recv_fds(channel, 4096, 1)
        if not message:
            selector.unregister(channel)
            return ""
        if message == b"proxy":
            self._start_proxy(descriptors[0])
            return ""
        if descriptors:
            selector.register(descriptors[0], selectors.EVENT_READ, "listener")
            return ""
        return message.decode("utf-8", "replace")

    def _start_proxy(self, descriptor: int) -> None:
        """Serve a socket of the program's network from this one, which is the host's."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with socket.socket(fileno=descriptor) as listener:
            told = os.open(f"{sandbox.WORK}/output/{proxy.REFUSED}", flags, 0o644)
            self._proxy = proxy.start(listener, self._mirrors, told)
            os.close(told)

    # --- functions of ours that must see the guest's owners ---

    def _begin(self, request: dict[str, Any]) -> int:
        """Start ``module.function(argument)`` in a child; what comes of it is for `_finish`.

        The module was imported before privileges went, since its file may be unreadable here.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with open(writer, "w") as pipe:  # noqa: PTH123 - a descriptor
                json.dump(_guarded_call(request), pipe)
            os._exit(0)
        os.close(writer)
        self._calls[child] = reader
        return child

    def _finish(self, child: int) -> object:
        """Wait for a child; its result or its error comes back."""
        with open(self._calls.pop(child), "rb") as pipe:  # noqa: PTH123 - a descriptor
            answer = pipe.read()
        os.waitpid(child, 0)
        if not answer:
            raise SupervisorError("internal", "a function of ours died")
        reply = json.loads(answer)
        if "error" in reply:
            raise SupervisorError(reply["error"]["kind"], reply["error"]["message"])
        return reply["result"]

    # --- the socket ---

    def _say(self, **message: object) -> None:
        self._control.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self) -> dict[str, Any] | None:
        while b"\n" not in self._buffer:
            chunk = self._control.recv(65536)
            if not chunk or len(self._buffer) > _MAX_REQUEST:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        request: dict[str, Any] = json.loads(line)
        return request


def _liken(upper: str, lower: str) -> None:
    """Give the root of a union what the guest's has: overlayfs shows the upper one's."""
    like = os.stat(lower)  # noqa: PTH116 - neither is a link
    os.chown(upper, like.st_uid, like.st_gid)
    os.chmod(upper, stat.S_IMODE(like.st_mode))  # noqa: PTH101
    os.utime(upper, ns=(like.st_atime_ns, like.st_mtime_ns))


def _mount_ext(volume: int) -> None:
    options = ",".join(_MOUNT_OPTIONS)
    mounted = _output([_FUSE2FS, sandbox.export(volume), sandbox.lower(volume), "-o", options])
    if mounted.returncode != 0:
        raise SupervisorError("file-system", f"fuse2fs: {_tail(mounted.stdout)}")


def _copy_vfat(volume: int) -> None:
    """Copy a FAT file system out with mtools; it is shown read-only.

    Nothing there has an inode number that would be the same in the guest, so that a change could
    not be held against what it replaces.
    """
    copy = sandbox.upper(volume)
    command = ["mcopy", "-i", sandbox.export(volume), "-s", "-p", "-m", "-n", "-Q", "::/*", copy]
    copied = _output(command)
    if copied.returncode != 0 and not _is_empty_vfat(volume):
        raise SupervisorError("file-system", f"mcopy: {_tail(copied.stdout)}")
    flags = raw.MS_BIND | raw.MS_REMOUNT | raw.MS_RDONLY | raw.MS_NOSUID | raw.MS_NODEV
    raw.mount(copy, sandbox.merged(volume), "", raw.MS_BIND)
    raw.mount("", sandbox.merged(volume), "", flags)


def _is_empty_vfat(volume: int) -> bool:
    listed = _output(["mdir", "-i", sandbox.export(volume), "-b", "::/"])
    return listed.returncode == 0 and not listed.stdout.strip()


def _guarded_call(request: dict[str, Any]) -> dict[str, object]:
    from ouassister.errors import OUassisterError

    try:
        function = getattr(importlib.import_module(request["module"]), request["function"])
        return {"result": codec.to_value(function(request["argument"]))}
    except OUassisterError as error:
        return {"error": {"kind": error.code, "message": error.message}}
    except OSError as error:
        kind = "work-disk-full" if error.errno == 28 else "internal"
        return {"error": {"kind": kind, "message": str(error)}}
    except Exception as error:
        return {"error": {"kind": "internal", "message": f"{type(error).__name__}: {error}"}}


def _output(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        check=False,
    )


def _tail(text: str) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines()[-3:]) or "no message"
