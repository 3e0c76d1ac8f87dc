"""Take the last update back in the running VM, behind a closed gate; or go back to a snapshot."""

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
    from ouassister.provider.interface import Vm
    from ouassister.timeline import Timeline


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
    choice.add_argument(
        "--snapshot",
        metavar="ID",
        help="put the VM, which does not run, back to this snapshot, or to the 'last' one;"
        " what its disks hold now is lost",
    )
    parser.add_argument("--quiet", action="store_true", help="no story on standard error")


def run(arguments: argparse.Namespace) -> common.Result:
    """See the module."""
    with Store() as store:
        config = common.find_vm(store, arguments)
        story = common.timeline(arguments, store, config)
        if arguments.snapshot is not None:
            return _go_back(config, store, story, arguments.snapshot)
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


def _go_back(config: Vm, store: Store, story: Timeline, word: str) -> common.Result:
    snapshot = pipeline.go_back(config, store, story, word)
    value = {
        "vm": config.name,
        "result": "asleep-again",
        "snapshot_id": snapshot.snapshot_id,
        "changeset_id": snapshot.changeset_id,
        "phases": codec.to_value(story.phases),
    }
    text = f"{config.name} sleeps as it did before change set {snapshot.changeset_id}"
    return 0, value, text


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
