"""Attributes of modules and their parameters: what lsmod(8), modprobe(8) and scripts read.

What kind of value a parameter has, only the functions that print it tell; the plain ones are known.

Source: Linux v6.1 ``kernel/module/main.c`` (``modinfo_attrs``, ``show_initstate``),
``kernel/module/internal.h``, ``kernel/params.c`` (``param_ops_*``, ``param_array_get``),
``include/linux/moduleparam.h``, ``kernel/panic.c`` (``taint_flags``),
``security/apparmor/lsm.c`` (``param_ops_aabool``). The sizes are an array since ac3b43283923
("module: replace module_layout with module_memory", v6.4).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from ouassister.kernel.fields import Fields, constant, has_member, offset, variable
from ouassister.model import VirtAddr
from ouassister.shadow.sysfs.look import MAX_TEXT, Structure, UntoldError, line, number

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.shadow.sysfs.look import Look

_STATES: Final = (b"live", b"coming", b"going")
_TAINTS: Final = {0: b"P", 10: b"C", 12: b"O", 13: b"E", 15: b"K", 16: b"X", 17: b"T", 18: b"N"}
_MAX_ELEMENTS: Final = 1024
_BOOL, _INVERTED, _TEXT, _STRING, _ARRAY, _HEX = range(6)
# Size in bytes and whether it is signed, or what else it is.
_KINDS: Final[dict[str, tuple[int, bool] | int]] = {
    "param_ops_byte": (1, False), "param_ops_short": (2, True), "param_ops_ushort": (2, False),
    "param_ops_int": (4, True), "param_ops_uint": (4, False), "param_ops_long": (8, True),
    "param_ops_ulong": (8, False), "param_ops_ullong": (8, False), "param_ops_bint": (4, True),
    "param_ops_bool": _BOOL, "param_ops_bool_enable_only": _BOOL, "param_ops_aabool": _BOOL,
    "param_ops_aaintbool": _BOOL, "param_ops_invbool": _INVERTED, "param_ops_charp": _TEXT,
    "param_ops_string": _STRING, "param_array_ops": _ARRAY, "param_ops_hexint": _HEX,
}  # fmt: skip
SYMBOLS: Final = (*_KINDS, "module_ktype")


class Modules:
    """Renders /sys/module.

    Args:
        look: The tree.
    """

    def __init__(self, look: Look) -> None:
        self._look = look
        kernel = look.kernel
        self._type = Fields(kernel, "struct kobject", "ktype")
        self._module_type = variable(kernel, "module_ktype")
        self._object = Fields(kernel, "struct module_kobject", "mod")
        self._object_at = offset(kernel, "struct module_kobject", "kobj")
        self._module = Structure(kernel, "struct module", "state", "refcnt.counter", "taints",
                                 "version", "srcversion", "core_layout.size",
                                 "init_layout.size")  # fmt: skip
        self._attribute = Fields(kernel, "struct param_attribute", "param")
        self._param = Fields(kernel, "struct kernel_param", "ops", "arg")
        self._ops: dict[int, tuple[int, bool] | int] = {
            address: kind
            for name, kind in _KINDS.items()
            if (address := kernel.symbols.address(name)) is not None
        }

    def render(self, folder: int) -> None:
        """Fill the folder of one module, which may be a part of the kernel's image."""
        kobject = self._look.nodes[folder].private
        if self._type.read(kobject)[0] != self._module_type:  # "compression", since v6.4
            return
        (module,) = self._object.read(kobject - self._object_at)
        if module:
            self._loaded(folder, module)
        elif (version := self._look.below[folder].get(b"version")) is not None:
            (text,) = self._version.read(self._look.nodes[version].private)
            self._look.give(folder, b"version", line(self._look.text(text)))
        parameters = self._look.below[folder].get(b"parameters")
        for index in self._look.below.get(parameters or 0, {}).values() if parameters else ():
            try:
                (param,) = self._attribute.read(self._look.nodes[index].private)
                ops, where = self._param.read(param)
                content = self._value(ops, where)
                if self._ops.get(ops) != _ARRAY:  # the line of its last element ends it
                    content = line(content)
            except UntoldError:
                continue
            self._look.set(index, content[:MAX_TEXT])

    @functools.cached_property
    def _version(self) -> Fields:
        """Of a module that is a part of the kernel's image."""
        return Fields(self._look.kernel, "struct module_version_attribute", "version")

    def _loaded(self, folder: int, module: int) -> None:
        one = self._module.read(module)
        core, init = self._sizes(module)
        told = {
            b"coresize": number(core),
            b"initsize": number(init),
            b"refcnt": number(one["refcnt.counter"] - 1),
            b"taint": line(b"".join(x for bit, x in _TAINTS.items() if one["taints"] >> bit & 1)),
        }
        if one["state"] < len(_STATES):
            told[b"initstate"] = line(_STATES[one["state"]])
        for text in ("version", "srcversion"):
            if one[text]:
                told[text.encode()] = line(self._look.text(one[text]))
        for name, content in told.items():
            self._look.give(folder, name, content)

    @functools.cached_property
    def _sizes(self) -> Callable[[int], tuple[int, int]]:
        kernel = self._look.kernel
        if not has_member(kernel, "struct module", "mem"):
            layouts = Fields(kernel, "struct module", "core_layout.size", "init_layout.size")

            def both(module: int) -> tuple[int, int]:
                core, init = layouts.read(module)
                return core, init

            return both
        first = offset(kernel, "struct module", "mem")
        kind = kernel.type("struct module").member("mem").type
        step, count = kind.type.size or 0, kind.length or 0
        at = offset(kernel, "struct module_memory", "size")
        core = constant(kernel, "mod_mem_type", "MOD_INIT_TEXT")

        def sizes(module: int) -> tuple[int, int]:
            raw = kernel.virtual.read(VirtAddr(module + first), step * count)
            each = [
                int.from_bytes(raw[place : place + 4], "little")
                for place in range(at, step * count, step)
            ]
            return sum(each[:core]), sum(each[core:])

        return sizes

    def _value(self, ops: int, where: int) -> bytes:
        kind = self._ops.get(ops)
        if kind is None or not where:
            raise UntoldError("a function that prints it")
        virtual = self._look.kernel.virtual
        if isinstance(kind, tuple):
            size, signed = kind
            raw = virtual.read(VirtAddr(where), size)
            return b"%d" % int.from_bytes(raw, "little", signed=signed)
        if kind in (_BOOL, _INVERTED):
            is_set = virtual.read(VirtAddr(where), 1) != b"\0"
            return b"Y" if is_set != (kind == _INVERTED) else b"N"
        if kind == _HEX:
            return b"%#08x" % int.from_bytes(virtual.read(VirtAddr(where), 4), "little")
        if kind == _TEXT:
            address = int.from_bytes(virtual.read(VirtAddr(where), 8), "little")
            return self._look.text(address, MAX_TEXT) if address else b"(null)"
        if kind == _STRING:
            limit, address = self._string.read(where)
            return self._look.text(address, min(limit, MAX_TEXT))
        return self._array(where)

    @functools.cached_property
    def _string(self) -> Fields:
        return Fields(self._look.kernel, "struct kparam_string", "maxlen", "string")

    @functools.cached_property
    def _elements(self) -> Fields:
        return Fields(self._look.kernel, "struct kparam_array", "max", "elemsize", "num", "ops",
                      "elem")  # fmt: skip

    def _array(self, where: int) -> bytes:
        most, size, counted, ops, first = self._elements.read(where)
        if self._ops.get(ops) == _ARRAY:
            raise UntoldError("an array of arrays")
        count = most
        if counted:
            raw = self._look.kernel.virtual.read(VirtAddr(counted), 4)
            count = min(int.from_bytes(raw, "little"), most)
        if count > _MAX_ELEMENTS:
            raise UntoldError("a long array")
        each = (self._value(ops, first + index * size) for index in range(count))
        return b",".join(each) + b"\n" * bool(count)
