"""Update the VM while it sleeps; the result waits as a change set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister import codec, pipeline
from ouassister.cli import common
from ouassister.cli.plan_verb import package_lines
from ouassister.errors import UsageError
from ouassister.model import Mode, Request, Verdict
from ouassister.store.database import Store
from ouassister.text import size, to_text

if TYPE_CHECKING:
    import argparse

    from ouassister.model import PackageMode, Restart, UpdateReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The VM, the wish or a plan."""
    common.add_vm(parser)
    common.add_request(parser)
    parser.add_argument("--plan", metavar="ID", help="carry out exactly this plan")
    parser.add_argument(
        "--no-staging",
        action="store_true",
        help="refuse what cannot be emulated, instead of having the guest install it",
    )
    parser.add_argument(
        "--on-conflict",
        type=pipeline.OnConflict,
        choices=tuple(pipeline.OnConflict),
        default=pipeline.OnConflict.REFUSE,
        help="stage: keep the archives, for 'resume --on-conflict stage'; refuse (default): do not",
    )
    common.add_run(parser)
    common.add_script_timeout(parser)


def run(arguments: argparse.Namespace) -> common.Result:
    """See the module."""
    if arguments.plan and (arguments.install or arguments.upgrade):
        raise UsageError("--plan says what to do; --install and --upgrade do not go with it")
    fallback = arguments.on_conflict is pipeline.OnConflict.STAGE
    if fallback and arguments.no_staging:
        raise UsageError("--no-staging has the guest install nothing: --on-conflict stage would")
    wish = arguments.plan or Request(tuple(arguments.install))
    with Store() as store:
        config = common.find_vm(store, arguments)
        story = common.timeline(arguments, store, config)
        options = pipeline.Options(
            arguments.timeout,
            arguments.keep,
            arguments.script_timeout,
            staging=not arguments.no_staging,
            fallback=fallback,
        )
        report = pipeline.update_sleeping(config, wish, store, story, options)
    return status_of(report), codec.to_value(report), "\n".join(_lines(report, arguments.vm))


def status_of(report: UpdateReport) -> int:
    """The exit status that tells a script how it went."""
    if not report.changeset_id:
        return common.PARTIAL if report.left_out else common.NOTHING_TO_DO
    return common.PARTIAL if report.left_out else 0


def mode_lines(modes: tuple[PackageMode, ...]) -> list[str]:
    """One line for each package that is not emulated."""
    return [f"staged: {one.name}: {one.reason}" for one in modes if one.mode is Mode.STAGED]


def restart_lines(restarts: tuple[Restart, ...]) -> list[str]:
    """One line for each unit that runs replaced files and is not simply restarted."""
    return [
        f"{one.verdict}: {one.unit or 'no unit'}"
        f" ({', '.join(to_text(process.comm) for process in one.processes[:4])}): {one.why}"
        for one in restarts
        if one.verdict is not Verdict.RESTART
    ]


def _lines(report: UpdateReport, vm: str) -> list[str]:
    lines = [
        f"{report.vm}: {len(report.changes)} packages",
        *package_lines(report.changes, report.left_out),
    ]
    if report.changeset_id:
        lines += [
            f"change set {report.changeset_id}",
            f"  {report.files} files and {report.deletions} deletions,"
            f" {size(report.layer_bytes)}; {len(report.actions)} actions",
        ]
        lines.append(f"  the resume will reach the guest by {report.channel}")
        if report.fallback_id:
            lines.append(f"  kept for a conflict: all archives, {size(report.fallback_bytes)}")
        lines += [f"  {line}" for line in mode_lines(report.modes)]
        lines += [f"  then: {action.shown}" for action in report.actions]
        lines += [f"  {line}" for line in restart_lines(report.restarts)]
        if report.reboot_needed:
            lines.append("  a newer kernel is installed: reboot the guest to run it")
        if report.filtered:
            shown = ", ".join(to_text(path) for path in report.filtered[:6])
            more = f" and {len(report.filtered) - 6} more" if len(report.filtered) > 6 else ""
            lines.append(f"  not taken along on purpose: {shown}{more}")
    lines += [f"note: {note}" for note in report.notes]
    lines.append(f"offline {report.offline_s:.2f} s, download {report.download_s:.2f} s")
    if report.changeset_id:
        policy = " --on-conflict stage" if report.fallback_id else ""
        lines.append(f"to apply it: ouassister resume {vm}{policy}")
    return lines
