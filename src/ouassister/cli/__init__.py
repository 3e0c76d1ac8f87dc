"""The command line: thin, one file per verb."""

from ouassister.cli.main import main

__all__ = ["main"]
