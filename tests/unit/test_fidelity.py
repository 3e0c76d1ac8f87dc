"""The twin harness decides rightly, on twins made by hand."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from tests.fidelity import bisection, compare, facts, twins
from tests.fidelity.bisection import Outcome, Trial
from tests.view.manifest import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ouassister.provider.qemu import RunningVM

SINCE = 1000.0
FILE = Node("100644", "0", "0", "5", "900.5", "900.5", "1", "12", "0:0", "0", "", "", "aa")


def _attempt(
    bad: Callable[[frozenset[str]], bool], tried: list[tuple[str, ...]]
) -> Callable[[Sequence[str]], Trial]:
    def one(packages: Sequence[str]) -> Trial:
        tried.append(tuple(packages))
        if bad(frozenset(packages)):
            return Trial(Outcome.FAILED, (f"failed among {len(packages)}",), {})
        return Trial(Outcome.EQUAL, (), {name: "held open" for name in packages if name == "d"})

    return one


def test_batch_that_is_well_is_tried_once() -> None:
    tried: list[tuple[str, ...]] = []
    verdicts = bisection.judge("abcd", _attempt(lambda _batch: False, tried))
    assert tried == [("a", "b", "c", "d")]
    assert {name: one.verdict for name, one in verdicts.items()} == dict.fromkeys("abcd", "equal")
    assert verdicts["d"].mode == "staged"
    assert verdicts["d"].reasons == ("staged: held open",)
    assert verdicts["a"].mode == "emulated"


def test_bisection_names_each_failing_package_and_no_other() -> None:
    tried: list[tuple[str, ...]] = []
    verdicts = bisection.judge("abcdefgh", _attempt(lambda batch: bool(batch & {"c", "h"}), tried))
    failed = {name for name, one in verdicts.items() if one.verdict is Outcome.FAILED}
    assert failed == {"c", "h"}
    assert verdicts["c"].reasons == ("failed among 1",)
    assert verdicts.keys() == set("abcdefgh")
    assert len(tried) == 11  # of 15 batches: halves that are well are not divided


def test_bisection_names_those_that_fail_only_together() -> None:
    tried: list[tuple[str, ...]] = []
    verdicts = bisection.judge("abcd", _attempt(lambda batch: batch >= {"a", "c"}, tried))
    assert {one.verdict for one in verdicts.values()} == {Outcome.FAILED}
    assert verdicts["a"].reasons == ("only together with a b c d", "failed among 4")


def _facts(
    nodes: dict[str, Node] | None = None, tables: dict[str, frozenset[str]] | None = None
) -> facts.Facts:
    return facts.Facts({"./f": FILE, **(nodes or {})}, tables or {"users": frozenset({"root"})})


def _found(theirs: facts.Facts, ours: facts.Facts, allowed: str = "path = []") -> list[str]:
    return compare.differences(theirs, ours, SINCE, compare.parse(allowed))[0]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("mode", "100600"),
        ("uid", "1"),
        ("size", "6"),
        ("mtime", "900.6"),
        ("mtime", "1001.5"),
        ("links", "2"),
        ("flags", "10"),
        ("xattrs", "system.posix_acl_access=02"),
        ("digest", "bb"),
    ],
)
def test_each_column_that_differs_is_told(column: str, value: str) -> None:
    other = FILE._replace(**{column: value})
    assert len(_found(_facts(), _facts({"./f": other}))) == 1


def test_time_of_the_update_and_numbers_of_inodes_are_no_difference() -> None:
    one = FILE._replace(mtime="1001.25", ctime="1001.25", inode="13")
    other = FILE._replace(mtime="1002.75", ctime="1002.75", inode="14")
    assert _found(_facts({"./f": one}), _facts({"./f": other})) == []


def test_path_or_line_of_one_twin_alone_is_told() -> None:
    assert _found(_facts({"./g": FILE}), _facts()) == ["./g: only in the twin"]
    assert _found(_facts(), _facts({"./g": FILE})) == ["./g: only in ours"]
    assert _found(_facts(), _facts(tables={"users": frozenset({"root", "postfix"})})) == [
        "users: only in ours: postfix"
    ]


def test_allowed_difference_is_counted_and_covers_no_other() -> None:
    rules = """
path = [{paths = ["./var/log/*"], columns = ["digest"], reason = "a log"}]
line = [{table = "users", line = "^postfix", reason = "known"}]
"""
    log = {"./var/log/x": FILE}
    other = {"./var/log/x": FILE._replace(digest="bb", mode="100600")}
    ours = _facts(other, {"users": frozenset({"root", "postfix", "other"})})
    found, used = compare.differences(_facts(log), ours, SINCE, compare.parse(rules))
    assert found == [
        "./var/log/x: mode is 100600 in ours, 100644 in the twin",
        "users: only in ours: other",
    ]
    assert used == {"a log": 1, "known": 1}


def test_line_that_one_twin_alone_may_have_is_none_of_the_other() -> None:
    rules = 'path = []\nline = [{table = "users", line = ".", only = "the twin", reason = "known"}]'
    some, none = ({"users": frozenset(one)} for one in ({"root"}, set[str]()))
    allowed = compare.parse(rules)
    theirs, ours = _facts(tables=some), _facts(tables=none)
    assert compare.differences(theirs, ours, SINCE, allowed) == ([], {"known": 1})
    found, used = compare.differences(ours, theirs, SINCE, allowed)
    assert (found, used) == (["users: only in ours: root"], {})


@pytest.mark.parametrize(
    "rules",
    [
        'path = [{paths = ["./x"], reason = " "}]',
        'path = []\nline = [{table = "users", line = "x", only = "mine", reason = "who?"}]',
        'path = []\nline = [{table = "users", line = "x", reason = ""}]',
        'path = [{paths = ["./x"], columns = ["colour"], reason = "no such column"}]',
        'path = []\nline = [{table = "colours", line = "x", reason = "no such table"}]',
    ],
)
def test_rule_that_gives_no_reason_or_means_nothing_is_refused(rules: str) -> None:
    with pytest.raises(ValueError, match="rule"):
        compare.parse(rules)


def test_reviewed_list_is_sound() -> None:
    allowed = compare.load()
    assert allowed.rules
    assert not any(pattern in ("*", "./*") for rule in allowed.rules if not rule.columns
                   for pattern in rule.paths)  # fmt: skip


def test_files_that_one_twin_alone_has_touched_are_hashed_in_both() -> None:
    untouched = FILE._replace(digest=facts.UNCHANGED)
    theirs = _facts({"./f": untouched, "./same": untouched, "./mode": untouched})
    ours = _facts({"./f": FILE, "./same": untouched, "./mode": FILE._replace(mode="100600")})
    assert facts.one_sided(theirs, ours) == ["./f"]
    assert facts.with_digests(theirs, {"./f": "cc"}).nodes["./f"].digest == "cc"


def test_names_of_a_manifest_become_bytes_again() -> None:
    assert facts.plain("./a\\x20b\\xff\\x5c") == b"./a b\xff\\"


def test_a_guest_that_was_ended_is_not_asked_any_more() -> None:
    nobody = SimpleNamespace(pid=(1 << 22) + 1)  # above what the kernel gives (PID_MAX_LIMIT)
    with pytest.raises(twins.UpdateFailedError, match="has been ended"):
        twins.must_live(cast("RunningVM", nobody))
    twins.must_live(cast("RunningVM", SimpleNamespace(pid=os.getpid())))
