"""Plans, and what is left of them when archives cannot be had: the guest's apt is played here.

The real apt does the same in tests/vm.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import pytest

from ouassister import codec
from ouassister.errors import PackageNotFoundError, RepositoryError, StaleError, UpdaterError
from ouassister.model import Archive, Fence, FileStamp, LeftOut, PackageChange, Plan, Request
from ouassister.packages import update
from ouassister.packages.apt import Simulation

if TYPE_CHECKING:
    from ouassister.packages.apt import Apt

FENCE = Fence(FileStamp("/vms/web1.save", 1, 2, 3, 4, 5, "ab"), ())
NEEDS = {"web": ("libweb",), "libweb": (), "tool": (), "data": ()}
UPGRADABLE = ("tool", "data")


def change(name: str) -> PackageChange:
    return PackageChange(name, "amd64", "1" if name in UPGRADABLE else "", "2")


def archive(name: str) -> Archive:
    return Archive(name, f"http://mirror.example/{name}.deb", f"{name}.deb", 10, "SHA256:00")


@dataclass
class PlayedApt:
    """An apt with four packages; ``gone`` are those that the mirror has lost."""

    gone: set[str]
    obeys: bool = True  # a hostile one ignores pins
    pinned: set[str] = field(default_factory=set)
    fetches: int = 0

    def plan(self, request: Request, *, fetch: bool = False) -> Simulation:
        self.fetches += fetch
        assert self.fetches < 10, "it does not end"
        wished = request.install or tuple(name for name in UPGRADABLE if name not in self.pinned)
        names: dict[str, None] = {}
        for name in wished:
            if name in self.pinned:
                raise PackageNotFoundError(f"no package {name}")
            for needed in NEEDS[name]:
                if needed in self.pinned:
                    raise UpdaterError(f"{name}: Depends: {needed}")
                names[needed] = None
            names[name] = None
        order = "".join(f"Inst {name}\n" for name in names)
        return Simulation(tuple(map(change, names)), tuple(map(archive, names)), (), order)

    def lacking(self, archives: tuple[Archive, ...]) -> tuple[Archive, ...]:
        return tuple(one for one in archives if one.package in self.gone)

    def pin_away(self, changes: tuple[PackageChange, ...]) -> None:
        if self.obeys:
            self.pinned |= {one.name for one in changes}


def fetch(apt: PlayedApt, *names: str) -> update.Prepared:
    request = Request(names)
    simulated = apt.plan(request, fetch=True)
    plan = update.make_plan("web1", FENCE, request, simulated)
    return update.complete(cast("Apt", apt), plan, simulated.output)


def test_plan_is_bound_to_everything_in_it_by_its_id() -> None:
    request = Request(("web",))
    kept, unread = LeftOut("x", "kept back"), LeftOut("http://mirror.example", "not read")
    simulated = Simulation((change("web"),), (archive("web"), archive("libweb")), (kept,))
    plan = update.make_plan("web1", FENCE, request, simulated, (unread,))
    assert plan.left_out == (unread, kept)
    assert plan.download_bytes == 20
    assert plan.plan_id == codec.digest(plan, without="plan_id")
    again = update.make_plan("web1", FENCE, request, simulated, (unread,))
    assert again == plan
    other = replace(FENCE, save=replace(FENCE.save, mtime_ns=9))
    assert update.make_plan("web1", other, request, simulated).plan_id != plan.plan_id


def test_stored_plan_that_still_holds_passes() -> None:
    plan = update.make_plan("web1", FENCE, Request(), PlayedApt(set()).plan(Request()))
    update.check_same(plan, plan.changes)


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ((change("tool"),), "data differs"),
        ((change("tool"), change("data"), change("web")), "web differs"),
        ((change("tool"), replace(change("data"), new="3")), "data differs"),
        ((change("data"), change("tool")), "the order of packages differs"),
        ((), "data differs"),
    ],
)
def test_stored_plan_that_apt_no_longer_makes_is_stale(
    now: tuple[PackageChange, ...], named: str
) -> None:
    plan = update.make_plan("web1", FENCE, Request(), PlayedApt(set()).plan(Request()))
    with pytest.raises(StaleError, match=named):
        update.check_same(plan, now)


def test_whole_download_keeps_the_plan() -> None:
    prepared = fetch(PlayedApt(set()), "web")
    assert [one.name for one in prepared.plan.changes] == ["libweb", "web"]
    assert prepared.request == Request(("web",))
    assert prepared.plan.left_out == ()
    assert prepared.order == "Inst libweb\nInst web\n"


def test_lost_package_is_left_out_and_the_rest_goes_on() -> None:
    prepared = fetch(PlayedApt({"tool"}))
    assert [one.name for one in prepared.plan.changes] == ["data"]
    assert prepared.plan.left_out == (LeftOut("tool", "version 2 could not be fetched"),)
    assert prepared.plan.plan_id == codec.digest(prepared.plan, without="plan_id")


def test_what_needs_a_lost_package_is_left_out_with_it() -> None:
    prepared = fetch(PlayedApt({"libweb"}), "web", "tool")
    assert prepared.request == Request(("tool",))
    assert prepared.order == "Inst tool\n"
    assert [one.name for one in prepared.plan.changes] == ["tool"]
    assert prepared.plan.left_out == (
        LeftOut("libweb", "version 2 could not be fetched"),
        LeftOut("web", "web: Depends: libweb"),
    )


def test_losses_that_come_one_after_the_other_are_all_told() -> None:
    class Worse(PlayedApt):
        def lacking(self, archives: tuple[Archive, ...]) -> tuple[Archive, ...]:
            missing = super().lacking(archives)
            self.gone.add("data")
            return missing

    with pytest.raises(RepositoryError, match="could not fetch data, and nothing is left"):
        fetch(Worse({"tool"}))


def test_nothing_of_the_wish_is_an_error_that_names_it() -> None:
    with pytest.raises(RepositoryError, match="could not fetch web, and nothing else was asked"):
        fetch(PlayedApt({"web"}), "web")


def test_archive_of_no_planned_package_is_an_error() -> None:
    class Odd(PlayedApt):
        def lacking(self, archives: tuple[Archive, ...]) -> tuple[Archive, ...]:
            return (archive("stranger"),)

    with pytest.raises(RepositoryError, match="no package of the plan owns failed: stranger"):
        fetch(Odd(set()), "web")


def test_apt_that_plans_the_lost_package_again_does_not_go_round() -> None:
    with pytest.raises(UpdaterError, match="plans tool again, which cannot be fetched"):
        fetch(PlayedApt({"tool"}, obeys=False))


def test_left_out_twice_is_told_once() -> None:
    plan = update.make_plan("web1", FENCE, Request(), PlayedApt(set()).plan(Request()))
    item = LeftOut("tool", "x")
    changed = update.replace_left_out(plan, (item, item))
    assert changed.left_out == (item,)
    assert changed.plan_id != plan.plan_id
    assert isinstance(changed, Plan)
    assert update.replace_left_out(changed, (item,)) is changed
