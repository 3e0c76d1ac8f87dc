"""List the VMs that were worked on and the domains that sleep, and the state of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister.errors import OUassisterError
from ouassister.provider import find, virsh
from ouassister.store.database import Store
from ouassister.text import table

if TYPE_CHECKING:
    import argparse

    from ouassister.cli.common import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which libvirt is looked into."""
    parser.add_argument(
        "--connect", metavar="URI", help=f"libvirt's URI ({virsh.DEFAULT})", default=virsh.DEFAULT
    )


def run(arguments: argparse.Namespace) -> Result:
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
    known = {value["source"] for value in values}
    values += [
        {"vm": name, "source": source, "state": "suspended", "changeset": ""}
        for name, source in _domains(arguments.connect)
        if source not in known
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
        config = find.load(source)
        if config.is_running():
            return "running"
        return "suspended" if config.save.exists() else "off"
    except (OUassisterError, OSError):
        return "unknown"


def _pending(store: Store, vm: str) -> str:
    row = store.pending(vm)
    return row.changeset_id if row is not None else ""


def _domains(uri: str) -> tuple[tuple[str, str], ...]:
    """Domains of libvirt that sleep; none on a host without it."""
    from ouassister.provider import libvirt, libvirt_python

    if not libvirt_python.installed():
        return ()
    return libvirt.suspended(uri)
