"""Take the last update back in the running VM, behind a closed gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister import codec, pipeline
from ouassister.cli import common
from ouassister.errors import RollbackRefusedError
from ouassister.store.database import Store
from ouassister.text import table, to_text

if TYPE_CHECKING:
    import argparse

    from ouassister.model import RollbackReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The VM, and what becomes of files that changed since."""
    common.add_vm(parser)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--leave-diverged",
        action="store_true",
        help="take back what is as the update left it, instead of refusing when a path is not",
    )
    choice.add_argument(
        "--forget",
        action="store_true",
        help="take nothing back; remove from the guest what is kept for it",
    )
    parser.add_argument("--quiet", action="store_true", help="no story on standard error")


def run(arguments: argparse.Namespace) -> common.Result:
    """See the module."""
    with Store() as store:
        config = common.find_vm(store, arguments)
        story = common.timeline(arguments, store, config)
        try:
            report = pipeline.rollback(
                config,
                store,
                story,
                leave_diverged=arguments.leave_diverged,
                only_forget=arguments.forget,
            )
        except RollbackRefusedError as error:
            for path, reason in error.paths:
                common.warn(f"  {path}: {reason}")
            raise
    status = common.PARTIAL if report.failed_actions or report.left else 0
    return status, codec.to_value(report), "\n".join(lines(report))


def lines(report: RollbackReport) -> list[str]:
    """The report for a person."""
    told = [f"{report.vm}: {report.result} change set {report.changeset_id}"]
    if report.closed_s:
        told.append(f"  {report.files} entries; links down for {report.closed_s:.2f} s")
    told += [
        f"  {change.name}: {change.new or 'removed'} → {change.old or 'removed'}"
        for change in report.changes
    ]
    told += [f"  left as it is: {to_text(one.path)}: {one.reason}" for one in report.left]
    rows = [(phase.name, f"{phase.seconds:.3f} s") for phase in report.phases]
    rows += [
        (f"  in the guest: {phase.name}", f"{phase.seconds:.3f} s") for phase in report.guest_phases
    ]
    told.append(table(rows, "  "))
    told += [f"  action failed: {action}" for action in report.failed_actions]
    return told + [f"note: {note}" for note in report.notes]
