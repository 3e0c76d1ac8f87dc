"""Runs one program with a shadow's /proc, in a tree; started as root by `tests.host.procfs_rig`.

    procfs_inside.py SNAPSHOT TREE CHANNEL ARGV...

CHANNEL is a descriptor, to which every value that was written below /proc/sys is told.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from ouassister.shadow import raw
from ouassister.shadow.procfs.server import Procfs, import_library
from ouassister.shadow.procfs.snapshot import read

FIRST_PID = 4_000_000


def main() -> None:
    snapshot, tree, channel, *argv = sys.argv[1:]
    import_library()
    procfs = Procfs(read(Path(snapshot)))
    server = os.fork()
    if server == 0:
        raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
        procfs.serve(lambda name, value: tell(int(channel), name, value))
        os._exit(0)
    os.close(int(channel))
    raw.unshare(raw.CLONE_NEWNS | raw.CLONE_NEWPID | raw.CLONE_NEWNET)
    init = os.fork()
    if init == 0:
        be_init(procfs, tree, argv)
    procfs.close()
    _, status = os.waitpid(init, 0)
    os.kill(server, signal.SIGKILL)
    sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)


def tell(channel: int, name: str, value: bytes) -> None:
    os.write(channel, f"{name}={value.decode()}\n".encode())


def be_init(procfs: Procfs, tree: str, argv: list[str]) -> None:
    raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
    raw.mount("", "/", "", raw.MS_REC | raw.MS_PRIVATE)
    if tree != "/":
        raw.mount(tree, tree, "", raw.MS_BIND | raw.MS_REC)
        os.chdir(tree)
        raw.pivot_root(".", ".")
    raw.mount("proc", "/proc", "proc")
    if tree != "/":
        raw.umount(".", raw.MNT_DETACH)
        os.chdir("/")
    system = Path("/proc/sys/kernel")
    if int((system / "pid_max").read_text()) <= FIRST_PID:
        (system / "pid_max").write_text(str(1 << 22))
    (system / "ns_last_pid").write_text(str(FIRST_PID - 1))
    procfs.cover()
    child = os.fork()
    if child == 0:
        os.execvp(argv[0], argv)
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    main()
