"""List the VMs that were worked on, and the state of each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ouassister.cli.common import Result, table
from ouassister.errors import OUassisterError
from ouassister.provider import qemu, vmtoml
from ouassister.store.database import Store

if TYPE_CHECKING:
    import argparse


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """Nothing more."""


def run(_arguments: argparse.Namespace) -> Result:
    """See the module."""
    with Store() as store:
        values = [
            {
                "vm": name,
                "source": source,
                "state": state_of(source),
                "changeset": _pending(store, name),
            }
            for name, source in store.vms()
        ]
    rows = [("VM", "STATE", "CHANGE SET", "SOURCE")]
    rows += [
        (str(v["vm"]), str(v["state"]), str(v["changeset"])[:12] or "-", str(v["source"]))
        for v in values
    ]
    return 0, values, table(rows)


def state_of(source: str) -> str:
    """``suspended``, ``running``, ``off`` (no save file), or ``unknown`` when it cannot be read."""
    try:
        config = vmtoml.load(Path(source))
        if qemu.is_running(config):
            return "running"
    except OUassisterError:
        return "unknown"
    return "suspended" if config.save.exists() else "off"


def _pending(store: Store, vm: str) -> str:
    row = store.pending(vm)
    return row.changeset_id if row is not None else ""
