"""The words that reach the guest: no shell sees one that it could read as more than a word."""

from __future__ import annotations

import shlex

from ouassister.changeset.medium import MediumInfo
from ouassister.model import Action
from ouassister.reflect import bootstrap

INFO = MediumInfo(applier_blocks=25, header_sha256="ab" * 32, size=1 << 20)


def test_time_has_nine_digits_of_nanoseconds() -> None:
    words = bootstrap.apply_command(b"stub", "oua-1", INFO, 1_700_000_000_000_000_007)
    assert words[words.index("--set-time") + 1] == "1700000000.000000007"
    assert words[words.index("--medium-sha256") + 1] == INFO.header_sha256


def test_values_are_arguments_of_the_script_and_never_part_of_it() -> None:
    command = bootstrap.apply_command(b"stub", "oua-1", INFO, 5)
    assert command[:2] == ["/bin/sh", "-c"]
    assert command[3:6] == ["ouassister-reflect", "oua-1", str(INFO.applier_blocks)]
    assert command[7:9] == ["apply", "serial:oua-1"]
    assert "oua-1" not in command[2]
    other = bootstrap.apply_command(b"stub", "$(reboot)", INFO, 5)
    assert "reboot" not in other[2]


def test_each_guest_gets_randomness_of_its_own_that_no_process_there_can_read() -> None:
    seeds = {bootstrap.seed() for _ in range(2)}
    assert {len(seed) for seed in seeds} == {64}
    assert len(seeds) == 2
    assert bootstrap.apply_command(b"stub", "oua-1", INFO, 5)[-2:] == ["--seed", "stdin"]


def test_applier_is_taken_from_a_medium_that_the_channel_brought() -> None:
    path = "/var/lib/.ouassister-medium-oua-1"
    command = bootstrap.apply_command(b"stub", "oua-1", INFO, 5, carried=True)
    assert command[:2] == ["/bin/sh", "-c"]
    assert "oua-1" not in command[2]
    program = "/var/lib/.ouassister-applier"
    assert command[3:9] == ["ouassister-reflect", path, "25", program, "apply", path]
    assert command[9:] == bootstrap.apply_command(b"stub", "oua-1", INFO, 5)[9:]
    assert bootstrap.uncarry_command("oua-1") == ["/bin/rm", "-f", path, program]


def test_actions_are_quoted_and_silent() -> None:
    actions = (
        Action(("systemctl", "daemon-reload")),
        Action(("modprobe", "a;reboot", "b'c", "\\x2d")),
    )
    shell, option, script, name = bootstrap.actions_command(actions)
    assert (shell, option, name) == ("/bin/sh", "-c", "ouassister-reflect")
    lines = script.splitlines()
    assert len(lines) == 2
    for index, (line, action) in enumerate(zip(lines, actions, strict=True)):
        call, end = line.split(" >/dev/null 2>&1 </dev/null; ")
        assert tuple(shlex.split(call)) == action.argv
        assert end == f"echo {index} $?"


def test_action_without_a_good_status_has_failed() -> None:
    actions = tuple(Action(("systemctl", "start", f"{i}.service")) for i in range(4))
    assert bootstrap.failed_actions(actions, b"0 0\n1 0\n2 0\n3 0\n") == ()
    assert bootstrap.failed_actions(actions, b"0 0\n1 5\n3 0\n") == (
        "systemctl start 1.service: status 5",
        "systemctl start 2.service: status unknown",
    )
    assert bootstrap.failed_actions((), b"") == ()


RELOAD = Action(("systemctl", "daemon-reload"))


def _states(*units: str) -> bytes:
    lines = ["1 1"]
    for at, unit in enumerate(units):
        load, active, result = unit.split()
        lines += ["1:"] * (at > 0)
        lines += [f"1:LoadState={load}", f"1:ActiveState={active}", f"1:Result={result}"]
    return "\n".join(["0 0", *lines, ""]).encode()


def test_call_for_several_units_that_failed_names_those_at_fault() -> None:
    actions = (RELOAD, Action(("systemctl", "restart", "a.service", "b.service", "c.service")))
    told = "systemctl restart a.service b.service c.service: status 1"
    good, failed = "loaded active success", "loaded failed exit-code"
    gone, looping = "not-found inactive success", "loaded activating exit-code"
    for states, named in (
        ((good, failed, good), " (b.service)"),
        ((gone, good, looping), " (a.service, c.service)"),
        ((good, good, good), ""),  # a job that waited for another's: nobody's own fault
        ((good, failed), ""),  # not a block for each: whose they are is not known
    ):
        assert bootstrap.failed_actions(actions, _states(*states)) == (told + named,), states
    assert bootstrap.failed_actions(actions, b"0 0\n1 0\n") == ()


def test_independent_calls_are_waited_for_by_their_own_pids() -> None:
    one, two = (Action(("systemctl", "start", unit)) for unit in ("a", "b"))
    start, first, second, end = bootstrap.action_lines((one, two))
    assert (start, end) == ("jobs=", "wait $jobs")
    assert first.startswith("{ systemctl start a ")
    assert second.endswith('echo 1 $?; } & jobs="$jobs $!"')


def test_state_of_units_is_asked_for_by_a_call_for_several_alone() -> None:
    one, two = (Action(("systemctl", "start", *units)) for units in (("a",), ("a", "b'; reboot")))
    lines = bootstrap.action_lines((one, RELOAD, two))
    lines = [lines[0], lines[2]]
    assert "show" not in lines[0]
    assert shlex.split(lines[1].partition(" -- ")[2])[:2] == ["a", "b'; reboot"]


def test_odd_output_of_the_guest_counts_as_failed() -> None:
    action = (Action(("systemctl", "daemon-reload")),)
    for output in (
        b"",
        b"0",
        b"0 ",
        b"0 x\n",
        b"0 -1\n",
        b"1 0\n",
        b"-0 0\n",
        b"9" * 9000 + b" 0\n",
        "\u0660 0\n".encode(),
        b"\xff\xfe\n",
    ):
        assert len(bootstrap.failed_actions(action, output)) == 1, output
