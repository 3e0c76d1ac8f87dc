"""The database: VMs, plans, change sets and what happened, in order.

Every change is one transaction with ``synchronous=FULL``, so that a crash between two steps of a
run loses nothing: what a step made is either recorded or can be thrown away.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ouassister import codec
from ouassister.errors import LockedError, StaleError, TamperedError, UsageError, WorkDiskFullError
from ouassister.model import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

_SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE vm (
    name TEXT PRIMARY KEY,
    source TEXT NOT NULL
) STRICT;
CREATE TABLE plan (
    plan_id TEXT PRIMARY KEY,
    vm TEXT NOT NULL REFERENCES vm,
    made_at_s INTEGER NOT NULL,
    record TEXT NOT NULL
) STRICT;
CREATE TABLE changeset (
    changeset_id TEXT PRIMARY KEY,
    vm TEXT NOT NULL REFERENCES vm,
    made_at_s INTEGER NOT NULL,
    state TEXT NOT NULL
) STRICT;
CREATE TABLE event (
    event_id INTEGER PRIMARY KEY,
    vm TEXT NOT NULL REFERENCES vm,
    at_s REAL NOT NULL,
    verb TEXT NOT NULL,
    step TEXT NOT NULL,
    detail TEXT NOT NULL
) STRICT;
"""


class ChangesetState(StrEnum):
    """How far a change set got."""

    READY = "ready"  # may be applied
    APPLYING = "applying"  # the VM was resumed for it; the gate is closed
    APPLIED = "applied"
    FAILED = "failed"  # the guest refused or undid it
    DISCARDED = "discarded"
    ROLLING_BACK = "rolling-back"  # it was applied, and is being taken back
    ROLLED_BACK = "rolled-back"
    FALLBACK = "fallback"  # is there in case that the one which it stands in for meets a conflict


@dataclass(frozen=True, slots=True)
class StoredChangeset:
    """A change set's row."""

    changeset_id: str
    vm: str
    made_at_s: int
    state: ChangesetState


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a run, as it began or ended."""

    at_s: float
    verb: str
    step: str
    detail: str


def home() -> Path:
    """The folder of all state: OUASSISTER_HOME, or the place that the system has for it."""
    chosen = os.environ.get("OUASSISTER_HOME")
    if chosen:
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/ouassister")
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "ouassister"


class Store:
    """Opened state of all VMs of one user; a context manager.

    Raises:
        WorkDiskFullError: There is no room for it.
        UsageError: It belongs to another version, or cannot be written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or home()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._database = sqlite3.connect(self.folder / "state.db", isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute("PRAGMA foreign_keys=ON")
            self._migrate()
        except (OSError, sqlite3.Error) as error:
            raise self._failure(error) from error

    def __enter__(self) -> Store:
        """Nothing more to do than to have it."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close the database."""
        self._database.close()

    # --- folders ---

    def vm_folder(self, vm: str) -> Path:
        """The private folder of a VM; made when missing."""
        folder = self.folder / "vms" / vm
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def changesets(self, vm: str) -> Path:
        """Where the VM's change sets are kept."""
        folder = self.vm_folder(vm) / "changesets"
        folder.mkdir(exist_ok=True)
        return folder

    @contextlib.contextmanager
    def lock(self, vm: str) -> Iterator[None]:
        """Hold the VM's lock; the kernel releases it when the process ends in any way.

        Raises:
            LockedError: Another process holds it.
        """
        descriptor = os.open(self.vm_folder(vm) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LockedError(f"another ouassister works on {vm}") from error
            yield
        finally:
            os.close(descriptor)

    # --- rows ---

    def remember(self, vm: str, source: str) -> None:
        """Record a VM by its name.

        Raises:
            UsageError: Another VM has that name.
        """
        row = self._one("SELECT source FROM vm WHERE name = ?", vm)
        if row is not None and row[0] != source:
            raise UsageError(
                f"the name {vm!r} belongs to {row[0]}",
                hint="give this VM another name in its vm.toml, or use another OUASSISTER_HOME",
            )
        self._write("INSERT OR IGNORE INTO vm VALUES (?, ?)", vm, source)

    def vms(self) -> tuple[tuple[str, str], ...]:
        """Names and sources of all VMs, by name."""
        return tuple(self._all("SELECT name, source FROM vm ORDER BY name"))

    def add_plan(self, plan: Plan) -> None:
        """Keep a plan."""
        record = json.dumps(codec.to_value(plan))
        now = int(time.time())
        self._write(
            "INSERT OR REPLACE INTO plan VALUES (?, ?, ?, ?)", plan.plan_id, plan.vm, now, record
        )

    def plan(self, vm: str, plan_id: str) -> Plan:
        """Read a plan back.

        Raises:
            StaleError: There is no such plan of this VM.
            TamperedError: It is not the one that was made.
        """
        row = self._one("SELECT record FROM plan WHERE plan_id = ? AND vm = ?", plan_id, vm)
        if row is None:
            raise StaleError(f"there is no plan {plan_id} of {vm}")
        try:
            plan = codec.from_value(Plan, json.loads(row[0]))
        except ValueError as error:
            raise TamperedError(f"plan {plan_id} cannot be read: {error}") from error
        if codec.digest(plan, without="plan_id") != plan_id:
            raise TamperedError(f"plan {plan_id} does not have that digest")
        return plan

    def add_changeset(self, vm: str, changeset_id: str, fallback_id: str = "") -> None:
        """Record a change set as ready, with one that may stand in for it.

        Older ready ones of the VM are superseded.
        """
        now = int(time.time())
        rows = [(changeset_id, vm, now, ChangesetState.READY)]
        if fallback_id:
            rows.append((fallback_id, vm, now, ChangesetState.FALLBACK))
        with self._transaction():
            self._database.execute(
                "UPDATE changeset SET state = ? WHERE vm = ? AND state IN (?, ?)",
                (ChangesetState.DISCARDED, vm, ChangesetState.READY, ChangesetState.FALLBACK),
            )
            self._database.executemany("INSERT OR REPLACE INTO changeset VALUES (?, ?, ?, ?)", rows)

    def fall_back(self, vm: str, changeset_id: str, fallback_id: str) -> None:
        """A change set has met a conflict, and another one is being applied in its place."""
        with self._transaction():
            self._database.execute(
                "UPDATE changeset SET state = ? WHERE changeset_id = ?",
                (ChangesetState.FAILED, changeset_id),
            )
            self._database.execute(
                "INSERT OR REPLACE INTO changeset VALUES (?, ?, ?, ?)",
                (fallback_id, vm, int(time.time()), ChangesetState.APPLYING),
            )

    def set_state(self, changeset_id: str, state: ChangesetState) -> None:
        """Move a change set on."""
        self._write("UPDATE changeset SET state = ? WHERE changeset_id = ?", state, changeset_id)

    def changeset_rows(self, vm: str) -> tuple[StoredChangeset, ...]:
        """All change sets of a VM, newest first."""
        rows = self._all(
            "SELECT changeset_id, vm, made_at_s, state FROM changeset WHERE vm = ?"
            " ORDER BY made_at_s DESC, rowid DESC",
            vm,
        )
        return tuple(
            StoredChangeset(i, name, at, ChangesetState(state)) for i, name, at, state in rows
        )

    def pending(self, vm: str) -> StoredChangeset | None:
        """The change set that a resume would apply, or take up again."""
        states = (ChangesetState.APPLYING, ChangesetState.READY)
        rows = [row for row in self.changeset_rows(vm) if row.state in states]
        return rows[0] if rows else None

    def last_applied(self, vm: str) -> StoredChangeset | None:
        """The last change set that got into the guest, whether or not it was taken back."""
        never = (
            ChangesetState.READY,
            ChangesetState.DISCARDED,
            ChangesetState.FAILED,
            ChangesetState.FALLBACK,
        )
        rows = [row for row in self.changeset_rows(vm) if row.state not in never]
        return rows[0] if rows else None

    def log(self, vm: str, verb: str, step: str, detail: str = "") -> None:
        """Add to the VM's history."""
        self._write(
            "INSERT INTO event (vm, at_s, verb, step, detail) VALUES (?, ?, ?, ?, ?)",
            vm,
            time.time(),
            verb,
            step,
            detail,
        )

    def history(self, vm: str, most: int = 20) -> tuple[Event, ...]:
        """The newest events, oldest first."""
        rows = self._all(
            "SELECT at_s, verb, step, detail FROM event WHERE vm = ?"
            " ORDER BY event_id DESC LIMIT ?",
            vm,
            most,
        )
        return tuple(Event(*row) for row in reversed(rows))

    def last_detail(self, vm: str, step: str) -> str:
        """What the newest event of that step says; "" for none."""
        row = self._one(
            "SELECT detail FROM event WHERE vm = ? AND step = ? ORDER BY event_id DESC LIMIT 1",
            vm,
            step,
        )
        return str(row[0]) if row is not None else ""

    def details(self, step: str, most: int = 10_000) -> tuple[tuple[str, str], ...]:
        """What all VMs' histories say of a step: VM and detail, oldest first."""
        rows = self._all(
            "SELECT vm, detail FROM event WHERE step = ? ORDER BY event_id DESC LIMIT ?", step, most
        )
        return tuple(reversed(rows))

    # --- SQLite ---

    def _migrate(self) -> None:
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            script = f"BEGIN EXCLUSIVE; {_SCHEMA} PRAGMA user_version={_SCHEMA_VERSION}; COMMIT;"
            self._database.executescript(script)
        elif version != _SCHEMA_VERSION:
            raise UsageError(
                f"{self.folder}/state.db has schema {version}, not {_SCHEMA_VERSION}",
                hint="use the version of ouassister that wrote it, or another OUASSISTER_HOME",
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield
            self._database.execute("COMMIT")
        except BaseException as error:  # a signal too: the next write finds no open transaction
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise self._failure(error) from error
            raise

    def _write(self, statement: str, *values: object) -> None:
        with self._transaction():
            self._database.execute(statement, values)

    def _one(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._database.execute(statement, values).fetchone()
        return row

    def _all(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return self._database.execute(statement, values).fetchall()

    def _failure(self, error: Exception) -> WorkDiskFullError | UsageError:
        if "full" in str(error) or getattr(error, "errno", None) == 28:  # ENOSPC
            return WorkDiskFullError(f"no room for the state in {self.folder}")
        return UsageError(
            f"the state in {self.folder} cannot be used: {error}",
            hint="choose a folder of yours with OUASSISTER_HOME",
        )
