"""The guest's own programs talk to the stand-in, over the guest's tree and what its memory told.

Every command runs in one shadow of a few namespaces, in order, so that later ones see what earlier
ones left. ``SERVICEMANAGER_RELEASES`` names the releases; each brings a systemd of its own.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from tests.conftest import GUESTS, need

from ouassister import codec
from ouassister.kernel import introspect
from ouassister.memory import open_save
from ouassister.model import GuestView, Subject
from ouassister.provider import vmtoml
from ouassister.shadow.events import Event, Outcome, read_events
from ouassister.shadow.servicemanager import collect
from ouassister.testing import Recipe, build_image, make_suspended
from ouassister.testing.view import build_view, mounted_view

pytestmark = pytest.mark.host

RELEASES: Final = os.environ.get("SERVICEMANAGER_RELEASES", "bookworm").split()
KERNELS: Final = {"bullseye": "bullseye"}  # its kernels go from the security archive
RIG: Final = Path(__file__).parent / "servicemanager_rig.py"
RECORDER: Final = Path(__file__).parents[2] / "src/ouassister/shadow/recorder/record.sh"
WANT: Final = frozenset(
    (Subject.TASKS, Subject.FILES, Subject.NETWORK, Subject.SWAP, Subject.TMPFS_CONTENT)
)
POSTINST: Final = {
    "DPKG_MAINTSCRIPT_PACKAGE": "nginx-common", "DPKG_MAINTSCRIPT_NAME": "postinst",
}  # fmt: skip
UNIT: Final = (
    "printf '[Unit]\\nDescription=mine\\n[Service]\\nExecStart=/bin/sleep 9\\n"
    "[Install]\\nWantedBy=multi-user.target\\n' >/etc/systemd/system/mine.service"
)
COMMANDS: Final[dict[str, dict[str, Any]]] = {
    "active": {"sh": "systemctl is-active ssh nginx nothere"},
    "active nothere": {"sh": "systemctl is-active nothere"},
    "failed": {"sh": "systemctl is-failed ssh"},
    "enabled": {"sh": "systemctl is-enabled ssh getty@tty1 systemd-logind sshd"},
    "running": {"sh": "systemctl is-system-running"},
    "status": {"sh": "systemctl status --no-pager nginx"},
    "status nothere": {"sh": "systemctl status nothere"},
    "show": {"sh": "systemctl show -p MainPID -p SubState -p LoadState -p CanReload nginx"},
    "oneshot": {"sh": "systemctl show --value -p ActiveState -p SubState networking"},
    "cat": {"sh": "systemctl cat ssh | head -1; systemctl show --value -p FragmentPath ssh"},
    "list": {"sh": "systemctl list-units --no-legend --plain --no-pager --full"},
    "list files": {"sh": "systemctl list-unit-files --no-legend --no-pager 'ssh*'"},
    "busctl": {"sh": "busctl get-property org.freedesktop.systemd1 /org/freedesktop/systemd1/unit/"
               "nginx_2eservice org.freedesktop.systemd1.Unit ActiveState"},
    "reload": {"sh": "systemctl daemon-reload", "environment": POSTINST},
    "restart": {"sh": "env -i PATH=$PATH systemctl restart nginx; :", "environment": POSTINST},
    "stop": {"sh": "systemctl stop nginx; systemctl is-active nginx; systemctl reload nginx"},
    "start": {"sh": "systemctl start nginx; systemctl is-active nginx"},
    "enable": {"sh": "systemctl enable --now systemd-networkd; systemctl is-enabled"
               " systemd-networkd; systemctl is-active systemd-networkd"},
    "disable": {"sh": "systemctl disable systemd-networkd; systemctl is-enabled systemd-networkd"},
    "mask": {"sh": "systemctl mask fstrim.timer; systemctl restart fstrim.timer; echo $?;"
             " systemctl unmask fstrim.timer"},
    "enable nothere": {"sh": "systemctl enable nothere"},
    "start nothere": {"sh": "systemctl start nothere"},
    "own unit": {"sh": f"{UNIT}; systemctl start mine; systemctl is-active mine; echo"
                 " >>/etc/systemd/system/mine.service; systemctl restart mine; systemctl"
                 " daemon-reload; systemctl stop mine"},
    "invoke": {"sh": "deb-systemd-invoke restart nginx.service"},
    "invoke disabled": {"sh": "deb-systemd-invoke start systemd-networkd.service"},
    "invoke-rc.d": {"sh": "invoke-rc.d nginx restart"},
    "service status": {"sh": "service ssh status"},
    "service reload": {"sh": "service nginx reload"},
    "update-rc.d": {"sh": "update-rc.d nginx disable; systemctl is-enabled nginx;"
                    " update-rc.d nginx enable; systemctl is-enabled nginx"},
    "telinit": {"sh": "telinit u"},
    "kill": {"sh": "systemctl kill -s HUP nginx"},
    "reboot": {"sh": "systemctl --no-block start reboot.target"},
    "transient": {"sh": "systemd-run --no-block /bin/true"},
    "dbus": {"sh": "dbus-send --system --print-reply --dest=org.freedesktop.DBus / "
             "org.freedesktop.DBus.ReloadConfig"},
    "foreign": {"sh": "dbus-send --system --print-reply --dest=org.freedesktop.hostname1 /x a.b.C"},
    "not root": {"sh": "systemctl restart ssh", "user": 65534},
    "asked not as root": {"sh": "systemctl is-active ssh", "user": 65534},
    "recorder": {"sh": "modprobe -n loop; modprobe loop; udevadm trigger --action=change",
                 "environment": POSTINST},
    "recorder nothere": {"sh": "update-grub"},
    "recorder of grub": {"sh": "d=/usr/local/sbin; echo 'echo made' >$d/grub-mkconfig;"
                         " echo 'grub-mkconfig -o /boot/grub/grub.cfg' >$d/update-grub;"
                         " chmod 755 $d/grub-mkconfig $d/update-grub;"
                         " grub-mkconfig; $d/update-grub"},
    "kill all": {"sh": "kill -KILL -1"},
    "survived": {"sh": "systemctl is-active ssh"},
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What the commands of one release left."""

    answers: dict[str, dict[str, Any]]
    events: tuple[Event, ...]
    state: dict[str, Any]

    def out(self, name: str) -> str:
        return str(self.answers[name]["out"])

    def lines(self, name: str) -> list[str]:
        return self.out(name).split("\n")[:-1]

    def status(self, name: str) -> int:
        return int(self.answers[name]["status"])

    def words(self, outcome: Outcome) -> list[str]:
        return [" ".join(event.words) for event in self.events if event.outcome is outcome]


def write_run(view: GuestView, folder: Path) -> None:
    """Folders, links and files of the guest's /run: units that generators made are there."""
    assert view.tmpfs_content is not None
    (content,) = (one for one in view.tmpfs_content if one.tmpfs.target == b"/run")
    runs = {file.path: file.runs for file in content.files}
    for node in content.tmpfs.nodes:
        path = folder / os.fsdecode(node.path.lstrip(b"/"))
        if stat.S_ISDIR(node.mode):
            path.mkdir(parents=True, exist_ok=True)
        elif node.target is not None:
            path.symlink_to(os.fsdecode(node.target))
        elif node.path in runs:
            path.write_bytes(b"".join(data for _, data in runs[node.path]))
    (folder / "ouassister").mkdir()


@pytest.fixture(scope="module", params=RELEASES)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    for tool in ("qemu-system-x86_64", "qemu-img", "mmdebstrap", "mke2fs", "e2fsck"):
        need(tool)
    folder = tmp_path_factory.mktemp(request.param)
    recipe = Recipe(suite=request.param, kernel_suite=KERNELS.get(request.param, ""))
    image = build_image(GUESTS, recipe, progress=print)
    suspended = make_suspended(
        image, GUESTS / f"{image.disk.parent.name}-suspended", progress=print
    )
    for name in ("upper", "work", "merged", "run"):
        (folder / name).mkdir()
    with open_save(vmtoml.load(suspended).save) as save:
        view = introspect(save, WANT)
    state = codec.to_value(collect(view))
    write_run(view, folder / "run")
    (folder / "state").write_text(json.dumps(state))
    commands = [{"argv": ["sh", "-c", command["sh"]], **command} for command in COMMANDS.values()]
    with mounted_view(build_view(suspended, folder / "view")) as tree:
        job = {
            "tree": str(tree), "folder": str(folder), "state": str(folder / "state"),
            "recorder": str(RECORDER),
            "recorded": ["grub-mkconfig", "modprobe", "udevadm", "update-grub"],
            "commands": commands,
        }  # fmt: skip
        (folder / "job").write_text(json.dumps(job))
        subprocess.run([sys.executable, "-I", RIG, folder / "job"], check=True, timeout=600)
    answers = json.loads((folder / "answers.json").read_text())
    (folder / "view" / "view.img").unlink()
    events = read_events(folder / "records")
    return Seen(dict(zip(COMMANDS, answers, strict=True)), events, state)


def test_questions_are_answered_as_in_the_guest(seen: Seen) -> None:
    assert seen.lines("active") == ["active", "active", "inactive"]
    assert seen.status("active") == 0
    assert seen.status("active nothere") != 0
    assert seen.lines("failed") == ["active"]
    assert seen.status("failed") == 1
    assert seen.lines("enabled") == ["enabled", "enabled", "static", "alias"]
    assert seen.lines("running") == ["running"]
    assert seen.status("status nothere") == 4
    shown = dict(line.split("=") for line in seen.lines("show"))
    assert shown["SubState"] == "running"
    assert shown["CanReload"] == "yes"
    (nginx,) = (unit for unit in seen.state["units"] if unit["unit"] == "nginx.service")
    assert int(shown["MainPID"]) == nginx["processes"][0]["pid"]
    assert seen.lines("oneshot") == ["active", "exited"]
    heading, fragment = seen.lines("cat")
    assert heading == f"# {fragment}"
    assert seen.lines("busctl") == ['s "active"']


def test_status_shows_unit_and_processes(seen: Seen) -> None:
    assert seen.status("status") == 0
    text = seen.out("status")
    for part in ("loaded (", "enabled;", "active (running) since", "Main PID: ", "nginx: master"):
        assert part in text


def test_units_of_every_kind_are_listed(seen: Seen) -> None:
    rows = {row[0]: row[1:4] for line in seen.lines("list") if (row := line.split())}
    for name, sub in (
        ("nginx.service", "running"),
        ("networking.service", "exited"),
        ("-.mount", "mounted"),
        ("multi-user.target", "active"),
        ("network.target", "active"),
        ("dbus.socket", "running"),
        ("system.slice", "active"),
        ("apt-daily.timer", "waiting"),
    ):
        assert rows[name] == ["loaded", "active", sub], name
    assert "ssh.socket" not in rows
    files = [line.split()[:2] for line in seen.lines("list files")]
    assert ["ssh.service", "enabled"] in files


def test_what_is_recorded_is_told_back(seen: Seen) -> None:
    assert seen.lines("stop") == ["inactive"]
    assert "not active, cannot reload" in seen.answers["stop"]["err"]
    assert seen.lines("start") == ["active"]
    assert seen.lines("enable")[-2:] == ["enabled", "active"]
    assert seen.lines("disable")[-1] == "disabled"
    assert seen.lines("mask") == ["1"]
    assert "is masked" in seen.answers["mask"]["err"]
    assert seen.lines("own unit") == ["active"]
    assert seen.answers["own unit"]["err"].count("changed on disk") == 1
    assert seen.lines("update-rc.d") == ["disabled", "enabled"]
    assert seen.lines("survived") == ["active"]
    for name in ("reload", "restart", "invoke", "invoke disabled", "invoke-rc.d", "service status",
                 "service reload", "telinit", "kill", "reboot", "dbus", "asked not as root",
                 "recorder"):  # fmt: skip
        assert seen.status(name) == 0, (name, seen.answers[name])


def test_every_change_is_recorded_in_order(seen: Seen) -> None:
    reload, end = "systemctl daemon-reload", " nginx.service"
    found = [words for words in seen.words(Outcome.DEFERRED) if words != reload]
    assert found == [
        "systemctl restart" + end,
        "systemctl stop" + end,
        "systemctl start" + end,
        "systemctl start systemd-networkd.service",
        "systemctl start mine.service",
        "systemctl restart mine.service",
        "systemctl stop mine.service",
        "systemctl restart" + end,
        "systemctl restart" + end,
        "systemctl reload" + end,
        "systemctl daemon-reexec",
        "systemctl kill --kill-who=all --signal=1" + end,
        "systemctl reload dbus.service",
        "modprobe loop",
        "udevadm trigger --action=change",
        "grub-mkconfig -o /boot/grub/grub.cfg",  # by a script that was called by its full path
    ]
    assert seen.lines("recorder of grub") == ["made"]
    done = seen.words(Outcome.DONE)
    assert "systemctl enable systemd-networkd.service" in done
    assert "systemctl mask fstrim.timer" in done


def test_records_name_the_package_whose_script_called(seen: Seen) -> None:
    of_nginx = [event for event in seen.events if event.package == "nginx-common"]
    assert [" ".join(event.words) for event in of_nginx] == [
        "systemctl daemon-reload",
        "systemctl restart nginx.service",  # its environment was empty: found by its parent
        "modprobe loop",
        "udevadm trigger --action=change",
    ]
    assert {event.script for event in of_nginx} == {"postinst"}


def test_what_cannot_be_done_is_refused_and_recorded(seen: Seen) -> None:
    for name in ("enable nothere", "start nothere", "transient", "foreign", "not root"):
        assert seen.status(name) != 0, name
    assert "not found" in seen.answers["start nothere"]["err"]
    assert "does not exist" in seen.answers["enable nothere"]["err"]
    assert seen.status("recorder nothere") == 127
    assert seen.words(Outcome.WITHHELD) == ["systemctl start reboot.target"]
    refused = seen.words(Outcome.REFUSED)
    assert "StartTransientUnit" in refused
    assert "systemctl restart ssh.service" in refused
    assert seen.words(Outcome.FOREIGN) == ["org.freedesktop.hostname1 a.b.C"]
    assert seen.words(Outcome.UNKNOWN) == []
