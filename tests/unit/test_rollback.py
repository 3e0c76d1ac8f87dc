"""What the guest is told to take back, what it answers, and what is refused before it is asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tests.unit.test_medium import changeset, file
from tests.unit.test_staged_reflection import APP, LIBRARY, restart

from ouassister import pipeline
from ouassister.changeset.medium import MediumInfo, write_medium
from ouassister.errors import (
    ApplyError,
    GateClosedError,
    LockedError,
    OUassisterError,
    RollbackRefusedError,
    StaleError,
)
from ouassister.model import Action, Differing, Entry, Kind, Restart, Verdict
from ouassister.provider import vmtoml
from ouassister.reflect import rollback
from ouassister.reflect.applier_protocol import ApplierResult, Outcome, ProtocolError
from ouassister.restart.back import actions_back, stopped_for_good
from ouassister.store.database import ChangesetState, Store
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

AGENT = "qemu-guest-agent.service"
RELOAD = ("systemctl", "daemon-reload")
TIMER = ("systemd-run", "--on-active=30", "systemctl", "try-restart", AGENT)
TOML = """\
[vm]
name = "web1"
save = "web1.save"
[qemu]
command = ["qemu-system-x86_64", "-blockdev",
           "driver=raw,node-name=d,file.driver=file,file.filename=a.raw"]
qmp = "qmp.sock"
[[disk]]
node = "d"
path = "a.raw"
format = "raw"
"""


def event(path: str, reason: str) -> bytes:
    value = {"event": "diverged", "path": path, "reason": reason, "ms": 1.0}
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def result(outcome: Outcome, code: str = "") -> ApplierResult:
    return ApplierResult(outcome, code, b"/a", "why", 0, 0, (), 0.0)


def test_command_is_the_appliers_for_the_way_back() -> None:
    command = rollback.rollback_command(
        b"apply", "oua-1", MediumInfo(7, "ab" * 32, 1), leave_diverged=False
    )
    assert command[-4:] == ["rollback", "serial:oua-1", "--medium-sha256", "ab" * 32]
    assert "--set-time" not in command
    leaving = rollback.rollback_command(
        b"apply", "oua-1", MediumInfo(7, "ab" * 32, 1), leave_diverged=True
    )
    assert leaving[-2:] == ["--leave-diverged", "yes"]
    forgetting = rollback.rollback_command(
        b"apply", "oua-1", MediumInfo(7, "ab" * 32, 1), leave_diverged=False, mode="forget"
    )
    assert forgetting[-4:] == ["forget", *command[-3:]]


def test_diverged_paths_are_read_and_escaped() -> None:
    output = b'{"event":"phase"}\n' + event("/a\\x1b", "it \\x1b[2J was written") + b"{}\n"
    assert rollback.diverged(output) == (Differing(b"/a\x1b", "it \\x1b[2J was written"),)


@pytest.mark.parametrize(
    "line",
    [
        b'{"event":"diverged"\n',
        b'{"event":"diverged"}\n',
        b'{"event":"diverged","path":1,"reason":"x"}\n',
        b'{"event":"diverged","path":"/\\\\xzz","reason":"x"}\n',
        b'{"event":"diverged","path":"/a","reason":null}\n',
        b'{"event":"diverged","path":' + b"[" * 100_000 + b"\n",
        event("/a", "x") * 1001,
    ],
)
def test_malformed_diverged_paths_are_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        rollback.diverged(line)


def test_result_means_an_error_that_says_what_becomes_of_the_gate() -> None:
    left = (Differing(b"/a\x1b", "it was written"),)

    def error(outcome: Outcome, code: str, *, again: bool = False) -> OUassisterError:
        found = rollback.error_for(result(outcome, code), left, again=again)
        assert found is not None
        return found

    for outcome in (Outcome.ROLLED_BACK, Outcome.ALREADY_ROLLED_BACK):
        assert rollback.error_for(result(outcome), (), again=True) is None
    assert type(error(Outcome.UNDONE, "io")) is ApplyError
    assert type(error(Outcome.NEEDS_PERSON, "undo")) is GateClosedError
    assert type(error(Outcome.REFUSED, "locked")) is LockedError
    assert type(error(Outcome.REFUSED, "no-undo")) is RollbackRefusedError
    # What an earlier run has left may be half done.
    assert type(error(Outcome.REFUSED, "locked", again=True)) is GateClosedError
    assert type(error(Outcome.REFUSED, "no-undo", again=True)) is RollbackRefusedError
    told = error(Outcome.REFUSED, "diverged")
    assert isinstance(told, RollbackRefusedError)
    assert told.paths == (("/a\\x1b", "it was written"),)


def unit(name: bytes, **more: object) -> Entry:
    return file(b"/lib/systemd/system/" + name, **more)


def test_services_that_came_are_stopped_and_the_others_restarted() -> None:
    made = changeset(
        unit(b"new.service", expected=None),
        unit(b"old.service"),
        actions=(
            Action(RELOAD),
            Action(("systemctl", "stop", "gone.service", "old.service")),
            Action(("deb-systemd-invoke", "start", "new.service", "old.service")),
            Action(("invoke-rc.d", "sysv", "restart")),
            Action(("systemctl", "try-restart", "a.service")),
            Action(TIMER),
        ),
        restarts=(
            restart("a.service", 7),
            restart("b.service", 8),
            Restart("dbus.service", Verdict.ADVISE, "sessions", ()),
            Restart(AGENT, Verdict.LATER, "the resume talks to it", ()),
        ),
    )
    assert [action.argv for action in actions_back(made)] == [
        RELOAD,
        ("systemctl", "stop", "new.service"),
        ("systemctl", "try-restart", "old.service", "sysv.service", "a.service", "b.service"),
        TIMER,
    ]


def test_agent_that_a_script_restarted_is_restarted_later() -> None:
    made = changeset(actions=(Action(("systemctl", "restart", AGENT, "x.service")),))
    assert [action.argv for action in actions_back(made)] == [
        RELOAD,
        ("systemctl", "try-restart", "x.service"),
        TIMER,
    ]


def test_update_without_services_has_no_actions_back() -> None:
    assert actions_back(changeset(file(b"/etc/x"))) == ()


def test_service_that_was_removed_is_named() -> None:
    made = changeset(
        unit(b"gone.service", kind=Kind.DELETE),
        actions=(Action(("systemctl", "stop", "gone.service", "kept.service")),),
    )
    assert stopped_for_good(made) == ("gone.service",)
    assert [action.argv for action in actions_back(made)] == [RELOAD]


def test_medium_for_the_way_back_has_the_same_header_and_no_layer(tmp_path: Path) -> None:
    made = changeset(file(b"/etc/x"), layer_size=1 << 30)
    (tmp_path / "applier").write_bytes(b"program")
    info = write_medium(made, None, tmp_path / "applier", tmp_path / "medium")
    status = (tmp_path / "medium").stat()
    assert status.st_size == info.size > 1 << 30
    assert status.st_blocks * 512 < 1 << 20


@pytest.fixture
def config(tmp_path: Path) -> vmtoml.VmConfig:
    (tmp_path / "a.raw").write_bytes(b"")
    (tmp_path / "vm.toml").write_text(TOML)
    return vmtoml.load(tmp_path / "vm.toml")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "home") as store:
        store.remember("web1", str(tmp_path / "vm.toml"))
        yield store


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([], "nothing was reflected"),
        ([ChangesetState.READY], "nothing was reflected"),
        ([ChangesetState.FAILED], "nothing was reflected"),
        ([ChangesetState.APPLYING], "applying"),
        ([ChangesetState.APPLIED, ChangesetState.ROLLED_BACK], "rolled-back"),
        ([ChangesetState.APPLIED], "was discarded"),
        ([ChangesetState.APPLIED, ChangesetState.FAILED], "was discarded"),
    ],
)
def test_nothing_to_take_back_is_refused(
    store: Store, config: vmtoml.VmConfig, states: list[ChangesetState], words: str
) -> None:
    for number, state in enumerate(states):
        store.add_changeset("web1", f"{number:064x}")
        store.set_state(f"{number:064x}", state)
    with pytest.raises(RollbackRefusedError, match=words):
        pipeline.rollback(config, store, Timeline())


def test_half_rolled_back_change_set_is_not_discarded(
    store: Store, config: vmtoml.VmConfig
) -> None:
    store.add_changeset("web1", "0" * 64)
    store.set_state("0" * 64, ChangesetState.ROLLING_BACK)
    with pytest.raises(StaleError, match="half rolled back"):
        pipeline.discard(config, store)


def test_update_with_staged_packages_is_refused_by_name(
    config: vmtoml.VmConfig, tmp_path: Path
) -> None:
    with pytest.raises(RollbackRefusedError, match="libfoo, app"):
        rollback.roll_back(
            config,
            changeset(staged=(LIBRARY, APP)),
            tmp_path,
            Timeline(),
            leave_diverged=True,
            again=False,
            on_state=lambda _state: pytest.fail("something was begun"),
        )
