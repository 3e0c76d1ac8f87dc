"""A guest with our helper on a port of its own, made of one that has neither."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ouassister.provider import helper, qemu, vmtoml
from ouassister.testing import clone, guest_run

if TYPE_CHECKING:
    from pathlib import Path

_SOCKET = "oua.sock"
_CHARDEV = f"socket,id=oua,path={_SOCKET},server=on,wait=off"
_PORT = "virtserialport,id=oua-port,bus=serial0.0,nr=2,chardev=oua,name=org.ouassister.0"
_WAIT = "until systemctl is-active --quiet ouassister-port; do sleep 0.1; done; sync"


def with_port(source: Path, folder: Path) -> Path:
    """Plug a port into a twin, install the helper as an administrator would, suspend it."""
    toml = clone(source, folder / "vm")
    config = vmtoml.load(toml)
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            # Installed and enabled while there is no port: udev starts it once there is.
            guest_run(vm, "mkdir -p /root/helper")
            for name, content in helper.files().items():
                vm.qga().write_file(f"/root/helper/{name}", content)
            guest_run(vm, "sh /root/helper/install.sh", timeout_s=120)
            address = {"type": "unix", "data": {"path": _SOCKET}}
            back = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
            vm.qmp.execute_with("chardev-add", {"id": "oua", "backend": back})
            port = dict(pair.partition("=")[::2] for pair in _PORT.split(",")[1:])
            vm.qmp.execute_with(
                "device_add", {"driver": "virtserialport", **port, "nr": int(port["nr"])}
            )
            guest_run(vm, _WAIT, timeout_s=120)
            config.save.unlink()  # a link to the other guest's
            vm.suspend()
        except BaseException:
            vm.kill()
            raise
    command = (*config.command, "-chardev", _CHARDEV, "-device", _PORT)
    toml.write_text(vmtoml.dump(replace(config, command=command, helper=config.folder / _SOCKET)))
    return toml
