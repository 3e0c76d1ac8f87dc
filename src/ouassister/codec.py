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
from typing import Any, TypeVar, cast

from ouassister.text import from_text, to_text

T = TypeVar("T")


class CodecError(ValueError):
    """A JSON value does not fit the record; the message names the place."""


def to_value(record: object) -> Any:  # noqa: ANN401 - a JSON value
    """Turn a record, or any value a record may hold, into a JSON value."""
    if isinstance(record, bytes):
        return to_text(record)
    if isinstance(record, enum.Enum):
        return record.value
    if isinstance(record, tuple | list):
        return [to_value(item) for item in record]
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {name: to_value(getattr(record, name)) for name in _hints(type(record))}
    return record


def from_value(kind: type[T], value: object, where: str = "$") -> T:
    """Build a record of ``kind`` from a JSON value.

    Raises:
        CodecError: The value does not have the shape of ``kind``.
    """
    return cast("T", _decode(kind, value, where))


def canonical(record: object, *, without: str = "") -> bytes:
    """Encode a record as JSON with one spelling, for hashing; ``without`` drops a top-level key."""
    value = to_value(record)
    if without:
        value.pop(without)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest(record: object, *, without: str) -> str:
    """SHA-256, in hex, of the canonical form."""
    return hashlib.sha256(canonical(record, without=without)).hexdigest()


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, value: object, where: str) -> object:  # noqa: ANN401 - any annotation
    origin = typing.get_origin(kind)
    if origin is types.UnionType or origin is typing.Union:
        if value is None:
            return None
        (inner,) = (arg for arg in typing.get_args(kind) if arg is not types.NoneType)
        return _decode(inner, value, where)
    if origin is tuple:
        return _decode_tuple(typing.get_args(kind), value, where)
    kind = getattr(kind, "__supertype__", kind)
    if dataclasses.is_dataclass(kind):
        return _decode_record(cast("type", kind), value, where)
    if kind is bytes and isinstance(value, str):
        try:
            return from_text(value)
        except ValueError as error:
            raise CodecError(f"{where}: {error}") from error
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(value)
        except ValueError as error:
            raise CodecError(f"{where}: {error}") from error
    if type(value) is not kind:
        raise CodecError(f"{where}: {type(value).__name__} where {kind} belongs")
    return value


def _decode_tuple(args: tuple[Any, ...], value: object, where: str) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise CodecError(f"{where}: a list belongs here")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise CodecError(f"{where}: {len(value)} items where {len(args)} belong")
    return tuple(
        _decode(arg, item, f"{where}[{i}]")
        for i, (arg, item) in enumerate(zip(args, value, strict=True))
    )


def _decode_record(kind: type, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise CodecError(f"{where}: an object belongs here")
    hints = _hints(kind)
    if value.keys() != hints.keys():
        odd = sorted(map(str, value.keys() ^ hints.keys()))
        raise CodecError(f"{where}: keys {', '.join(odd)} are missing or unknown")
    return kind(
        **{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}
    )
