"""A VM that ended while a change set was being applied: the host or the guest lost its power.

Its saved memory is of no use any more. It is booted with its links down, and the applier takes up
from its journal what was begun (docs/design/0003-applier.md), unless the guest has done so itself
while it booted (0022-power-cuts.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.errors import ChannelError, DeadlineError, GateClosedError
from ouassister.reflect import gate

if TYPE_CHECKING:
    from ouassister.access import Access
    from ouassister.provider.interface import Running, Vm

_BOOT_S: Final = 600.0
# Of a change set that began earlier and is refused now: what it had begun is undone.
UNDONE_HINT: Final = (
    "nothing of it is in the guest, which runs with its links down; "
    "'ouassister suspend', 'update' and 'resume' update it afresh"
)


def boot(config: Vm, access: Access) -> Running:
    """Boot it with every link down, and wait until it answers.

    Raises:
        GateClosedError: It does not.
    """
    vm = config.boot()
    try:
        vm.reach(access)
        vm.channel()
        vm.cont()
        vm.channel().ping(timeout_s=_BOOT_S)
    except (ChannelError, DeadlineError) as error:
        message = f"{config.name} was booted to finish what was begun: {error.message}"
        raise GateClosedError(message, hint=gate.HINT) from error
    return vm
