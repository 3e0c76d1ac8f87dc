"""libvirt-python without its libvirt: which client is taken, and calls that fail or hang.

What each word means is held against virsh in `tests/vm/test_libvirt.py`, by a real daemon.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from ouassister.errors import DeadlineError, HostNotReadyError, UsageError
from ouassister.provider import libvirt_python
from ouassister.provider.libvirt_python import Library, client, installed
from ouassister.provider.virsh import NO_DOMAIN, Virsh

if TYPE_CHECKING:
    from pathlib import Path

URI = "qemu:///system"
CHOICE = "OUASSISTER_LIBVIRT_CLIENT"


class FakeError(Exception):
    """As the library's own."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code

    def get_error_message(self) -> str:
        return str(self.args[0])

    def get_error_code(self) -> int:
        return self.code


class FakeLibvirt:
    """The library, and the connection that it opens; calls are what a test says."""

    libvirtError = FakeError  # noqa: N815 - the library's own name
    VIR_ERR_NO_DOMAIN = 42
    __file__ = "/lib/libvirt.py"

    def __init__(self) -> None:
        self.opened = 0
        self.alive = True
        self.refuses: FakeError | None = None

    def open(self, _uri: str) -> FakeLibvirt:
        if self.refuses is not None:
            raise self.refuses
        self.opened += 1
        self.alive = True
        return self

    def isAlive(self) -> bool:  # noqa: N802
        return self.alive


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLibvirt:
    library = FakeLibvirt()
    monkeypatch.setattr(libvirt_python, "_modules", lambda: (library, library))
    monkeypatch.setattr(libvirt_python, "_connections", {})
    monkeypatch.delenv(CHOICE, raising=False)
    return library


def calls(monkeypatch: pytest.MonkeyPatch, call: Any) -> Library:  # noqa: ANN401
    monkeypatch.setitem(libvirt_python._CALLS, "domstate", call)
    return Library(URI)


def test_library_is_taken_where_it_is(
    fake: FakeLibvirt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "virsh"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert client(URI) == Library(URI)
    assert installed() == (fake.__file__, str(tool))
    monkeypatch.setenv(CHOICE, "virsh")
    assert type(client(URI)) is Virsh
    assert installed() == (str(tool),)
    monkeypatch.setenv(CHOICE, "python")
    assert installed() == (fake.__file__,)
    monkeypatch.setattr(libvirt_python, "_modules", lambda: None)
    assert installed() == ()
    with pytest.raises(HostNotReadyError, match="libvirt-python is not installed"):
        client(URI)
    monkeypatch.delenv(CHOICE)
    assert type(client(URI)) is Virsh
    monkeypatch.setenv(CHOICE, "perl")
    for call in (installed, lambda: client(URI)):
        with pytest.raises(UsageError, match="'perl'"):
            call()


def test_call_that_hangs_ends_at_the_deadline_and_leaves_its_connection(
    fake: FakeLibvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    hangs = calls(monkeypatch, lambda _connection, _word: go.wait(60))
    with pytest.raises(DeadlineError, match="did not answer domstate"):
        hangs.ask("domstate", "web1", timeout_s=0.05)
    go.set()
    again = calls(monkeypatch, lambda _connection, _word: "running\n")
    assert again.ask("domstate", "web1").output == "running\n"
    assert fake.opened == 2
    again.ask("domstate", "web1")
    assert fake.opened == 2
    fake.alive = False  # the daemon was restarted
    again.ask("domstate", "web1")
    assert fake.opened == 3


def test_error_is_told_as_virsh_tells_it(
    fake: FakeLibvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception) -> Library:
        def call(_connection: object, _word: str) -> str:
            raise error

        return calls(monkeypatch, call)

    answer = fails(FakeError("no\x1b[31m way\nfor you")).ask("domstate", "web1")
    assert (answer.ok, answer.reason) == (False, "no?[31m way; for you")
    answer = fails(FakeError("no domain of that name", 42)).ask("domstate", "web1")
    assert (answer.ok, answer.reason) == (False, f"{NO_DOMAIN} 'web1'")
    answer = fails(FakeError("x" * 5000)).ask("domstate", "web1")
    assert (answer.ok, len(answer.reason)) == (False, 1000)
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError()).ask("domstate", "web1")
    fake.alive, fake.refuses = False, FakeError("nobody is there")
    with pytest.raises(HostNotReadyError, match="nobody is there"):
        Library(URI).ask("domstate", "web1")
