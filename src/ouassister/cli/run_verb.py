"""Run any program in the sleeping guest's view; its writes are thrown away."""

from __future__ import annotations

import argparse

from ouassister import pipeline
from ouassister.cli import common
from ouassister.errors import UsageError
from ouassister.store.database import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The VM and the command."""
    common.add_run(parser)
    parser.add_argument("--verbose", action="store_true", help="tell the story on standard error")
    common.add_vm(parser)
    parser.add_argument("command", metavar="CMD", nargs=argparse.REMAINDER, help="-- CMD ARG...")


def run(arguments: argparse.Namespace) -> common.Result:
    """See the module; the exit status is the program's, and its output is the result."""
    command = arguments.command
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        raise UsageError("run needs a command", hint="ouassister run VM -- dpkg -l")
    arguments.quiet = not arguments.verbose
    with Store() as store:
        config = common.find_vm(store, arguments)
        story = common.timeline(arguments, store, config)
        options = pipeline.Options(arguments.timeout, arguments.keep)
        status, output = pipeline.run_program(
            config, command, store, story, options, capture=arguments.json
        )
    text = output.decode("utf-8", "backslashreplace")
    return status, {"exit_status": status, "output": text}, ""
