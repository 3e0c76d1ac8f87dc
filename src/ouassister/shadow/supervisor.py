"""Serves one shadow from inside its user namespace: mounts the tree, runs programs in it.

It is the first process of the shadow's pid namespace: with it ends everything in the shadow. Its
requests are JSON objects, one a line, on a socket that the host's side holds.
"""

from __future__ import annotations

import importlib
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ouassister import codec
from ouassister.disk import ext4_view
from ouassister.shadow import afresh, raw, sandbox, told
from ouassister.shadow.programs import Programs, SetUpError
from ouassister.shadow.syscalls.facts import GuestFacts
from ouassister.shadow.sysfs.record import ATTRIBUTES
from ouassister.shadow.told import Told
from ouassister.shadow.trees.serve import ServerDiedError, Servers

if TYPE_CHECKING:
    import socket

    from ouassister.disk.layout import Layout
    from ouassister.model import Uts
    from ouassister.shadow.limits import Bounds

_MAX_REQUEST: Final = 1 << 20


class SupervisorError(Exception):
    """A step inside the shadow failed; ``kind`` tells the host's side which error to raise."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Supervisor:
    """The loop. One request at a time; what a running program asks is answered in between."""

    def __init__(
        self, control: socket.socket, stage: str, layout: Layout, uts: Uts, bounds: Bounds
    ) -> None:
        self._control = control
        self._stage = stage
        self._layout = layout
        self._uts = uts
        self._programs = Programs(control, stage, layout, Told(GuestFacts(uts)), bounds)
        self._servers = Servers()
        self._calls: dict[int, int] = {}  # pid, and where its answer comes from
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
            case "reset":
                self._reset()
                return None
            case "know":
                known = told.read(Path(sandbox.TOLD), self._uts)
                self._programs.know(known, self._serve_trees())
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
            self._unite(number)

    def _unite(self, number: int) -> None:
        """Lay an empty union layer over a volume."""
        _liken(sandbox.upper(number), sandbox.lower(number))
        layers = f"lowerdir={sandbox.lower(number)},upperdir={sandbox.upper(number)}"
        options = f"{layers},workdir={sandbox.overlay_work(number)},userxattr,volatile,xino=off"
        try:
            raw.mount("overlay", sandbox.merged(number), "overlay", 0, options)
        except OSError as error:
            volume = self._layout.volumes[number]
            below = "ext4-view" if volume.is_ext else f"{volume.fstype} with mapped ids"
            raise SupervisorError("host", f"overlayfs over {below}: {error.strerror}") from error

    def _reset(self) -> None:
        """Forget what programs wrote and recorded, as if none had run; see `afresh`."""
        united = [
            number
            for number, volume in enumerate(self._layout.volumes)
            if volume.fstype != "vfat"  # nothing can be written to those
        ]
        try:
            afresh.clear(united)
        except (OSError, RecursionError) as error:
            raise SupervisorError("host", f"the union layer cannot be cleared: {error}") from error
        self._programs.forget()
        for number in united:
            self._unite(number)

    def _run(self, request: dict[str, Any]) -> dict[str, object]:
        """Run a program; it ends well only where all that it saw was there to its end."""
        try:
            answer = self._programs.run(request)
            self._servers.check()
        except SetUpError as error:
            raise SupervisorError("host", str(error)) from error
        except ServerDiedError as error:
            raise SupervisorError("internal", str(error)) from error
        return answer

    def _serve_trees(self) -> frozenset[str]:
        """Mount the guest's /sys, and its /dev where it was handed over."""
        records = Path(self._stage, sandbox.WORK, "output", ATTRIBUTES)
        try:
            return self._servers.start(Path(sandbox.TOLD), Path(self._stage), records)
        except OSError as error:
            raise SupervisorError("host", f"/sys and /dev by FUSE: {error}") from error

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
    image, folder = Path(sandbox.export(volume)), Path(sandbox.lower(volume))
    if problem := ext4_view.mount(image, folder):
        raise SupervisorError("file-system", f"ext4-view: {problem}")


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
