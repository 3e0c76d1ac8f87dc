"""Suspend a running VM to its save file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister.access import AGENT, PORT, Access
from ouassister.cli import common
from ouassister.errors import OUassisterError
from ouassister.store.database import Store

if TYPE_CHECKING:
    import argparse

    from ouassister.provider.interface import Running


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The VM."""
    common.add_vm(parser)
    parser.add_argument(
        "--no-sync", action="store_true", help="do not ask the guest to flush its caches first"
    )


def run(arguments: argparse.Namespace) -> common.Result:
    """See the module."""
    with Store() as store:
        config = common.find_vm(store, arguments)
        store.remember(config.name, str(config.source))
        with store.lock(config.name), config.attach() as vm:
            synced = not arguments.no_sync and _sync(vm, config.channels)
            vm.suspend()
        store.log(config.name, "suspend", "saved", "synced" if synced else "not synced")
    told = "its caches were flushed" if synced else "its caches were not flushed"
    value = {"vm": config.name, "save": str(config.save), "synced": synced}
    return 0, value, f"{config.name} is suspended to {config.save}; {told}"


def _sync(vm: Running, channels: tuple[str, ...]) -> bool:
    """Ask the guest to flush; a guest without a channel is suspended all the same.

    Not by ssh: the guest's host keys are known once it sleeps.
    """
    told = "its description names no port of the agent or our helper"
    for name in (one for one in channels if one in (AGENT, PORT)):
        try:
            vm.reach(Access(name))
            return vm.channel().run(["/bin/sync"], timeout_s=60).exit_status == 0
        except OUassisterError as error:
            told = error.message
    common.warn(f"note: the guest could not be asked to flush: {told}")
    return False
