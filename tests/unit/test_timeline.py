"""The story of a run: phases in order, also of a run that fails, and safe for a terminal."""

from __future__ import annotations

import re

import pytest

from ouassister.timeline import Timeline, stderr_story


def test_phases_are_timed_told_and_logged_in_their_order() -> None:
    told: list[str] = []
    logged: list[tuple[str, str]] = []
    timeline = Timeline(told.append, lambda step, detail: logged.append((step, detail)))
    with timeline.phase("plan"):
        timeline.say("Get:1 list")
    with timeline.phase("download"):
        pass
    assert [phase.name for phase in timeline.phases] == ["plan", "download"]
    assert all(0 <= phase.seconds <= timeline.elapsed_s for phase in timeline.phases)
    stamp = r"\[ +\d+\.\d\d s\] "
    expected = ("plan …", "Get:1 list", "plan: 0.00 s", "download …", "download: 0.00 s")
    assert len(told) == len(expected)
    for line, text in zip(told, expected, strict=True):
        assert re.fullmatch(stamp + re.escape(text), line), line
    assert [step for step, _ in logged] == ["plan", "plan", "download", "download"]
    assert logged[0][1] == "begin"
    assert re.fullmatch(r"end \d\.\d{3} s", logged[1][1])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failed_phase_is_logged_and_does_not_count(error: type[BaseException]) -> None:
    logged: list[tuple[str, str]] = []
    timeline = Timeline(None, lambda step, detail: logged.append((step, detail)))
    with pytest.raises(error), timeline.phase("emulate"):
        raise error
    assert logged == [("emulate", "begin"), ("emulate", error.__name__)]
    assert timeline.phases == ()


def test_phases_nest_and_sum_by_name() -> None:
    timeline = Timeline()
    with timeline.phase("outer"), timeline.phase("inner"):
        pass
    with timeline.phase("inner"):
        pass
    assert [phase.name for phase in timeline.phases] == ["inner", "outer", "inner"]
    inner = sum(phase.seconds for phase in timeline.phases if phase.name == "inner")
    assert timeline.seconds("inner") == inner
    assert timeline.seconds("nothing") == 0
    assert timeline.seconds("inner", "outer") >= inner


def test_lines_of_a_guest_are_escaped() -> None:
    told: list[str] = []
    Timeline(told.append).say("Setting up evil\x1b]0;x\x07 \u202e\r\n\udcff")
    assert told[0].isprintable()
    assert told[0].endswith(r"evil\u{1b}]0;x\u{7} \u{202e}\u{d}\u{a}\u{dcff}")


def test_story_goes_to_standard_error_alone(capsys: pytest.CaptureFixture[str]) -> None:
    stderr_story("a line")
    assert capsys.readouterr() == ("", "a line\n")
