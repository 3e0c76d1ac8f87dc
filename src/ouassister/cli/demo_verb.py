"""Do the main job on a real VM, side by side with the conventional way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from ouassister.cli.common import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it works and what it leaves."""
    parser.add_argument(
        "--folder", type=Path, default=Path("build"), help="where everything is made (build)"
    )
    parser.add_argument(
        "--install", metavar="PKG", default="bcc", help="the package that is installed (bcc)"
    )


def run(arguments: argparse.Namespace) -> Result:
    """See the module; leaves FOLDER/demo.json."""
    from ouassister.demo import run_demo

    value, text, status = run_demo(arguments.folder.absolute(), arguments.install)
    return status, value, text
