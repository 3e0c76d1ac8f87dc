"""Write the helper that a guest needs whose agent may run nothing, to be installed there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ouassister.provider import helper

if TYPE_CHECKING:
    import argparse

    from ouassister.cli.common import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="made when it is not there")


def run(arguments: argparse.Namespace) -> Result:
    """See the module."""
    folder: Path = arguments.folder
    found = helper.files()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        path = folder / name
        path.write_bytes(content)
        path.chmod(0o644 if name.endswith(".service") else 0o755)
    value = {"folder": str(folder.absolute()), "files": sorted(found)}
    text = f"bring {folder} into the guest and run 'sh install.sh' there, as root"
    return 0, value, text
