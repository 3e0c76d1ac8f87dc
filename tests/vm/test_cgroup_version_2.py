"""Control groups of version 2, in a guest whose systemd has them: `make cgroup-test`.

What runs there is the module itself, which needs the standard library alone. A host has its
controllers on one version; this one is for hosts that have them on the other.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import pytest
from tests.conftest import GUESTS

from ouassister.provider import qemu, vmtoml
from ouassister.shadow import cgroups
from ouassister.testing import Recipe, build_image, guest_run, make_suspended
from ouassister.testing import clone as make_clone

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]

_PACKAGES: Final = ("systemd", "systemd-sysv", "dbus", "udev", "qemu-guest-agent", "apt", "python3")
_PROGRAM: Final = """
import json, os, sys
sys.path.insert(0, "/root")
import cgroups

def child(what):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setresgid(4242, 4242, 4242)
        os.setresuid(4242, 4242, 4242)  # no right of its own: the group was opened before
        group.join()
        os.write(writer, json.dumps(what()).encode())
        os._exit(0)
    os.close(writer)
    said = os.fdopen(reader, "rb").read()
    return json.loads(said) if said else os.waitpid(pid, 0)[1]

def forks():
    made = []
    try:
        while len(made) < 100:
            pid = os.fork()
            if pid == 0:
                os.read(waits[0], 1)
                os._exit(0)
            made.append(pid)
    except OSError as error:
        made.append(error.strerror)
    for pid in made[:-1]:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return [len(made), made[-1]]

waits = os.pipe()
places = cgroups.find()
group = cgroups.Group(places, {"pids": 20, "memory": 64 << 20})
told = {"places": [[one.controller, one.version, str(one.folder)] for one in places]}
told["controllers"] = group.controllers
told["forks"] = child(forks)
told["reached"] = [group.reached(), group.reached()]
told["memory"] = child(lambda: len(b"x" * (256 << 20)))
told["then"] = group.reached()
group.remove()
told["left"] = [str(one) for place in places for one in place.folder.glob("ouassister-*")]
print(json.dumps(told))
"""


@pytest.mark.skipif(
    not os.environ.get("OUASSISTER_CGROUP_TEST"),
    reason="takes a guest of its own: make cgroup-test",
)
def test_group_of_version_2_bounds_who_has_no_right_to_enter(tmp_path: Path) -> None:
    image = build_image(GUESTS, Recipe(packages=_PACKAGES), progress=print)
    suspended = make_suspended(
        image, GUESTS / f"{image.disk.parent.name}-suspended", web=False, progress=print
    )
    config = vmtoml.load(make_clone(suspended, tmp_path / "vm"))
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            vm.qga().write_file("/root/cgroups.py", Path(cgroups.__file__).read_bytes())
            vm.qga().write_file("/root/program.py", _PROGRAM.encode())
            told = json.loads(guest_run(vm, "python3 /root/program.py", timeout_s=240).stdout)
        finally:
            vm.kill()
    slice_ = "/sys/fs/cgroup/system.slice"
    assert told["places"] == [["memory", 2, slice_], ["pids", 2, slice_]]
    assert told["controllers"] == ["memory", "pids"]
    assert told["forks"] == [20, "Resource temporarily unavailable"]
    assert told["reached"] == [["pids"], []]
    assert told["memory"] == 9
    assert told["then"] == ["memory"]
    assert told["left"] == []
