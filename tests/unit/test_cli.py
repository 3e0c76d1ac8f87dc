"""Bad input gets its documented exit status, one sentence of cause and one of remedy."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ouassister import guest_shadow
from ouassister.cli import main
from ouassister.cli import main as entry
from ouassister.cli.main import SCHEMA, VERBS
from ouassister.errors import StateError, WorkDiskFullError
from ouassister.provider import helper
from ouassister.store.database import ChangesetState, Store
from ouassister.text import size, table

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "command-line.md"
VM_VERBS = ("inspect", "plan", "update", "resume", "status", "rollback", "discard", "suspend")
SHADOW_VERBS = ("plan", "update")
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


@pytest.fixture(autouse=True)
def no_libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is installed, virsh among them; nor may libvirt-python be used."""
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("OUASSISTER_LIBVIRT_CLIENT", "virsh")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state of our own, and a VM that was never saved."""
    monkeypatch.setenv("OUASSISTER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vm.toml").write_text(TOML)
    (tmp_path / "a.raw").write_bytes(bytes(1 << 16))
    return tmp_path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a call that must fail: its message is returned, its shape is checked."""

    def check(status: int, code: str, *argv: str) -> str:
        assert main(argv) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        found = re.fullmatch(
            r"error: (.+) \[([a-z-]+)\]\n(?:  while: .+\n)?"
            r"  guest: (untouched|partly applied|unknown)\n  hint:  (.+)\n",
            err,
        )
        assert found is not None, err
        assert found[2] == code
        return found[1]

    return check


# --- naming a VM ---


@pytest.mark.parametrize("verb", VM_VERBS)
def test_unknown_name_is_a_usage_error(folder: Path, fails: Callable[..., str], verb: str) -> None:
    message = fails(2, "usage", verb, "nobody")
    assert message == "'nobody' is neither a vm.toml nor a VM from 'ouassister list'"


def test_vm_that_is_inspected_may_be_named(folder: Path, fails: Callable[..., str]) -> None:
    with Store() as store:
        store.remember("known", str(folder / "vm.toml"))
    assert "web1 has no save file" in fails(20, "state-not-suspended", "inspect", "known")


@pytest.mark.parametrize("verb", VM_VERBS)
def test_missing_file_is_a_usage_error(folder: Path, fails: Callable[..., str], verb: str) -> None:
    assert fails(2, "usage", verb, "./nothing.toml") == (
        f"cannot read {folder}/nothing.toml: No such file or directory"
    )
    (folder / "empty").mkdir()
    assert "empty/vm.toml" in fails(2, "usage", verb, "./empty")


@pytest.mark.parametrize("verb", VM_VERBS)
def test_bad_toml_is_a_usage_error(folder: Path, fails: Callable[..., str], verb: str) -> None:
    bad = folder / "bad.toml"
    bad.write_text("[vm\n")
    assert "is not TOML" in fails(2, "usage", verb, "bad.toml")
    bad.write_text(TOML.replace('name = "web1"', ""))
    assert "vm.name is missing" in fails(2, "usage", verb, "bad.toml")
    bad.write_bytes(b"\xff\xfe")
    assert "is not TOML" in fails(2, "usage", verb, "bad.toml")


def test_name_of_another_vm_is_a_usage_error(folder: Path, fails: Callable[..., str]) -> None:
    with Store() as store:
        store.remember("web1", "/elsewhere/vm.toml")
    assert "belongs to /elsewhere/vm.toml" in fails(2, "usage", "plan", "vm.toml")


# --- words that do not go together ---


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["plan"],
        ["plan", "vm.toml", "extra"],
        ["plan", "vm.toml", "--frobnicate"],
        ["plan", "vm.toml", "--install", "bcc", "--upgrade"],
        *(["plan", "vm.toml", "--timeout", word] for word in ("soon", "0", "-1", "nan", "inf")),
        ["update", "vm.toml", "--plan"],
        ["demo", "--folder"],
    ],
)
def test_words_that_no_verb_has_exit_with_2(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"^usage: ouassister.*^ouassister.*: error: .+\n\Z", err, re.S | re.M)


@pytest.mark.parametrize("wish", [["--install", "bcc"], ["--upgrade"]])
def test_plan_does_not_go_with_a_wish(
    folder: Path, fails: Callable[..., str], wish: list[str]
) -> None:
    message = fails(2, "usage", "update", "vm.toml", "--plan", "0" * 64, *wish)
    assert message.startswith("--plan says what to do")


def test_nothing_staged_does_not_go_with_staging_a_conflict(
    folder: Path, fails: Callable[..., str]
) -> None:
    words = ["--no-staging", "--on-conflict", "stage"]
    message = fails(2, "usage", "update", "vm.toml", *words)
    assert message.startswith("--no-staging has the guest install nothing")


@pytest.mark.parametrize("end", [[], ["--"]])
def test_run_without_a_command_is_a_usage_error(
    folder: Path, fails: Callable[..., str], end: list[str]
) -> None:
    assert fails(2, "usage", "run", "vm.toml", *end) == "run needs a command"


@pytest.mark.parametrize("verb", SHADOW_VERBS)
@pytest.mark.parametrize("word", ["-y", "a;reboot", "\x1b[2J", "\udcff", "bcc-"])
def test_word_that_is_no_package_is_refused_before_anything_starts(
    folder: Path, fails: Callable[..., str], verb: str, word: str
) -> None:
    message = fails(2, "usage", verb, "vm.toml", f"--install={word}")
    assert "is not a package name" in message
    assert message.isprintable()


# --- the VM's state ---


@pytest.fixture
def no_shadow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shadow's first process, which starts while memory is read, is not needed here."""
    monkeypatch.setattr(guest_shadow, "launch", lambda _preload: nullcontext())


@pytest.mark.usefixtures("no_shadow")
@pytest.mark.parametrize("argv", [["inspect", "vm.toml"], ["run", "vm.toml", "--", "true"]])
def test_vm_without_save_file_is_not_suspended(
    folder: Path, fails: Callable[..., str], argv: list[str]
) -> None:
    assert "web1 has no save file" in fails(20, "state-not-suspended", *argv)


@pytest.mark.usefixtures("no_shadow")
@pytest.mark.parametrize("verb", SHADOW_VERBS)
def test_vm_without_save_file_cannot_be_updated(
    folder: Path, fails: Callable[..., str], verb: str
) -> None:
    fails(20, "state-not-suspended", verb, "vm.toml", "--quiet")


def test_vm_that_does_not_run_cannot_be_suspended(folder: Path, fails: Callable[..., str]) -> None:
    assert "no QEMU of web1 answers" in fails(20, "state", "suspend", "vm.toml")


def test_nothing_pending_and_nothing_to_drop_have_status_10(
    folder: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no change set" in fails(10, "nothing-pending", "resume", "vm.toml", "--quiet")
    assert main(["discard", "vm.toml"]) == 10
    assert capsys.readouterr().out == "nothing to drop\n"


def test_changeset_that_vanished_is_tampered(folder: Path, fails: Callable[..., str]) -> None:
    with Store() as store:
        store.remember("web1", str(folder / "vm.toml"))
        store.add_changeset("web1", "c" * 64)
    assert "manifest.json is missing" in fails(21, "tampered", "resume", "web1", "--quiet")


def test_discard_takes_a_stored_changeset_away(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store() as store:
        store.remember("web1", str(folder / "vm.toml"))
        store.add_changeset("web1", "c" * 64)
        stored = store.changesets("web1") / ("c" * 64)
    stored.mkdir()
    (stored / "manifest.json").touch(0o400)
    stored.chmod(0o500)  # as it is saved
    assert main(["discard", "web1"]) == 0
    assert capsys.readouterr().out == f"dropped {'c' * 64}\n"
    assert not stored.exists()


def test_half_applied_changeset_is_not_dropped(folder: Path, fails: Callable[..., str]) -> None:
    with Store() as store:
        store.remember("web1", str(folder / "vm.toml"))
        store.add_changeset("web1", "c" * 64)
        store.set_state("c" * 64, ChangesetState.APPLYING)
    assert "not finished" in fails(21, "stale", "discard", "web1")


def test_unknown_plan_is_stale(folder: Path, fails: Callable[..., str]) -> None:
    assert "there is no plan abc" in fails(21, "stale", "update", "vm.toml", "--plan", "abc")


def test_locked_vm_is_refused(folder: Path, fails: Callable[..., str]) -> None:
    with Store() as store, store.lock("web1"):
        fails(22, "locked", "resume", "vm.toml", "--quiet")
        fails(22, "locked", "discard", "vm.toml")
        fails(22, "locked", "suspend", "vm.toml")


def test_state_that_cannot_be_written_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: Callable[..., str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUASSISTER_HOME", str(tmp_path / "file"))
    assert "cannot be used" in fails(2, "usage", "list")


# --- what goes wrong inside ---


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException | Callable[[], object]) -> None:
    def run(_arguments: object) -> object:
        if callable(error):
            return error()
        raise error

    monkeypatch.setattr(importlib.import_module("ouassister.cli.list_verb"), "run", run)


def test_defect_of_ours_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    failing(monkeypatch, ZeroDivisionError("by\x1b[2Jzero"))
    assert fails(1, "internal", "list") == r"ZeroDivisionError: by\u{1b}[2Jzero"
    monkeypatch.setenv("OUASSISTER_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_full_disk_has_its_own_status(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    failing(monkeypatch, OSError(28, "No space left on device", "/var/x"))
    message = fails(WorkDiskFullError.exit_status, "work-disk-full", "list")
    assert message == "/var/x: No space left on device"
    failing(monkeypatch, OSError(5, "Input/output error", "/var/x"))
    fails(1, "internal", "list")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_with_143(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str], number: signal.Signals
) -> None:
    def signalled() -> object:
        os.kill(os.getpid(), number)
        signal.sigtimedwait((), 5)
        return 0, None, ""

    failing(monkeypatch, signalled)
    assert fails(143, "interrupted", "list") == f"ended by {number.name}"


def test_hostile_message_reaches_no_terminal(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    hostile = "the agent says \x1b]0;x\x07\u202e\ud800\nerror: all is well [done]"
    failing(monkeypatch, StateError(hostile, hint="a\x1bb", context="c\x1bd"))
    assert fails(20, "state", "list").isprintable()


# --- results ---


def test_hostile_result_reaches_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, lambda: (0, [], "one\n  left out: \x1b[2J\r\u202e\ud800\ntwo"))
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 3
    assert all(line.isprintable() for line in out.splitlines())


def test_json_error_has_the_documented_shape(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "vm.toml", "--json"]) == 20
    out, err = capsys.readouterr()
    value: dict[str, Any] = json.loads(out)
    assert err == ""
    assert value.keys() == {"schema", "error"}
    assert value["schema"] == SCHEMA
    assert value["error"].keys() == {"code", "exit_status", "message", "impact", "hint"}
    assert value["error"]["code"] == "state-not-suspended"
    assert value["error"]["exit_status"] == 20
    assert value["error"]["impact"] == "untouched"


@pytest.mark.parametrize("argv", [["list"], ["status"], ["status", "vm.toml"], ["support"]])
def test_json_result_has_the_documented_shape(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    value = json.loads(out)
    assert value.keys() == {"schema", "verb", "result"}
    assert (value["schema"], value["verb"]) == (SCHEMA, argv[0])


def test_list_and_status_tell_what_is_known(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store() as store:
        store.remember("web1", str(folder / "vm.toml"))
        store.remember("gone", str(folder / "gone.toml"))
        store.add_changeset("web1", "c" * 64)
        store.log("web1", "update", "plan", "begin")
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["result"]
    assert [(row["vm"], row["state"], row["changeset"]) for row in rows] == [
        ("gone", "unknown", ""),
        ("web1", "off", "c" * 64),
    ]
    assert main(["status", "web1"]) == 0
    told = capsys.readouterr().out
    assert "web1: off" in told
    assert f"change set {'c' * 16}: stale: " in told
    assert "update: plan begin" in told


def test_doctor_exits_with_2_when_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor"]) == 2
    assert re.search(
        r"^MISSING +qemu-img .*apt-get install qemu-utils$", capsys.readouterr().out, re.M
    )


def test_support_lists_each_system_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["support"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^uname +emulated +", out, re.M)
    assert re.search(r"^io_uring_setup +denied ENOSYS +", out, re.M)


def test_helper_is_written_as_it_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tmp_path / "built"
    monkeypatch.setattr(helper, "_BUILT", built)
    assert main(["helper", str(tmp_path / "out")]) == 2
    assert "run 'make applier'" in capsys.readouterr().err
    built.write_bytes(b"a program")
    assert main(["helper", str(tmp_path / "out" / "deep")]) == 0
    assert "install.sh" in capsys.readouterr().out
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out/deep").iterdir()}
    assert found == {"ouassister-port": 0o755, helper.UNIT: 0o644, "install.sh": 0o755}
    assert (tmp_path / "out/deep/ouassister-port").read_bytes() == b"a program"


# --- the page ---


@pytest.mark.parametrize("verb", VERBS)
def test_verb_helps_and_the_page_names_it_with_its_options(
    capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    options = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.M)) - {"--json"}
    text = PAGE.read_text()
    start = text.index(f"\n## {verb}\n")
    section = text[start : text.find("\n## ", start + 1)]
    assert set(re.findall(r"`(--[a-z-]+)", section)) - {"--json"} == options


def test_page_names_no_other_verb() -> None:
    verbs = re.findall(r"^## ([a-z]+)$", PAGE.read_text(), re.M)
    assert sorted(verbs) == sorted(VERBS)


# --- helpers ---


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (2_100_000, "2.1 MB"),
        (5 * 10**12, "5000.0 GB"),
    ],
)
def test_size_is_for_a_person(number: int, text: str) -> None:
    assert size(number) == text


def test_table_aligns_and_trims() -> None:
    assert table([("a", "b"), ("long", "")], "  ") == "  a     b\n  long"
    assert table([]) == ""


def test_entry_point_is_the_module_s() -> None:
    assert entry is main
