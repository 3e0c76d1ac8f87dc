"""The restart plan of one update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.errors import OUassisterError
from ouassister.model import Restart, Verdict
from ouassister.restart import kernels, needrestart, policy
from ouassister.restart.exposed import exposed
from ouassister.shadow import sandbox
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ouassister.disk.layout import Layout
    from ouassister.model import Entry
    from ouassister.restart.uses import ProcessUse
    from ouassister.shadow.session import Shadow

TREE: Final = "ouassister.restart.tree"
_CONFIGURATION: Final = b"/etc/needrestart/needrestart.conf"


@dataclass(frozen=True, slots=True)
class RestartPlan:
    """What is due in the guest. ``kernel`` is the newest one, unless it runs already.

    ``again`` are units that run what staged packages will replace.
    """

    restarts: tuple[Restart, ...]
    kernel: str
    notes: tuple[str, ...]
    again: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Staged:
    """Packages that the guest's own dpkg will install: what they replace, and their names."""

    files: frozenset[bytes] = frozenset()
    packages: tuple[str, ...] = ()


_NOTHING: Final = Staged()


def make_plan(
    read_uses: Callable[[], Iterable[ProcessUse]],
    entries: Iterable[Entry],
    release: str,
    layout: Layout,
    shadow: Shadow,
    staged: Staged = _NOTHING,
) -> RestartPlan:
    """Say what is done about each unit that runs what the entries replace.

    Args:
        read_uses: Tells who runs what (`ouassister.restart.uses`).
        entries: Of the change set.
        release: Of the kernel that runs.
        layout: Where the guest's file systems are.
        shadow: With the update in it.
        staged: What follows in the guest.

    Raises:
        UpdaterError: The guest's own rules cannot be read.
    """
    notes: tuple[str, ...] = ()
    again: frozenset[str] = frozenset()
    try:
        running = tuple(read_uses())
        found = exposed(running, entries, staged.files)
        if staged.files:
            again = frozenset(use.unit for use, _files in exposed(running, (), staged.files))
    except OUassisterError as error:
        found = ()
        notes = (f"who runs replaced files cannot be told: {error.message}",)
    argument = {
        "boot": _inside(layout, b"/boot"),
        "needrestart": _inside(layout, _CONFIGURATION),
    }
    tree = shadow.call(TREE, "look", argument)
    restarts = policy.decide(found, {})
    if tree["needrestart"]:
        units = [one.unit for one in restarts if one.verdict is Verdict.RESTART]
        restarts = policy.decide(found, needrestart.excluded(shadow, units))
    releases = [*tree["kernels"], *kernels.installed_by(staged.packages)]
    return RestartPlan(restarts, kernels.newer(release, releases), notes, again)


def _inside(layout: Layout, path: bytes) -> str:
    volume, inside = layout.locate(path)
    return f"{sandbox.merged(volume)}{to_text(inside)}"
