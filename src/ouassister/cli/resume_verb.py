"""Resume the VM behind a closed gate, apply its change set, open the gate."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Final

from ouassister import codec, pipeline, snapshots
from ouassister.cli import common
from ouassister.model import Gate
from ouassister.store.database import Store
from ouassister.text import size, table, to_text

if TYPE_CHECKING:
    from ouassister.model import ResumeReport


_SHOWN: Final = 20
_OPEN_AFTER: Final = re.compile(r"open-after=([0-9]{1,6})")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The VM, and what becomes of the gate."""
    common.add_vm(parser)
    parser.add_argument(
        "--on-failure",
        type=_on_failure,
        default=pipeline.OnFailure(),
        metavar="POLICY",
        help="closed (default); open-after=SECONDS: the links go up although it failed;"
        " quarantine: those of the VM's quarantine do",
    )
    parser.add_argument(
        "--snapshot",
        action="store_true",
        help="copy the disks before, so that 'rollback --snapshot' can go back to the VM's sleep",
    )
    parser.add_argument(
        "--keep-snapshots",
        type=_count,
        default=snapshots.KEPT_BY_DEFAULT,
        metavar="N",
        help=f"of these, keep so many ({snapshots.KEPT_BY_DEFAULT}); the oldest go afterwards",
    )
    parser.add_argument(
        "--gate",
        choices=[gate.value for gate in Gate],
        default=Gate.FULL.value,
        help="what is done before the links go up: full (default), everything; exposed, the"
        " end of all old services that somebody on a network can reach: new ones come up after",
    )
    parser.add_argument(
        "--on-conflict",
        type=pipeline.OnConflict,
        choices=tuple(pipeline.OnConflict),
        default=pipeline.OnConflict.REFUSE,
        help="when paths of the guest changed while it woke up: refuse (default), nothing of the"
        " update is done; stage, the guest's own dpkg installs its packages, from archives that"
        " 'update --on-conflict stage' kept",
    )
    parser.add_argument("--quiet", action="store_true", help="no story on standard error")


def _on_failure(word: str) -> pipeline.OnFailure:
    if word == "closed":
        return pipeline.OnFailure()
    if match := _OPEN_AFTER.fullmatch(word):
        return pipeline.OnFailure(float(match[1]))
    if word == "quarantine":
        return pipeline.OnFailure(quarantine=True)
    if word.startswith("quarantine="):
        raise argparse.ArgumentTypeError(
            "the VM's description says which device is its quarantine: say quarantine alone"
        )
    raise argparse.ArgumentTypeError(
        f"{word!r} is none of closed, open-after=SECONDS and quarantine"
    )


def _count(word: str) -> int:
    if not re.fullmatch("[0-9]{1,4}", word) or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of snapshots: 1 to 9999")
    return int(word)


def run(arguments: argparse.Namespace) -> common.Result:
    """See the module."""
    with Store() as store:
        config = common.find_vm(store, arguments)
        story = common.timeline(arguments, store, config)
        report = pipeline.resume(
            config,
            store,
            story,
            arguments.on_failure,
            Gate(arguments.gate),
            keep_snapshots=arguments.keep_snapshots if arguments.snapshot else 0,
            on_conflict=arguments.on_conflict,
        )
    status = common.REBOOT_NEEDED if report.reboot_needed else 0
    if report.failed_actions:
        status = common.PARTIAL
    return status, codec.to_value(report), "\n".join(lines(report))


def lines(report: ResumeReport) -> list[str]:
    """The report for a person."""
    told = [
        f"{report.vm}: {report.result} change set {report.changeset_id}",
        f"  {report.files} files, {size(report.bytes)};"
        f" gate open {report.online_s:.2f} s after the first instruction"
        + (
            f", the rest done after {report.settled_s:.2f} s"
            if report.gate is not Gate.FULL
            else ""
        ),
        f"  verified: {', '.join(report.verified) or 'nothing'}",
    ]
    told += [
        f"  installed by the guest: {one.name} {one.version} ({one.status})"
        for one in report.staged
    ]
    told += [f"  conflict: {to_text(one.path)}: {one.reason}" for one in report.conflicts[:_SHOWN]]
    if len(report.conflicts) > _SHOWN:
        told.append(f"  … and {len(report.conflicts) - _SHOWN} more conflicts")
    if report.fell_back:
        names = ", ".join(one.name for one in report.fell_back)
        told.append(f"  so the guest itself installed what was emulated: {names}")
    rows = [(phase.name, f"{phase.seconds:.3f} s") for phase in report.phases]
    rows += [
        (f"  in the guest: {phase.name}", f"{phase.seconds:.3f} s") for phase in report.guest_phases
    ]
    told.append(table(rows, "  "))
    told += [f"  action failed: {action}" for action in report.failed_actions]
    told += [f"note: {note}" for note in report.notes]
    if report.reboot_needed:
        told.append("the new kernel needs a reboot of the guest")
    return told
