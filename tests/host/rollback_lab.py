"""A guest in which an update was just applied, and the way back."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.host.applier_run import Bench, traced
from tests.host.applier_world import RESERVED, World, inodes, paths, snapshot
from tests.host.test_applier_crash import Lab

from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.reflect.applier_protocol import ApplierResult

META = frozenset((b"/usr/lib/meta",))  # a directory that stays; its time is put back


@dataclass
class Back(Bench):
    """The same medium, for the way back."""

    leave: bool = False
    mode: str = "rollback"

    def command(self, program: Path | None = None, sha256: str = "") -> list[str]:
        words = super().command(program, sha256)
        words[1] = self.mode
        return [*words, "--leave-diverged", "yes"] if self.leave else words

    def told(self) -> tuple[ApplierResult, list[tuple[str, str]]]:
        """The result, and which paths are said to differ."""
        done = self.raw(self.command(), {})
        events: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
        differ = [(e["path"], e["reason"]) for e in events if e["event"] == "diverged"]
        return self.result(done), differ


def back_of(bench: Bench, *, leave: bool = False) -> Back:
    return Back(bench.appliers, bench.medium, bench.info, bench.root, leave)


class Applied(Lab):
    """Makes a guest in which the change set of everything was just applied."""

    def applied(self) -> tuple[World, Back]:
        world, bench = self.fresh()
        self.before, self.inodes = snapshot(world.root, META), inodes(world.root)
        self.after = world.after()
        assert bench.run().outcome is Outcome.APPLIED
        assert snapshot(world.root, world.timed) == self.after
        return world, back_of(bench)

    def back_steps(self) -> list[str]:
        _, back = self.applied()
        trace = self.folder / "trace"
        assert back.run(OUA_TRACE=str(trace)).outcome is Outcome.ROLLED_BACK
        return traced(trace)

    def is_as_before(self, world: World, why: object = "") -> None:
        assert snapshot(world.root, META) == self.before, why
        assert inodes(world.root) == self.inodes, why
        assert_nothing_kept(world.root)

    def is_updated(self, world: World, why: object = "") -> None:
        assert snapshot(world.root, world.timed) == self.after, why
        assert not [path for path in paths(world.root) if RESERVED in path], why
        assert not list(state(world).glob("journal-*")), why


def state(world: World) -> Path:
    return world.root / "var/lib/ouassister"


def assert_nothing_kept(root: Path) -> None:
    """Neither a journal nor an old file, nor a folder of them."""
    assert sorted(p.name for p in (root / "var/lib/ouassister").iterdir()) == [
        "applied",
        "attestation.json",
        "lock",
    ]
    for _, folders, files in os.walk(root):
        assert not [name for name in (*folders, *files) if RESERVED in os.fsencode(name)]
