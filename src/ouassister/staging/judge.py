"""What became of a run of the updater, package by package; nothing here runs anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.packages.apt_status import at_work
from ouassister.shadow import labels
from ouassister.shadow.events import Outcome
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from ouassister.model import Entry
    from ouassister.packages.apt import Ran
    from ouassister.packages.apt_status import Work
    from ouassister.shadow.events import Event
    from ouassister.staging.held import HeldFile

_ENDED: Final = {
    Outcome.REFUSED: "which is refused there",
    Outcome.UNKNOWN: "which nothing there answers",
    Outcome.FOREIGN: "which is meant for a daemon that nothing stands in for",
}
# Kernels are built or told to be without it (CONFIG_IO_URING, kernel.io_uring_disabled), so whoever
# calls it does the same by other calls then: databases look for it each time.
_DONE_WITHOUT: Final = frozenset(("io_uring_setup",))
_MAX_SHOWN: Final = 80

Reasons = dict[str, str]
"""Names of packages, and why they cannot be emulated."""


def failed(ran: Ran, planned: Collection[str]) -> Reasons:
    """Packages whose scripts failed, or were at work when the time ran out.

    A package that waits for another one is no culprit. When one fails that is not part of the
    update (it has a trigger), nobody knows which of the update's packages pulled it: all did.
    """
    reasons: Reasons = {}
    if ran.timed_out:
        last = ran.works[-1].package if ran.works else ""
        words = "it did not end in time while the guest slept"
        return _assign(reasons, last, words, planned) if last else {}
    culprits = [error for error in ran.errors if not error.waits] or list(ran.errors)
    for error in culprits:
        _assign(reasons, error.package, f"it failed while the guest slept: {error.words}", planned)
    return reasons


def refused(events: Iterable[Event], planned: Collection[str]) -> Reasons:
    """Packages whose scripts called what the shadow has no true answer to, or did not end.

    A script of an installed package that a trigger ran is named in the notes, and stages nothing.
    """
    reasons: Reasons = {}
    for event in events:
        if event.outcome is Outcome.EXPIRED and event.package in planned:
            reasons[event.package] = f"{event.detail} while the guest slept"
        ended = _ENDED.get(event.outcome)
        done_without = event.words[:1] and event.words[0] in _DONE_WITHOUT
        if ended is not None and not done_without and event.package in planned:
            called = f"{' '.join(event.words)[:_MAX_SHOWN]!a}"
            reasons.setdefault(event.package, f"its script called {called}, {ended}")
    return reasons


def holders(
    files: Iterable[HeldFile],
    owners: Mapping[bytes, tuple[str, ...]],
    wrote_s: Mapping[bytes, int],
    works: tuple[Work, ...],
    planned: Collection[str],
) -> Reasons:
    """Packages that wrote to files which sleeping processes hold open.

    Whose it is: the file's own package, or those of the program and of the unit which hold it, or
    whose script was at work in the second in which the file was last written; else it may be any.

    Args:
        files: What is held and written.
        owners: Packages of the files, and of what `HeldFile.known_by` names, as dpkg knows them.
        wrote_s: When the update wrote each, in seconds since the epoch.
        works: What dpkg worked on.
        planned: Names of the update's packages.
    """
    reasons: Reasons = {}
    for file in files:
        words = (
            f"it writes {to_text(file.path)},"
            f" which {to_text(file.comm)} (pid {file.pid}) holds open for writing"
        )
        guesses = (
            owners.get(file.path, ()),
            tuple(name for path in file.known_by for name in owners.get(path, ())),
            at_work(works, wrote_s.get(file.path, -1)),
        )
        mine = next((kept for guess in guesses if (kept := set(guess) & set(planned))), planned)
        for name in sorted(mine):
            reasons.setdefault(name, words)
    return reasons


def policies(
    entries: Iterable[Entry], works: tuple[Work, ...], planned: Collection[str]
) -> Reasons:
    """Packages that wrote the SELinux policy, which the kernel has loaded and must load again.

    Labels of the new one are none that the old one knows. Whose it is: whose script was at work in
    the second in which it was written; else it may be any.
    """
    reasons: Reasons = {}
    for entry in entries:
        if labels.POLICY.fullmatch(entry.path) and not entry.same:
            guess = set(at_work(works, entry.mtime_ns // 1_000_000_000)) & set(planned)
            words = (
                f"it changes the SELinux policy {to_text(entry.path)}, which the guest has loaded"
            )
            reasons.update(dict.fromkeys(sorted(guess or planned), words))
    return reasons


def _assign(reasons: Reasons, name: str, words: str, planned: Collection[str]) -> Reasons:
    if name in planned:
        reasons.setdefault(name, words)
    else:
        for one in planned:
            reasons.setdefault(one, f"{name}, which is not part of the update: {words}")
    return reasons
