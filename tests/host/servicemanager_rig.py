"""Runs commands of a guest's tree beside the stand-in: namespaces and overlayfs, nothing more.

Started as root, as ``python -I servicemanager_rig.py JOB``; JOB is a JSON file with the tree, the
manager's state, a folder of its own, and the commands. The answers go to ``answers.json`` there.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from ouassister import codec
from ouassister.model import Uts
from ouassister.shadow import raw
from ouassister.shadow.mounts import Bind, Devices, Folder, Tmpfs, enter_tree
from ouassister.shadow.servicemanager import (
    Listeners,
    ManagerState,
    listen,
    open_namespaces,
    start,
)
from ouassister.shadow.syscalls.facts import GuestFacts
from ouassister.shadow.syscalls.filter import build_filter
from ouassister.shadow.syscalls.handlers import handlers
from ouassister.shadow.syscalls.notify import serve_one
from ouassister.shadow.syscalls.records import JsonLines

_ENVIRONMENT = {
    "PATH": "/run/ouassister/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/root",
    "SYSTEMD_PAGER": "",
}
_NAMESPACES = (
    raw.CLONE_NEWNS
    | raw.CLONE_NEWPID
    | raw.CLONE_NEWUTS
    | raw.CLONE_NEWIPC
    | raw.CLONE_NEWNET
    | raw.CLONE_NEWCGROUP
)


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    state = codec.from_value(ManagerState, json.loads(Path(job["state"]).read_text()))
    raw.unshare(raw.CLONE_NEWNS | raw.CLONE_NEWPID)
    supervisor = os.fork()
    if supervisor:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(supervisor, 0)[1]))
    raw.mount("", "/", "", raw.MS_REC | raw.MS_PRIVATE)
    raw.mount("proc", "/proc", "proc")
    layers = f"lowerdir={job['tree']},upperdir={folder}/upper,workdir={folder}/work"
    raw.mount("overlay", f"{folder}/merged", "overlay", 0, layers)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    answers = os.open(folder / "answers.json", os.O_WRONLY | os.O_CREAT)
    runner = os.fork()
    if runner == 0:
        raw.unshare(_NAMESPACES)
        opened, tell_opened = os.pipe()
        init = os.fork()
        if init:
            # Before the first process enters the tree, as `ouassister.shadow.runner` does it.
            socket.send_fds(theirs, [b"namespaces"], open_namespaces())
            os.close(tell_opened)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]) & 0xFF)
        ours.close()
        os.close(tell_opened)
        os.read(opened, 1)
        _be_init(job, theirs, answers)
    theirs.close()
    messages: dict[bytes, list[int]] = {}
    for _ in range(2):
        message, descriptors, _flags, _address = socket.recv_fds(ours, 4096, 8)
        messages[message] = descriptors
    records = os.open(folder / "records", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    take, give = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    threading.Thread(target=_answer, args=(take, folder), daemon=True).start()

    def confine() -> None:
        listener = raw.seccomp_listener(build_filter())
        socket.send_fds(give, [b"listener"], [listener])
        os.close(listener)

    listeners = Listeners.received(messages[b"listeners"])
    log = os.open(folder / "journal.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    manager = start(messages[b"namespaces"], listeners, state, records, log, confine)
    ours.send(b"go")
    os.waitpid(runner, 0)
    sys.exit(0 if manager.stop() else 3)


def _answer(channel: socket.socket, folder: Path) -> None:
    """Serve the filters of the programs that the stand-in starts, one after the other."""
    uts = Uts("Linux", "web1", "6.1.0-1-amd64", "#1", "x86_64", "(none)")
    table = handlers(GuestFacts(uts), JsonLines(str(folder / "syscalls")))
    while True:
        _message, descriptors, _flags, _address = socket.recv_fds(channel, 64, 1)
        if not descriptors:
            return
        ready = select.poll()
        ready.register(descriptors[0], select.POLLIN)
        while ready.poll()[0][1] & select.POLLIN:  # else no process has the filter any more
            serve_one(descriptors[0], table)
        os.close(descriptors[0])


def _be_init(job: dict[str, Any], channel: socket.socket, answers: int) -> NoReturn:
    """The first process of the programs' pid namespace."""
    folder = Path("/run/ouassister/bin")
    recorder = Path(job["recorder"]).read_text()
    tmp = Tmpfs("/tmp", 0o1777)  # noqa: S108
    run = Bind(f"{job['folder']}/run", "/run")
    operations = (Devices(), run, tmp, Tmpfs("/run/ouassister"), Folder(str(folder)))
    enter_tree(f"{job['folder']}/merged", operations)
    for name in job["recorded"]:
        (folder / name).write_text(recorder)
        (folder / name).chmod(0o755)
    listeners = listen()
    socket.send_fds(channel, [b"listeners"], listeners.descriptors())
    listeners.close()
    channel.recv(16)
    done = [_run(command) for command in job["commands"]]
    os.write(answers, json.dumps(done).encode())
    os._exit(0)


def _run(command: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        command["argv"],
        env={**_ENVIRONMENT, **command.get("environment", {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=60,
        check=False,
        user=command.get("user"),
    )
    return {"status": done.returncode, "out": done.stdout, "err": done.stderr}


if __name__ == "__main__":
    main()
