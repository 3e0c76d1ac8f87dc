"""A domain without its libvirt: what is decided before it is asked, and what the agent may say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ouassister.access import AGENT, SSH, Access
from ouassister.errors import AgentError, DeadlineError, UnsupportedGuestError, UsageError
from ouassister.provider import libvirt
from ouassister.provider.domain_xml import Hardware
from ouassister.provider.virsh import Answer, Virsh
from ouassister.provider.virsh_agent import VirshAgent

if TYPE_CHECKING:
    from collections.abc import Callable

HARDWARE = Hardware("web1", "u-1", (), (), "vdz", (AGENT,), "", (), host_kernel_mounts=False)
ABSENT = Answer(False, "", "Guest agent is not responding: QEMU guest agent is not connected")
SILENT = Answer(False, "", "Guest agent is not responding: Guest agent not available for now")


def test_domain_is_found_again_by_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = libvirt.Domain(
        Virsh("qemu:///system"), HARDWARE, Path("/s/web1.save"), True, (), False
    )
    assert domain.source == "libvirt:u-1?connect=qemu%3A%2F%2F%2Fsystem"
    asked: list[tuple[str, str, Path | None]] = []
    monkeypatch.setattr(libvirt, "find", lambda *words: asked.append(words))
    libvirt.load(domain.source, Path("/a"))
    assert asked == [("u-1", "qemu:///system", Path("/a"))]


def test_domain_is_reached_by_what_its_xml_has_a_port_for() -> None:
    domain = libvirt.Domain(Virsh("qemu:///system"), HARDWARE, Path("/s"), True, (), False)
    assert domain.channels == (AGENT,)
    assert domain.untold_links == ()
    with pytest.raises(UsageError, match="has no channel ssh"):
        libvirt.RunningDomain(domain).reach(Access(SSH))


def test_domain_that_lacks_something_cannot_be_updated() -> None:
    whole = libvirt.Domain(Virsh("qemu:///system"), HARDWARE, Path("/s"), True, (), False)
    whole.refuse_unresumable()
    lacking = replace(whole, hardware=replace(HARDWARE, lacking="a free pcie-root-port"))
    with pytest.raises(UnsupportedGuestError, match=r"web1 cannot .* it lacks a free pcie-root"):
        lacking.refuse_unresumable()


def test_saves_of_a_user_are_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/c")
    assert Virsh("qemu:///session").saves() == Path("/c/libvirt/qemu/save")
    assert Virsh("qemu+unix:///system").saves() == Path("/var/lib/libvirt/qemu/save")


@pytest.mark.parametrize("uri", ["qemu+ssh://far/system", "xen:///system", "qemu:///embed", "a b"])
def test_other_libvirt_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="no libvirt of this host"):
        Virsh(uri).saves()


@dataclass(frozen=True)
class Told(Virsh):
    """What libvirt answers, in turn; the last goes on. An agent of a hostile guest is behind it."""

    answers: list[Answer] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def ask(self, *words: str, timeout_s: float = 30.0) -> Answer:
        self.asked.append(json.loads(words[2])["execute"])
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


PONG = Answer(True, '{"return": {}}', "")


def told(*answers: Answer) -> tuple[Told, VirshAgent]:
    virsh = Told("qemu:///system", list(answers))
    return virsh, VirshAgent(virsh, "u-1")


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", "[" * 100_000, '{"error": 1}'])
def test_reply_that_is_none_is_an_error(text: str) -> None:
    _virsh, agent = told(Answer(True, text, ""))
    with pytest.raises(AgentError, match="is no reply"):
        agent.execute("guest-info")


def test_agent_that_is_not_there_yet_is_waited_for() -> None:
    virsh, agent = told(ABSENT, SILENT, ABSENT, PONG)
    agent.execute("guest-info", timeout_s=30)
    assert virsh.asked == ["guest-info", "guest-ping", "guest-ping", "guest-ping", "guest-info"]


def test_agent_that_stays_silent_ends_at_the_deadline() -> None:
    _virsh, agent = told(ABSENT)
    with pytest.raises(DeadlineError, match="is not connected"):
        agent.execute("guest-info", timeout_s=0.2)


def test_command_whose_answer_is_late_is_not_sent_twice() -> None:
    virsh, agent = told(SILENT, PONG)
    with pytest.raises(DeadlineError):
        agent.start(["/bin/true"])
    assert virsh.asked == ["guest-exec"]
    agent.execute("guest-info")
    assert virsh.asked[1:] == ["guest-ping", "guest-info"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda agent: agent.start(["/bin/true"]), "returned no pid"),
        (lambda agent: agent.status(1), "is malformed"),
        (lambda agent: agent.write_file("/a", b"x"), "returned no pid"),
        (lambda agent: agent.execute("guest-exec", arg="x" * (128 << 10)), "too long for virsh"),
    ],
)
def test_what_an_agent_may_not_say(call: Callable[[VirshAgent], Any], words: str) -> None:
    _virsh, agent = told(PONG)
    with pytest.raises(AgentError, match=words):
        call(agent)


def test_refusal_is_told_in_libvirt_s_words() -> None:
    _virsh, agent = told(Answer(False, "", "unable to execute QEMU agent command"))
    with pytest.raises(AgentError, match="refused guest-exec: 'unable to execute"):
        agent.start(["/bin/true"])
    _virsh, agent = told(ABSENT, Answer(False, "", "Requested operation is not valid: domain is"))
    with pytest.raises(AgentError, match="cannot be asked"):
        agent.start(["/bin/true"])
