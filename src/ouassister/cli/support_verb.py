"""Print what is supported, from the tables in the code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister.shadow.syscalls.table import TABLE
from ouassister.text import table

if TYPE_CHECKING:
    import argparse

    from ouassister.cli.common import Result


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """Nothing more."""


def run(_arguments: argparse.Namespace) -> Result:
    """See the module."""
    value = {
        "syscalls": [
            {"name": row.name, "answer": str(row.answer), "note": row.note} for row in TABLE
        ]
    }
    rows = [("SYSTEM CALL", "ANSWER", "NOTE")]
    rows += [(row.name, str(row.answer), row.note) for row in TABLE]
    return 0, value, table(rows)
