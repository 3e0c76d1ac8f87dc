"""The conventional way on a twin of the same suspended VM: resume it, update it inside."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ouassister.model import Phase
from ouassister.provider import qemu
from ouassister.testing import guest_run

if TYPE_CHECKING:
    from ouassister.provider.vmtoml import VmConfig
    from ouassister.timeline import Timeline

_LIMIT_S: Final = 900.0
_APT: Final = "DEBIAN_FRONTEND=noninteractive apt-get -q -y"


@dataclass(frozen=True, slots=True)
class Conventional:
    """How long it took, from the first instruction to the installed package."""

    seconds: float
    phases: tuple[Phase, ...]


def update_inside(config: VmConfig, package: str, timeline: Timeline) -> Conventional:
    """Resume with the links up throughout, run apt inside, end the VM."""
    vm = qemu.restore(config, links_up=True)
    try:
        vm.qga()
        phases: list[Phase] = []
        vm.cont()
        start = time.monotonic()
        # Any hypervisor's resume hook does this; without it apt finds the lists from the future.
        vm.qga().execute("guest-set-time", time=time.time_ns())
        for name, command in (
            ("apt-get update", f"{_APT} update"),
            ("download", f"{_APT} --download-only install {package}"),
            ("install", f"{_APT} install {package}"),
        ):
            began = time.monotonic()
            with timeline.phase(f"twin: {name}"):
                guest_run(vm, command, timeout_s=_LIMIT_S)
            phases.append(Phase(name, round(time.monotonic() - began, 3)))
        return Conventional(round(time.monotonic() - start, 3), tuple(phases))
    finally:
        vm.kill()
