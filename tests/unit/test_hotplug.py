"""A place for the medium, told from QEMU's command; each lack by its name."""

from __future__ import annotations

import pytest

from ouassister.provider.hotplug import lacking

PORT = ("-device", "pcie-root-port,id=medium,bus=pcie.0,addr=8,chassis=1")
FULL = [
    word
    for slot in range(2, 32)
    for word in ("-device", f"virtio-rng-pci,id=rng{slot},bus=pci.0,addr={slot:x}")
]


def command(machine: str, *more: str) -> tuple[str, ...]:
    return ("qemu-system-x86_64", "-machine", machine, *more)


@pytest.mark.parametrize(
    ("words", "bus"),
    [
        (command("pc-i440fx-7.2"), ""),
        (command("pc", "-device", "virtio-rng-pci,bus=pci.0,addr=3"), "pci.0"),
        (command("type=pc,usb=off", *FULL[2:]), ""),
        (("qemu-system-x86_64",), ""),
        (command("pc-q35-7.2", *PORT), "medium"),
        (command("q35", "-device", "virtio-scsi-pci,id=scsi0"), "scsi0.0"),
        (command("pc-i440fx-7.2", "-device", "virtio-scsi-pci,id=scsi0", *FULL), "scsi0.0"),
        (command("microvm"), ""),
        (command("pc", "-device", "pci-bridge,id=b,chassis_nr=1", *FULL), "b"),
    ],
)
def test_place_is_there_or_nothing_is_known(words: tuple[str, ...], bus: str) -> None:
    assert lacking(words, bus) == ""


@pytest.mark.parametrize(
    ("words", "bus", "missing"),
    [
        (command("pc-q35-7.2", *PORT), "", "pcie.0 of a q35 takes nothing"),
        (command("q35,accel=kvm", *PORT), "pcie.0", "pcie.0 of a q35 takes nothing"),
        (command("q35", *PORT), "other", "a pcie-root-port with the id 'other'"),
        (command("q35", "-device", "virtio-rng-pci,id=medium"), "medium", "a pcie-root-port"),
        (
            command("q35", *PORT, "-device", "virtio-rng-pci,id=rng0,bus=medium"),
            "medium",
            "'medium' has the device 'rng0'",
        ),
        (command("pc", *FULL), "", "a free slot of pci.0"),
        (command("pc-i440fx-7.2", *FULL, *FULL[:2]), "pci.0", "a free slot of pci.0"),
    ],
)
def test_lack_of_a_place_is_named(words: tuple[str, ...], bus: str, missing: str) -> None:
    assert missing in lacking(words, bus)
