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
import subprocess
import time
from typing import TYPE_CHECKING, Any, Final

from ouassister import codec
from ouassister.shadow import raw, runner, sandbox
from ouassister.shadow.syscalls.notify import Handler, serve_one
from ouassister.shadow.syscalls.uts import uname_handlers

if TYPE_CHECKING:
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

    def __init__(self, control: socket.socket, stage: str, uts: Uts) -> None:
        self._control = control
        self._stage = stage
        self._uts = uts
        self._handlers: dict[tuple[bool, int], Handler] = uname_handlers(uts)
        self._buffer = b""

    def serve(self) -> None:
        """Mount, say so, and serve until the host's side closes the socket."""
        os.chdir(self._stage)
        try:
            self._mount_root()
            self._say(event="ready")
        except SupervisorError as error:
            self._say(event="error", kind=error.kind, message=str(error))
            return
        while (request := self._receive()) is not None:
            try:
                self._say(event="done", result=self._handle(request))
            except SupervisorError as error:
                self._say(event="error", kind=error.kind, message=str(error))

    def _handle(self, request: dict[str, Any]) -> object:
        match request["op"]:
            case "run":
                return self._run(request)
            case "call":
                return self._call(request)
        raise SupervisorError("internal", f"unknown request {request['op']!r}")

    # --- the tree ---

    def _mount_root(self) -> None:
        """Replay the journal on the private copy, mount it read-only, lay the union over it.

        fuse2fs replays no journal on a read-only mount, and a writable one would age the tree.
        """
        # e2fsck(8): 0 clean, 1 errors corrected; -E journal_only replays and checks no more.
        replay = _output(["e2fsck", "-E", "journal_only", "-y", sandbox.EXPORT])
        if replay.returncode not in (0, 1):
            raise SupervisorError("file-system", f"journal replay: {_tail(replay.stdout)}")
        mounted = _output([_FUSE2FS, sandbox.EXPORT, sandbox.LOWER, "-o", ",".join(_MOUNT_OPTIONS)])
        if mounted.returncode != 0:
            raise SupervisorError("file-system", f"fuse2fs: {_tail(mounted.stdout)}")
        layers = f"lowerdir={sandbox.LOWER},upperdir={sandbox.UPPER},workdir={sandbox.OVERLAY_WORK}"
        try:
            raw.mount(
                "overlay", sandbox.MERGED, "overlay", 0, f"{layers},userxattr,volatile,xino=off"
            )
        except OSError as error:
            raise SupervisorError("host", f"overlayfs over fuse2fs: {error.strerror}") from error

    # --- programs ---

    def _run(self, request: dict[str, Any]) -> dict[str, object]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = runner.Program(
            argv=tuple(request["argv"]),
            environment=dict(request["environment"]),
            network=request["network"],
            package_cache=request["package_cache"],
            output=f"{sandbox.WORK}/output/{request['output']}" if request["output"] else None,
        )
        child = os.fork()
        if child == 0:
            ours.close()
            self._control.close()
            runner.run(program, self._stage, self._uts, theirs)
        theirs.close()
        deadline = time.monotonic() + request["timeout_s"]
        try:
            return self._wait(child, ours, deadline)
        finally:
            ours.close()

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
        if descriptors:
            selector.register(descriptors[0], selectors.EVENT_READ, "listener")
            return ""
        return message.decode("utf-8", "replace")

    # --- functions of ours that must see the guest's owners ---

    def _call(self, request: dict[str, Any]) -> object:
        """Run ``module.function(argument)`` in a child; its result or its error comes back.

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
        with open(reader, "rb") as pipe:  # noqa: PTH123 - a descriptor
            answer = pipe.read()
        os.waitpid(child, 0)
        if not answer:
            raise SupervisorError("internal", f"{request['function']} died")
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
