"""Who runs what an update replaces, and what is done about it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ouassister.guest_model import GuestPid, TaskDetail, VirtAddr, Vma
from ouassister.model import Action, Entry, Expected, Exposed, Kind, Restart, Task, Verdict
from ouassister.restart import actions, exposed, kernels, needrestart, policy, uses
from ouassister.restart.uses import ProcessUse, UsedFile

LIB = b"/usr/lib/libssl.so.3"


def use(pid: int, unit: str = "nginx.service", **what: Any) -> ProcessUse:  # noqa: ANN401
    values: dict[str, Any] = {
        "pid": GuestPid(pid), "comm": b"nginx", "unit": unit, "user_unit": "", "apart": False,
        "files": (UsedFile(LIB, 7),), "script": b"",
    }  # fmt: skip
    return ProcessUse(**(values | what))


def entry(path: bytes, inode: int | None, kind: Kind = Kind.FILE, **what: Any) -> Entry:  # noqa: ANN401
    expected = None if inode is None else Expected(inode, 0o100644, 1, 2, 3)
    return Entry(path, kind, expected, **what)


# --- what processes run ---


def mapping(path: bytes, inode: int, permissions: str = "r-xp") -> Vma:
    return Vma(VirtAddr(0), VirtAddr(4096), permissions, 0, 254, 1, inode, path)


def task(exe: bytes, *words: bytes, cwd: bytes | None = b"/srv") -> Task:
    detail = TaskDetail(GuestPid(9), (), 0, 0, 0, (), cwd, b"/", None, (), "", "", "")
    return Task(GuestPid(9), GuestPid(1), b"x", "S", 0, exe, (exe, *words), 0, False, detail)


def test_executable_mappings_of_files_count() -> None:
    vmas = (
        mapping(b"/usr/sbin/nginx", 1), mapping(LIB, 2), mapping(LIB, 2),
        mapping(b"/etc/x", 3, "r--p"), mapping(b"[vdso]", 0),
        mapping(b"/dev/zero (deleted)", 4), mapping(b"/usr/lib/old (deleted)", 5),
        mapping(b"/var/lib/ouassister/old-0123456789ab/7", 6),
        mapping(b"/boot/.ouassister-0123456789ab-undo/8", 7),
        mapping(b"/var/lib/ouassister/older/9", 8),
    )  # fmt: skip
    assert uses._files(vmas) == (
        UsedFile(b"/usr/sbin/nginx", 1),
        UsedFile(LIB, 2),
        UsedFile(b"/usr/lib/old", 5, gone=True),
        UsedFile(b"/var/lib/ouassister/old-0123456789ab/7", 6, gone=True),
        UsedFile(b"/boot/.ouassister-0123456789ab-undo/8", 7, gone=True),
        UsedFile(b"/var/lib/ouassister/older/9", 8),
    )


@pytest.mark.parametrize(
    ("words", "script"),
    [
        (
            (b"/usr/bin/python3.11", b"/usr/bin/fail2ban-server", b"-xf"),
            b"/usr/bin/fail2ban-server",
        ),
        ((b"/usr/bin/python3.11", b"-Es", b"tool.py"), b"/srv/tool.py"),
        ((b"/usr/bin/perl", b"../x/y.pl"), b"/x/y.pl"),
        ((b"/usr/bin/python3", b"-m", b"http.server"), b""),
        ((b"/bin/sh", b"-c", b"/usr/bin/x"), b""),
        ((b"/usr/sbin/nginx", b"/etc/nginx.conf"), b""),
        ((b"/usr/bin/python3 (deleted)", b"/usr/bin/tool"), b"/usr/bin/tool"),
        ((b"/usr/bin/python3",), b""),
    ],
)
def test_script_of_an_interpreter_is_found(words: tuple[bytes, ...], script: bytes) -> None:
    assert uses._script(task(*words)) == script


def test_relative_script_of_a_process_without_a_folder_is_not_guessed() -> None:
    assert uses._script(task(b"/usr/bin/perl", b"x.pl", cwd=None)) == b""


# --- who is exposed ---


def found(use_: ProcessUse, *entries: Entry) -> list[tuple[bytes, ...]]:
    return [one.files for _, one in exposed.exposed([use_], entries)]


def test_replaced_and_deleted_files_expose() -> None:
    assert found(use(1), entry(LIB, 7)) == [(LIB,)]
    assert found(use(1), entry(LIB, 7, Kind.DELETE)) == [(LIB,)]
    below = ((LIB, Expected(7, 0o100644, 1, 2, 3)),)
    assert found(use(1), entry(b"/usr/lib", 5, Kind.DELETE, below=below)) == [(LIB,)]


def test_other_files_of_that_name_do_not() -> None:
    assert found(use(1), entry(LIB, 8)) == []  # a container's, or covered by a mount
    assert found(use(1), entry(LIB, None)) == []  # new
    assert found(use(1), entry(LIB, 7, Kind.DIRECTORY)) == []
    assert found(use(1), dataclasses.replace(entry(LIB, 7), same=True)) == []  # its inode stays
    assert found(use(1, files=(UsedFile(LIB, 0),)), entry(b"/x", 0)) == []


def test_file_that_was_gone_before_exposes() -> None:
    assert found(use(1, files=(UsedFile(LIB, 9, gone=True),))) == [(LIB,)]


def test_script_exposes_by_its_path() -> None:
    one = use(1, files=(), script=b"/usr/bin/tool")
    assert found(one, entry(b"/usr/bin/tool", 3)) == [(b"/usr/bin/tool",)]
    assert found(one, entry(b"/usr/bin/other", 3)) == []


# --- what is done ---


@pytest.mark.parametrize(
    ("unit", "verdict"),
    [
        ("nginx.service", Verdict.RESTART),
        ("postgresql@15-main.service", Verdict.RESTART),
        ("dbus.service", Verdict.ADVISE),
        ("systemd-logind.service", Verdict.ADVISE),
        ("session-3.scope", Verdict.ADVISE),
        ("user@1000.service", Verdict.ADVISE),
        ("getty@tty1.service", Verdict.ADVISE),
        ("docker.service", Verdict.ADVISE),
        ("networking.service", Verdict.ADVISE),
        ("ifup@eth0.service", Verdict.ADVISE),
        ("systemd-networkd.service", Verdict.RESTART),  # goes on when there is a carrier again
        ("init.scope", Verdict.ADVISE),
        ("", Verdict.ADVISE),
        ("x;y.service", Verdict.ADVISE),
        ("qemu-guest-agent.service", Verdict.LATER),
    ],
)
def test_verdict_of_a_unit(unit: str, verdict: Verdict) -> None:
    (one,) = policy.decide([(use(1, unit), Exposed(GuestPid(1), b"x", (LIB,)))], {})
    assert (one.unit, one.verdict) == (unit, verdict)


def test_container_is_kept_apart_and_rules_are_honoured() -> None:
    one = Exposed(GuestPid(1), b"x", (LIB,))
    (told,) = policy.decide([(use(1, apart=True), one)], {})
    assert told.verdict is Verdict.APART
    (told,) = policy.decide([(use(1), one)], {"nginx.service": "(?^:^nginx)"})
    assert (told.verdict, "(?^:^nginx)" in told.why) == (Verdict.EXCLUDED, True)


def test_processes_are_gathered_by_unit() -> None:
    pairs = [
        (use(pid, unit), Exposed(GuestPid(pid), b"x", (LIB,)))
        for pid, unit in ((1, ""), (2, "b.service"), (3, "a.service"), (4, "b.service"))
    ]
    told = policy.decide(pairs, {})
    assert [(one.unit, [p.pid for p in one.processes]) for one in told] == [
        ("a.service", [3]), ("b.service", [2, 4]), ("", [1]),
    ]  # fmt: skip


def restart(unit: str, verdict: Verdict = Verdict.RESTART) -> Restart:
    return Restart(unit, verdict, "", ())


RELOAD = Action(("systemctl", "daemon-reload"))


def test_units_that_no_script_restarted_are_restarted_in_one_call() -> None:
    recorded = [RELOAD, Action(("deb-systemd-invoke", "restart", "ssh.service"))]
    due = [restart("ssh.service"), restart("a.service"), restart("b.service"),
           restart("dbus.service", Verdict.ADVISE)]  # fmt: skip
    assert actions.coalesce(recorded, due) == (
        *recorded,
        Action(("systemctl", "try-restart", "a.service", "b.service")),
    )


def test_signals_go_to_processes_that_are_still_there() -> None:
    hangup, upgrade = Action(("kill", "-s", "HUP", "520")), Action(("kill", "-s", "USR2", "451"))
    start, again = (Action(("systemctl", verb, "nginx.service")) for verb in ("start", "restart"))
    master = Exposed(GuestPid(451), b"nginx", (b"/usr/sbin/nginx",))
    due = [Restart("nginx.service", Verdict.RESTART, "", (master,))]
    assert actions.coalesce([RELOAD, start, hangup, upgrade], due)[:4] == (
        RELOAD, hangup, upgrade, start,
    )  # fmt: skip
    assert actions.coalesce([again, upgrade, hangup], due) == (hangup, again)


def test_reload_comes_first() -> None:
    told = actions.coalesce([], [restart("a.service")])
    assert told == (RELOAD, Action(("systemctl", "try-restart", "a.service")))
    assert actions.coalesce([], []) == ()
    again = Action(("systemctl", "daemon-reexec"))  # loads units as well
    told = actions.coalesce([again], [restart("a.service")])
    assert told == (again, Action(("systemctl", "try-restart", "a.service")))


@pytest.mark.parametrize(
    "words",
    [
        ("systemctl", "restart", "nginx"),
        ("invoke-rc.d", "nginx", "restart"),
        ("service", "nginx", "restart"),
        ("deb-systemd-invoke", "--no-dbus", "try-restart", "nginx.service"),
        ("systemctl", "stop", "nginx.service"),
    ],
)
def test_what_a_script_ends_is_not_restarted_again(words: tuple[str, ...]) -> None:
    assert actions.coalesce([Action(words)], [restart("nginx.service")]) == (Action(words),)


def test_what_a_script_ends_is_restarted_again_for_what_follows() -> None:
    words = Action(("systemctl", "restart", "nginx"))
    due = Action(("systemctl", "try-restart", "nginx.service"))
    assert actions.coalesce([words], [restart("nginx.service")], {"nginx.service"})[-1] == due


@pytest.mark.parametrize("verb", ["start", "reload-or-restart", "enable"])
def test_what_a_script_only_starts_is(verb: str) -> None:
    recorded = Action(("systemctl", verb, "nginx.service"))
    told = actions.coalesce([RELOAD, recorded], [restart("nginx.service")])
    assert told[-1] == Action(("systemctl", "try-restart", "nginx.service"))


def call(*words: str) -> Action:
    return Action(("systemctl", *words))


def test_neighbours_with_the_same_verb_become_one_call() -> None:
    recorded = [
        call("start", "a.service"),
        RELOAD,
        call("start", "b.service", "a.service"),
        call("restart", "c.service"),
        call("restart", "d.service"),
        call("start", "e.service"),
        RELOAD,
    ]
    assert actions.coalesce(recorded, []) == (
        RELOAD,
        call("start", "a.service", "b.service"),
        call("restart", "c.service", "d.service"),
        call("start", "e.service"),
    )


def create(*names: str) -> Action:
    return Action(("systemd-tmpfiles", "--create", *names))


def test_what_tmpfiles_make_is_one_call_before_what_needs_it() -> None:
    recorded = [
        call("restart", "a.service"),
        create("a.conf"),
        call("restart", "b.service"),
        create("b.conf", "a.conf"),
        create(),  # all that there is
        Action(("systemd-tmpfiles", "--create", "--boot", "x.conf")),
        call("stop", "c.service"),  # may take away what it has
        create("c.conf"),
        call("start", "c.service"),
        create("d.conf"),
    ]
    assert actions.coalesce(recorded, []) == (
        call("restart", "a.service"),
        create("a.conf", "b.conf"),
        call("restart", "b.service"),
        create(),
        Action(("systemd-tmpfiles", "--create", "--boot", "x.conf")),
        call("stop", "c.service"),
        create("c.conf", "d.conf"),
        call("start", "c.service"),
    )


def test_calls_of_tmpfiles_are_not_too_long() -> None:
    many = [create(f"{number}.conf") for number in range(300)]
    told = actions.coalesce(many, [])
    assert [len(action.argv) - 2 for action in told] == [128, 128, 44]


def test_calls_for_units_of_their_own_go_on_side_by_side() -> None:
    some = (
        RELOAD,
        call("try-restart", "a.service", "b.service"),
        call("--job-mode=fail", "start", "c.service"),
        Action(("invoke-rc.d", "d", "restart")),
        call("reload", "dbus.service"),
        call("start", "d"),  # again
        Action(("deb-systemd-invoke", "stop", "e.service")),
        create("x.conf"),
        call("start", "f.service"),
        call("enable", "g.service"),
        call("start", "h.service"),
        Action(("kill", "-s", "HUP", "7")),
    )
    assert actions.side_by_side(some) == [
        [0], [1, 2, 3, 4], [5], [6], [7], [8], [9], [10], [11],
    ]  # fmt: skip
    assert actions.side_by_side(()) == []


def test_what_stops_has_stopped_before_others_start() -> None:
    """As PostgreSQL asks for: one unit pulls the other in, and its job to stop is cancelled."""
    some = (
        call("stop", "postgresql@15-main.service"),
        Action(("invoke-rc.d", "old", "stop")),
        call("start", "postgresql.service"),
        call("stop", "new.service"),
    )
    assert actions.side_by_side(some) == [[0, 1], [2], [3]]


@pytest.mark.parametrize(
    "pair",
    [
        (call("start", "a.service"), call("--no-block", "start", "b.service")),
        (call("start", "a.service"), call("start", "--no-block", "b.service")),
        (call("-H", "other", "start", "a.service"), call("-H", "other", "start", "b.service")),
        (call("start", "a.service"), Action(("deb-systemd-invoke", "start", "b.service"))),
        (Action(("invoke-rc.d", "a", "start")), Action(("invoke-rc.d", "b", "start"))),
        (call("enable", "a.service"), call("enable", "b.service")),
        (Action(("modprobe", "start", "a")), Action(("modprobe", "start", "b"))),
    ],
)
def test_calls_that_mean_different_things_stay_apart(pair: tuple[Action, Action]) -> None:
    assert actions.coalesce(pair, []) == pair


def test_calls_with_equal_options_become_one_and_none_is_too_long() -> None:
    one, two = (Action(("deb-systemd-invoke", "--no-dbus", "restart", unit)) for unit in "ab")
    assert actions.merge([one, two]) == [
        Action(("deb-systemd-invoke", "--no-dbus", "restart", "a", "b"))
    ]
    many = [call("start", f"u{number}.service") for number in range(300)]
    told = actions.merge(many)
    assert [len(action.argv) - 2 for action in told] == [128, 128, 44]
    assert [unit for action in told for unit in action.argv[2:]] == [one.argv[2] for one in many]


def test_guest_agent_is_restarted_when_it_is_not_needed_any_more() -> None:
    agent = "qemu-guest-agent.service"
    timer = Action(("systemd-run", "--on-active=30", "systemctl", "try-restart", agent))
    assert actions.coalesce([], [restart(agent, Verdict.LATER)]) == (timer,)
    recorded = [Action(("deb-systemd-invoke", "restart", agent, "x.service"))]
    assert actions.coalesce(recorded, []) == (
        Action(("deb-systemd-invoke", "restart", "x.service")),
        timer,
    )
    assert actions.coalesce([Action(("invoke-rc.d", "qemu-guest-agent", "restart"))], []) == (
        timer,
    )
    assert actions.coalesce([Action(("systemctl", "stop", agent))], []) == ()


# --- rules and kernels ---


def test_only_units_that_were_asked_for_are_excluded() -> None:
    raw = b"a.service\t(?^:^a)\nb.service\tx\n\xff\tno\n" + b"c.service\t" + b"r" * 5000
    told = needrestart.parse(raw, ["a.service", "c.service"])
    assert told == {"a.service": "(?^:^a)", "c.service": "r" * 200}


@pytest.mark.parametrize(
    ("running", "installed", "newest"),
    [
        (
            "6.1.0-9-cloud-amd64",
            ["6.1.0-10-cloud-amd64", "6.1.0-9-cloud-amd64"],
            "6.1.0-10-cloud-amd64",
        ),
        ("6.1.0-10-amd64", ["6.1.0-10-amd64", "6.1.0-9-amd64"], ""),
        ("6.1.0-9-amd64", ["6.1.0-10-cloud-amd64"], ""),
        ("7.0-rc3-amd64", ["7.0-amd64"], "7.0-amd64"),
        ("7.0~rc3-amd64", ["7.0-amd64", "7.0.1+deb14-amd64"], "7.0.1+deb14-amd64"),
        ("5.10.0", [], ""),
    ],
)
def test_newest_kernel_of_the_flavour(running: str, installed: list[str], newest: str) -> None:
    assert kernels.newer(running, installed) == newest
