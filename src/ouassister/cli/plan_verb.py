"""Say what an update would do; nothing is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister import codec, pipeline
from ouassister.cli import common
from ouassister.model import Request
from ouassister.store.database import Store
from ouassister.text import size, table

if TYPE_CHECKING:
    import argparse

    from ouassister.model import LeftOut, PackageChange


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The VM and the wish."""
    common.add_vm(parser)
    common.add_request(parser)
    common.add_run(parser)


def run(arguments: argparse.Namespace) -> common.Result:
    """See the module."""
    with Store() as store:
        config = common.find_vm(store, arguments)
        story = common.timeline(arguments, store, config)
        options = pipeline.Options(arguments.timeout, arguments.keep)
        plan = pipeline.plan(config, Request(tuple(arguments.install)), store, story, options)
    lines = [f"plan {plan.plan_id} for {plan.vm}"]
    lines += package_lines(plan.changes, plan.left_out)
    lines.append(
        f"archives: {len(plan.archives)}, {size(plan.download_bytes)}; what was fetched is kept"
    )
    lines += [
        f"  will perhaps be staged (a prediction): {one.name}: {one.reason}"
        for one in plan.predicted
    ]
    lines.append(f"the resume will reach the guest by {plan.channel}")
    lines += [f"  {line}" for line in plan.notes]
    if plan.changes:
        lines.append(f"to carry it out: ouassister update {arguments.vm} --plan {plan.plan_id}")
    status = 0 if plan.changes else common.NOTHING_TO_DO
    return status, codec.to_value(plan), "\n".join(lines)


def package_lines(changes: tuple[PackageChange, ...], left_out: tuple[LeftOut, ...]) -> list[str]:
    """What changes and what does not, for a person."""
    lines = [table([(c.name, c.old or "-", "->", c.new or "removed") for c in changes], "  ")]
    lines += [f"  left out: {item.package}: {item.reason}" for item in left_out]
    return [line for line in lines if line] or ["  nothing to change"]
