"""Domains of a real libvirtd: found, updated while they sleep, resumed behind a closed gate."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance.libvirt import SETTINGS, wait_until
from tests.conftest import GUESTS, need
from tests.vm import packages
from tests.vm.libvirt_host import DOWN, SSH_CARD, UP, Inside, Sleeper, domain, running
from tests.vm.repository import build
from tests.vm.session_host import URI, session
from tests.vm.world import NOTHING, leftovers, until

from ouassister.demo.frames import count_frames
from ouassister.errors import AgentError, DeadlineError
from ouassister.provider import helper
from ouassister.provider.virsh_agent import VirshAgent
from ouassister.state.data import map_file
from ouassister.state.libvirt_save import read_header
from ouassister.store.database import ChangesetState, Store
from ouassister.testing import build_image, overlay
from ouassister.testing.channel import check_channel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.vm.repository import Repository

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

_SETTLED = (
    "until systemctl is-system-running; do"
    " systemctl --failed --plain --no-legend | grep . && exit 1; sleep 0.2; done"
)


# The others too: "all", by 'make libvirt-test'.
_ALL = os.environ.get("OUASSISTER_LIBVIRT") == "all"
_MACHINES = ("q35", "pc") if _ALL else ("q35",)
_COMPRESSED = ("lzop", "gzip", "bzip2", "xz") if _ALL else ("lzop",)
_BOTH = ("python", "virsh")


@pytest.fixture(scope="module", params=_MACHINES)
def virsh(
    request: pytest.FixtureRequest,
    repository: Repository,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Inside]:
    """A libvirtd with a domain that was suspended once; what it woke up from is in ``kept``."""
    folder = tmp_path_factory.mktemp("libvirt")
    image = build_image(GUESTS, progress=print)
    overlay(folder / "disk.qcow2", image.disk, "qcow2")
    (folder / "domain.xml").write_text(domain(image, folder, repository.port, request.param))
    with running(folder) as virsh:
        virsh.run("define", str(folder / "domain.xml"))
        virsh.run("start", image.hostname)
        awake = Sleeper(Path(image.hostname), folder, virsh=virsh)
        agent: Any = VirshAgent(virsh, image.hostname)
        agent.ping(timeout_s=300)
        awake.guest(_SETTLED)
        source = f"deb [trusted=yes] http://127.0.0.1:{repository.port}/ ./\n"
        awake.guest("rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*")
        agent.write_file("/etc/apt/sources.list", source.encode())
        for package in packages.BEFORE:
            deb = build(package, folder)
            agent.write_file(f"/root/{deb.name}", deb.read_bytes())
            awake.guest(f"dpkg -i /root/{deb.name}")
        awake.guest("sync")
        virsh.run("managedsave", image.hostname, timeout_s=120)
        (folder / "kept").mkdir()
        awake.save.rename(folder / "kept" / "save")
        (folder / "disk.qcow2").rename(folder / "kept" / "base.qcow2")
        yield virsh


@pytest.fixture(params=_BOTH if _ALL else _BOTH[:1])
def sleeper(
    virsh: Inside,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Sleeper:
    """The domain, asleep as it was when it was suspended, with a home of its own.

    Its parameter is what asks libvirt.
    """
    monkeypatch.setenv("OUASSISTER_LIBVIRT_CLIENT", request.param)
    sleeper = Sleeper(Path("web1"), tmp_path / "home", virsh=virsh)
    sleeper.fall_asleep(virsh.folder / "kept")
    return sleeper


@pytest.mark.parametrize("sleeper", _BOTH, indirect=True)
def test_managed_save_is_updated_and_the_domain_says_so_when_it_is_awake(sleeper: Sleeper) -> None:
    before = sleeper.hashes()
    listed = {one["vm"]: one for one in sleeper.run("list").result}
    assert listed["web1"]["state"] == "suspended"
    uuid = sleeper.virsh.run("domuuid", "web1").strip()
    assert listed["web1"]["source"].startswith(f"libvirt:{uuid}?")
    seen = sleeper.run("inspect").result
    assert seen["uts"]["nodename"] == "web1"
    plan = replace(sleeper, toml=Path(uuid)).run("plan").result
    assert {one["name"] for one in plan["changes"]} >= {"oua-daemon", "oua-hello"}
    update = sleeper.run("update", "--plan", plan["plan_id"])
    assert update.status == 0, update
    assert sleeper.hashes() == before
    assert sleeper.state() == "shut off"
    assert leftovers(sleeper.home) == NOTHING

    resumed = sleeper.run("resume")
    assert resumed.status == 0, resumed
    assert (resumed.result["result"], resumed.result["notes"]) == ("applied", [])
    print(f"{resumed.result['online_s']} s, {resumed.result['phases']}")
    assert sleeper.guest("oua-hello; dpkg --audit") == "two"
    assert sleeper.guest("find / -xdev -name '.ouassister-*'; ls /dev/vd?") == "/dev/vda"
    assert not sleeper.save.exists()
    links = [sleeper.virsh.run("domif-getlink", "web1", mac).split()[-1] for mac in (UP, DOWN)]
    assert links == ["up", "down"]
    assert "open mac=" not in sleeper.virsh.run("dumpxml", "web1")
    assert [path.name for path in sleeper.folder.glob(".ouassister*")] == []
    assert sleeper.run("status").result[0]["state"] == "running"
    again = sleeper.run("update")
    assert (again.status, again.code) == (20, "state-running"), again


def test_domain_saved_to_a_file_is_updated_and_the_file_put_aside(sleeper: Sleeper) -> None:
    save = sleeper.folder / "web1.img"
    sleeper.save.rename(save)
    asleep = sleeper.run("update", "--install", "oua-extra")
    assert (asleep.status, asleep.code) == (20, "state-not-suspended"), asleep
    saved = replace(sleeper, words=("--save", str(save)))
    assert saved.run("update", "--install", "oua-extra").status == 0
    resumed = saved.run("resume")
    assert resumed.status == 0, resumed
    assert "oua-extra" in sleeper.guest("dpkg-query -W")
    assert not save.exists()
    save.with_name("web1.img.resumed").unlink()
    assert saved.run("suspend").status == 0
    assert (sleeper.state(), save.exists()) == ("shut off", True)
    save.unlink()


@pytest.mark.parametrize("kind", _COMPRESSED)
def test_compressed_save_is_updated_resumed_and_gone_back_to(sleeper: Sleeper, kind: str) -> None:
    sleeper.virsh.run("start", "web1", timeout_s=120)
    sleeper.virsh.restart(f'{SETTINGS}save_image_format = "{kind}"\n')
    try:
        sleeper.virsh.run("managedsave", "web1", timeout_s=300)
        with contextlib.closing(map_file(sleeper.save)) as file:
            assert read_header(file, "save").format == kind
        before = sleeper.hashes()
        assert sleeper.run("update", "--install", "oua-extra").status == 0
        assert sleeper.hashes() == before
        resumed = sleeper.run("resume", "--snapshot")
        assert resumed.status == 0, resumed
        assert "oua-extra" in sleeper.guest("dpkg-query -W; dpkg --audit")
        assert not sleeper.save.exists()
        sleeper.virsh.run("destroy", "web1")
        back = sleeper.run("rollback", "--snapshot", "last")
        assert back.status == 0, back
        assert sleeper.hashes() == before
        sleeper.virsh.run("start", "web1", timeout_s=120)
        assert "oua-extra" not in sleeper.guest("dpkg-query -W")
        assert not sleeper.save.exists()
    finally:
        sleeper.virsh.restart(SETTINGS)


@pytest.mark.skipif(not _ALL, reason="'make libvirt-test' runs it")
def test_user_updates_domains_of_his_own_libvirt(virsh: Inside) -> None:
    with contextlib.closing(map_file(virsh.folder / "kept" / "save")) as file:
        xml = read_header(file, "save").xml.decode()
    with session(virsh.folder / "kept", xml) as own:
        agent: Any = VirshAgent(own, "web1")
        command = own.user.ouassister
        listed = {one["vm"]: one["state"] for one in command("list", "--connect", URI).result}
        assert listed == {"web1": "suspended"}
        update = command("update", "--connect", URI, "--install", "oua-extra", "web1")
        assert update.status == 0, update
        resumed = command("resume", "--connect", URI, "web1")
        assert resumed.status == 0, resumed
        assert agent.run(["oua-extra"], timeout_s=60).stdout == b"extra\n"
        links = [own.run("domif-getlink", "web1", mac).split()[-1] for mac in (UP, DOWN)]
        assert links == ["up", "down"]

        own.run("undefine", "web1")  # from now on it is there for as long as it runs
        saved = ("--connect", URI, "--save", str(own.user.home / "vm" / "web1.save"), "web1")
        assert command("suspend", *saved).status == 0
        assert not own.ask("domstate", "web1").ok
        update = command("update", "--install", "oua-gone", *saved)
        assert update.status == 0, update
        resumed = command("resume", *saved)
        assert resumed.status == 0, resumed
        assert agent.run(["oua-gone"], timeout_s=60).stdout == b"gone\n"


# Both are asked all, one after the other, and what they say is told.
_SAME = """
import json, sys
from ouassister.provider.libvirt_python import Library
from ouassister.provider.virsh import DEFAULT, Virsh

def say(ask, *words):
    answer = ask.ask(*words)
    return [answer.ok, answer.output.strip(), answer.reason]

questions = json.load(sys.stdin)
print(json.dumps([[say(one(DEFAULT), *words) for words in questions] for one in (Virsh, Library)]))
"""
# It looks for itself whether a domain runs and has such an interface, and has words of its own.
_REFUSED_BY_VIRSH = ("start", "domif-setlink")
_UUID = "11111111-2222-3333-4444-555555555555"
_ASLEEP = [
    ["domstate", "web1"], ["domstate", "nobody"], ["domstate", _UUID], ["dumpxml", "web1"],
    ["dumpxml", "web1", "--inactive"], ["list", "--inactive", "--uuid", "--name"],
    ["suspend", "web1"], ["destroy", "web1"],
    ["metadata", "web1", "urn:ouassister:gate:1", "--live", "--remove"],
    ["qemu-monitor-command", "web1", "--hmp", "info status"],
    ["detach-device-alias", "web1", "ua-ouassister-medium", "--live"],
    ["restore", "/nowhere", "--xml", "/etc/hostname", "--paused"],
    ["qemu-agent-command", "web1", '{"execute": "guest-ping"}', "--timeout", "2"],
]  # fmt: skip
_AWAKE = [  # it ends as it begins
    ["domif-setlink", "web1", UP, "down"], ["domif-setlink", "web1", UP.upper(), "up"],
    ["domstate", "web1"], ["dumpxml", "web1"], ["dumpxml", "web1", "--inactive"],
    ["list", "--inactive", "--uuid", "--name"], ["start", "web1", "--paused"], ["suspend", "web1"],
    ["domstate", "web1"], ["resume", "web1"], ["domstate", "web1"], ["managedsave-remove", "web1"],
    ["domif-setlink", "web1", "00:00:00:00:00:09", "up"], ["domif-setlink", "web1", UP, "no"],
    ["qemu-monitor-command", "web1", "--hmp", "info status"],
    ["qemu-agent-command", "web1", '{"execute": "guest-ping"}', "--timeout", "30"],
    ["qemu-agent-command", "web1", '{"execute": "guest-no"}', "--timeout", "30"],
    ["qemu-agent-command", "web1", "no json", "--timeout", "30"],
    ["metadata", "web1", "urn:ouassister:gate:1", "--live", "--remove"],
    ["detach-device-alias", "web1", "ua-ouassister-medium", "--live"],
    ["attach-device", "web1", "/etc/hostname", "--live"],
]  # fmt: skip


def _compare(sleeper: Sleeper, questions: list[list[str]]) -> None:
    argv = [*sleeper.virsh.enter(), sys.executable, "-c", _SAME]
    text = json.dumps(questions).encode()
    done = subprocess.run(argv, input=text, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for words, virsh, library in zip(questions, *json.loads(done.stdout), strict=True):
        assert library[:2] == virsh[:2], words
        if words[0] in _REFUSED_BY_VIRSH:
            assert bool(library[2]) == bool(virsh[2]), words
        else:
            assert library[2].rpartition(": ")[2] == virsh[2].rpartition(": ")[2], words


@pytest.mark.parametrize("sleeper", _BOTH[:1], indirect=True)  # it asks both by itself
def test_libvirt_python_says_what_virsh_says(sleeper: Sleeper) -> None:
    _compare(sleeper, _ASLEEP)
    sleeper.virsh.run("start", "web1", timeout_s=120)
    sleeper.guest("true")
    _compare(sleeper, _AWAKE)


_RESTORE = """
from ouassister.provider import libvirt
from ouassister.errors import StateError
vm = libvirt.find("web1")
awake = vm.restore()
"""


def test_gate_lets_nothing_through_until_it_is_opened_for_links_that_were_up(
    sleeper: Sleeper,
) -> None:
    frames = sleeper.folder / "frames.pcap"
    sleeper.python(_RESTORE)
    assert sleeper.state() == "paused"
    with pytest.raises(AgentError, match="domain is not running"):
        VirshAgent(sleeper.virsh, "web1").ping(timeout_s=2)
    sleeper.virsh.run("resume", "web1")
    knock = "ip link set eth0 up; bash -c 'echo knock >/dev/udp/10.0.2.2/9'; sleep 0.2; true"
    carrier = (
        "cat /sys/class/net/eth0/carrier; ip link set eth1 up; cat /sys/class/net/eth1/carrier"
    )
    sleeper.guest(knock)
    assert sleeper.guest(carrier).split() == ["0", "0"]
    assert count_frames(frames) == 0
    with pytest.raises(AgentError, match="refused guest-exec"):
        VirshAgent(sleeper.virsh, "web1").run(["/no/such/program"], timeout_s=60)
    check_channel(VirshAgent(sleeper.virsh, "web1"))
    awake = "from ouassister.provider import libvirt\nvm = libvirt.find('web1').attach()\n"
    sleeper.python(f"{awake}vm.open_quarantine()")
    sleeper.guest(knock)
    assert sleeper.guest(carrier).split() == ["0", "1"]
    assert count_frames(frames) == 0
    sleeper.python(f"{awake}vm.set_links(up=False)")
    assert sleeper.guest(carrier).split() == ["0", "0"]
    sleeper.python(f"{awake}vm.set_links(up=True)")
    sleeper.guest(knock)
    assert sleeper.guest(carrier).split() == ["1", "0"]
    assert count_frames(frames) > 0


# The helper and the key are installed, and then the agent goes.
_CHANNELS = """sh /root/helper/install.sh
card=$(grep -l {card} /sys/class/net/*/address | cut -d/ -f5)
ip addr add 10.77.0.15/24 dev $card; ip link set $card up
mkdir -p -m 700 /root/.ssh; echo '{key}' >/root/.ssh/authorized_keys
until systemctl is-active --quiet ouassister-port; do sleep 0.1; done
systemd-run --on-active=1 systemctl stop qemu-guest-agent; sync"""
_RUN = """
from ouassister.access import Access
from ouassister.provider import libvirt
with libvirt.find("web1").attach() as vm:
    vm.reach(Access("virtio-port"))
    print(vm.channel().run(["/bin/sh", "-c", {script!r}], timeout_s=120).stdout.decode())
"""


def _agent_is_gone(virsh: Inside) -> bool:
    try:
        VirshAgent(virsh, "web1").ping(timeout_s=1)
    except (AgentError, DeadlineError):
        return True
    return False


_CONFLICT = """
import sys
from ouassister.cli.main import main
from ouassister.provider.libvirt import RunningDomain

cont = RunningDomain.cont

def continued(self):
    cont(self)
    script = "echo '# woken' >>/usr/bin/oua-hello; echo knock >/dev/udp/10.0.2.2/9 || true"
    self.qga().run(["/bin/bash", "-c", script], timeout_s=120)

RunningDomain.cont = continued
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not _ALL, reason="'make libvirt-test' runs it")
def test_conflict_costs_its_package_by_another_medium(sleeper: Sleeper) -> None:
    wish = ("--install", "oua-hello", "--install", "oua-extra", "--on-conflict", "stage")
    update = sleeper.run("update", *wish)
    assert update.status == 0, update
    waking = replace(sleeper, program=("-c", _CONFLICT))
    resumed = waking.run("resume", "--on-conflict", "stage")
    assert resumed.status == 0, resumed
    assert [one["path"] for one in resumed.result["conflicts"]] == ["/usr/bin/oua-hello"]
    assert [one["name"] for one in resumed.result["fell_back"]] == ["oua-hello"]
    assert [one["status"] for one in resumed.result["staged"]] == ["installed"]
    assert sleeper.guest("oua-hello; oua-extra; dpkg --audit") == "two\nextra"
    assert sleeper.guest("ls /dev/vd?") == "/dev/vda"
    links = [sleeper.virsh.run("domif-getlink", "web1", mac).split()[-1] for mac in (UP, DOWN)]
    assert links == ["up", "down"]


@pytest.mark.skipif(not _ALL, reason="'make libvirt-test' runs it")
def test_domain_without_its_agent_is_updated_by_the_helper_and_without_that_by_ssh(
    sleeper: Sleeper, repository: Repository
) -> None:
    need("ssh-keygen")
    key = sleeper.home.with_name("key")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = " ".join(key.with_suffix(".pub").read_text().split()[:2])
    sleeper.virsh.run("start", "web1", timeout_s=120)
    sleeper.guest("mkdir -p /root/helper")
    for name, content in helper.files().items():
        VirshAgent(sleeper.virsh, "web1").write_file(f"/root/helper/{name}", content)
    sleeper.guest(_CHANNELS.format(card=SSH_CARD, key=public))
    wait_until(lambda: _agent_is_gone(sleeper.virsh))
    sleeper.virsh.run("managedsave", "web1", timeout_s=120)
    told = f"local-mirrors='127.0.0.1:{repository.port}' ssh-device='mgmt0' ssh-identity='{key}'"
    words = ("metadata", "web1", "urn:ouassister:vm:1", "--config", "--key", "ouassister")
    sleeper.virsh.run(*words, "--set", f"<vm {told}/>")
    update = sleeper.run("update", "--install", "oua-extra")
    assert (update.status, update.result["channel"]) == (0, "virtio-port"), update
    resumed = sleeper.run("resume")
    assert resumed.status == 0, resumed
    out = sleeper.python(_RUN.format(script="oua-extra; dpkg --audit"))
    assert out.split() == ["extra"]
    links = [sleeper.virsh.run("domif-getlink", "web1", mac).split()[-1] for mac in (UP, DOWN)]
    assert links == ["up", "down"]

    stop = "systemd-run --on-active=1 systemctl stop ouassister-port; sync"
    sleeper.python(_RUN.format(script=stop))
    ask = _RUN.format(script="true").replace("timeout_s=120", "timeout_s=1")
    wait_until(lambda: "Deadline" in _last_words(sleeper, ask))
    sleeper.virsh.run("managedsave", "web1", timeout_s=120)
    update = sleeper.run("update", "--install", "oua-gone")
    assert (update.status, update.result["channel"]) == (0, "ssh"), update
    resumed = sleeper.run("resume")
    assert resumed.status == 0, resumed
    assert "completion marker of this change set" in resumed.result["verified"]


def _last_words(sleeper: Sleeper, script: str) -> str:
    argv = [*sleeper.virsh.enter(), sys.executable, "-c", script]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120).stderr


def test_medium_that_cannot_be_plugged_in_leaves_the_domain_asleep(sleeper: Sleeper) -> None:
    before = sleeper.hashes()
    # What reflection does when anything fails before the first instruction.
    told = sleeper.python(
        f"{_RESTORE}"
        "import pathlib, tempfile\n"
        "from ouassister.provider.virsh import Virsh\n"
        "medium = pathlib.Path(tempfile.mkdtemp(), 'medium.img')\n"
        "medium.write_bytes(bytes(512))\n"
        "awake.attach_medium(medium, 'oua-one')\n"
        "try:\n"
        "    awake.attach_medium(medium, 'oua-two')\n"
        "except StateError as error:\n"
        "    print(error.message)\n"
        "    awake.kill()\n"
    )
    assert "libvirt refused attach-device" in told
    assert sleeper.state() == "shut off"
    assert sleeper.hashes()["web1.save"] == before["web1.save"]
    assert sleeper.run("inspect").status == 0


def test_resume_that_stopped_half_way_is_taken_up_with_the_gate_closed(sleeper: Sleeper) -> None:
    # libvirt forgets that there is a save; one that comes to its place is there all the same.
    sleeper.virsh.run("managedsave-remove", "web1")
    sleeper.fall_asleep(sleeper.folder / "kept")
    update = sleeper.run("update", "--install", "oua-extra")
    with Store(sleeper.home) as store:  # as a host leaves it that lost ouassister after the resume
        store.set_state(update.result["changeset_id"], ChangesetState.APPLYING)
    sleeper.python(f"{_RESTORE}vm.retire_save(); awake.cont()\n")
    assert not sleeper.save.exists()
    sleeper.save.with_name("web1.save.resumed").unlink()
    resumed = sleeper.run("resume")
    assert resumed.status == 0, resumed
    assert "oua-extra" in sleeper.guest("dpkg-query -W")
    links = [sleeper.virsh.run("domif-getlink", "web1", mac).split()[-1] for mac in (UP, DOWN)]
    assert links == ["up", "down"]


def test_domain_started_by_somebody_ends_the_update_and_runs_on(sleeper: Sleeper) -> None:
    process = subprocess.Popen(
        sleeper.command("update", "--install", "oua-slow"),
        env=sleeper.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        until(process, b"Setting up oua-slow")
        sleeper.virsh.run("start", "web1", timeout_s=120)
        process.wait(timeout=30)
        assert sleeper.guest("oua-hello") == "one"
    finally:
        process.kill()
        output, _errors = process.communicate()
    assert process.returncode == 20
    assert b"state-running" in output
    assert leftovers(sleeper.home) == NOTHING


def test_domain_that_cannot_be_updated_is_refused_by_name(sleeper: Sleeper) -> None:
    xml = (sleeper.folder / "domain.xml").read_text()
    network = "<source protocol='nbd' name='disk'><host name='127.0.0.1' port='9'/></source>"
    xml = xml.replace("<disk type='file'", "<disk type='network'")
    xml = xml.replace(f"<source file='{sleeper.folder}/disk.qcow2'/>", network)
    odd = sleeper.folder / "odd.xml"
    odd.write_text(xml.replace("<name>web1<", "<name>odd<"))
    sleeper.virsh.run("define", str(odd))
    for verb in ("inspect", "plan", "resume"):
        done = replace(sleeper, toml=Path("odd")).run(verb)
        assert (done.status, done.code) == (23, "unsupported-guest"), done
        assert "disk vda of odd is of type network" in done.value["error"]["message"]
    sleeper.virsh.run("undefine", "odd")


def test_word_that_is_no_domain_is_a_usage_error(sleeper: Sleeper) -> None:
    for word in ("nobody", "web1x"):
        done = replace(sleeper, toml=Path(word)).run("inspect")
        assert (done.status, done.code) == (2, "usage"), done
    elsewhere = replace(sleeper, words=("--connect", "qemu+ssh://far/system"))
    assert elsewhere.run("inspect").code == "usage"
    nowhere = replace(sleeper, words=("--connect", "qemu+unix:///system?socket=/nowhere"))
    done = nowhere.run("inspect")
    assert (done.status, done.code) == (2, "host-not-ready"), done
