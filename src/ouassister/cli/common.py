"""What verbs share: naming a VM, options, the story of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ouassister.errors import UsageError
from ouassister.provider import find, virsh, vmtoml
from ouassister.timeline import Timeline, stderr_story

if TYPE_CHECKING:
    from ouassister.provider.interface import Vm
    from ouassister.store.database import Store

Result = tuple[int, object, str]
"""Exit status, JSON value, text."""

PARTIAL = 11
REBOOT_NEEDED = 12
NOTHING_TO_DO = 10

_MOST_SECONDS = 1_000_000


def add_vm(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names a VM."""
    parser.add_argument(
        "vm", metavar="VM", help="a libvirt domain, the path of a vm.toml, or a name from 'list'"
    )
    add_libvirt(parser)


def add_libvirt(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which domain of libvirt is meant, and how it sleeps."""
    parser.add_argument(
        "--connect", metavar="URI", help=f"libvirt's URI; VM is a domain ({virsh.DEFAULT})"
    )
    parser.add_argument(
        "--save",
        metavar="FILE",
        type=Path,
        help="what 'virsh save' wrote of the domain; its managed save without this",
    )


def add_request(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is wanted."""
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument(
        "--install", metavar="PKG", action="append", default=[], help="install this package"
    )
    wish.add_argument(
        "--upgrade", action="store_true", help="upgrade all that is installed (default)"
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of everything that opens a shadow."""
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=3600.0,
        metavar="S",
        help="seconds that one call of the guest's programs may take (default 3600)",
    )
    parser.add_argument("--keep", action="store_true", help="leave the work folder")
    parser.add_argument("--quiet", action="store_true", help="no story on standard error")


def add_script_timeout(parser: argparse.ArgumentParser) -> None:
    """Add the option of what runs scripts of packages."""
    parser.add_argument(
        "--script-timeout",
        type=_seconds,
        default=300.0,
        metavar="S",
        help="seconds that one script of a package may take (default 300)",
    )


def _seconds(word: str) -> float:
    try:
        value = float(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of seconds") from error
    if not 0 < value <= _MOST_SECONDS:  # NaN too fails this
        raise argparse.ArgumentTypeError(f"{word} is not between 0 and {_MOST_SECONDS}")
    return value


def find_vm(store: Store, arguments: argparse.Namespace) -> Vm:
    """Load the VM that a call names.

    A word that is a path is a ``vm.toml``; then come the names that the store knows, and then
    libvirt's domains.

    Raises:
        OUassisterError: It is none of them, or what describes it is off.
    """
    path = _file(arguments)
    if path is not None:
        return vmtoml.load(path)
    word, save = arguments.vm, arguments.save
    save = save.absolute() if save is not None else None
    if arguments.connect is None:
        for name, source in store.vms():
            if name == word:
                return find.load(source, save)
    from ouassister.provider import libvirt_python

    if not libvirt_python.installed():
        raise UsageError(f"{word!r} is neither a vm.toml nor a VM from 'ouassister list'")
    return find.domain(word, arguments.connect or virsh.DEFAULT, save)


def locate(arguments: argparse.Namespace) -> Vm:
    """`find_vm` for who needs no store: it is opened for a name alone; raises the same."""
    path = _file(arguments)
    if path is not None:
        return vmtoml.load(path)
    from ouassister.store.database import Store

    with Store() as store:
        return find_vm(store, arguments)


def _file(arguments: argparse.Namespace) -> Path | None:
    """The ``vm.toml`` that is meant; None for a name."""
    word = arguments.vm
    if arguments.connect is not None or arguments.save is not None:
        return None
    path = Path(word)
    if path.is_dir():
        path = path / "vm.toml"
    return path if "/" in word or word.endswith(".toml") or path.exists() else None


def timeline(arguments: argparse.Namespace, store: Store, config: Vm) -> Timeline:
    """A story on standard error that is also kept as the VM's history."""
    store.remember(config.name, str(config.source))
    quiet = getattr(arguments, "quiet", False)
    return Timeline(
        None if quiet else stderr_story,
        lambda step, detail: store.log(config.name, arguments.verb, step, detail),
    )


def warn(line: str) -> None:
    """Say something on standard error."""
    print(line, file=sys.stderr, flush=True)
