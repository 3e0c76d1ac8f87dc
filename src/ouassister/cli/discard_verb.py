"""Drop the change sets of a VM, or its snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister import pipeline
from ouassister.cli import common
from ouassister.store.database import Store

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The VM, and what is meant."""
    common.add_vm(parser)
    parser.add_argument(
        "--snapshots", action="store_true", help="drop the snapshots of 'resume --snapshot' instead"
    )


def run(arguments: argparse.Namespace) -> common.Result:
    """See the module."""
    with Store() as store:
        config = common.find_vm(store, arguments)
        drop = pipeline.discard_snapshots if arguments.snapshots else pipeline.discard
        dropped = drop(config, store)
    text = "\n".join(f"dropped {changeset_id}" for changeset_id in dropped) or "nothing to drop"
    return (0 if dropped else common.NOTHING_TO_DO), list(dropped), text
