"""One worker: ``python -m tests.fuzz TARGET --seconds 60 --seed 1 --work build/fuzz``.

With ``--replay FILE...`` it runs these cases alone. It prints how many cases there were and how
many of them were refused; a finding ends it, and leaves the case in the work folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from tests.fuzz.engine import Tally, Target, fuzz, limit, run_cases


def make(name: str, save: Path | None) -> Target:
    """Return a target by its name."""
    if name.startswith("trap-"):
        from tests.fuzz.traps import TRAPS

        return TRAPS[name]()
    if name == "guest":
        from tests.fuzz.guest import Walkers

        assert save is not None, "--save is missing"
        return Walkers(save)
    from tests.fuzz.parsers import TARGETS

    return TARGETS[name]()


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--replay", type=Path, nargs="*")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    current = options.work / f"{options.target}.case"
    target = make(options.target, options.save)
    limit(target)
    tally = Tally()
    if options.replay is None:
        tally = fuzz(target, options.seed, options.seconds, current)
    else:
        run_cases(target, [path.read_bytes() for path in options.replay], current, tally)
    current.unlink(missing_ok=True)
    json.dump(dataclasses.asdict(tally), sys.stdout)


if __name__ == "__main__":
    main()
