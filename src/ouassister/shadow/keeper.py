"""The first process of a shadow: private mounts, the disk export, the way into the user namespace.

Started as ``python -I -m ouassister.shadow.keeper FD MODULE...``; FD is a socket on which the
first line is the configuration (`Configuration`), and which belongs to the supervisor from then
on. The modules are those that the supervisor is asked to call: imported here, since their files
may be unreadable to subordinate ids.

    host side ── keeper ── init ─┬─ qemu-storage-daemon     caller's rights, own mounts and pids
                                 └─ supervisor ─┬─ ext4-view  subordinate ids from here on
                                                └─ runner ── the guest's programs

When the host's side dies, the keeper is told by a signal, the init by another; with the init the
kernel ends every process of the shadow, and with them the mounts go.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from ouassister import codec
from ouassister.disk import ext4_view
from ouassister.disk.layout import Layout
from ouassister.disk.storage import Daemon
from ouassister.model import Uts
from ouassister.shadow import host_mounts, raw, sandbox
from ouassister.shadow.limits import Bounds, Limits
from ouassister.shadow.procfs.server import import_library
from ouassister.shadow.supervisor import Supervisor
from ouassister.shadow.trees.handover import DEV, SYS

IDS: Final = 65536  # a guest's uids and gids
_FUSE_DEVICE: Final = os.makedev(10, 229)  # Documentation/admin-guide/devices.txt


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the host's side decides.

    ``base_uid`` and ``base_gid`` are the subordinate ids that the guest's root becomes, as seen
    by the keeper. With ``own_userns`` the keeper makes a user namespace first and waits for its
    maps, since only the host's root can do without.
    """

    own_userns: bool
    base_uid: int
    base_gid: int
    stage: str
    work: str
    cache: str
    tools: str
    storage: tuple[Daemon, ...]
    layout: Layout
    uts: Uts
    limits: Limits


def main() -> None:
    """Entry point; see the module."""
    control = socket.socket(fileno=int(sys.argv[1]))
    raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGTERM)
    for name in sys.argv[2:]:
        importlib.import_module(name)
    try:
        import_library()
    except OSError as error:
        _give_up(control, f"libfuse 3: {error}")
    line = control.makefile("rb", buffering=0).readline()
    if not line:
        return  # the host's side changed its mind
    configuration = codec.from_value(Configuration, json.loads(line))
    try:
        ext4_view.open_program()
    except OSError as error:
        _give_up(control, f"{error} ('make' builds it)")
    try:
        bounds = Bounds(configuration.limits)
    except OSError as error:
        _give_up(control, f"control groups: {error}")
    try:
        _isolate(configuration, control)
    except OSError as error:
        bounds.remove()
        _give_up(control, f"namespaces: {error}")
    init = os.fork()
    if init == 0:
        _be_init(configuration, control, bounds)
    control.close()

    def end(_number: int, _frame: object) -> None:
        os.kill(init, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host's side decides
    _pid, status = os.waitpid(init, 0)
    bounds.remove()
    # What else Python would do at its end takes a while, and the host's side waits.
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _isolate(configuration: Configuration, control: socket.socket) -> None:
    if configuration.own_userns:
        raw.unshare(raw.CLONE_NEWUSER)
        control.sendall(b'{"event": "map"}\n')
        control.recv(1)  # the host's side has written the maps
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    raw.unshare(raw.CLONE_NEWNS | raw.CLONE_NEWPID)


def _be_init(configuration: Configuration, control: socket.socket, bounds: Bounds) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _prepare_folders(configuration)
        _build_stage(configuration)
        _start_storage(configuration)
        host_mounts.mount(
            Path(configuration.stage),
            configuration.layout,
            configuration.base_uid,
            configuration.base_gid,
            ids=IDS,
        )
        supervisor = _enter_subordinate(configuration, control, bounds)
    except (OSError, subprocess.SubprocessError) as error:
        _give_up(control, str(error))
    control.close()
    while True:
        pid, status = os.wait()
        if pid == supervisor:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _prepare_folders(configuration: Configuration) -> None:
    """Make the folders that the guest's root owns.

    What an earlier run left in the cache was in its hands: a link there leads anywhere.
    """
    work, cache = Path(configuration.work), Path(configuration.cache)
    folders = [work / name for name in ("upper", "overlay", "output", "log", "excerpt")]
    for volume in range(len(configuration.layout.volumes)):
        folders += [work / "upper" / str(volume), work / "overlay" / str(volume)]
    folders += [cache / "apt", cache / sandbox.KEPT]
    for name in ("lists", "apt/archives"):
        folders += [cache / name, cache / name / "partial"]
    for folder in folders:  # parents before what is in them
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            folder.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, configuration.base_uid, configuration.base_gid, follow_symlinks=False)


def _build_stage(configuration: Configuration) -> None:
    """Lay the tmpfs and everything that subordinate ids may reach over the stage."""
    stage = Path(configuration.stage)
    raw.mount("", "/", "", raw.MS_REC | raw.MS_PRIVATE)
    raw.mount("proc", "/proc", "proc", raw.MS_NOSUID | raw.MS_NODEV | raw.MS_NOEXEC)
    raw.mount("tmpfs", str(stage), "tmpfs", raw.MS_NOSUID, "mode=755")
    if not configuration.own_userns:  # /dev/fuse may be closed to all but root
        node = stage / "fuse"
        os.mknod(node, 0o20666, _FUSE_DEVICE)
        node.chmod(0o666)
        raw.mount(str(node), "/dev/fuse", "", raw.MS_BIND)
    folders = {
        sandbox.WORK: configuration.work,
        sandbox.CACHE: configuration.cache,
        sandbox.TOOLS: configuration.tools,
    }
    for name, source in folders.items():
        (stage / name).mkdir()
        raw.mount(source, str(stage / name), "", raw.MS_BIND)
    places = [sandbox.TMPFS, SYS, DEV]
    for volume in range(len(configuration.layout.volumes)):
        places += [sandbox.lower(volume), sandbox.merged(volume)]
    for name in places:
        (stage / name).mkdir(parents=True)
        os.chown(stage / name, configuration.base_uid, configuration.base_gid)


def _start_storage(configuration: Configuration) -> None:
    """Serve each of the guest's file systems as one file that the subordinate root owns."""
    folder = Path(configuration.stage) / sandbox.EXPORTS
    folder.mkdir()
    for daemon in configuration.storage:
        for name, text in daemon.files:
            (folder / name).write_text(text)
        argv = list(daemon.argv)
        for export in daemon.exports:
            (folder / export.name).touch()
            writable = "on" if export.writable else "off"
            options = f"type=fuse,id={export.name},node-name={export.node},writable={writable}"
            argv += ["--export", f"{options},mountpoint={folder / export.name},allow-other=on"]
        done = subprocess.run(
            [*argv, "--daemonize"],  # returns when the exports are there
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            check=False,
        )
        if done.returncode != 0:
            words = " / ".join(done.stdout.split("\n")).strip(" /") or done.returncode
            raise OSError(f"qemu-storage-daemon: {words}")
    for volume in range(len(configuration.layout.volumes)):
        export_file = f"{configuration.stage}/{sandbox.export(volume)}"
        os.chown(export_file, configuration.base_uid, configuration.base_gid)


def _enter_subordinate(configuration: Configuration, control: socket.socket, bounds: Bounds) -> int:
    """Fork the supervisor into a user namespace where the guest's ids are subordinate ones.

    Returns:
        Its pid; it is the first process of its own pid namespace.
    """
    wait_map, mapped = os.pipe()
    unshared, tell_unshared = os.pipe()
    outer = os.fork()
    if outer == 0:
        os.close(mapped)
        raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
        raw.unshare(raw.CLONE_NEWUSER | raw.CLONE_NEWNS | raw.CLONE_NEWPID)
        os.close(tell_unshared)
        os.read(wait_map, 1)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        inner = os.fork()
        if inner == 0:
            _supervise(configuration, control, bounds)
        control.close()
        _pid, status = os.waitpid(inner, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.close(tell_unshared)
    os.close(wait_map)
    os.read(unshared, 1)
    for name, base in (("uid_map", configuration.base_uid), ("gid_map", configuration.base_gid)):
        Path(f"/proc/{outer}/{name}").write_text(f"0 {base} {IDS}\n")
    os.close(mapped)
    return outer


def _supervise(configuration: Configuration, control: socket.socket, bounds: Bounds) -> NoReturn:
    raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
    raw.mount("", "/", "", raw.MS_REC | raw.MS_PRIVATE)
    raw.mount("proc", "/proc", "proc", raw.MS_NOSUID | raw.MS_NODEV | raw.MS_NOEXEC)
    place = (configuration.stage, configuration.layout, configuration.uts)
    Supervisor(control, *place, bounds).serve()
    os._exit(0)


def _give_up(control: socket.socket, message: str) -> NoReturn:
    report = {"event": "error", "kind": "host", "message": message}
    control.sendall(json.dumps(report).encode() + b"\n")
    os._exit(1)


if __name__ == "__main__":
    main()
