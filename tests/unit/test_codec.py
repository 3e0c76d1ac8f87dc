"""Records survive the way to JSON and back; everything that is no record is refused by place."""

from __future__ import annotations

import dataclasses
import enum
import json
import random
import types
import typing
from dataclasses import dataclass
from typing import Any

import pytest

from ouassister import codec, model
from ouassister.codec import (
    CodecError,
    canonical,
    canonical_and_digest,
    digest,
    from_value,
    to_value,
)

RECORDS = sorted(
    (
        value
        for value in vars(model).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
    ),
    key=lambda kind: kind.__name__,
)
TEXTS = ("", "vda", "naïve", "\\", "\\x41", "two\nlines", '"', "\x1b[2J", "\u202e", "😀")
DIGEST = "267895c0ce776a192e95ffa28a77653077552380a283220307ec30b6e1bc55f5"
NUMBERS = (0, 1, -1, 0o7777, 2**31, 2**63 - 1, 2**64)


def make(kind: Any, chance: random.Random) -> Any:  # noqa: ANN401 - any annotation
    """Any value that an annotation of a record allows."""
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return make(chance.choice([a for a in arguments]), chance)
    if origin is tuple:
        if arguments[1:] == (Ellipsis,):
            return tuple(make(arguments[0], chance) for _ in range(chance.randrange(3)))
        return tuple(make(argument, chance) for argument in arguments)
    kind = getattr(kind, "__supertype__", kind)
    if kind is types.NoneType:
        return None
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(**{name: make(hint, chance) for name, hint in hints.items()})
    if issubclass(kind, enum.Enum):
        return chance.choice(list(kind))
    if kind is bytes:
        return chance.choice((b"", b"/var/lib", b"\\", chance.randbytes(chance.randrange(40))))
    choices: dict[type, tuple[object, ...]] = {
        str: TEXTS,
        int: NUMBERS,
        bool: (False, True),
        float: (0.0, 1.5, 1e-9, 12345.6789),
    }
    return chance.choice(choices[kind])


def test_every_record_of_the_model_is_tried() -> None:
    names = {kind.__name__ for kind in RECORDS}
    assert {"GuestView", "Plan", "Changeset", "Entry", "UpdateReport", "ResumeReport"} <= names


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_record_comes_back_as_it_was(kind: type[object]) -> None:
    chance = random.Random(kind.__name__)  # noqa: S311 - the same values in each run
    for _ in range(30):
        record = make(kind, chance)
        text = json.dumps(to_value(record))
        again = from_value(kind, json.loads(text))
        assert again == record
        assert canonical(again) == canonical(record)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_record_with_a_key_less_or_more_is_refused(kind: type[object]) -> None:
    value = to_value(make(kind, random.Random(1)))  # noqa: S311 - the same value in each run
    for name in value:
        less = {key: one for key, one in value.items() if key != name}
        with pytest.raises(CodecError, match=rf"^\$: keys {name} "):
            from_value(kind, less)
    with pytest.raises(CodecError, match="keys odd are missing or unknown"):
        from_value(kind, {**value, "odd": 1})
    others: tuple[object, ...] = (None, [], "text", 7)
    for wrong in others:
        with pytest.raises(CodecError, match="an object belongs here"):
            from_value(kind, wrong)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_no_field_takes_a_value_of_another_type(kind: type[object]) -> None:
    value = to_value(make(kind, random.Random(2)))  # noqa: S311 - the same value in each run
    for name, hint in typing.get_type_hints(kind).items():
        for wrong in wrong_values(hint):
            with pytest.raises(CodecError, match=rf"^\$\.{name}\b"):
                from_value(kind, {**value, name: wrong})


def wrong_values(hint: Any) -> list[object]:  # noqa: ANN401 - any annotation
    inner = [a for a in typing.get_args(hint) if a is not types.NoneType]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [wrong for wrong in wrong_values(inner[0]) if wrong is not None]
    kind = getattr(hint, "__supertype__", hint)
    if kind is int:
        return [True, 1.0, "1", None, []]
    if kind is float:
        return [True, 1, "1.0", None]
    if kind is bool:
        return [0, 1, "true", None]
    if kind is str:
        return [0, True, None, ["a"]]
    if kind is bytes:
        return [0, None, ["a"], "\\", "\\x4", "\\xZZ", "\ud800"]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return ["no such", 0, None, []]
    return [{"a": 1}, 7, "text"] if typing.get_origin(kind) is tuple else [7, "text", []]


@dataclass(frozen=True, slots=True)
class Pair:
    two: tuple[str, bytes]
    many: tuple[int, ...]


def test_refusal_names_the_place_inside_of_tuples() -> None:
    with pytest.raises(CodecError, match=r"^\$\.two: 3 items where 2 belong$"):
        from_value(Pair, {"two": ["a", "b", "c"], "many": []})
    with pytest.raises(CodecError, match=r"^\$\.two\[1\]: int where"):
        from_value(Pair, {"two": ["a", 5], "many": []})
    with pytest.raises(CodecError, match=r"^\$\.many\[2\]: bool where"):
        from_value(Pair, {"two": ["a", "b"], "many": [1, 2, True]})


def test_bytes_travel_as_reversible_text() -> None:
    assert to_value(Pair(("a", b"/\x1b\xff\\\xc3\xa9"), ())) == {
        "two": ["a", "/\\x1b\\xff\\\\é"],
        "many": [],
    }


def test_canonical_form_has_one_spelling() -> None:
    pair = Pair(("é", b"\xc3\xa9"), (3, 1))
    assert canonical(pair) == b'{"many":[3,1],"two":["\\u00e9","\\u00e9"]}'
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1})


def test_digest_is_stable_between_versions() -> None:
    """Plans and change sets on disks carry these; a change of this value orphans them."""
    change = model.PackageChange("bcc", "amd64", "", "0.16.17-3.4")
    assert canonical(change) == (
        b'{"architecture":"amd64","name":"bcc","new":"0.16.17-3.4","old":""}'
    )
    assert digest(change, without="old") == DIGEST
    assert canonical_and_digest(change, without="old") == (canonical(change), DIGEST)


def test_digest_leaves_out_one_key_and_sees_all_others() -> None:
    chance = random.Random(3)  # noqa: S311 - the same values in each run
    plan = make(model.Plan, chance)
    whole = digest(plan, without="plan_id")
    assert digest(dataclasses.replace(plan, plan_id="other"), without="plan_id") == whole
    for field in dataclasses.fields(plan):
        if field.name == "plan_id":
            continue
        hint = typing.get_type_hints(model.Plan)[field.name]
        before = getattr(plan, field.name)
        after = next(v for v in (make(hint, chance) for _ in range(50)) if v != before)
        changed = dataclasses.replace(plan, **{field.name: after})
        assert digest(changed, without="plan_id") != whole, field.name


def test_digest_without_an_unknown_key_is_an_error() -> None:
    with pytest.raises(KeyError):
        digest(model.Phase("x", 1.0), without="nothing")
    assert codec.canonical(model.Phase("x", 1.0)) == b'{"name":"x","seconds":1.0}'
