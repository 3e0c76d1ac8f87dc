"""Whether the guest's kernel labels files by an SELinux policy.

Many kernels have SELinux built in and never load a policy; then no label counts.

Source: Linux v6.1 ``security/selinux/include/security.h`` (``struct selinux_state``,
``selinux_initialized``), ``security/selinux/hooks.c`` (``selinux_state``). The state is one
structure since aa8e712cee93 ("selinux: wrap global selinux state", v4.17).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ouassister.kernel.fields import Fields
from ouassister.kernel.program import guest_reads

if TYPE_CHECKING:
    from ouassister.kernel.program import Kernel

STATE: Final = "selinux_state"


def has_policy(kernel: Kernel) -> bool:
    """Tell whether a policy was loaded since the guest booted; enforced or not, it labels.

    Raises:
        UnsupportedGuestError: SELinux is built in, and its state is laid out otherwise.
        CorruptGuestError: The variable leads nowhere.
    """
    address = kernel.symbols.address(STATE)
    if address is None:
        return False
    with guest_reads("reading the state of SELinux"):
        (initialized,) = Fields(kernel, f"struct {STATE}", "initialized").read(address)
    return bool(initialized)
