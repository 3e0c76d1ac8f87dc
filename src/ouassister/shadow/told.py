"""What programs in the shadow are told of the sleeping guest: written on the host's side, once.

The save file is not readable inside, and the guest's kernel is read in one place only. The two
files lie in the run's folder, where no program of the guest reaches them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ouassister import codec
from ouassister.errors import InternalError
from ouassister.shadow.procfs import snapshot
from ouassister.shadow.procfs.snapshot import Node
from ouassister.shadow.servicemanager.state import ManagerState
from ouassister.shadow.syscalls.facts import GuestFacts
from ouassister.shadow.syscalls.proc_facts import read_facts

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.model import Uts
    from ouassister.shadow.procfs.snapshot import Tree

_PROC: Final = "proc"
_PROCESSES: Final = "processes"
_SERVICES: Final = "services.json"
NOTHING: Final = ManagerState(0, (), None, (), (), None)


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of the guest.

    Attributes:
        facts: For system calls.
        nodes: Its part of /proc; they agree, since the facts are made of them.
        services: What its service manager had running.
    """

    facts: GuestFacts
    nodes: Mapping[bytes, Node] = field(default_factory=dict)
    services: ManagerState = NOTHING


def write_processes(folder: Path, tree: Tree) -> None:
    """Write down the guest's processes for `read`.

    Args:
        folder: Exists; private to the run.
        tree: Of `ouassister.shadow.procfs.collect`, like that of `write_system`.
    """
    snapshot.write(folder / _PROCESSES, tree)


def write_system(folder: Path, tree: Tree, services: ManagerState) -> None:
    """Write down the rest of its /proc, and what its service manager had running, likewise."""
    snapshot.write(folder / _PROC, tree)
    text = json.dumps(codec.to_value(services), separators=(",", ":"))
    (folder / _SERVICES).write_text(text)
    (folder / _SERVICES).chmod(0o644)  # subordinate ids read it; a folder above is private


def read(folder: Path, uts: Uts) -> Told:
    """Read what was written.

    Raises:
        InternalError: It is not what is written here.
    """
    nodes = {**snapshot.read(folder / _PROC), **snapshot.read(folder / _PROCESSES)}
    facts = read_facts({path: node.content for path, node in nodes.items()}, uts)
    try:
        services = codec.from_value(
            ManagerState, json.loads((folder / _SERVICES).read_text(encoding="utf-8"))
        )
    except (ValueError, RecursionError) as error:
        raise InternalError(f"what is told of services: {error}") from error
    return Told(facts, nodes, services)
