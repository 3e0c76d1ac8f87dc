"""A VM whose guest answers as the real one would; everything on the host is real."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ouassister.model import Differing
from ouassister.provider.channel import Channel, ExecResult

if TYPE_CHECKING:
    from collections.abc import Sequence


class KilledError(BaseException):
    """The host's side dies here."""


@dataclass
class PlayedGuest(Channel):
    """A guest whose applier and shell answer as they would; by the medium's serial."""

    name: ClassVar[str] = "played"
    conflicts: tuple[Differing, ...] = ()
    outcome: str = "refused"
    dpkg: str = "code 0"
    applied: list[str] = field(default_factory=list)  # serials, as the applier was asked
    installed: int = 0
    up: bool = True
    medium: str = ""
    killed_at: str = ""
    alive: bool = False

    def _maybe_die(self, place: str) -> None:
        if place == self.killed_at:
            self.killed_at = ""
            raise KilledError

    # As `Running`.

    def __enter__(self) -> PlayedGuest:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def reach(self, _access: object) -> None:
        pass

    def channel(self) -> PlayedGuest:
        return self

    def runs(self) -> bool:
        return self.alive

    def cont(self) -> None:
        self.alive = True

    def kill(self) -> None:
        self.alive = False

    def set_links(self, *, up: bool) -> None:
        if up:
            self._maybe_die("open")
        self.up = up

    def attach_medium(self, _path: Path, serial: str) -> None:
        self._maybe_die(f"attach {len(self.applied)}")
        assert not self.medium, "a medium is plugged in"
        self.medium = serial

    def detach_medium(self, *, timeout_s: float = 30.0) -> None:
        del timeout_s
        self._maybe_die(f"detach {len(self.applied)}")
        self.medium = ""

    # As `Channel`.

    def ping(self, *, timeout_s: float = 5.0) -> None:
        pass

    def close(self) -> None:
        pass

    def write_file(self, path: str, content: bytes, *, timeout_s: float = 30.0) -> None:
        pass

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float,
        most_s: float = 0.1,
    ) -> ExecResult:
        del stdin, timeout_s, most_s
        words = " ".join(argv)
        if "apply" in argv:
            return ExecResult(0, self._apply(argv[argv.index("apply") + 1]), b"", False)
        if "verify" in words or "begin" in words.splitlines():
            told = "v marker clean\nv audit 0\nv units 0\nv attested 0\n"
            return ExecResult(0, told.encode(), b"", False)
        if "told" in words:
            self._maybe_die("dpkg")
            states = "state app amd64 2.0 installed\nstate libfoo amd64 2.0 installed\n"
            return ExecResult(0, f"{self.dpkg}\n{states}end\n".encode(), b"", False)
        self.installed += "systemd-run" in words
        return ExecResult(0, b"", b"", False)

    def _apply(self, device: str) -> bytes:
        serial = device.removeprefix("serial:")
        assert serial == self.medium
        again = serial in self.applied
        self.applied.append(serial)
        self._maybe_die(f"applied {len(self.applied)}")
        if self.conflicts and serial == self.applied[0]:
            lines = [
                {"event": "conflict", "path": one.path.decode(), "reason": one.reason, "ms": 1.0}
                for one in self.conflicts
            ]
            first = self.conflicts[0]
            return _lines(*lines, _result(self.outcome, first))
        return _lines(_result("already-applied" if again else "applied", None))


def _result(outcome: str, conflict: Differing | None) -> dict[str, object]:
    return {
        "event": "result",
        "result": outcome,
        "code": "conflict" if conflict else "",
        "path": conflict.path.decode() if conflict else "",
        "reason": conflict.reason if conflict else "",
        "files": 1,
        "bytes": 7,
        "phases": {"stage": 1.0, "verify": 1.0} if outcome == "applied" else {"check": 1.0},
        "ms": 9.0,
    }


def _lines(*values: dict[str, object]) -> bytes:
    return b"".join(json.dumps(v, separators=(",", ":")).encode() + b"\n" for v in values)


@dataclass
class PlayedVm:
    """Its description; the save file is real."""

    folder: Path
    guest: PlayedGuest
    name: str = "web1"
    quarantine: tuple[str, ...] = ()
    disks: tuple[object, ...] = ()
    running: bool = False
    restored: int = 0

    @property
    def source(self) -> str:
        return "vm.toml"

    @property
    def save(self) -> Path:
        return self.folder / "web1.save"

    def is_running(self) -> bool:
        return self.running

    def medium_place(self) -> None:
        return None

    def restore(self) -> PlayedGuest:
        self.restored += 1
        self.running, self.guest.up = True, False
        return self.guest

    def attach(self) -> PlayedGuest:
        return self.guest

    def retire_save(self) -> None:
        self.save.unlink(missing_ok=True)
