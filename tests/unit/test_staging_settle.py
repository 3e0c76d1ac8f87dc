"""The loop's decisions, on a ground that answers from a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from ouassister.changeset.extract import Extraction
from ouassister.errors import (
    DeadlineError,
    OUassisterError,
    StagingNeededError,
    UpdaterError,
    WorkDiskFullError,
)
from ouassister.model import PackageChange, Request
from ouassister.packages.apt import Ran
from ouassister.packages.apt_status import PackageError, Work
from ouassister.shadow.events import Event, Outcome
from ouassister.staging.settle import Settled, settle

if TYPE_CHECKING:
    from collections.abc import Mapping

FINE = Ran("", False, (), ())


def change(name: str, old: str = "1", new: str = "2") -> PackageChange:
    return PackageChange(name, "amd64", old, new)


A, B, C = change("a"), change("b"), change("c")


def fails(*names: str) -> Ran:
    errors = tuple(PackageError(name, "script failed", waits=False) for name in names)
    return Ran("apt-get: dpkg returned an error", False, errors, ())


@dataclass
class Table:
    """Answers by the packages that are planned; ``needs`` are pairs of package and need."""

    planned: tuple[PackageChange, ...]
    bad: dict[str, Ran] = field(default_factory=dict)
    called: dict[str, Event] = field(default_factory=dict)
    holds: set[str] = field(default_factory=set)
    needs: dict[str, str] = field(default_factory=dict)
    other: tuple[PackageChange, ...] = ()  # what apt plans besides once something is staged
    unsolvable: OUassisterError | None = None
    story: list[str] = field(default_factory=list)
    wrote: bool = False

    def emulate(self, _request: Request) -> Ran:
        names = [one.name for one in self.planned]
        self.story.append(f"emulate {' '.join(names)}")
        assert not self.wrote, "an earlier round was not forgotten"
        self.wrote = True
        return next((self.bad[name] for name in names if name in self.bad), FINE)

    def events(self) -> tuple[Event, ...]:
        return tuple(self.called[one.name] for one in self.planned if one.name in self.called)

    def extract(self, staged: Mapping[PackageChange, str]) -> Extraction:
        self.story.append(f"extract with {' '.join(one.name for one in staged)}".strip())
        return Extraction((), (), (), 0, "", 0)

    def held(self, _extraction: Extraction, _ran: Ran, names: frozenset[str]) -> dict[str, str]:
        return {name: "held" for name in sorted(names & self.holds)}

    def plan_without(
        self, staged: tuple[PackageChange, ...], request: Request
    ) -> tuple[Request, tuple[PackageChange, ...]]:
        assert not self.wrote, "apt plans for a guest that is half updated"
        if self.unsolvable is not None:
            raise self.unsolvable
        gone = {one.name for one in staged}
        while more := {a for a, b in self.needs.items() if b in gone} - gone:
            gone |= more
        self.planned = tuple(one for one in self.planned if one.name not in gone) + self.other
        return request, self.planned

    def start_over(self) -> None:
        self.story.append("start over")
        self.wrote = False


def run(table: Table, *, staging: bool = True) -> tuple[Settled, dict[str, str]]:
    settled = settle(table, table.planned, Request(), staging=staging, tell=lambda _line: None)
    return settled, {one.name: why for one, why in settled.staged.items()}


def test_what_ends_well_is_emulated_once() -> None:
    table = Table((A, B))
    assert run(table)[1] == {}
    assert table.story == ["emulate a b", "extract with"]


def test_package_that_fails_is_staged_with_what_needs_it_and_the_rest_is_emulated_afresh() -> None:
    table = Table((A, B, C), bad={"a": fails("a")}, needs={"b": "a"})
    _settled, reasons = run(table)
    assert reasons == {
        "a": "it failed while the guest slept: script failed",
        "b": "apt does not plan it without a, which is staged",
    }
    assert table.story == ["emulate a b c", "start over", "emulate c", "extract with a b"]


def test_package_that_waits_for_another_is_no_culprit() -> None:
    errors = (
        PackageError("a", "script failed", waits=False),
        PackageError("b", "dependency problems - leaving unconfigured", waits=True),
    )
    table = Table((A, B), bad={"a": Ran("apt-get: error", False, errors, ())})
    assert run(table)[1].keys() == {"a"}


def test_culprits_come_one_after_the_other() -> None:
    table = Table((A, B, C), bad={"a": fails("a")}, holds={"b"})
    _settled, reasons = run(table)
    assert reasons["b"] == "held"
    assert table.story[-1] == "extract with a b"
    assert "emulate c" in table.story


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.UNKNOWN, Outcome.FOREIGN])
def test_call_without_a_true_answer_stages_although_the_script_went_on(outcome: Outcome) -> None:
    event = Event(outcome, ("keyctl", "0"), "b", "postinst")
    table = Table((A, B), called={"b": event})
    assert "keyctl 0" in run(table)[1]["b"]


def test_call_that_everybody_does_without_stages_nothing() -> None:
    event = Event(Outcome.REFUSED, ("io_uring_setup", "8"), "b", "postinst")
    assert run(Table((A, B), called={"b": event}))[1] == {}


def test_call_that_is_recorded_stages_nothing() -> None:
    event = Event(Outcome.WITHHELD, ("reboot",), "b", "postinst")
    assert run(Table((A, B), called={"b": event}))[1] == {}


def test_package_that_does_not_end_in_time_is_the_last_that_was_worked_on() -> None:
    slow = Ran("apt-get: killed", True, (), (Work("a", 1), Work("b", 2)))
    assert run(Table((A, B), bad={"b": slow}))[1] == {
        "b": "it did not end in time while the guest slept"
    }


def test_all_may_end_staged() -> None:
    table = Table((A, B), bad={"a": fails("a", "b")})
    assert run(table)[1].keys() == {"a", "b"}
    assert table.story == ["emulate a b", "start over", "extract with a b"]


def test_trigger_of_an_installed_package_stages_all_that_may_have_pulled_it() -> None:
    reasons = run(Table((A, B), bad={"a": fails("man-db")}))[1]
    assert reasons.keys() == {"a", "b"}
    assert "man-db, which is not part of the update" in reasons["b"]


def test_plan_that_becomes_another_stages_all_of_it() -> None:
    """With another version in sight, or another solver of a dependency, nothing else was agreed."""
    table = Table((A, B), bad={"a": fails("a")}, other=(change("exim4", ""),))
    assert run(table)[1]["b"] == "apt plans something else without a, which is staged"


def test_plan_without_a_solution_stages_all_that_is_left() -> None:
    table = Table((A, B), bad={"a": fails("a")}, unsolvable=UpdaterError("no solution"))
    assert run(table)[1].keys() == {"a", "b"}
    full = Table((A, B), bad={"a": fails("a")}, unsolvable=WorkDiskFullError("full"))
    with pytest.raises(WorkDiskFullError):
        run(full)


def test_rounds_are_bounded_and_the_last_stages_what_is_left() -> None:
    many = tuple(change(f"p{number}") for number in range(20))
    table = Table(many, bad={one.name: fails(one.name) for one in many})
    reasons = run(table)[1]
    assert len(reasons) == 20
    assert reasons["p19"] == "too many others had to be staged"
    assert sum(step.startswith("emulate") for step in table.story) == 7


def test_failure_that_nobody_is_to_blame_for_is_an_error() -> None:
    with pytest.raises(UpdaterError, match="hook"):
        run(Table((A,), bad={"a": Ran("apt-get: a hook failed", False, (), ())}))
    with pytest.raises(DeadlineError):
        run(Table((A,), bad={"a": Ran("apt-get: killed", True, (), ())}))


def test_without_staging_the_package_and_the_reason_are_named() -> None:
    with pytest.raises(StagingNeededError, match="a: it failed while the guest slept: script"):
        run(Table((A, B), bad={"a": fails("a")}), staging=False)
    with pytest.raises(StagingNeededError, match="b: held"):
        run(Table((A, B), holds={"b"}), staging=False)
    slow = Ran("apt-get: killed", True, (), (Work("a", 1),))
    with pytest.raises(DeadlineError, match="a: it did not end in time"):
        run(Table((A, B), bad={"a": slow}), staging=False)
