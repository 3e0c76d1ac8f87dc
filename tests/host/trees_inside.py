"""Serves a small /sys and /dev in a user namespace; started as root by `tests.host.test_trees`.

    trees_inside.py FOLDER SCRIPT [kill]

What the script prints comes out; with ``kill``, the servers die before it runs. The last line tells
what is found of them after it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from ouassister.shadow import raw
from ouassister.shadow.served.server import import_library
from ouassister.shadow.trees.serve import ServerDiedError, Servers

BASE = 100000


def main() -> None:
    folder, script, *kill = sys.argv[1:]
    import_library()
    ready, tell_ready = os.pipe()
    mapped, tell_mapped = os.pipe()
    child = os.fork()
    if child == 0:
        raw.prctl(raw.PR_SET_PDEATHSIG, signal.SIGKILL)
        raw.unshare(raw.CLONE_NEWUSER | raw.CLONE_NEWNS)
        os.write(tell_ready, b"x")
        os.read(mapped, 1)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        inside(Path(folder), script, bool(kill))
        os._exit(0)
    os.read(ready, 1)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{child}/{name}").write_text(f"0 {BASE} 65536\n")
    os.write(tell_mapped, b"x")
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)


def inside(folder: Path, script: str, kill: bool) -> None:
    raw.mount("", "/", "", raw.MS_REC | raw.MS_PRIVATE)
    stage = folder / "stage"
    raw.mount("tmpfs", str(stage), "tmpfs", 0, "mode=755")
    for name in ("sys", "dev"):
        (stage / name).mkdir()
    servers = Servers()
    assert servers.start(folder, stage, stage / "records") == {"sys", "dev"}
    if kill:
        for pid in servers.pids():
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its files are closed by then
    done = subprocess.run(
        ["sh", "-c", f"cd {stage}; {script}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    os.write(1, done.stdout)
    try:
        servers.check()
        told = "served"
    except ServerDiedError as error:
        told = str(error)
    os.write(1, told.encode() + b"\n")


if __name__ == "__main__":
    main()
