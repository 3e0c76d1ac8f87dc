"""Find a VM again by what the store knows of it: a path of a ``vm.toml``, or a domain's source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ouassister.provider import vmtoml

if TYPE_CHECKING:
    from ouassister.provider.interface import Vm

_DOMAIN = "libvirt:"


def load(source: str, save: Path | None = None) -> Vm:
    """Load the VM of a source; ``save`` is for a domain that was saved to a file.

    Raises:
        OUassisterError: As `vmtoml.load` or `libvirt.find`.
    """
    if not source.startswith(_DOMAIN):
        return vmtoml.load(Path(source))
    from ouassister.provider import libvirt

    return libvirt.load(source, save)


def domain(word: str, uri: str, save: Path | None) -> Vm:
    """Find the domain of a name or UUID; raises as `libvirt.find`."""
    from ouassister.provider import libvirt

    return libvirt.find(word, uri, save)
