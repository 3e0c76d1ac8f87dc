"""``make fidelity PACKAGES="a b" [UPGRADE=1] [GUEST=bookworm]``: does sleeping make a difference?

One suspended guest, two twins: one is resumed and updated by its own apt, the other by this
project. All packages go in one update; where the twins differ, or one fails, halves of them are
tried until the culprits are alone. With ``INSTALLED="c d"`` the guest is outdated and has these,
and only the packages that are asked for are installed or upgraded.

``build/fidelity.json`` has the verdict of each package.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.fidelity import bisection, compare, twins
from tests.fidelity.bisection import Outcome, Trial

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULT: Final = twins.BUILD / "fidelity.json"
_SHOWN: Final = 60


class Runs:
    """Updates pairs of twins, and keeps what it cost.

    Args:
        base: The guest that both are clones of.
        outdated: It may have what is asked for already, and current.
        everything: The first run upgrades all that is outdated, whatever else is named.
    """

    def __init__(self, base: Path, *, outdated: bool, everything: bool) -> None:
        self._base = base
        self._outdated, self._everything = outdated, everything
        self.log: list[dict[str, object]] = []

    def attempt(self, packages: Sequence[str]) -> Trial:
        """One update of a fresh pair."""
        wish = twins.Wish(() if self._everything else tuple(packages))
        self._everything = False
        words = " ".join(wish.packages or ["everything, with", *packages])
        print(f"fidelity: {words}", flush=True)
        entry: dict[str, object] = {"packages": words}
        self.log.append(entry)
        with tempfile.TemporaryDirectory(prefix="fidelity-", dir=twins.BUILD) as folder:
            try:
                pair = twins.update_both(self._base, Path(folder), wish)
            except twins.NothingToDoError as error:
                print(f"  {error}", flush=True)
                # Among several that are outdated some are not; a package to install has to be.
                outcome = Outcome.EQUAL if self._outdated else Outcome.FAILED
                return Trial(outcome, (str(error),), {})
            except twins.UpdateFailedError as error:
                entry["failed"] = str(error)
                print(f"  failed: {error}", flush=True)
                return Trial(Outcome.FAILED, (str(error),), {})
        found, used = compare.differences(pair.theirs, pair.ours, pair.since_s, compare.load())
        changed = [one["name"] for one in pair.update["changes"]]
        entry |= {
            "changed": changed,
            "paths": len(pair.theirs.nodes),
            "hashed": sum(node.digest not in ("", "-") for node in pair.ours.nodes.values()),
            "seconds": pair.seconds,
            "offline_s": pair.update["offline_s"],
            "online_s": pair.resume["online_s"],
            "differences": found,
            "allowed": used,
            "notes": pair.update["notes"],
        }
        print(f"  {len(changed)} packages, {entry['paths']} paths, {entry['hashed']} hashed;"
              f" seconds {pair.seconds}")  # fmt: skip
        for reason, count in sorted(used.items()):
            print(f"  allowed: {count} x {reason}")
        for line in found[:_SHOWN]:
            print(f"  {line}")
        print(f"  {len(found)} differences", flush=True)
        return Trial(Outcome.DIFFERS if found else Outcome.EQUAL, tuple(found), pair.staged)


def main() -> int:
    """Entry point; ends with 1 when any package is not equal."""
    parser = argparse.ArgumentParser(prog="fidelity", description=__doc__)
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--upgrade", action="store_true", help="they are there, and outdated")
    parser.add_argument(
        "--installed", default="", help="what the outdated guest has; only packages are upgraded"
    )
    parser.add_argument("--held", default="", help="what neither of them upgrades")
    parser.add_argument("--guest", default="bookworm", choices=("bullseye", "bookworm", "trixie"))
    options = parser.parse_args()
    installed = tuple(options.installed.split())
    outdated = options.upgrade or bool(installed)
    before = installed or (tuple(options.packages) if options.upgrade else ())
    held = tuple(options.held.split())
    base = twins.sleeping(options.guest, before, outdated=outdated, held=held)
    runs = Runs(base, outdated=outdated, everything=options.upgrade)
    verdicts = bisection.judge(options.packages, runs.attempt)
    result = {
        "guest": options.guest,
        "upgrade": options.upgrade,
        "installed": installed,
        "held": held,
        "packages": {name: asdict(one) for name, one in verdicts.items()},
        "runs": runs.log,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{RESULT}: {', '.join(f'{name} {one.verdict}' for name, one in verdicts.items())}")
    return 0 if all(one.verdict is Outcome.EQUAL for one in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
