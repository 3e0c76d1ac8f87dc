"""``uname`` of the guest's initial namespace.

Source: Linux v6.1 ``include/uapi/linux/utsname.h`` (``struct new_utsname``),
``init/version.c`` (``init_uts_ns``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister.kernel.program import guest_reads
from ouassister.model import Uts
from ouassister.text import to_text

if TYPE_CHECKING:
    from ouassister.kernel.program import Kernel


def read_uts(kernel: Kernel) -> Uts:
    """Read the six names; bytes that are no printable text are escaped."""
    with guest_reads("reading the guest's uname"):
        name = kernel.prog["init_uts_ns"].name

        def text(field: str) -> str:
            return to_text(name.member_(field).string_())

        return Uts(
            sysname=text("sysname"),
            nodename=text("nodename"),
            release=text("release"),
            version=text("version"),
            machine=text("machine"),
            domainname=text("domainname"),
        )
