"""A guest with a network of its own for ssh, made of one that has none."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

from ouassister.provider import management, qemu, vmtoml
from ouassister.testing import clone, guest_run

if TYPE_CHECKING:
    from pathlib import Path

DEVICE = "mgmt0"
_NETWORK = "user,id=mgmt,restrict=on,ipv6=off,net=10.77.0.0/24,hostfwd=tcp:127.0.0.1:0-:22"
_CARD = f"virtio-net-pci,id={DEVICE},netdev=mgmt,bus=pci.0,addr=9"
_SET_UP = """until [ -e /sys/class/net/eth1 ]; do sleep 0.1; done
ip addr add 10.77.0.15/24 dev eth1 && ip link set eth1 up
mkdir -p -m 700 /root/.ssh && echo '{key}' >/root/.ssh/authorized_keys
sync"""


def with_management(source: Path, folder: Path) -> Path:
    """Plug the network into a twin of a sleeping guest and suspend it; returns its ``vm.toml``."""
    toml = clone(source, folder / "vm")
    config = vmtoml.load(toml)
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = " ".join(key.with_suffix(".pub").read_text().split()[:2])
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            back = {"type": "user", "id": "mgmt", "restrict": True, "net": "10.77.0.0/24"}
            forward = [{"str": "tcp:127.0.0.1:0-:22"}]
            vm.qmp.execute_with("netdev_add", {**back, "ipv6": False, "hostfwd": forward})
            card = dict(pair.partition("=")[::2] for pair in _CARD.split(",")[1:])
            vm.qmp.execute_with("device_add", {"driver": "virtio-net-pci", **card})
            vm.cont()
            guest_run(vm, _SET_UP.format(key=public), timeout_s=120)
            config.save.unlink()  # a link to the other guest's
            vm.suspend()
        except BaseException:
            vm.kill()
            raise
    command = (*config.command, "-netdev", _NETWORK, "-device", _CARD)
    network = management.find(command, DEVICE, key)
    toml.write_text(vmtoml.dump(replace(config, command=command, management=network)))
    return toml
