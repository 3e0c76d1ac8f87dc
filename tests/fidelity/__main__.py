"""``make fidelity PACKAGES="a b" [UPGRADE=1] [GUEST=bookworm]``: does sleeping make a difference?

One suspended guest, two twins: one is resumed and updated by its own apt, the other by this
project. All packages go in one update; where the twins differ, or one fails, halves of them are
tried until the culprits are alone. ``build/fidelity.json`` has the verdict of each package.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.fidelity import compare, twins

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULT: Final = twins.BUILD / "fidelity.json"


@dataclass
class Verdict:
    """What came of one package."""

    verdict: str  # equal, differs, failed
    mode: str = "emulated"  # or staged
    reasons: list[str] = field(default_factory=list)


def judge(
    base: Path, packages: Sequence[str], verdicts: dict[str, Verdict], *, upgrade: bool
) -> None:
    """Try packages together; where that does not end in twins, try halves."""
    print(f"fidelity: {' '.join(packages)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fidelity-", dir=twins.BUILD) as folder:
        try:
            pair = twins.update_both(base, Path(folder), packages, upgrade=upgrade)
        except twins.UpdateFailedError as error:
            result, reasons, staged, notes = "failed", [str(error)], frozenset[str](), list[str]()
        else:
            found, used = compare.differences(pair.theirs, pair.ours, pair.since_s, compare.load())
            result, reasons = ("differs", found) if found else ("equal", [])
            staged, notes = pair.staged, [*pair.reasons]
            print(f"  {len(pair.theirs.nodes)} paths, seconds {pair.seconds}")
            for reason, count in sorted(used.items()):
                print(f"  allowed: {count} x {reason}")
    print(f"  {result}", *(f"    {line}" for line in reasons[:20]), sep="\n", flush=True)
    if result != "equal" and len(packages) > 1 and not upgrade:
        middle = len(packages) // 2
        for half in (packages[:middle], packages[middle:]):
            judge(base, half, verdicts, upgrade=upgrade)
        if all(verdicts[name].verdict == "equal" for name in packages):
            for name in packages:  # each half is well: it is their being together
                verdicts[name] = Verdict(result, reasons=["only together: ", *reasons])
        return
    for name in packages:
        mode = "staged" if name in staged else "emulated"
        verdicts[name] = Verdict(result, mode, [*reasons, *notes])


def main() -> int:
    """Entry point; ends with 1 when any package is not equal."""
    parser = argparse.ArgumentParser(prog="fidelity", description=__doc__)
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--upgrade", action="store_true", help="they are there, and outdated")
    parser.add_argument("--guest", default="bookworm", choices=("bullseye", "bookworm", "trixie"))
    options = parser.parse_args()
    before = options.packages if options.upgrade else []
    base = twins.sleeping(options.guest, before, outdated=options.upgrade)
    verdicts: dict[str, Verdict] = {}
    judge(base, options.packages, verdicts, upgrade=options.upgrade)
    RESULT.write_text(
        json.dumps(
            {"guest": options.guest, "upgrade": options.upgrade,
             "packages": {name: asdict(one) for name, one in verdicts.items()}}, indent=1,
        ) + "\n"
    )  # fmt: skip
    print(f"{RESULT}: {', '.join(f'{name} {one.verdict}' for name, one in verdicts.items())}")
    return 0 if all(one.verdict == "equal" for one in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
