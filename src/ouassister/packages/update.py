"""One update in an open shadow: lists, plan, archives, and the run of the guest's updater."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ouassister import codec
from ouassister.errors import RepositoryError, StaleError, UpdaterError
from ouassister.model import LeftOut, PackageChange, Plan, Request

if TYPE_CHECKING:
    from ouassister.model import Archive, Fence, PackageMode
    from ouassister.packages.apt import Apt, Simulation


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan whose archives are all there. ``request`` asks for what is left of the wish.

    ``order`` is what apt printed when it simulated that (`apt_steps`).
    """

    plan: Plan
    request: Request
    order: str = ""


def make_plan(
    vm: str,
    fence: Fence,
    request: Request,
    simulated: Simulation,
    left_out: tuple[LeftOut, ...] = (),
    predicted: tuple[PackageMode, ...] = (),
    channel: str = "",
    notes: tuple[str, ...] = (),
) -> Plan:
    """Freeze what apt simulated; the id hashes everything else."""
    plan = Plan(
        plan_id="",
        vm=vm,
        fence=fence,
        request=request,
        changes=simulated.changes,
        archives=simulated.archives,
        left_out=left_out + simulated.kept_back,
        download_bytes=sum(archive.size for archive in simulated.archives),
        predicted=predicted,
        channel=channel,
        notes=notes,
    )
    return replace(plan, plan_id=codec.digest(plan, without="plan_id"))


def check_same(plan: Plan, simulated: tuple[PackageChange, ...]) -> None:
    """Hold a stored plan against what apt would do now.

    Raises:
        StaleError: They differ; the first difference is named.
    """
    if plan.changes != simulated:
        odd = sorted(set(plan.changes) ^ set(simulated), key=lambda change: change.name)
        name = odd[0].name if odd else "the order of packages"
        raise StaleError(f"plan {plan.plan_id[:12]} no longer holds: {name} differs")


def complete(apt: Apt, plan: Plan, order: str) -> Prepared:
    """Make sure that the plan's archives were fetched, after `Apt.plan` with ``fetch``.

    What cannot be had is left out, with what depends on it.

    Args:
        apt: What planned and fetched.
        plan: Of it.
        order: What it printed then.

    Raises:
        RepositoryError: Nothing of the plan can be had.
    """
    request, left_out = plan.request, plan.left_out
    while True:
        missing = apt.lacking(plan.archives)
        if not missing:
            return Prepared(replace_left_out(plan, left_out), request, order)
        named = ", ".join(archive.package for archive in missing)
        lost = tuple(change for change in plan.changes if _is_of(change, missing))
        if not lost:
            raise RepositoryError(f"archives that no package of the plan owns failed: {named}")
        left_out += tuple(
            LeftOut(change.name, f"version {change.new} could not be fetched") for change in lost
        )
        apt.pin_away(lost)
        request, dropped = still_possible(apt, request)
        left_out += dropped
        if plan.request.install and not request.install:
            raise RepositoryError(f"could not fetch {named}, and nothing else was asked for")
        before = {change.name for change in plan.changes}
        simulated = apt.plan(request, fetch=True)
        order = simulated.output
        for change in lost:
            if change in simulated.changes:  # else this loop would not end
                raise UpdaterError(f"apt-get plans {change.name} again, which cannot be fetched")
        plan = make_plan(
            plan.vm,
            plan.fence,
            request,
            simulated,
            left_out,
            channel=plan.channel,
            notes=plan.notes,
        )
        gone = before - {change.name for change in plan.changes}
        gone -= {item.package for item in left_out}
        left_out += tuple(
            LeftOut(name, f"needs what could not be fetched: {named}") for name in sorted(gone)
        )
        if not plan.changes:
            raise RepositoryError(f"could not fetch {named}, and nothing is left to update")


def replace_left_out(plan: Plan, left_out: tuple[LeftOut, ...]) -> Plan:
    """The same plan with another list of what is left out, under its own id."""
    unique = tuple(dict.fromkeys(left_out))
    if unique == plan.left_out:
        return plan
    changed = replace(plan, left_out=unique)
    return replace(changed, plan_id=codec.digest(changed, without="plan_id"))


def _is_of(change: PackageChange, archives: tuple[Archive, ...]) -> bool:
    return any(archive.package == change.name for archive in archives)


def still_possible(apt: Apt, request: Request) -> tuple[Request, tuple[LeftOut, ...]]:
    """Drop requested packages that apt cannot install any more, each tried by itself."""
    kept, dropped = [], []
    for name in request.install:
        try:
            apt.plan(Request((name,)))
        except (UpdaterError, RepositoryError) as error:
            dropped.append(LeftOut(name, error.message))
        else:
            kept.append(name)
    return Request(tuple(kept)), tuple(dropped)
