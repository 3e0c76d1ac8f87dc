"""Show what is known of a VM: its state, change sets, snapshots and history."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from ouassister import codec, snapshots
from ouassister.changeset import archive
from ouassister.cli import common
from ouassister.cli.list_verb import state_of
from ouassister.errors import OUassisterError
from ouassister.state.fence import check_fence
from ouassister.store.database import ChangesetState, Store
from ouassister.text import size

if TYPE_CHECKING:
    import argparse


_TIME: Final = "%Y-%m-%d %H:%M:%S"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The VM, or none for all."""
    parser.add_argument(
        "vm", metavar="VM", nargs="?", help="a domain, path of a vm.toml, or a name"
    )
    common.add_libvirt(parser)


def run(arguments: argparse.Namespace) -> common.Result:
    """See the module."""
    with Store() as store:
        if arguments.vm is not None:
            config = common.find_vm(store, arguments)
            chosen = [(config.name, str(config.source))]
        else:
            chosen = list(store.vms())
        values = [_status(store, name, source) for name, source in chosen]
    text = "\n\n".join(_text(value) for value in values)
    return 0, values, text


def _status(store: Store, name: str, source: str) -> dict[str, object]:
    rows = store.changeset_rows(name)
    return {
        "vm": name,
        "source": source,
        "state": state_of(source),
        "changesets": [
            {**codec.to_value(row), "verdict": _verdict(store, name, row.changeset_id, row.state)}
            for row in rows
        ],
        "snapshots": [
            {
                "snapshot_id": one.snapshot_id,
                "changeset_id": one.changeset_id,
                "made_at_s": one.made_at_s,
                "stage": str(one.stage),
                "bytes": one.size_bytes(),
            }
            for one in snapshots.known(store.vm_folder(name))
        ],
        "history": codec.to_value(store.history(name)),
    }


def _verdict(store: Store, vm: str, changeset_id: str, state: ChangesetState) -> str:
    """Whether a ready change set still fits the VM as it sleeps now."""
    if state is not ChangesetState.READY:
        return str(state)
    try:
        changeset, _layer = archive.load(store.changesets(vm), changeset_id)
        check_fence(changeset.fence)
    except OUassisterError as error:
        return f"stale: {error.message}"
    return "ready"


def _text(value: dict[str, object]) -> str:
    lines = [f"{value['vm']}: {value['state']}"]
    changesets = value["changesets"]
    assert isinstance(changesets, list)  # noqa: S101 - made above
    lines += [f"  change set {row['changeset_id'][:16]}: {row['verdict']}" for row in changesets]
    kept = value["snapshots"]
    assert isinstance(kept, list)  # noqa: S101 - made above
    for one in kept:
        at = time.strftime(_TIME, time.gmtime(one["made_at_s"]))
        lines.append(
            f"  snapshot {one['snapshot_id']} of {at}: {one['stage']}, {size(one['bytes'])}"
        )
    history = value["history"]
    assert isinstance(history, list)  # noqa: S101 - made above
    for event in history:
        at = time.strftime(_TIME, time.gmtime(event["at_s"]))
        lines.append(f"  {at}  {event['verb']}: {event['step']} {event['detail']}".rstrip())
    return "\n".join(lines)
