"""Runs programs under the real filter and the real handlers, in namespaces as a shadow's.

Started as root: ``python -I syscall_inside.py REQUEST``, with the request in JSON. Prints the exit
status of the program, what it wrote, and the records.

    this ── space (user namespace) ── supervisor ── runner (pid namespace) ── init ── the program
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

REQUEST = json.loads(sys.argv[1])
sys.path.insert(0, REQUEST["source"])

from ouassister import codec  # noqa: E402
from ouassister.shadow import raw, sandbox  # noqa: E402
from ouassister.shadow.syscalls.facts import GuestFacts  # noqa: E402
from ouassister.shadow.syscalls.filter import build_filter  # noqa: E402
from ouassister.shadow.syscalls.handlers import Handlers, handlers  # noqa: E402
from ouassister.shadow.syscalls.notify import serve_one  # noqa: E402

IDS = 65536
STAGE = Path(REQUEST["stage"])
FOLDERS = ("proc", "bin", "tmp", "dev", "sys", "mnt", "var/lib/dpkg/info")


def main() -> None:
    """Make the user namespace, write its maps, pass the answer on."""
    unshared, tell_unshared = os.pipe()
    wait_map, mapped = os.pipe()
    space = os.fork()
    if space == 0:
        guarded(lambda: be_space(tell_unshared, wait_map))
    os.close(tell_unshared)
    os.read(unshared, 1)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{space}/{name}").write_text(f"0 {REQUEST['base']} {IDS}\n")
    os.write(mapped, b".")
    _pid, status = os.waitpid(space, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


def be_space(tell: int, wait: int) -> NoReturn:
    raw.unshare(raw.CLONE_NEWUSER | raw.CLONE_NEWNS | raw.CLONE_NEWPID)
    os.write(tell, b".")
    os.read(wait, 1)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    child = os.fork()
    if child == 0:
        guarded(be_supervisor)
    _pid, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def be_supervisor() -> NoReturn:
    raw.mount("", "/", "", raw.MS_REC | raw.MS_PRIVATE)
    raw.mount("proc", "/proc", "proc", raw.MS_NOSUID | raw.MS_NODEV | raw.MS_NOEXEC)
    raw.mount("tmpfs", str(STAGE), "tmpfs", 0, "mode=755")
    build_tree(STAGE / "tree")
    records: list[dict[str, Any]] = []
    facts = codec.from_value(GuestFacts, REQUEST["facts"])
    answers = handlers(facts, records.append)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    runner = os.fork()
    if runner == 0:
        guarded(lambda: be_runner(theirs, writer))
    theirs.close()
    os.close(writer)
    output = serve(answers, ours, reader)
    _pid, status = os.waitpid(runner, 0)
    answers.close()
    tree = STAGE / "tree"
    answer = {
        "status": os.waitstatus_to_exitcode(status),
        "output": base64.b64encode(output).decode(),
        "records": records,
        "files": {
            str(path.relative_to(tree)): describe(path)
            for place in ("tmp", "var")
            for path in sorted((tree / place).rglob("*"))
        },
    }
    os.write(1, json.dumps(answer).encode())
    os._exit(0)


def describe(path: Path) -> dict[str, Any]:
    status = path.lstat()
    mark = ""
    with contextlib.suppress(OSError):
        mark = os.getxattr(path, "user.ouassister.device", follow_symlinks=False).decode()
    return {
        "mode": status.st_mode,
        "uid": status.st_uid,
        "gid": status.st_gid,
        "inode": status.st_ino,
        "mark": mark,
    }


def build_tree(tree: Path) -> None:
    for name in FOLDERS:
        (tree / name).mkdir(parents=True)
    raw.mount(str(tree), str(tree), "", raw.MS_BIND)  # pivot_root wants a mount
    for name, source in REQUEST["programs"].items():
        shutil.copy(source, tree / "bin" / name)
        (tree / "bin" / name).chmod(0o755)
    for name, target in REQUEST["links"].items():
        (tree / name).symlink_to(target)


def serve(answers: Handlers, channel: socket.socket, reader: int) -> bytes:
    """As the supervisor of a shadow does, with the program's output beside."""
    output = b""
    deadline = time.monotonic() + REQUEST["timeout_s"]
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ, "channel")
        selector.register(reader, selectors.EVENT_READ, "output")
        while True:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"the program goes on; so far: {output!r}")
            for key, _events in ready:
                if key.data == "channel":
                    message, descriptors, _flags, _address = socket.recv_fds(channel, 4096, 1)
                    if descriptors:
                        selector.register(descriptors[0], selectors.EVENT_READ, "listener")
                    elif not message:
                        selector.unregister(channel)
                    else:
                        raise RuntimeError(message.decode())
                elif key.data == "output":
                    data = os.read(reader, 65536)
                    if not data:
                        return output
                    output += data
                else:
                    try:
                        more = serve_one(key.fd, answers)
                    except OSError:
                        more = False
                    if not more:
                        selector.unregister(key.fd)


def be_runner(channel: socket.socket, writer: int) -> NoReturn:
    raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
    flags = raw.CLONE_NEWPID | raw.CLONE_NEWNS | raw.CLONE_NEWUTS | raw.CLONE_NEWIPC
    raw.unshare(flags | raw.CLONE_NEWCGROUP | raw.CLONE_NEWNET)
    init = os.fork()
    if init == 0:
        guarded(lambda: be_init(channel, writer))
    channel.close()
    os.close(writer)
    _pid, status = os.waitpid(init, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def be_init(channel: socket.socket, writer: int) -> NoReturn:
    raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
    outside = os.open("/", os.O_PATH | os.O_CLOEXEC)
    os.chdir(STAGE / "tree")
    raw.pivot_root(".", ".")
    raw.mount("proc", "/proc", "proc", raw.MS_NOSUID | raw.MS_NODEV | raw.MS_NOEXEC)
    os.fchdir(outside)
    raw.umount(".", raw.MNT_DETACH)
    os.chdir("/")
    os.close(outside)
    if REQUEST["high_pids"]:
        with contextlib.suppress(OSError):
            Path("/proc/sys/kernel/pid_max").write_text(f"{1 << 22}\n")
        Path("/proc/sys/kernel/ns_last_pid").write_text(f"{sandbox.FIRST_PID - 1}\n")
    program = os.fork()
    if program == 0:
        guarded(lambda: be_program(channel, writer))
    channel.close()
    os.close(writer)
    while True:
        pid, status = os.wait()
        if pid == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def be_program(channel: socket.socket, writer: int) -> NoReturn:
    os.setsid()
    os.dup2(writer, 1)
    if REQUEST["uid"]:
        raw.prctl(38, 1)  # PR_SET_NO_NEW_PRIVS: a filter without privilege
        os.setresgid(REQUEST["uid"], REQUEST["uid"], REQUEST["uid"])
        os.setresuid(REQUEST["uid"], REQUEST["uid"], REQUEST["uid"])
    listener = raw.seccomp_listener(build_filter() if REQUEST["high_pids"] else build_filter(1))
    socket.send_fds(channel, [b"listener"], [listener])
    os.close(listener)
    channel.close()
    os.execve(REQUEST["argv"][0], REQUEST["argv"], REQUEST["environment"])


def guarded(body: Callable[[], NoReturn]) -> NoReturn:
    try:
        body()
    except BaseException:  # tell, and end here whatever it was: this is a fork
        traceback.print_exc()
        os._exit(70)


main()
