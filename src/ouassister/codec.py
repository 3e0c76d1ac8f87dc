"""Frozen records to JSON values and back, checked on the way in.

Bytes travel as reversible text (`ouassister.text`); unknown or missing keys are errors, so a
record that was edited or written by another version is refused instead of half read.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import types
import typing
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

from ouassister.text import from_text, to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

T = TypeVar("T")

_AS_THEY_ARE: Final = frozenset((str, int, bool, float, types.NoneType))


class CodecError(ValueError):
    """A JSON value does not fit the record; the message names the place."""


def to_value(record: object) -> Any:  # noqa: ANN401 - a JSON value
    """Turn a record, or any value a record may hold, into a JSON value."""
    kind = type(record)
    if kind in _AS_THEY_ARE:
        return record
    if isinstance(record, bytes):
        return to_text(record)
    if isinstance(record, enum.Enum):
        return record.value
    if isinstance(record, tuple | list):
        return [to_value(item) for item in record]
    if names := _names(cast("Hashable", kind)):
        return {name: to_value(getattr(record, name)) for name in names}
    return record


def from_value(kind: type[T], value: object) -> T:
    """Build a record of ``kind`` from a JSON value.

    Raises:
        CodecError: The value does not have the shape of ``kind``.
    """
    try:
        return cast("T", _decoder(cast("Hashable", kind))(value))
    except _MisfitError as misfit:
        raise CodecError(f"${misfit.where}: {misfit.words}") from misfit


def canonical(record: object, *, without: str = "") -> bytes:
    """Encode a record as JSON with one spelling, for hashing; ``without`` drops a top-level key."""
    value = to_value(record)
    if without:
        value.pop(without)
    return _spell(value)


def digest(record: object, *, without: str) -> str:
    """SHA-256, in hex, of the canonical form."""
    return hashlib.sha256(canonical(record, without=without)).hexdigest()


def canonical_and_digest(record: object, *, without: str) -> tuple[bytes, str]:
    """`canonical` of the whole record, and its `digest`."""
    value = to_value(record)
    whole = _spell(value)
    value.pop(without)
    return whole, hashlib.sha256(_spell(value)).hexdigest()


def _spell(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


@functools.cache
def _names(kind: Hashable) -> tuple[str, ...]:
    """The fields of a record's class; none of another."""
    return tuple(typing.get_type_hints(kind)) if dataclasses.is_dataclass(kind) else ()


class _MisfitError(Exception):
    """A value that does not fit; the place is told by each level on the way out."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words
        self.where = ""

    def within(self, place: str) -> Self:
        self.where = place + self.where
        return self


@functools.cache
def _decoder(kind: Any) -> Callable[[object], object]:  # noqa: ANN401 - any annotation
    """What makes a value of ``kind``; found once for each annotation."""
    origin = typing.get_origin(kind)
    if origin is types.UnionType or origin is typing.Union:
        (inner,) = (arg for arg in typing.get_args(kind) if arg is not types.NoneType)
        return _optional(_decoder(inner))
    if origin is tuple:
        args = typing.get_args(kind)
        if len(args) == 2 and args[1] is Ellipsis:
            return _items(_decoder(args[0]))
        return _fixed(tuple(_decoder(arg) for arg in args))
    kind = getattr(kind, "__supertype__", kind)
    if dataclasses.is_dataclass(kind):
        return _record(cast("type", kind))
    if kind is bytes:
        return _bytes
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _member(kind)
    return _plain(kind)


def _optional(inner: Callable[[object], object]) -> Callable[[object], object]:
    return lambda value: None if value is None else inner(value)


def _items(inner: Callable[[object], object]) -> Callable[[object], object]:
    def decode(value: object) -> object:
        items = _list(value)
        made: list[object] = []
        try:
            for item in items:
                made.append(inner(item))
        except _MisfitError as misfit:
            raise misfit.within(f"[{len(made)}]") from None
        return tuple(made)

    return decode


def _fixed(inner: tuple[Callable[[object], object], ...]) -> Callable[[object], object]:
    def decode(value: object) -> object:
        items = _list(value)
        if len(items) != len(inner):
            raise _MisfitError(f"{len(items)} items where {len(inner)} belong")
        made: list[object] = []
        try:
            for one, item in zip(inner, items, strict=True):
                made.append(one(item))
        except _MisfitError as misfit:
            raise misfit.within(f"[{len(made)}]") from None
        return tuple(made)

    return decode


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise _MisfitError("a list belongs here")
    return value


def _record(kind: type) -> Callable[[object], object]:
    hints = typing.get_type_hints(kind)
    fields = tuple((name, _decoder(hint)) for name, hint in hints.items())

    def decode(value: object) -> object:
        if not isinstance(value, dict):
            raise _MisfitError("an object belongs here")
        if value.keys() != hints.keys():
            odd = sorted(map(str, value.keys() ^ hints.keys()))
            raise _MisfitError(f"keys {', '.join(odd)} are missing or unknown")
        made: dict[str, object] = {}
        name = ""
        try:
            for name, one in fields:
                made[name] = one(value[name])
        except _MisfitError as misfit:
            raise misfit.within(f".{name}") from None
        return kind(**made)

    return decode


def _bytes(value: object) -> object:
    if not isinstance(value, str):
        raise _MisfitError(f"{type(value).__name__} where {bytes} belongs")
    try:
        return from_text(value)
    except ValueError as error:
        raise _MisfitError(str(error)) from error


def _member(kind: type[enum.Enum]) -> Callable[[object], object]:
    def decode(value: object) -> object:
        try:
            return kind(value)
        except ValueError as error:
            raise _MisfitError(str(error)) from error

    return decode


def _plain(kind: object) -> Callable[[object], object]:
    def decode(value: object) -> object:
        if type(value) is not kind:
            raise _MisfitError(f"{type(value).__name__} where {kind} belongs")
        return value

    return decode
