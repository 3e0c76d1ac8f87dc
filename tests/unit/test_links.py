"""Which links the gate opens: the addresses by the command, and what the guest's memory says."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.unit.test_vmtoml import GOOD

from ouassister.access import Access
from ouassister.errors import StateError
from ouassister.model import NetworkDevice
from ouassister.provider import links, vmtoml
from ouassister.provider.links import Link
from ouassister.reaching.links import judge, notes

if TYPE_CHECKING:
    from pathlib import Path

MAC, OTHER = "52:54:00:12:34:56", "52:54:00:12:34:57"
UP = 0x1003
ETH = NetworkDevice("eth0", 2, "", UP, 1500, "up", MAC, (), MAC, True)
CUT = replace(ETH, operstate="down", carrier=False)
UNUSED = replace(CUT, flags=0x1002)


def test_addresses_are_given_as_qemu_does() -> None:
    found = links.addresses(
        ["qemu", "-device", "virtio-net-pci,id=a,netdev=n", "-device", "virtio-blk-pci,id=d",
         "-device", "e1000,id=b,mac=52:54:00:12:34:57", "-device", "virtio-net-pci",
         "-device", "rtl8139,id=c", "-device", "e1000e,id=e,mac=AA:0:0:0:0:1",
         "-device", "igb,id=f,mac=AA-BB-CC-00-11-22", "-device", "e1000,id=g",
         "-device", "e1000,id=h,mac=52:54:00:12:34:5a"]
    )  # fmt: skip
    assert found == {
        "a": MAC,
        "b": OTHER,
        "c": "52:54:00:12:34:59",
        "e": "",
        "f": "aa:bb:cc:00:11:22",
        "g": "52:54:00:12:34:5a",
        "h": "52:54:00:12:34:5a",  # QEMU did not know of it
    }


def test_addresses_are_not_guessed_beside_devices_in_json() -> None:
    odd = f'{{"driver":"e1000","id":"b","mac":"{OTHER}"}}'
    found = links.addresses(["qemu", "-device", "e1000,id=a", "-device", odd])
    assert found == {"a": "", "b": OTHER}


@pytest.mark.parametrize("option", ["-nic", "-net"])
def test_addresses_are_not_guessed_beside_cards_of_another_kind(option: str) -> None:
    card = ["-device", "virtio-net-pci,id=a", "-device", f"virtio-net-pci,id=b,mac={OTHER}"]
    assert links.addresses(["qemu", option, "user", *card]) == {"a": "", "b": OTHER}


def test_addresses_end_where_qemu_has_no_more() -> None:
    cards = [word for number in range(170) for word in ("-device", f"e1000,id=n{number}")]
    found = links.addresses(["qemu", *cards])
    assert (found["n0"], found["n168"], found["n169"]) == (MAC, "52:54:00:12:34:fe", "")


@pytest.mark.parametrize(
    ("devices", "down", "untold"),
    [
        ((ETH,), (), ()),
        ((CUT,), ("nic0",), ()),
        ((UNUSED,), (), ("nic0",)),  # its driver may have said nothing
        ((replace(UNUSED, carrier=True),), (), ()),
        ((), (), ("nic0",)),
        ((CUT, ETH), (), ("nic0",)),  # who of both is meant?
        ((replace(CUT, permanent_address=OTHER),), (), ("nic0",)),
        # A bridge and its like bear the address of the card.
        ((replace(CUT, kind="bridge", permanent_address=""), ETH), (), ()),
    ],
)
def test_link_is_judged_by_what_the_driver_of_its_card_said(
    devices: tuple[NetworkDevice, ...], down: tuple[str, ...], untold: tuple[str, ...]
) -> None:
    assert judge((Link("nic0", MAC, False),), devices) == (down, untold)


def test_device_without_a_known_address_is_not_told() -> None:
    assert judge((Link("nic0", "", False),), (replace(CUT, permanent_address=""),)) == (
        (),
        ("nic0",),
    )


def test_link_that_the_gate_has_closed_is_opened() -> None:
    assert judge((Link("nic0", MAC, True),), (CUT,)) == ((), ())


def test_link_that_somebody_cut_behind_the_closed_gate_counts_once_another_is_open() -> None:
    both = (Link("nic0", MAC, True), Link("nic1", OTHER, True))
    second = replace(ETH, permanent_address=OTHER)
    assert judge(both, (CUT, second)) == (("nic0",), ())
    assert judge(both, (CUT, replace(second, carrier=False))) == ((), ())
    third = (both[0], replace(both[1], closed=False))  # it was down before the gate closed
    assert judge(third, (CUT, replace(second, carrier=False))) == (("nic1",), ())


def test_both_kinds_are_told() -> None:
    told = notes(Access(links_down=("nic0",), links_untold=("nic1",)))
    assert told[0] == "nic0: its link was down when the guest fell asleep, and stays down"
    assert told[1].startswith("nic1: memory does not tell")


def _config(folder: Path, setting: str = "") -> vmtoml.VmConfig:
    (folder / "a.qcow2").touch()
    path = folder / "vm.toml"
    path.write_text(GOOD.replace('device = "nic0"', f'device = "nic0"\n{setting}'))
    return vmtoml.load(path)


def test_what_vm_toml_says_is_not_asked_of_memory(tmp_path: Path) -> None:
    assert _config(tmp_path).untold_links == (Link("nic0", MAC, False),)
    for setting in ("stays_down = true", "stays_down = false", "quarantine = true"):
        config = _config(tmp_path, setting)
        assert config.untold_links == ()
        assert vmtoml.load(config.source).nets == config.nets
        (tmp_path / "vm.toml").write_text(vmtoml.dump(config))
        assert vmtoml.load(config.source).nets == config.nets


def test_closed_gate_is_remembered_beside_the_file(tmp_path: Path) -> None:
    config = _config(tmp_path)
    links.write_closed(config.gate_file, ("nic0", "gone"))
    assert config.untold_links == (Link("nic0", MAC, True),)
    assert config.gate_file.name == f"{config.name}.gate"


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"[" * 70000, b"\xff"])
def test_odd_memory_of_the_gate_is_refused(tmp_path: Path, text: bytes) -> None:
    config = _config(tmp_path)
    config.gate_file.write_bytes(text)
    with pytest.raises(StateError, match="does not say which links"):
        _ = config.untold_links
