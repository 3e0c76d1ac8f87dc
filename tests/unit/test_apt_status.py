"""What apt and dpkg tell while they work, hostile lines included."""

from __future__ import annotations

import pytest

from ouassister.errors import UpdaterError
from ouassister.model import StagedStep, StepKind
from ouassister.packages.apt_status import PackageError, Work, at_work, parse_errors, parse_log
from ouassister.packages.apt_steps import steps_for

STATUS = """dlstatus:1:20.0000:Retrieving file 1 of 2
pmstatus:oua-broken:20.0000:Installing oua-broken (all)
pmerror:oua-broken:40.0000:installed oua-broken package post-installation script subprocess returned error exit status 3
pmerror:libc6:amd64:50.0000:triggers looping, abandoned
pmerror:oua-broken:60.0000:again
pmerror:oua-user:60.0000:dependency problems - leaving unconfigured
pmerror:Evil;rm:1:no name
pmerror:
"""  # noqa: E501 - as apt 2.6 prints it

LOG = """2026-11-25 16:40:05 startup packages configure
2026-11-25 16:40:05 install oua-live:all <none> 1.0
2026-11-25 16:40:05 status half-installed oua-live:all 1.0
2026-11-25 16:40:05 configure oua-live:all 1.0 <none>
2026-11-25 16:40:09 configure oua-user:all 1.0 <none>
2026-99-99 16:40:09 configure oua-odd:all 1.0 <none>
2026-11-25 16:40:11 trigproc man-db:amd64 2.11 <none>
"""


def test_errors_name_each_package_once_and_those_that_wait() -> None:
    assert parse_errors(STATUS) == (
        PackageError(
            "oua-broken",
            "installed oua-broken package post-installation script subprocess returned error"
            " exit status 3",
            waits=False,
        ),
        PackageError("libc6", "triggers looping, abandoned", waits=False),
        PackageError("oua-user", "dependency problems - leaving unconfigured", waits=True),
    )


def test_errors_are_bounded() -> None:
    lines = "".join(f"pmerror:p{number}:1.0:{'x' * 5000}\n" for number in range(5000))
    errors = parse_errors(lines)
    assert len(errors) == 1000
    assert max(len(error.words) for error in errors) == 300


@pytest.mark.parametrize(("zone", "shift"), [("+0000", 0), ("+0200", 7200), ("-0530", -19800)])
def test_log_is_read_in_the_guests_time(zone: str, shift: int) -> None:
    start = 1795624805 - shift
    assert parse_log(LOG, f"{zone}\n") == (
        Work("oua-live", start),
        Work("oua-live", start),
        Work("oua-user", start + 4),
        Work("man-db", start + 6),
    )


def test_zone_that_is_none_changes_nothing() -> None:
    assert parse_log(LOG, "nonsense") == parse_log(LOG, "+0000") == parse_log(LOG, "+9900")


def test_who_was_at_work_in_a_second_may_be_two() -> None:
    works = parse_log(LOG, "+0000")
    start = works[0].at_s
    assert at_work(works, start - 1) == ()
    assert at_work(works, start + 1) == ("oua-live",)
    assert at_work(works, start + 4) == ("oua-live", "oua-user")
    assert at_work(works, start + 100) == ("man-db",)


SIMULATED = """Remv old-mta [1.0]
Inst libc6 [2.36-9] (2.36-10 Debian:12.1/stable [amd64]) [libc6-dev:amd64 ]
Conf libc6 (2.36-10 Debian:12.1/stable [amd64])
Inst libfoo [1-2] (2.0 local [amd64]) []
Inst libfoo:i386 [1-2] (2.0 local [i386])
Inst app (2.0 local [all])
Conf libfoo (2.0 local [amd64])
Conf libfoo:i386 (2.0 local [i386])
Conf app (2.0 local [all])
"""


def test_steps_follow_apt_and_join_what_one_call_does() -> None:
    chosen = {("libc6", "amd64"): 0, ("libfoo", "amd64"): 1, ("libfoo", "i386"): 2,
              ("app", "all"): 3, ("old-mta", ""): 4}  # fmt: skip
    assert steps_for(SIMULATED, chosen) == (
        StagedStep(StepKind.REMOVE, (4,)),
        StagedStep(StepKind.INSTALL, (0,)),
        StagedStep(StepKind.INSTALL, (1, 2, 3)),
    )
    assert steps_for(SIMULATED, {("app", "all"): 0}) == (StagedStep(StepKind.INSTALL, (0,)),)


def test_steps_stay_apart_where_apt_configures_less_than_it_unpacked() -> None:
    lines = ("Inst a (1 l [all])", "Inst b (1 l [all])", "Conf a (1 l [all])",
             "Inst c (1 l [all])", "Conf c (1 l [all])", "Conf b (1 l [all])")  # fmt: skip
    chosen = {("a", "all"): 0, ("b", "all"): 1, ("c", "all"): 2}
    assert steps_for("\n".join(lines), chosen) == (
        StagedStep(StepKind.UNPACK, (0, 1)),
        StagedStep(StepKind.CONFIGURE, (0,)),
        StagedStep(StepKind.UNPACK, (2,)),
        StagedStep(StepKind.CONFIGURE, (2, 1)),
    )


def test_package_without_its_steps_is_refused() -> None:
    with pytest.raises(UpdaterError, match="gone"):
        steps_for(SIMULATED, {("gone", "all"): 0})
    with pytest.raises(UpdaterError, match="app"):
        steps_for("Inst app (2.0 local [all])", {("app", "all"): 0})
