"""Show what the sleeping guest's kernel knows: release, uptime, processes, mounts, and more."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from ouassister import codec
from ouassister.cli.common import Result, add_vm, locate
from ouassister.cli.inspect_lists import LISTS
from ouassister.looking import look_at
from ouassister.model import Subject
from ouassister.packages.activity import activity
from ouassister.text import size, table, to_text

if TYPE_CHECKING:
    import argparse

    from ouassister.model import GuestView

# Cheap, and worth a line of the summary each.
_ALWAYS: Final = frozenset(
    (Subject.TASKS, Subject.LOCKS, Subject.FILE_SYSTEMS, Subject.BLOCK_DEVICES, Subject.NETWORK,
     Subject.MODULES, Subject.SWAP)
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The VM, and which lists to print."""
    add_vm(parser)
    for name, (_, _, meaning) in LISTS.items():
        parser.add_argument(
            f"--{name}", dest="lists", action="append_const", const=name, help=meaning
        )
    parser.add_argument("--all", action="store_true", help="all of these lists")


def run(arguments: argparse.Namespace) -> Result:
    """See the module."""
    config = locate(arguments)
    lists = tuple(LISTS) if arguments.all else tuple(dict.fromkeys(arguments.lists or ()))
    want = _ALWAYS | {LISTS[name][0] for name in lists}
    view = look_at(config, want)
    lines = _lines(config.name, view)
    for name in lists:
        lines += ["", name.replace("-", " "), *LISTS[name][1](view)]
    value = codec.to_value(view)
    value["package_manager"] = codec.to_value(activity(view))
    return 0, value, "\n".join(lines)


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
    rows = [("PID", "PARENT", "UID", "STATE", "UNIT", "COMMAND", "EXECUTABLE")]
    rows += [
        (
            str(t.pid), str(t.parent), str(t.uid), t.state,
            (t.detail.user_unit or t.detail.unit or "-") if t.detail else "-",
            to_text(t.comm), to_text(t.exe or b"-"),
        )
        for t in view.tasks
        if not t.kernel_thread
    ]  # fmt: skip
    threads = sum(task.kernel_thread for task in view.tasks)
    lines += [table(rows, "  "), f"  and {threads} kernel threads", "", "mounts"]
    mounts = [("SOURCE", "TARGET", "TYPE", "")]
    mounts += [
        (to_text(m.source), to_text(m.target), m.fstype, "read-only" if m.read_only else "")
        for m in view.mounts
    ]
    lines += [table(mounts, "  "), *_devices(view), *_network(view)]
    for one in activity(view):
        what = f" the {one.step} of {one.package or 'a package'}" if one.step else ""
        lines.append(f"package manager at work: {one.program} (pid {one.pid}){what}")
    if view.held_locks:
        lines += ["", "locks"]
        lines += [
            f"  {to_text(lock.path)}: {lock.kind}, {'write' if lock.write else 'read'}, "
            + (f"pid {lock.pid}" if lock.pid > 0 else "of an open file")
            for lock in view.held_locks
        ]
    lines += [f"not told by this kernel: {what}" for what in view.degraded]
    return lines


def _devices(view: GuestView) -> list[str]:
    lines = []
    used = [one for one in view.block_devices or () if one.size]
    if used:
        rows = [("NAME", "NUMBER", "SIZE", "START", "LABEL", "SYSFS")]
        rows += [
            (
                one.name, f"{one.major}:{one.minor}", size(one.size), str(one.start),
                one.partition_label or "-", to_text(one.sysfs),
            )
            for one in used
        ]  # fmt: skip
        lines += ["", "block devices", table(rows, "  ")]
    for mapped in view.mapped_devices or ():
        lines.append(f"  {mapped.device} is {mapped.name}")
        for one in mapped.ranges:
            below = ", ".join(
                leg.device + ("" if leg.start is None else f" from {leg.start}")
                for leg in one.below
            )
            lines.append(f"    {size(one.size)} at {one.start}: {one.target} on {below}")
    for area in view.swaps or ():
        lines.append(f"  swap {to_text(area.path)}: {size(area.used)} of {size(area.size)} used")
    return lines


def _network(view: GuestView) -> list[str]:
    lines = []
    if view.network_devices:
        rows = [
            (one.name, one.kind or "-", one.operstate, "yes" if one.carrier else "no",
             one.hardware_address or "-", " ".join(one.addresses) or "-")
            for one in view.network_devices
        ]  # fmt: skip
        head = ("NAME", "KIND", "STATE", "LINK", "HARDWARE ADDRESS", "ADDRESSES")
        lines += ["", "network", table([head, *rows], "  ")]
    if view.sockets:
        ports = sorted(
            {
                f"{one.protocol}/{one.port}"
                for one in view.sockets.bound
                if not one.protocol.startswith("unix")
            }
        )
        lines.append(
            f"  reachable: {', '.join(ports) or 'nothing'};"
            f" {view.sockets.established} connections established"
        )
    return lines
