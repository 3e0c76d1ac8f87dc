"""A guest that has loaded an SELinux policy: `make selinux-test`.

Its labels are judged by its own tools: restorecon(8), and the same package installed by its own
dpkg in a twin.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest
from tests.conftest import GUESTS
from tests.fidelity.twins import again
from tests.vm.repository import Package, Repository, build
from tests.vm.world import use_mirror, use_source

from ouassister.provider import qemu, vmtoml
from ouassister.testing import Recipe, build_image, guest_run, make_suspended
from ouassister.testing import clone as make_clone
from ouassister.testing.suspended import wait_ready

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.vm.world import World

    from ouassister.provider.qemu import RunningVM

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not os.environ.get("OUASSISTER_SELINUX"),
        reason="an image of its own, labelled and booted twice, 8 minutes: 'make selinux-test'",
    ),
]

_PACKAGES: Final = ("selinux-basics", "selinux-policy-default", "policycoreutils", "selinux-utils")
_RELABEL: Final = (
    "setfiles -F -T 2 /etc/selinux/default/contexts/files/file_contexts / >/dev/null 2>&1; sync"
)
_CIL: Final = """(type oua_t)
(roletype object_r oua_t)
(typeattributeset file_type (oua_t))
"""
# A file of a package, one that its script makes, one of the guest that it edits, a link of each
# kind, a folder, a pipe; places for which the policy has labels of their own, and none.
_LABELLED: Final = Package(
    "oua-labelled",
    files={
        "/usr/bin/oua-tool": "#!/bin/sh\n",
        "/etc/init.d/oua-tool": "#!/bin/sh\n",
        "/etc/oua/oua.conf": "a\n",
        "/etc/cron.d/oua": "# nothing\n",
        "/usr/lib/systemd/system/oua-tool.service": "[Service]\nExecStart=/bin/true\n",
        "/var/www/oua/index.html": "here\n",
        "/opt/oua/caf\u00e9": "x\n",
    },
    links={"/usr/bin/oua-link": "oua-tool"},
    conffiles=("/etc/oua/oua.conf",),
    scripts={
        "postinst": "mkdir -p /var/lib/oua/new; echo made >/var/lib/oua/new/file\n"
        "mkfifo /var/lib/oua/pipe; ln /var/lib/oua/new/file /var/lib/oua/other-name\n"
        "mkdir -p /var/log/oua; echo line >/var/log/oua/log\n"
        "echo odd >'/opt/oua/odd\n name'\n"
        "echo edited >>/etc/issue; chmod 640 /etc/issue.net\n"
        "cp /usr/bin/oua-tool /usr/sbin/oua-copy",
    },
)
_POLICY: Final = Package(
    "oua-policy",
    files={"/usr/share/oua/oua.cil": _CIL},
    # Who wrote a file is known by the second: it shall be its own.
    scripts={"postinst": "sleep 2; semodule -i /usr/share/oua/oua.cil; sleep 2"},
)
_LIST: Final = (
    "find /usr/bin/oua* /usr/sbin/oua* /etc/init.d /etc/oua /etc/cron.d /etc/issue* /var/www"
    " /usr/lib/systemd/system/oua* /opt/oua /var/lib/oua /var/log/oua /var/lib/dpkg"
    " /usr/share/doc/oua* -printf '%Z %M %p\\0' 2>/dev/null | sort -z"
)
_KNOWS: Final = "echo -n system_u:object_r:oua_t:s0 >/sys/fs/selinux/context"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    with Repository(tmp_path_factory.mktemp("repository")) as served:
        for package in (_LABELLED, _POLICY):
            build(package, served.folder)
        served.publish()
        yield served


@pytest.fixture(scope="module")
def prepared(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest whose files are labelled, and which was booted so; it uses the tests' repository."""
    standard = Recipe()
    recipe = replace(standard, packages=(*standard.packages, *_PACKAGES))
    image = build_image(GUESTS, recipe, progress=print)
    image = replace(image, cmdline=f"{image.cmdline} security=selinux selinux=1")
    folder = GUESTS / f"{image.disk.parent.name}-selinux"
    first = make_suspended(image, folder, memory_mib=1024, progress=print)
    toml = make_clone(first, tmp_path_factory.mktemp("prepared") / "vm")
    config = vmtoml.load(toml)
    with qemu.restore(config, links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            use_source(vm, repository.port)
            guest_run(vm, _RELABEL, timeout_s=900)
        finally:
            vm.kill()
    config.save.unlink()
    use_mirror(toml, repository.port)
    vm = qemu.start(vmtoml.load(toml))
    try:
        wait_ready(vm, timeout_s=300)
        assert guest_run(vm, "getenforce").stdout == b"Permissive\n"
        vm.suspend()
    except BaseException:
        vm.kill()
        raise
    return toml


def sleep_again(world: World, script: str) -> None:
    """Do something in the guest before it sleeps."""
    with again(world.toml) as vm:
        guest_run(vm, f"{script}; sync")


def listed(vm: RunningVM) -> dict[str, str]:
    lines = guest_run(vm, _LIST).stdout.decode("utf-8", "backslashreplace").split("\0")
    return {line.split(" ", 1)[1]: line.split(" ", 1)[0] for line in lines if line}


@pytest.mark.parametrize("mode", [0, 1])
def test_labels_are_those_that_the_guests_own_dpkg_gives(
    world: World, repository: Repository, tmp_path: Path, mode: int
) -> None:
    if mode:
        sleep_again(world, "setenforce 1")
    twin = make_clone(world.toml, tmp_path / "twin")
    (deb,) = repository.folder.glob("oua-labelled*.deb")
    with qemu.restore(vmtoml.load(twin), links_up=False) as vm:
        try:
            vm.qga()
            vm.cont()
            vm.qga().write_file(f"/root/{deb.name}", deb.read_bytes())
            guest_run(vm, f"dpkg -i /root/{deb.name}")
            # What a script makes has a label by who made it (initrc_t makes ntp_drift_t of
            # folders in /var/lib); ours has that of its path.
            guest_run(vm, "restorecon -R /var/lib/oua /var/log/oua /opt/oua /etc/issue*")
            truth = listed(vm)
        finally:
            vm.kill()
    before = world.hashes()
    updated = world.run("update", "--install", "oua-labelled")
    assert updated.status == 0, updated
    assert [one["mode"] for one in updated.result["modes"]] == ["emulated"]
    assert world.hashes() == before
    assert world.run("resume").status == 0
    with qemu.attach(world.config) as vm:
        found = listed(vm)
        refused = guest_run(vm, "dmesg | grep 'avc:.*denied' | grep -i ouassister", check=False)
        spelled = guest_run(
            vm, "restorecon -n -v -R /usr /etc /opt /var/lib/oua /var/www /var/log/oua /boot",
            timeout_s=300,
        )  # fmt: skip
        assert guest_run(vm, "getenforce").stdout == (b"Enforcing\n" if mode else b"Permissive\n")
    assert len(truth) > 40
    assert {label for label in truth.values() if "?" not in label} >= {
        "system_u:object_r:bin_t:s0", "system_u:object_r:etc_t:s0",
        "system_u:object_r:initrc_exec_t:s0", "system_u:object_r:httpd_sys_content_t:s0",
    }  # fmt: skip
    assert found == truth
    assert spelled.stdout == b""
    assert refused.stdout == b""


def test_package_that_changes_the_policy_is_installed_by_the_guest(world: World) -> None:
    updated = world.run("update", "--install", "oua-policy", "--install", "oua-labelled")
    assert updated.status == 0, updated
    modes = {one["name"]: one for one in updated.result["modes"]}
    assert modes["oua-labelled"]["mode"] == "emulated", modes
    assert modes["oua-policy"]["mode"] == "staged"
    assert (
        "it changes the SELinux policy /etc/selinux/default/policy/policy."
        in (modes["oua-policy"]["reason"])
    )
    assert world.run("resume").status == 0
    with qemu.attach(world.config) as vm:
        assert guest_run(vm, _KNOWS).exit_status == 0  # its kernel has the new type


def test_guest_without_a_program_that_tells_labels_is_refused_by_plan(world: World) -> None:
    sleep_again(world, f"! {_KNOWS}; rm /usr/sbin/matchpathcon")
    planned = world.run("plan", "--install", "oua-labelled")
    assert (planned.status, planned.code) == (23, "unsupported-guest")
    assert "selinux-utils" in planned.value["error"]["hint"]
