"""The database: what a step recorded survives its process, and what was changed is noticed."""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ouassister import codec
from ouassister.errors import (
    InterruptedRunError,
    LockedError,
    StaleError,
    TamperedError,
    UsageError,
    WorkDiskFullError,
)
from ouassister.model import Archive, Fence, FileStamp, LeftOut, PackageChange, Plan, Request
from ouassister.store.database import ChangesetState, Store, home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STAMP = FileStamp("/vms/web1.save", 1, 2, 3, 4, 5, "ab")


def make_plan(vm: str = "web1") -> Plan:
    plan = Plan(
        plan_id="",
        vm=vm,
        fence=Fence(STAMP, (STAMP,)),
        request=Request(("bcc",)),
        changes=(PackageChange("bcc", "amd64", "", "0.16.17-3.4"),),
        archives=(Archive("bcc", "http://mirror.example/b.deb", "b.deb", 9, "SHA256:00"),),
        left_out=(LeftOut("x", "kept back"),),
        download_bytes=9,
    )
    return dataclasses.replace(plan, plan_id=codec.digest(plan, without="plan_id"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "home") as opened:
        opened.remember("web1", "/vms/vm.toml")
        yield opened


def again(store: Store) -> Store:
    """What another process sees now; the first connection is left as a crash leaves it."""
    return Store(store.folder)


def raw(store: Store, statement: str, *values: object) -> None:
    connection = sqlite3.connect(store.folder / "state.db")
    with connection:
        connection.execute(statement, values)
    connection.close()


def test_each_step_is_seen_by_another_process_at_once(store: Store) -> None:
    plan = make_plan()
    steps: tuple[Callable[[], None], ...] = (
        lambda: store.add_plan(plan),
        lambda: store.add_changeset("web1", "c1"),
        lambda: store.set_state("c1", ChangesetState.APPLYING),
        lambda: store.log("web1", "resume", "apply", "begin"),
    )
    seen = []
    for step in steps:
        step()
        with again(store) as other:
            row = other.pending("web1")
            seen.append((row and row.state, [event.step for event in other.history("web1")]))
    assert seen == [
        (None, []),
        (ChangesetState.READY, []),
        (ChangesetState.APPLYING, []),
        (ChangesetState.APPLYING, ["apply"]),
    ]
    with again(store) as other:
        assert other.plan("web1", plan.plan_id) == plan
        assert other.vms() == (("web1", "/vms/vm.toml"),)


def test_failed_step_leaves_nothing_of_it(store: Store) -> None:
    """Superseding and recording are one transaction: the second statement fails here."""
    store.add_changeset("web1", "c1")
    raw(
        store,
        "CREATE TRIGGER no BEFORE INSERT ON changeset BEGIN SELECT RAISE(ABORT, 'no'); END",
    )
    with pytest.raises(UsageError, match="cannot be used: no"):
        store.add_changeset("web1", "c2")
    with again(store) as other:
        assert [(row.changeset_id, row.state) for row in other.changeset_rows("web1")] == [
            ("c1", ChangesetState.READY)
        ]


class Signalled(str):
    """A value in whose binding a signal arrives."""

    __slots__ = ()

    def __conform__(self, _protocol: object) -> str:
        raise InterruptedRunError("ended by SIGINT")


def test_signal_within_a_step_leaves_nothing_of_it_and_the_next_is_kept(store: Store) -> None:
    with pytest.raises(InterruptedRunError):
        store.log("web1", "resume", "gate closed", Signalled("begin"))
    store.log("web1", "resume", "gate closed", "InterruptedRunError")
    with again(store) as other:
        assert [event.detail for event in other.history("web1")] == ["InterruptedRunError"]


def test_every_commit_is_synchronous(store: Store) -> None:
    connection = store._database
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


# --- the lock ---


def test_lock_held_elsewhere_is_refused_and_released_at_the_end(store: Store) -> None:
    with again(store) as other:
        with store.lock("web1"):
            with (
                pytest.raises(LockedError, match="another ouassister works on web1"),
                other.lock("web1"),
            ):
                pytest.fail("two hold the lock")
            with other.lock("db1"):  # of another VM
                pass
        with other.lock("web1"):
            pass


def test_lock_is_released_by_an_error(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.lock("web1"):
        raise ZeroDivisionError
    with store.lock("web1"):
        pass


def test_lock_file_is_not_inherited_by_programs(store: Store) -> None:
    with store.lock("web1"):
        path = store.vm_folder("web1") / "lock"
        held = [int(link.name) for link in Path("/proc/self/fd").iterdir() if leads_to(link, path)]
        assert held
        assert not any(os.get_inheritable(fd) for fd in held)


def leads_to(link: Path, path: Path) -> bool:
    try:
        return link.readlink() == path
    except FileNotFoundError:  # the listing's own
        return False


# --- plans ---


def test_plan_of_another_vm_or_unknown_is_stale(store: Store) -> None:
    plan = make_plan()
    store.add_plan(plan)
    store.add_plan(plan)  # making it twice is fine
    store.remember("db1", "/vms/db1.toml")
    for vm, plan_id in (("db1", plan.plan_id), ("web1", "0" * 64), ("web1", "")):
        with pytest.raises(StaleError, match="there is no plan"):
            store.plan(vm, plan_id)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"bcc"', '"evil"', "does not have that digest"),
        ('"download_bytes": 9', '"download_bytes": 8', "does not have that digest"),
        ('"download_bytes": 9', '"download_bytes": true', "cannot be read"),
        ('"download_bytes": 9', '"download_byte": 9', "cannot be read"),
        ("}", "", "cannot be read"),
        ("mirror.example", "\\ud800", "does not have that digest"),
    ],
)
def test_changed_plan_is_tampered(store: Store, old: str, new: str, what: str) -> None:
    plan = make_plan()
    store.add_plan(plan)
    text = json.dumps(codec.to_value(plan))
    assert old in text
    raw(store, "UPDATE plan SET record = ?", text.replace(old, new))
    with pytest.raises(TamperedError, match=what):
        store.plan("web1", plan.plan_id)


def test_plan_under_another_id_is_tampered(store: Store) -> None:
    plan = make_plan()
    store.add_plan(plan)
    raw(store, "UPDATE plan SET plan_id = 'other'")
    with pytest.raises(TamperedError, match="does not have that digest"):
        store.plan("web1", "other")


# --- change sets ---


def test_new_changeset_supersedes_the_ready_one(store: Store) -> None:
    store.add_changeset("web1", "c1")
    store.add_changeset("web1", "c2")
    pending = store.pending("web1")
    assert pending is not None
    assert (pending.changeset_id, pending.vm, pending.state) == ("c2", "web1", "ready")
    states = {row.changeset_id: row.state for row in store.changeset_rows("web1")}
    assert states == {"c1": ChangesetState.DISCARDED, "c2": ChangesetState.READY}


def test_rows_come_newest_first_also_within_one_second(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    for changeset_id in ("c3", "c1", "c2"):
        store.add_changeset("web1", changeset_id)
    monkeypatch.setattr(time, "time", lambda: 999.0)
    store.add_changeset("web1", "old")
    assert [row.changeset_id for row in store.changeset_rows("web1")] == ["c2", "c1", "c3", "old"]


@pytest.mark.parametrize("state", list(ChangesetState))
def test_only_ready_and_applying_are_pending(store: Store, state: ChangesetState) -> None:
    store.add_changeset("web1", "c1")
    store.set_state("c1", state)
    pending = store.pending("web1")
    if state in (ChangesetState.READY, ChangesetState.APPLYING):
        assert pending is not None
        assert pending.state is state
    else:
        assert pending is None
    assert store.changeset_rows("web1")[0].state is state


def test_half_applied_changeset_stays_when_another_is_made(store: Store) -> None:
    store.add_changeset("web1", "c1")
    store.set_state("c1", ChangesetState.APPLYING)
    store.add_changeset("web1", "c2")
    states = {row.changeset_id: row.state for row in store.changeset_rows("web1")}
    assert states == {"c1": ChangesetState.APPLYING, "c2": ChangesetState.READY}


# --- VMs and history ---


def test_name_belongs_to_one_vm(store: Store) -> None:
    store.remember("web1", "/vms/vm.toml")
    with pytest.raises(UsageError, match=r"the name 'web1' belongs to /vms/vm\.toml"):
        store.remember("web1", "/other/vm.toml")


def test_unknown_vm_has_no_rows(store: Store) -> None:
    with pytest.raises(UsageError, match="FOREIGN KEY"):
        store.log("nobody", "update", "plan")


def test_history_is_the_newest_oldest_first(store: Store) -> None:
    for number in range(30):
        store.log("web1", "update", f"step {number}", "detail")
    assert [event.step for event in store.history("web1", 3)] == ["step 27", "step 28", "step 29"]
    assert len(store.history("web1")) == 20


# --- the folder ---


def test_other_schema_version_is_refused_and_left_alone(store: Store) -> None:
    raw(store, "PRAGMA user_version = 7")
    with pytest.raises(UsageError, match="has schema 7, not 1") as caught:
        Store(store.folder)
    assert "OUASSISTER_HOME" in caught.value.hint


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    Store(folder).__exit__()
    (folder / "state.db").chmod(0o400)
    folder.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be used") as caught:
        Store(folder)
    assert str(folder) in caught.value.message
    with pytest.raises(UsageError, match="cannot be used"):
        Store(folder / "deeper")
    folder.chmod(0o700)


def test_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(UsageError, match="not a database"):
        Store(tmp_path)


def test_folders_are_private(store: Store) -> None:
    for folder in (store.folder, store.vm_folder("web1")):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_no_room_has_its_own_error(store: Store) -> None:
    pages = store._database.execute("PRAGMA page_count").fetchone()[0]
    store._database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(WorkDiskFullError, match="no room for the state in"):
        store.log("web1", "update", "x" * 100_000)
    with again(store) as other:
        assert other.history("web1") == ()


def test_home_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUASSISTER_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUASSISTER_HOME", "below")
    assert home() == tmp_path / "below"
    monkeypatch.delenv("OUASSISTER_HOME")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert home() == tmp_path / "data" / "ouassister"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".local" / "share" / "ouassister"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert str(home()) == "/var/lib/ouassister"


def test_details_of_a_step_are_those_of_all_vms_oldest_first(store: Store) -> None:
    store.remember("web2", "/vms/web2.toml")
    for vm, step, detail in (
        ("web2", "staged", "1"),
        ("web1", "other", "2"),
        ("web1", "staged", "3"),
    ):
        store.log(vm, "update", step, detail)
    assert store.details("staged") == (("web2", "1"), ("web1", "3"))
    assert store.details("staged", most=1) == (("web1", "3"),)
