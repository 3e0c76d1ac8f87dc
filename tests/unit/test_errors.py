"""The error tree as a whole: codes, exit statuses, hints, its drawing and its reference page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from ouassister import errors
from ouassister.errors import (
    Impact,
    OUassisterError,
    PageAbsentError,
    QemuRefusedError,
    UnsupportedStateError,
)

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
EXIT_STATUSES = {1, 2, 10, 20, 21, 22, 23, 30, 31, 32, 40, 41, 143}
ROW = re.compile(r"\| (\d+) \| `([a-z-]+)` \| ([^|]+) \| ([a-z ]+) \| ([^|]+) \|")


def tree(top: type[OUassisterError] = OUassisterError) -> list[type[OUassisterError]]:
    """All classes below ``top`` that are part of the public tree, each once."""
    found: list[type[OUassisterError]] = []
    for one in top.__subclasses__():
        found += [one, *tree(one)]
    return found


CLASSES = tree()


def test_every_class_is_defined_in_errors() -> None:
    assert {one.__module__ for one in CLASSES} == {errors.__name__}
    assert len(CLASSES) == len(set(CLASSES)) > 20


def test_codes_are_unique_words() -> None:
    codes = [one.code for one in CLASSES]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("one", CLASSES)
def test_class_has_its_own_code_and_a_known_exit_status(one: type[OUassisterError]) -> None:
    assert "code" in vars(one)
    assert one.exit_status in EXIT_STATUSES
    assert one.impact in get_args(Impact)


def test_every_known_exit_status_is_used() -> None:
    assert {one.exit_status for one in CLASSES} == EXIT_STATUSES


@pytest.mark.parametrize("one", CLASSES)
def test_hint_is_one_sentence_without_a_full_stop(one: type[OUassisterError]) -> None:
    assert one.default_hint.strip() == one.default_hint != ""
    assert not one.default_hint.endswith(".")
    assert "\n" not in one.default_hint


@pytest.mark.parametrize("one", CLASSES)
def test_class_is_drawn_below_its_parent(one: type[OUassisterError]) -> None:
    """The tree in the docstring: name, exit status, and its place by indentation."""
    lines = (errors.__doc__ or "").splitlines()
    (at,) = (i for i, line in enumerate(lines) if re.search(rf"\b{one.__name__} ", line))
    drawn = re.fullmatch(r"    ([│ ├└─]*)(\w+) +(\d+) +\S.*", lines[at])
    assert drawn is not None, lines[at]
    assert int(drawn[3]) == one.exit_status
    depth = len(drawn[1])
    above = [line[4:] for line in lines[:at] if line.startswith("    ")]
    parent = next(
        line for line in reversed(above) if len(line) - len(line.lstrip("│ ├└─")) == depth - 4
    )
    assert parent.lstrip("│ ├└─").split()[0] == one.__bases__[0].__name__


def test_nothing_is_drawn_that_does_not_exist() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert sorted(drawn) == sorted(one.__name__ for one in CLASSES)


def test_page_lists_exactly_the_codes_with_status_and_impact() -> None:
    rows = [match.groups() for match in map(ROW.fullmatch, PAGE.read_text().splitlines()) if match]
    listed = sorted((int(status), code, impact.strip()) for status, code, _, impact, _ in rows)
    assert listed == sorted((one.exit_status, one.code, one.impact) for one in CLASSES)


def test_page_lists_in_the_order_of_the_statuses() -> None:
    statuses = [
        int(found[1]) for found in map(ROW.fullmatch, PAGE.read_text().splitlines()) if found
    ]
    assert statuses == sorted(statuses)


def test_error_carries_its_own_words_or_the_class_s() -> None:
    error = errors.StateError("the cause", context="reading web1.save")
    assert (str(error), error.message, error.context) == ("the cause",) * 2 + ("reading web1.save",)
    assert error.hint == errors.StateError.default_hint
    assert errors.StateError("the cause", hint="do that").hint == "do that"


def test_errors_with_values_keep_them() -> None:
    absent = PageAbsentError(0x1000)
    assert isinstance(absent, LookupError)
    assert (absent.address, absent.message) == (
        0x1000,
        "page absent from the save: 0x0000000000001000",
    )
    unseen = UnsupportedStateError("version", 8, b"\x1b", "only 3 is known", hint="x")
    assert (unseen.field, unseen.offset, unseen.value) == ("version", 8, b"\x1b")
    assert unseen.message == r"version at offset 0x8 is b'\x1b': only 3 is known"
    refused = QemuRefusedError("device_del", "DeviceNotFound", "no such device")
    assert refused.error_class == "DeviceNotFound"
    assert refused.message == "QEMU refused device_del: no such device"
