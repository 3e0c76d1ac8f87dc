"""What the guest's shell is given, run by a real one: its branches, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.conftest import lacking, need
from tests.unit.test_changeset_archive import build

from ouassister.model import Action, PackageChange, Restart, Verdict
from ouassister.reflect import bootstrap, verify

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host

CHANGESET: Final = build(
    changes=(PackageChange("oua-one", "amd64", "1", "2"),),
    restarts=(Restart("one.service", Verdict.RESTART, "", ()),),
)
ACTION: Final = Action(("systemctl", "restart", "one.service", "two.service"))
# One that tells what the file says; no service manager runs here.
SYSTEMCTL: Final = """#!/bin/sh
case $1 in
list-units) cat "$FAKE/failed" || exit 1 ;;
show) echo LoadState=loaded; echo ActiveState=failed; echo InactiveEnterTimestampMonotonic=123 ;;
restart) exit "$(cat "$FAKE/status")" ;;
start | reload) # each ends when both have begun
	: >"$FAKE/begun-$1"
	n=0
	until [ -e "$FAKE/begun-start" ] && [ -e "$FAKE/begun-reload" ]; do
		n=$((n + 1))
		[ $n -lt 600 ] || exit 1
		sleep 0.05
	done
	[ "$1" = start ]
	;;
esac
"""
STATUS: Final = """Package: {}
Status: install ok {}
Maintainer: Tests <tests@localhost>
Architecture: all
Version: 2
Description: a package

"""
# A /var/lib of its own in a mount namespace of its own.
WORLD: Final = (
    'mount --bind "$FAKE/lib" /var/lib && mount -t tmpfs none /run && mkdir -p /run/systemd/system'
    ' && exec "$@"'
)


class Guest:
    """Just enough of one for the scripts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "lib" / "ouassister"
        for name in ("lib/ouassister", "lib/dpkg/info", "lib/dpkg/updates", "bin"):
            (folder / name).mkdir(parents=True)
        (folder / "lib" / "dpkg" / "info" / "format").write_text("1\n")
        (folder / "bin" / "systemctl").write_text(SYSTEMCTL)
        (folder / "bin" / "systemctl").chmod(0o755)
        self.packages()
        self.say()
        (self.state / "applied").write_text(f"{CHANGESET.changeset_id} 77\n")

    def packages(self, **states: str) -> None:
        text = "".join(STATUS.format(f"oua-{name}", state) for name, state in states.items())
        (self.folder / "lib" / "dpkg" / "status").write_text(text)

    def say(self, failed: str = "", status: int = 0) -> None:
        (self.folder / "failed").write_text(failed)
        (self.folder / "status").write_text(f"{status}\n")

    def run(self, *actions: Action) -> bytes:
        environment = {**os.environ, "FAKE": str(self.folder)}
        environment["PATH"] = f"{self.folder}/bin:{environment['PATH']}"
        unshare = ["unshare", "--mount", "/bin/sh", "-c", WORLD, "sh"]
        command = [*unshare, *verify.command(CHANGESET, actions)]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert done.stderr == b""
        return done.stdout

    @property
    def attested(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.state / "attestation.json").read_text())
        return value


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    for tool in ("unshare", "dpkg"):
        need(tool)
    if os.geteuid() != 0:
        lacking("mounts need root here")
    return Guest(tmp_path)


def judged(output: bytes) -> verify.Verification:
    return verify.judge(CHANGESET, 0.1, output)


def test_calls_for_units_of_their_own_go_on_side_by_side_and_end_before_the_next(
    guest: Guest,
) -> None:
    actions = (
        Action(("systemctl", "start", "one.service")),
        Action(("systemctl", "reload", "two.service", "three.service")),
        Action(("rm", f"{guest.folder}/begun-start", f"{guest.folder}/begun-reload")),
        ACTION,
    )
    output = guest.run(*actions)
    # Of three units each is asked for; what the fake one tells is one block.
    assert bootstrap.failed_actions(actions, output) == (
        "systemctl reload two.service three.service: status 1",
    )
    assert judged(output).problems == ()


def test_all_clean_is_verified_and_attested(guest: Guest) -> None:
    output = guest.run(ACTION)
    told = judged(output)
    assert (told.problems, len(told.verified), told.notes) == ((), 3, ())
    assert bootstrap.failed_actions((ACTION,), output) == ()
    assert guest.attested == {
        "schema": 1,
        "changeset": CHANGESET.changeset_id,
        "packages": [{"name": "oua-one", "architecture": "amd64", "old": "1", "new": "2"}],
        "staged": [],
        "entries": len(CHANGESET.entries),
        "applied_at_s": 77,
        "checks": {
            "files": "clean",
            "marker": "clean",
            "package_database": "clean",
            "units": "clean",
        },
        "result": "verified",
    }
    attestation = guest.state / "attestation.json"
    assert attestation.stat().st_mode & 0o777 == 0o600
    assert not attestation.with_suffix(".new").exists()


def test_nothing_done_asks_nothing_of_the_service_manager(guest: Guest) -> None:
    guest.say("one.service loaded failed failed\n")
    assert judged(guest.run()).problems == ()
    assert guest.attested["checks"]["units"] == "not asked"
    assert guest.attested["result"] == "verified"


def test_restarted_unit_that_failed_is_seen(guest: Guest) -> None:
    words = "one.service loaded failed failed $(touch /var/lib/odd) `x`\n-.mount loaded failed f\n"
    guest.say(words, status=1)
    output = guest.run(ACTION)
    told = judged(output)
    assert told.problems == ("one.service ran at suspend and failed when restarted",)
    assert len(bootstrap.failed_actions((ACTION,), output)) == 1
    assert (guest.attested["checks"]["units"], guest.attested["result"]) == (
        "not clean",
        "not verified",
    )
    assert not (guest.folder / "lib" / "odd").exists()


def test_service_manager_that_does_not_answer_is_not_taken_for_a_good_answer(guest: Guest) -> None:
    (guest.folder / "failed").unlink()
    told = judged(guest.run(ACTION))
    assert told.problems == ()
    assert not [words for words in told.verified if "unit" in words]
    assert guest.attested["checks"]["units"] == "not known"
    assert guest.attested["result"] == "not verified"


@pytest.mark.parametrize(("name", "problems"), [("one", 1), ("other", 0)])
def test_package_that_dpkg_finds_half_configured_is_seen(
    guest: Guest, name: str, problems: int
) -> None:
    guest.packages(**{name: "half-configured"})
    told = judged(guest.run(ACTION))
    assert len(told.problems) == problems
    assert f"oua-{name}" in " ".join((*told.problems, *told.notes))
    assert guest.attested["checks"]["package_database"] == "not clean"


@pytest.mark.parametrize("marker", [None, "", "another 77\n", f"{'0' * 64} 77\n"])
def test_marker_that_is_not_there_or_not_ours_is_seen(guest: Guest, marker: str | None) -> None:
    place = guest.state / "applied"
    place.unlink() if marker is None else place.write_text(marker)
    (problem,) = judged(guest.run(ACTION)).problems
    assert "marker" in problem
    assert guest.attested["checks"]["marker"] == "not clean"


def test_database_that_dpkg_cannot_read_is_seen(guest: Guest) -> None:
    (guest.folder / "lib" / "dpkg" / "status").write_text("no database\n")
    (problem,) = judged(guest.run(ACTION)).problems
    assert problem.startswith("dpkg --audit ended with status 2")


def test_attestation_that_cannot_be_written_is_told_and_the_old_one_stays(guest: Guest) -> None:
    (guest.state / "attestation.json").write_text("old")
    (guest.state / "attestation.new").mkdir()
    told = judged(guest.run(ACTION))
    assert told.notes == ("the guest could not write its attestation",)
    assert (guest.state / "attestation.json").read_text() == "old"


# Blocks until it is told to go on: by the first pause of who waits for it.
EARLIER: Final = 'echo ready >"$HERE/ready"; read -r line <"$HERE/go"; echo earlier'
SLEEP: Final = """#!/bin/sh
[ -e "$HERE/slept" ] || { >"$HERE/slept"; echo go >"$HERE/go"; }
"""


@pytest.mark.parametrize("words", ["ouassister-reflect x", "x serial:oua-0123456789abcdef"])
def test_what_an_earlier_resume_began_is_waited_for(tmp_path: Path, words: str) -> None:
    """In a process namespace of its own, where nobody else has such words."""
    need("unshare")
    if os.geteuid() != 0:
        lacking("mounts need root here")
    (tmp_path / "sleep").write_text(SLEEP)
    (tmp_path / "sleep").chmod(0o755)
    script = 'sh -c "$EARLIER" $WORDS & read -r line <"$HERE/ready"; "$@"; echo waited'
    for name in ("ready", "go"):
        os.mkfifo(tmp_path / name)
    unshare = [
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "/bin/sh",
        "-c",
        script,
    ]
    done = subprocess.run(
        [*unshare, "sh", *bootstrap.await_command()],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "HERE": str(tmp_path),
            "EARLIER": EARLIER,
            "WORDS": words,
        },
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == b"earlier\nwaited\n"
