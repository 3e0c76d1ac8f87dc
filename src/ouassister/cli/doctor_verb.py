"""Check this host: each tool and kernel feature, with the purpose that it serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister import doctor
from ouassister.text import table

if TYPE_CHECKING:
    import argparse

    from ouassister.cli.common import Result


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """Nothing more."""


def run(_arguments: argparse.Namespace) -> Result:
    """See the module; exit status 2 when something needed is missing."""
    checks = doctor.check_host()
    rows = [("", "WHAT", "FOR", "FOUND, OR HOW TO GET IT")]
    rows += [("ok" if c.ok else "MISSING", c.name, c.purpose, c.detail) for c in checks]
    value = [{"ok": c.ok, "name": c.name, "purpose": c.purpose, "detail": c.detail} for c in checks]
    return (0 if all(check.ok for check in checks) else 2), value, table(rows)
