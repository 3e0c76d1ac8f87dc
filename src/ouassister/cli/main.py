"""Entry point: parse, run one verb, print its result or its error.

Results go to standard output, the story to standard error. Exit statuses are those of
docs/reference/errors.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Final

from ouassister.errors import InternalError, OUassisterError, StateError, WorkDiskFullError
from ouassister.interrupts import interruptible
from ouassister.text import plain

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA: Final = 1
VERBS: Final = (
    "list",
    "inspect",
    "plan",
    "update",
    "resume",
    "status",
    "rollback",
    "discard",
    "run",
    "suspend",
    "helper",
    "demo",
    "doctor",
    "support",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser(sys.argv[1:] if argv is None else argv)
    _find_system_tools()
    try:
        with interruptible():
            module = importlib.import_module(f"ouassister.cli.{arguments.verb}_verb")
            status, value, text = module.run(arguments)
    except OUassisterError as error:
        return _print_error(error, as_json=arguments.json)
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            full = WorkDiskFullError(f"{error.filename or 'the work folder'}: {error.strerror}")
            return _print_error(full, as_json=arguments.json)
        if isinstance(error, PermissionError) and error.filename:
            closed = StateError(
                f"{error.filename}: {error.strerror}",
                hint="run as a user who may read the VM's files, or as root",
            )
            return _print_error(closed, as_json=arguments.json)
        if isinstance(error, BrokenPipeError):
            raise
        return _internal(error, as_json=arguments.json)
    except Exception as error:
        return _internal(error, as_json=arguments.json)
    if arguments.json:
        if value is not None:
            print(json.dumps({"schema": SCHEMA, "verb": arguments.verb, "result": value}, indent=2))
    elif text:
        print("\n".join(plain(line) for line in text.split("\n")))
    return int(status)


def _find_system_tools() -> None:
    """Look for tools where Debian keeps e2fsck too: a user's PATH does not lead there."""
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    missing = [place for place in ("/usr/sbin", "/sbin") if place not in places]
    os.environ["PATH"] = os.pathsep.join([*places, *missing])


def _parser(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ouassister", description="Update a suspended virtual machine before it wakes up."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    # One verb need not wait for what the others import.
    for name in argv[:1] if argv[:1] and argv[0] in VERBS else VERBS:
        module = importlib.import_module(f"ouassister.cli.{name}_verb")
        summary = (module.__doc__ or "").partition("\n")[0]
        verb = verbs.add_parser(name, help=summary, description=summary)
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
        module.add_arguments(verb)
    return parser.parse_args(argv)


def _internal(error: Exception, *, as_json: bool) -> int:
    if os.environ.get("OUASSISTER_DEBUG"):
        raise error
    name = type(error).__name__
    return _print_error(
        InternalError(f"{name}: {error}", context="OUASSISTER_DEBUG=1 shows where"),
        as_json=as_json,
    )


def _print_error(error: OUassisterError, *, as_json: bool) -> int:
    if as_json:
        value: dict[str, object] = {
            "code": error.code,
            "exit_status": error.exit_status,
            "message": error.message,
            "impact": error.impact,
            "hint": error.hint,
        }
        if paths := getattr(error, "paths", ()):
            value["paths"] = [{"path": path, "reason": reason} for path, reason in paths]
        print(json.dumps({"schema": SCHEMA, "error": value}, indent=2))
        return error.exit_status
    print(f"error: {plain(error.message)} [{error.code}]", file=sys.stderr)
    if error.context:
        print(f"  while: {plain(error.context)}", file=sys.stderr)
    print(f"  guest: {error.impact}", file=sys.stderr)
    print(f"  hint:  {plain(error.hint)}", file=sys.stderr)
    return error.exit_status
