"""What kind of file system /proc is: the shadow's is served by FUSE, and has to say procfs.

systemd-tmpfiles does nothing at all where /proc is of another kind, and others warn.

Source: Linux v6.1 fs/statfs.c (``do_statfs_native``, ``put_compat_statfs``,
``put_compat_statfs64``), fs/libfs.c (``simple_statfs``), include/uapi/linux/magic.h; systemd v252
src/basic/stat-util.c (``proc_mounted``), src/tmpfiles/tmpfiles.c.
"""

from __future__ import annotations

import errno
import posixpath
import struct
from typing import TYPE_CHECKING, Final

from ouassister.shadow.syscalls import caller
from ouassister.shadow.syscalls.notify import Call, Pass, Result, read_string, write_memory

if TYPE_CHECKING:
    from ouassister.shadow.syscalls.context import Answerer, Context

_PROC: Final = b"/proc"
_MAGIC, _BLOCK, _NAME = 0x9FA0, 4096, 255  # PROC_SUPER_MAGIC, PAGE_SIZE, NAME_MAX
_FLAGS: Final = 0x102E  # ST_VALID, nosuid, nodev, noexec, relatime
_NATIVE: Final = struct.pack("<7q8x3q32x", _MAGIC, _BLOCK, 0, 0, 0, 0, 0, _NAME, _BLOCK, _FLAGS)
_COMPAT: Final = struct.pack("<7I8x3I16x", _MAGIC, _BLOCK, 0, 0, 0, 0, 0, _NAME, _BLOCK, _FLAGS)
_COMPAT_64: Final = struct.pack("<2I5Q8x3I16x", _MAGIC, _BLOCK, *[0] * 5, _NAME, _BLOCK, _FLAGS)


def _statfs(context: Context, listener: int, call: Call) -> Result:
    return _by_path(context, listener, call, _COMPAT if call.compat else _NATIVE, 1)


def _fstatfs(context: Context, listener: int, call: Call) -> Result:
    return _by_descriptor(context, listener, call, _COMPAT if call.compat else _NATIVE, 1)


def _statfs64(context: Context, listener: int, call: Call) -> Result:
    _check_size(call)
    return _by_path(context, listener, call, _COMPAT_64, 2)


def _fstatfs64(context: Context, listener: int, call: Call) -> Result:
    _check_size(call)
    return _by_descriptor(context, listener, call, _COMPAT_64, 2)


def _by_path(_context: Context, listener: int, call: Call, told: bytes, at: int) -> Result:
    path = read_string(listener, call, call.args[0])
    if not path or caller.root(call) != b"/":
        return Pass.CONTINUE
    whole = posixpath.normpath(posixpath.join(caller.working_folder(call), path))
    return _answer(listener, call, told, at) if whole == _PROC else Pass.CONTINUE


def _by_descriptor(_context: Context, listener: int, call: Call, told: bytes, at: int) -> Result:
    path = caller.descriptor_path(listener, call, call.signed(0))
    inside = path == _PROC or path.startswith(_PROC + b"/")
    return _answer(listener, call, told, at) if inside else Pass.CONTINUE


def _answer(listener: int, call: Call, told: bytes, at: int) -> Result:
    write_memory(listener, call, call.args[at], told)
    return 0


def _check_size(call: Call) -> None:
    if call.unsigned(1) not in (len(_COMPAT_64), len(_COMPAT_64) + 4):  # compat_sys_statfs64
        raise OSError(errno.EINVAL, "another structure")


ANSWERERS: Final[dict[str, Answerer]] = {
    "statfs": _statfs,
    "fstatfs": _fstatfs,
    "statfs64": _statfs64,
    "fstatfs64": _fstatfs64,
}
