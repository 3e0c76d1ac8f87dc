"""What becomes of the gate after a failure, by each policy."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, cast

import pytest

from ouassister.cli import resume_verb
from ouassister.errors import (
    AgentError,
    ApplyError,
    GateClosedError,
    GateOpenedError,
    InterruptedRunError,
    LockedError,
    OUassisterError,
    QemuLostError,
    StaleError,
)
from ouassister.reflect import gate
from ouassister.reflect.gate import OnFailure
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from ouassister.provider.qemu import RunningVM

NOW = OnFailure(0.0)
APART = OnFailure(quarantine=True)


class Links:
    """Links that somebody may open."""

    def __init__(self, error: OUassisterError | None = None) -> None:
        self.up = self.apart = False
        self.error = error

    def set_links(self, *, up: bool) -> None:
        if self.error:
            raise self.error
        self.up = up

    def open_quarantine(self) -> None:
        if self.error:
            raise self.error
        self.apart = True


def after(links: Links, failure: OUassisterError, policy: OnFailure) -> OUassisterError:
    return gate.after_failure(cast("RunningVM", links), failure, policy, Timeline())


@pytest.mark.parametrize("failure", [ApplyError("x"), GateClosedError("x")])
def test_gate_stays_closed_unless_asked(failure: OUassisterError) -> None:
    links = Links()
    assert after(links, failure, OnFailure()) is failure
    assert not links.up


def test_gate_opens_after_a_failure_when_asked_and_the_error_says_so() -> None:
    links = Links()
    told = after(links, GateClosedError("x"), NOW)
    assert isinstance(told, GateOpenedError)
    assert (links.up, told.exit_status) == (True, 41)
    links = Links()
    told = after(links, ApplyError("x"), NOW)
    assert isinstance(told, ApplyError)
    assert links.up
    assert "opened" in told.message


@pytest.mark.parametrize("failure", [StaleError("x"), LockedError("x")])
def test_refusal_never_opens_the_gate(failure: OUassisterError) -> None:
    links = Links()
    assert after(links, failure, NOW) is failure
    assert not links.up


def test_signal_while_waiting_leaves_the_gate_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_seconds: float) -> None:
        raise InterruptedRunError("ended by SIGINT")

    monkeypatch.setattr("time.sleep", interrupted)
    links = Links()
    told = after(links, GateClosedError("x"), OnFailure(3600.0))
    assert isinstance(told, GateClosedError)
    assert "SIGINT: the gate stays closed" in told.message
    assert not links.up


@pytest.mark.parametrize("failure", [ApplyError("x"), GateClosedError("x")])
def test_quarantine_opens_alone_and_the_error_says_so(failure: OUassisterError) -> None:
    links = Links()
    told = after(links, failure, APART)
    assert type(told) is type(failure)
    assert (links.up, links.apart) == (False, True)
    assert "x; the VM is in quarantine" in told.message
    told = after(Links(QemuLostError("gone")), failure, APART)
    assert isinstance(told, GateClosedError)
    assert "the quarantine could not be opened: gone" in told.message
    links = Links(InterruptedRunError("ended by SIGTERM"))
    assert "SIGTERM: the gate stays closed" in after(links, failure, APART).message
    links = Links()
    assert after(links, LockedError("x"), APART).message == "x"
    assert not links.apart


def test_links_that_cannot_be_opened_are_told() -> None:
    told = after(Links(QemuLostError("gone")), ApplyError("x"), NOW)
    assert isinstance(told, GateClosedError)
    assert "could not be opened: gone" in told.message


def test_what_nobody_knows_the_end_of_needs_a_person() -> None:
    assert isinstance(gate.judge(AgentError("silent")), GateClosedError)
    for known in (ApplyError("x"), GateClosedError("x"), StaleError("x"), LockedError("x")):
        assert gate.judge(known) is known


def test_policy_is_read_or_refused_in_words() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    resume_verb.add_arguments(parser)
    for word, policy in (
        ("closed", OnFailure()),
        ("open-after=0", NOW),
        ("open-after=90", OnFailure(90.0)),
        ("quarantine", APART),
    ):
        assert parser.parse_args(["--on-failure", word, "vm"]).on_failure == policy
    assert parser.parse_args(["vm"]).on_failure == OnFailure()
    for word, why in (
        ("quarantine=br0", "say quarantine alone"),
        ("open-after=-1", "none of closed"),
        ("open-after=1.5", "none of closed"),
        ("open", "none of closed"),
    ):
        with pytest.raises(argparse.ArgumentError, match=why):
            parser.parse_args(["--on-failure", word, "vm"])
