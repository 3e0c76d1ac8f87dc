"""List the VMs that were worked on, and the state of each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ouassister.errors import OUassisterError
from ouassister.provider import qemu, vmtoml
from ouassister.store.database import Store
from ouassister.text import table

if TYPE_CHECKING:
    import argparse

    from ouassister.cli.common import Result


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
        return "suspended" if config.save.exists() else "off"
    except (OUassisterError, OSError):
        return "unknown"


def _pending(store: Store, vm: str) -> str:
    row = store.pending(vm)
    return row.changeset_id if row is not None else ""
