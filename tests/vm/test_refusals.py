"""Each guard fires, with the documented exit status, and the sleeping VM stays as it was."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.vm.world import NOTHING, World, leftovers

from ouassister.provider import qemu
from ouassister.testing import guest_run
from ouassister.testing.suspended import overlay

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vm.repository import Repository

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def test_save_file_that_is_truncated_is_refused(world: World) -> None:
    save = world.config.save
    whole = save.resolve().read_bytes()
    save.unlink()
    for size in (len(whole) // 2, len(whole) - 1):
        save.write_bytes(whole[:size])
        for verb in ("inspect", "update"):
            done = world.run(verb)
            assert (done.status, done.code) == (20, "state-truncated"), done


def test_vm_that_runs_is_refused_and_not_disturbed(world: World) -> None:
    with qemu.restore(world.config, links_up=False) as vm:
        for verb in ("inspect", "plan", "update", "run"):
            words = ("--", "true") if verb == "run" else ()
            done = world.run(verb, *words)
            assert (done.status, done.code) == (20, "state-running"), done
        assert vm.status() == "paused"


def test_disk_that_changed_after_planning_makes_plan_and_change_set_stale(world: World) -> None:
    plan = world.run("plan", "--install", "oua-extra").result["plan_id"]
    assert world.run("update", "--install", "oua-extra").status == 0
    disk = world.config.disks[0].path
    times = disk.stat()
    with disk.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"\0" * 4096)
    os.utime(disk, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = world.run("update", "--plan", plan)
    assert (done.status, done.code) == (21, "stale"), done
    assert disk.name in done.value["error"]["message"]
    resumed = world.run("resume")
    assert (resumed.status, resumed.code) == (21, "stale"), resumed
    assert not qemu.is_running(world.config)
    assert world.run("status").result[0]["changesets"][0]["verdict"].startswith("stale")


@pytest.mark.parametrize("name", ["manifest.json", "layer.tar"])
def test_change_set_that_was_tampered_with_is_not_applied(world: World, name: str) -> None:
    update = world.run("update", "--install", "oua-extra")
    folder = next(world.home.glob("vms/*/changesets")) / update.result["changeset_id"]
    target = folder / name
    raw = bytearray(target.read_bytes())
    # One bit: of a digit in the manifest, of a file's content in the layer.
    at = raw.index(b'"size":') + 7 if name.endswith("json") else raw.index(b"echo extra")
    raw[at] ^= 1
    target.chmod(0o600)
    target.write_bytes(raw)
    resumed = world.run("resume")
    assert (resumed.status, resumed.code) == (21, "tampered"), resumed
    assert not qemu.is_running(world.config)


def test_package_that_does_not_exist_is_named(world: World) -> None:
    done = world.run("update", "--install", "no-such-package")
    assert (done.status, done.code) == (30, "package-not-found"), done
    assert "no-such-package" in done.value["error"]["message"]
    odd = world.run("update", "--install", "--allow-downgrades")
    assert odd.status == 2


def test_archive_that_answers_404_is_left_out_and_the_rest_is_updated(
    world: World, repository: Repository
) -> None:
    repository.missing.add("oua-gone_1.0_all.deb")
    try:
        done = world.run("update", "--install", "oua-gone", "--install", "oua-extra")
        assert done.status == 11, done
        assert [change["name"] for change in done.result["changes"]] == ["oua-extra"]
        assert "oua-gone" in {item["package"] for item in done.result["left_out"]}
        alone = world.run("update", "--install", "oua-gone")
        assert (alone.status, alone.code) == (30, "repository"), alone
    finally:
        repository.missing.clear()


def test_dependency_that_answers_404_takes_its_dependents_along(
    world: World, repository: Repository
) -> None:
    repository.missing.add("oua-library_1.0_all.deb")
    try:
        done = world.run("update", "--install", "oua-hello", "--install", "oua-extra")
        assert done.status == 11, done
        assert [change["name"] for change in done.result["changes"]] == ["oua-extra"]
        assert {"oua-hello", "oua-library"} <= {x["package"] for x in done.result["left_out"]}
    finally:
        repository.missing.clear()


def test_package_whose_script_fails_leaves_no_change_set_where_nothing_may_be_staged(
    world: World,
) -> None:
    done = world.run("update", "--no-staging", "--install", "oua-broken", "--install", "oua-extra")
    assert (done.status, done.code) == (31, "needs-staging"), done
    message = done.value["error"]["message"]
    assert "oua-broken: it failed while the guest slept" in message
    assert "post-installation script subprocess returned error exit status 3" in message
    assert "oua-extra" not in message
    assert world.run("status").result[0]["changesets"] == []
    assert leftovers(world.home) == NOTHING


def test_work_disk_that_is_full_is_named_and_left_clean(world: World, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    image = tmp_path / "small.ext4"
    with image.open("wb") as file:
        file.truncate(150 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(small)], check=True)
    try:
        cramped = World(world.toml, small / "home")
        before = world.hashes()
        done = cramped.run("update", "--install", "oua-big")
        assert (done.status, done.code) == (31, "work-disk-full"), done
        assert world.hashes() == before
        left = leftovers(cramped.home)
        assert left == NOTHING
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_disk_that_is_not_what_memory_remembers_is_refused(world: World, tmp_path: Path) -> None:
    """Somebody wrote to the disk of the sleeping guest: modes of programs that run there."""
    (disk,) = world.config.disks
    raw = tmp_path / "written.raw"
    convert = ["qemu-img", "convert", "-f", disk.format, "-O", "raw", str(disk.path), str(raw)]
    subprocess.run(convert, check=True)
    programs = ("systemd/systemd", "systemd/systemd-journald", "systemd/systemd-logind")
    lines = [f"set_inode_field /usr/lib/{name} mode 0100700" for name in programs]
    lines += [f"set_inode_field /usr/sbin/{name} mode 0100700" for name in ("nginx", "sshd")]
    (tmp_path / "commands").write_text("\n".join(lines) + "\n")
    write = ["debugfs", "-w", "-f", str(tmp_path / "commands"), f"{raw}?offset={1 << 20}"]
    subprocess.run(write, check=True, capture_output=True)
    disk.path.unlink()
    overlay(disk.path, raw, "raw")
    done = world.run("update", "--install", "oua-extra")
    assert (done.status, done.code) == (20, "state-corrupt-guest"), done
    assert "mode" in done.value["error"]["message"]
    assert leftovers(world.home) == NOTHING
    shown = world.run("run", "--", "true")
    assert (shown.status, shown.code) == (20, "state-corrupt-guest"), shown


def test_dump_can_be_looked_at_and_not_updated(world: World) -> None:
    save = world.config.save
    with qemu.restore(world.config, links_up=False) as vm:
        save.unlink()
        words = {"paging": False, "protocol": f"file:{save}", "detach": False}
        vm.qmp.execute_with("dump-guest-memory", words)
        vm.kill()
    assert world.run("inspect").status == 0
    done = world.run("update")
    assert (done.status, done.code) == (23, "unsupported-state"), done
    assert "it can be inspected, never updated" in done.value["error"]["message"]


def test_updater_that_held_its_lock_at_suspend_is_refused(world: World) -> None:
    # struct flock of x86-64: type, whence, start, length, pid (fcntl(2)).
    hold = (
        "use Fcntl; open(F, '>>', '/var/lib/dpkg/lock-frontend') or die;"
        " my \\$lock = pack('ssx4qqix4', F_WRLCK, 0, 0, 0, 0);"
        " fcntl(F, F_SETLK, \\$lock) or die; open(O, '>', '/root/held'); close(O); sleep 600"
    )
    script = f'(perl -e "{hold}" >/dev/null 2>&1 </dev/null &); until [ -e /root/held ]; do :; done'
    with qemu.restore(world.config, links_up=False) as vm:
        vm.qga()
        vm.cont()
        guest_run(vm, f"{script}; sync", timeout_s=60)
        world.config.save.unlink()
        vm.suspend()
    done = world.run("update", "--install", "oua-extra")
    assert (done.status, done.code) == (22, "locked"), done
    assert "lock-frontend" in done.value["error"]["message"]
