"""What the guest is told to install, and what is made of its answer."""

from __future__ import annotations

import dataclasses

import pytest
from tests.unit.test_changeset_archive import build

from ouassister.errors import InternalError
from ouassister.model import (
    Action,
    Changeset,
    Entry,
    Exposed,
    GuestPid,
    Kind,
    Restart,
    Staged,
    StagedStep,
    StepKind,
    Verdict,
)
from ouassister.reflect import staged

FOLDER = b"/var/cache/ouassister/0123456789abcdef"
SHA256 = "ab" * 32


def package(name: str, **more: object) -> Staged:
    plain = Staged(name, "amd64", "", "2.0", f"{name}_2.0_amd64.deb", 3, SHA256, False, "why")
    return dataclasses.replace(plain, **more)  # type: ignore[arg-type]


LIBRARY = package("libfoo")
APP = package("app", architecture="all", old="1.0", file="app_2.0_all.deb", requested=True)
GONE = package("old-mta", architecture="", old="1.0", new="", file="", size=0, sha256="")


def changeset(*steps: StagedStep, packages: tuple[Staged, ...] = (LIBRARY, APP)) -> Changeset:
    entries = [
        Entry(FOLDER + b"/" + one.file.encode(), Kind.FILE, None, size=3, sha256=SHA256, offset=512)
        for one in packages
        if one.file
    ]
    entries.sort(key=lambda entry: entry.path.split(b"/"))
    all_at_once = (StagedStep(StepKind.INSTALL, tuple(range(len(packages)))),)
    return build(
        *entries,
        staged=packages,
        staged_steps=steps or all_at_once,
        staging_folder=FOLDER,
        restarts=(restart("a.service", 7, 8), restart("b.service", 9)),
        actions=ACTIONS,
    )


def restart(unit: str, *pids: int) -> Restart:
    processes = tuple(Exposed(GuestPid(pid), b"x", (b"/x",)) for pid in pids)
    return Restart(unit, Verdict.RESTART, "it runs replaced files", processes)


AGENT = "qemu-guest-agent.service"
ACTIONS = (
    Action(("systemctl", "daemon-reload")),
    Action(("systemctl", "try-restart", "a.service", "b.service")),
    Action(("systemd-run", "--on-active=30", "systemctl", "try-restart", AGENT)),
)


def test_script_installs_in_one_call_and_marks_as_apt_would() -> None:
    text = staged.script(changeset(), "/run/here")
    head = text.partition("# Installs")[0].splitlines()
    assert head == [
        "state=/run/here",
        "limit=1800",
        "folder=/var/cache/ouassister/0123456789abcdef",
        "names='libfoo:amd64 app'",
        "pids='7 8 9'",
        "steps() { step --install ./libfoo_2.0_amd64.deb ./app_2.0_all.deb; }",
        "marks() { apt-mark auto libfoo:amd64 && apt-mark manual app; }",
    ]


def test_script_follows_the_steps_of_apt() -> None:
    steps = (
        StagedStep(StepKind.REMOVE, (2,)),
        StagedStep(StepKind.INSTALL, (0,)),
        StagedStep(StepKind.UNPACK, (1,)),
    )
    text = staged.script(changeset(*steps, packages=(LIBRARY, APP, GONE)), "/run/here")
    assert (
        "steps() { step --force-depends --remove old-mta && step --install ./libfoo_2.0_amd64.deb"
        " && step --unpack ./app_2.0_all.deb && step --configure --pending; }"
    ) in text


GOOD = (
    b"code 0\nstate libfoo amd64 2.0 installed\nstate app all 2.0 installed\n"
    b"before 7\nbefore 8\nalive 8\nalive x\nend\n"
)


def test_answer_that_all_is_installed_is_good() -> None:
    problem, installed = staged.judge((LIBRARY, APP), GOOD)
    assert problem == ""
    assert sorted(installed.before) == [7, 8]
    assert sorted(installed.alive) == [8]
    assert [(one.name, one.version, one.status) for one in installed.states] == [
        ("libfoo", "2.0", "installed"),
        ("app", "2.0", "installed"),
    ]


def test_removed_package_is_good_when_it_is_not_there() -> None:
    told = b"code 0\nstate old-mta amd64 1.0 config-files\nend\n"
    assert staged.judge((GONE,), told)[0] == ""
    assert staged.judge((GONE,), b"code 0\nend\n")[0] == ""
    there = staged.judge((GONE,), b"code 0\nstate old-mta amd64 1.0 installed\nend\n")[0]
    assert "old-mta is installed" in there


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (GOOD.replace(b"code 0", b"code 1"), "no message"),
        (GOOD.replace(b"end\n", b""), "no message"),
        (
            GOOD.replace(b"2.0 installed\nbefore 7", b"1.0 installed\nbefore 7"),
            "app is installed 1.0",
        ),
        (GOOD.replace(b"state libfoo", b"state libbar"), "libfoo is not-installed"),
        (GOOD.replace(b"amd64 2.0 installed", b"amd64 2.0 unpacked"), "libfoo is unpacked 2.0"),
        (b"", "libfoo is not-installed"),
        (b"\xff\0" * 100, "libfoo is not-installed"),
    ],
)
def test_answer_that_is_anything_else_is_a_problem(told: bytes, words: str) -> None:
    problem = staged.judge((LIBRARY, APP), told)[0]
    assert words in problem
    assert "libfoo, app" in problem


def test_problem_names_the_package_with_the_words_of_dpkg() -> None:
    log = (
        "log Setting up app (2.0) ...\nlog broken on purpose\n"
        "log dpkg: error processing package app (--install):\n"
        "log  installed app package post-installation script subprocess returned error exit status"
        " 3\nlog Errors were encountered while processing:\nlog  app\n"
    )
    told = b"code 1\nstate app all 2.0 half-configured\n" + log.encode() + b"end\n"
    problem = staged.judge((LIBRARY, APP), told)[0]
    assert problem == (
        "staged packages are not installed (app): broken on purpose; dpkg: error processing package"
        " app (--install):; installed app package post-installation script subprocess returned"
        " error exit status 3"
    )


def after(before: set[int], alive: set[int]) -> staged.Installed:
    return staged.Installed((), frozenset(before), frozenset(alive))


def test_what_scripts_asked_for_comes_first_and_restarts_from_memory_last() -> None:
    assert staged.split(changeset()) == (ACTIONS[:1], ACTIONS[1:])
    asked = Action(("systemctl", "try-restart", "other.service"))  # a script's own
    made = dataclasses.replace(changeset(), actions=(*ACTIONS[:1], asked))
    assert staged.split(made) == ((ACTIONS[0], asked), ())
    assert staged.split(dataclasses.replace(changeset(), actions=())) == ((), ())


def test_unit_whose_processes_ended_with_staged_packages_is_not_restarted_again() -> None:
    made, last = changeset(), ACTIONS[1:]
    every = {7, 8, 9}
    assert staged.due(made.restarts, last, after(every, {8, 9})) == last
    left = staged.due(made.restarts, last, after(every, {8}))
    assert left[0].argv == ("systemctl", "try-restart", "a.service")
    assert staged.due(made.restarts, last, after(every, set())) == last[1:]


def test_unit_that_was_restarted_before_is_restarted_for_what_staged_packages_replaced() -> None:
    """By a recorded action: its processes were gone when the staged packages came."""
    made, last = changeset(), ACTIONS[1:]
    left = staged.due(made.restarts, last, after({7, 8}, set()))
    assert left[0].argv == ("systemctl", "try-restart", "b.service")


def test_agent_that_a_script_restarted_needs_no_timer() -> None:
    restarts, last = (restart(AGENT, 5),), ACTIONS[1:]
    assert staged.due(restarts, last, after({5}, {5})) == last
    assert staged.due(restarts, last, after({5}, set())) == last[:1]


@pytest.mark.parametrize(
    "more",
    [
        {"staged_steps": ()},
        {"staged_steps": (StagedStep(StepKind.INSTALL, (0, 1, 2)),)},
        {"staged_steps": (StagedStep(StepKind.INSTALL, (0,)),)},
        {"staged_steps": (StagedStep(StepKind.INSTALL, (0, 1)), StagedStep(StepKind.UNPACK, ()))},
        {"staged_steps": (StagedStep(StepKind.REMOVE, (0, 1)),)},
        {"staged": (LIBRARY, package("app", new="", file="\u00e9"))},
        {"staged": (LIBRARY, package("app", new="", file=""))},
        {"staging_folder": b""},
        {"staging_folder": b"/var/cache/$(reboot)"},
        {"staged": (LIBRARY, package("Evil;rm", file="app_2.0_all.deb"))},
        {"staged": (LIBRARY, package("app", architecture="a b", file="app_2.0_all.deb"))},
        {"staged": (LIBRARY, package("app", file="../../etc/passwd.deb"))},
        {"staged": (LIBRARY, package("app", file="app_2.0_all.deb", sha256="cd" * 32))},
        {"staged": (LIBRARY, package("app", file="other_2.0_all.deb"))},
        {"staged": ()},
    ],
)
def test_change_set_whose_staged_packages_do_not_fit_is_refused(more: dict[str, object]) -> None:
    made = changeset()
    fields = {
        "staged": made.staged,
        "staged_steps": made.staged_steps,
        "staging_folder": made.staging_folder,
    }
    build(*made.entries, **fields)
    with pytest.raises(InternalError):
        build(*made.entries, **(fields | more))
