"""Hostile input ends in an answer or in a refusal, within bounds; and the limits that prove it.

Each target runs in a process of its own. ``FUZZ_SECONDS`` is how long all of them take together,
a minute by default; ``FUZZ_SEED`` makes other cases. A finding leaves its case in ``build/fuzz``;
the same command with ``--replay`` runs it again.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from tests.conftest import need
from tests.fuzz.engine import CORPUS
from tests.fuzz.parsers import TARGETS

from ouassister.provider import vmtoml

ROOT: Final = Path(__file__).parents[2]
WORK: Final = ROOT / "build" / "fuzz"
SECONDS: Final = float(os.environ.get("FUZZ_SECONDS", "60"))
SEED: Final = os.environ.get("FUZZ_SEED", "1")
# The walkers have half of the time. Of the rest save formats take most: there are most of them.
SHARES: Final = {"save": 0.2, "guest": 0.5} | dict.fromkeys(TARGETS.keys() - {"save"}, 0.06)
_SLACK_S: Final = 240  # to start, and for one case that takes too long, on a busy machine


class EndedError(Exception):
    """A worker found something."""


def work(target: str, *options: str, seconds: float = 0, folder: Path = WORK) -> dict[str, Any]:
    """Run one worker; return its tally."""
    command = [sys.executable, "-m", "tests.fuzz", target, "--work", str(folder), *options]
    command += ["--seconds", str(seconds)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + _SLACK_S
        )
    except subprocess.TimeoutExpired as error:
        raise EndedError(f"{target} sleeps; its case is {folder / target}.case") from error
    if done.returncode:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else "an exception"
        again = shlex.join([*command, "--replay", f"{folder / target}.case"])
        raise EndedError(f"{how}, seed {SEED}; again: {again}\n{done.stderr[-4000:]}")
    tally: dict[str, Any] = json.loads(done.stdout)
    return tally


def fuzz(target: str, *options: str) -> None:
    seconds = SHARES[target] * SECONDS
    tally = work(target, "--seed", SEED, *options, seconds=seconds)
    print(target, tally)
    assert tally["cases"] > 0


@pytest.mark.host
@pytest.mark.timeout(SECONDS + 2 * _SLACK_S)
@pytest.mark.parametrize("target", TARGETS)
def test_damaged_input_is_read_or_refused(target: str) -> None:
    for tool in ("lzop", "zstd"):
        need(tool)
    fuzz(target)


@pytest.mark.vm
@pytest.mark.timeout(SECONDS + 2 * _SLACK_S + 600)
def test_damaged_memory_is_read_or_refused(suspended: Path) -> None:
    fuzz("guest", "--save", str(vmtoml.load(suspended).save))


@pytest.mark.host
@pytest.mark.parametrize("target", TARGETS)
def test_corpus_is_read_or_refused(target: str, tmp_path: Path) -> None:
    """The inputs that were findings once, and the seeds, of which most are read."""
    for tool in ("lzop", "zstd"):
        need(tool)
    files = sorted((CORPUS / target).iterdir())
    seeds = [str(path) for path in files if not path.name.startswith("found-")]
    tally = work(target, "--replay", *map(str, files), folder=tmp_path)
    assert tally["cases"] == len(files)
    tally = work(target, "--replay", *seeds, folder=tmp_path)
    assert tally["cases"] > tally["refused"], "no seed is read: what is damaged then?"


TRAPS: Final = {
    "raises": "IndexError",
    "confesses": "InternalError",
    "hangs": "SIGPROF",
    "swells": "MemoryError",
    "crashes": "SIGSEGV",
}


@pytest.mark.host
@pytest.mark.parametrize(("trap", "said"), TRAPS.items())
def test_broken_limit_is_told_with_its_case(trap: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(EndedError, match=f"(?s){said}.*trap-{trap}.case|trap-{trap}.case.*{said}"):
        work(f"trap-{trap}", folder=tmp_path)
    assert (tmp_path / f"trap-{trap}.case").read_bytes().isdigit()


@pytest.mark.host
def test_cases_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    cases = []
    for seed in ("1", "1", "2"):
        with pytest.raises(EndedError):
            work("trap-raises", "--seed", seed, folder=tmp_path)
        cases.append((tmp_path / "trap-raises.case").read_bytes())
    assert cases[0] == cases[1] != cases[2]
    assert work("trap-none", "--seed", "1", folder=tmp_path)["refused"] > 0
