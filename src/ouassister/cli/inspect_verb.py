"""Show what the sleeping guest's kernel knows: release, uptime, processes, mounts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ouassister import codec
from ouassister.cli.common import Result, add_vm, find_vm
from ouassister.sleeping import open_sleeping
from ouassister.store.database import Store
from ouassister.text import size, table, to_text

if TYPE_CHECKING:
    import argparse

    from ouassister.model import GuestView


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The VM."""
    add_vm(parser)


def run(arguments: argparse.Namespace) -> Result:
    """See the module."""
    with Store() as store:
        config = find_vm(store, arguments.vm)
    with open_sleeping(config) as sleeping:
        view = sleeping.view
    return 0, codec.to_value(view), "\n".join(_lines(config.name, view))


def _lines(name: str, view: GuestView) -> list[str]:
    uts = view.uts
    slept = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(view.suspended_at_s))
    lines = [
        f"{name}: {uts.nodename}, {uts.sysname} {uts.release} {uts.machine}",
        f"  suspended {slept} after {view.uptime_s} s of uptime",
        f"  {view.cpus} CPU, {size(view.memory_bytes)} of memory, boot {view.boot_id or 'unknown'}",
        "",
        "processes",
    ]
    rows = [("PID", "PARENT", "UID", "STATE", "COMMAND", "EXECUTABLE")]
    rows += [
        (str(t.pid), str(t.parent), str(t.uid), t.state, to_text(t.comm), to_text(t.exe or b"-"))
        for t in view.tasks
        if not t.kernel_thread
    ]
    threads = sum(task.kernel_thread for task in view.tasks)
    lines += [table(rows, "  "), f"  and {threads} kernel threads", "", "mounts"]
    mounts = [("SOURCE", "TARGET", "TYPE", "")]
    mounts += [
        (to_text(m.source), to_text(m.target), m.fstype, "read-only" if m.read_only else "")
        for m in view.mounts
    ]
    lines.append(table(mounts, "  "))
    dirty = sum(file.dirty for file in view.database)
    lines += ["", f"package database: {len(view.database)} cached paths, {dirty} unflushed"]
    if view.locks:
        lines.append("locks")
        lines += [f"  {to_text(lock.path)}: {lock.kind}, pid {lock.pid}" for lock in view.locks]
    lines += [f"not told by this kernel: {what}" for what in view.degraded]
    return lines
