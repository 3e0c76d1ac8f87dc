"""Print what is supported, from the tables in the code."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ouassister.shadow.syscalls.table import TABLE
from ouassister.shadow.sysfs.table import TABLE as SYSFS_TABLE
from ouassister.state.formats import FORMATS
from ouassister.text import table

if TYPE_CHECKING:
    import argparse

    from ouassister.cli.common import Result


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """Nothing more."""


def run(_arguments: argparse.Namespace) -> Result:
    """See the module."""
    value = {
        "save_formats": [
            {"name": row.name, "title": row.title, "support": str(row.support), "note": row.note}
            for row in FORMATS
        ],
        "syscalls": [
            {
                "name": row.name,
                "x86_64": row.x86_64,
                "i386": row.i386,
                "answer": str(row.answer),
                "errno": errno.errorcode[row.errno] if row.errno else None,
                "in_part": bool(row.when),
                "note": row.note,
            }
            for row in TABLE
        ],
        "sysfs": [
            {"name": row.name, "shown": str(row.shown), "note": row.note} for row in SYSFS_TABLE
        ],
    }
    saves = [("SAVED BY", "SUPPORT", "NOTE")]
    saves += [(row.title, str(row.support), row.note) for row in FORMATS]
    calls = [("SYSTEM CALL", "ANSWER", "NOTE")]
    calls += [(row.name, row.label, row.note) for row in TABLE]
    files = [("FILES OF /sys AND /dev", "SHOWN", "NOTE")]
    files += [(row.name, str(row.shown), row.note) for row in SYSFS_TABLE]
    return 0, value, "\n\n".join(map(table, (saves, calls, files)))
