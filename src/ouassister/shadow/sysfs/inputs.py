"""Attributes of input devices: what udev and initramfs-tools know a keyboard by.

Source: Linux v6.1 ``drivers/input/input.c`` (``input_dev_uevent``, ``input_print_modalias``,
``input_print_bitmap``, ``input_dev_attrs``), ``include/uapi/linux/input-event-codes.h``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.kernel.fields import length_of, offset
from ouassister.model import VirtAddr
from ouassister.shadow.sysfs.look import Structure, UntoldError, line

if TYPE_CHECKING:
    from ouassister.shadow.sysfs.look import Look, Values

_OF: Final = "struct input_dev"
_LONG: Final = 8
_MAX_LONGS: Final = 64
_IDS: Final = ("bustype", "vendor", "product", "version")


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of event: its letter in an alias, the first and behind the last bit that is there.

    ``event`` is its bit among the kinds of a device; None: it is told of every device.
    """

    name: str
    letter: bytes
    start: int
    end: int
    event: int | None


_KINDS: Final = (
    _Kind("ev", b"e", 0, 0x1F, None), _Kind("key", b"k", 0x71, 0x2FF, 1),
    _Kind("rel", b"r", 0, 0x0F, 2), _Kind("abs", b"a", 0, 0x3F, 3),
    _Kind("msc", b"m", 0, 0x07, 4), _Kind("led", b"l", 0, 0x0F, 0x11),
    _Kind("snd", b"s", 0, 0x07, 0x12), _Kind("ff", b"f", 0, 0x7F, 0x15),
    _Kind("sw", b"w", 0, 0x10, 0x05),
)  # fmt: skip


class Inputs:
    """Renders the folders of input devices.

    Args:
        look: The tree.
    """

    def __init__(self, look: Look) -> None:
        self._look = look

    def render(self, folder: int) -> None:
        """Fill the folder of a device; a handler of it (event0) has only what all have."""
        if b"modalias" not in self._look.below[folder]:
            return
        give = functools.partial(self._look.give, folder)
        one, bits = self._values(folder), self._bits(folder)
        for name in ("name", "phys", "uniq"):
            give(name.encode(), line(self._text(one, name)))
        for name in _IDS:
            give(f"id/{name}".encode(), b"%04x\n" % one[f"id.{name}"])
        for kind in _KINDS:
            give(f"capabilities/{kind.name}".encode(), line(_words(bits[kind.name])))
        give(b"properties", line(_words(bits["prop"])))
        give(b"modalias", line(self._alias(one, bits)))

    def lines(self, folder: int) -> list[bytes]:
        """Return what an input device adds to its ``uevent``; a handler adds nothing.

        Raises:
            UntoldError: This kernel lays it out otherwise.
        """
        if b"modalias" not in self._look.below[folder]:
            return []
        one, bits = self._values(folder), self._bits(folder)
        found = [b"PRODUCT=%x/%x/%x/%x" % tuple(one[f"id.{name}"] for name in _IDS)]
        found += [
            b'%s="%s"' % (name.upper().encode(), self._text(one, name))
            for name in ("name", "phys", "uniq")
            if one[name]
        ]
        found += [b"PROP=" + _words(bits["prop"]), b"EV=" + _words(bits["ev"])]
        for kind in _KINDS:
            if kind.event is not None and bits["ev"] >> kind.event & 1:
                found.append(kind.name.upper().encode() + b"=" + _words(bits[kind.name]))
        return [*found, b"MODALIAS=" + self._alias(one, bits)]

    @functools.cached_property
    def _layout(self) -> tuple[Structure, int, dict[str, tuple[int, int]]]:
        kernel = self._look.kernel
        layout = Structure(kernel, _OF, "name", "phys", "uniq", *(f"id.{name}" for name in _IDS))
        places = {}
        for name in ("prop", *(kind.name for kind in _KINDS)):
            count = min(length_of(kernel, _OF, f"{name}bit"), _MAX_LONGS)
            places[name] = (offset(kernel, _OF, f"{name}bit"), count * _LONG)
        return layout, offset(kernel, _OF, "dev"), places

    def _values(self, folder: int) -> Values:
        layout, at, _ = self._layout
        return layout.read(self._look.device(folder) - at)

    def _bits(self, folder: int) -> dict[str, int]:
        _, at, places = self._layout
        device = self._look.device(folder) - at
        read = self._look.kernel.virtual.read
        return {
            name: int.from_bytes(read(VirtAddr(device + place), size), "little")
            for name, (place, size) in places.items()
        }

    def _text(self, one: Values, name: str) -> bytes:
        try:
            return self._look.text(one[name])
        except UntoldError:
            return b""

    @staticmethod
    def _alias(one: Values, bits: dict[str, int]) -> bytes:
        text = b"input:b%04Xv%04Xp%04Xe%04X-" % tuple(one[f"id.{name}"] for name in _IDS)
        for kind in _KINDS:
            numbers = (
                b"%X," % bit for bit in range(kind.start, kind.end) if bits[kind.name] >> bit & 1
            )
            text += kind.letter + b"".join(numbers)
        return text


def _words(bits: int) -> bytes:
    """Render a bitmap: words of 64 bits, the highest first, without leading zeros."""
    words = []
    while bits:
        words.append(b"%x" % (bits & (1 << 64) - 1))
        bits >>= 64
    return b" ".join(reversed(words)) or b"0"
