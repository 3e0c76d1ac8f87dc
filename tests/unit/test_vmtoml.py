"""The loader of vm.toml: what it accepts, and that each refusal names its key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ouassister.errors import UnsupportedGuestError, UsageError
from ouassister.provider import cmdline, vmtoml

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """
[vm]
name = "web1"
save = "web1.save"

[qemu]
command = [
    "qemu-system-x86_64",
    "-m", "512",
    "-display", "none",
    "-blockdev", "driver=qcow2,node-name=disk0,file.driver=file,file.filename=a.qcow2",
    "-device", "virtio-blk-pci,drive=disk0,id=vd0",
    "-netdev", "user,id=net0",
    "-device", "virtio-net-pci,netdev=net0,id=nic0",
    "-chardev", "socket,id=qga,path=qga.sock,server=on,wait=off",
]
qmp = "qmp.sock"
agent = "qga.sock"

[[disk]]
node = "disk0"
path = "a.qcow2"
format = "qcow2"
serial = "S1"

[[net]]
device = "nic0"

[medium]
bus = "pci.0"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.qcow2").touch()
    return tmp_path


def _load(folder: Path, text: str) -> vmtoml.VmConfig:
    path = folder / "vm.toml"
    path.write_text(text)
    return vmtoml.load(path)


def test_host_kernel_mounts_are_asked_for(folder: Path) -> None:
    assert not _load(folder, GOOD).host_kernel_mounts
    asked = GOOD.replace("[qemu]", "host_kernel_mounts = true\n[qemu]")
    config = _load(folder, asked)
    assert config.host_kernel_mounts
    assert _load(folder, vmtoml.dump(config)).host_kernel_mounts
    odd = asked.replace("= true", '= "yes"')
    with pytest.raises(UsageError, match=r"vm\.host_kernel_mounts is 'yes' where"):
        _load(folder, odd)


def test_good_file_is_loaded_with_paths_of_its_folder(folder: Path) -> None:
    config = _load(folder, GOOD)
    assert config.name == "web1"
    assert config.save == folder / "web1.save"  # need not exist: that is a state of the VM
    assert config.qmp == folder / "qmp.sock"
    assert config.agent == folder / "qga.sock"
    assert config.disks == (vmtoml.Disk("disk0", folder / "a.qcow2", "qcow2", "S1"),)
    assert config.nets == (vmtoml.Net("nic0", "net0"),)
    assert config.medium_bus == "pci.0"


def test_dump_is_loaded_as_the_same_record(folder: Path) -> None:
    config = _load(folder, GOOD)
    assert _load(folder, vmtoml.dump(config)) == config


def test_dump_keeps_a_command_with_quotes_and_controls(folder: Path) -> None:
    odd = r'"-m", "5\"1\\2\u007f\u0001é"'
    config = _load(folder, GOOD.replace('"-m", "512"', odd))
    assert config.command[2] == '5"1\\2\x7f\x01é'
    assert _load(folder, vmtoml.dump(config)) == config


def test_json_blockdev_with_referenced_file_node_is_understood(folder: Path) -> None:
    nodes = (
        r'"-blockdev", "{\"driver\":\"file\",\"node-name\":\"f\",\"filename\":\"a.qcow2\"}",'
        r'"-blockdev", "{\"driver\":\"qcow2\",\"node-name\":\"disk0\",\"file\":\"f\"}",'
    )
    start = GOOD.index('"-blockdev"')
    text = GOOD[:start] + nodes + GOOD[GOOD.index("\n", start) :]
    assert _load(folder, text).disks[0].node == "disk0"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('name = "web1"', "", "vm.name is missing"),
        ('name = "web1"', "name = 7", "vm.name is 7"),
        ('name = "web1"', 'name = ""', "vm.name"),
        ('name = "web1"', 'name = "a/b"', "vm.name"),
        ('name = "web1"', 'name = "web1"\nnmae = 1', "vm.nmae is not a known key"),
        ("[vm]", "extra = 1\n[vm]", "extra is not a known key"),
        ("[[net]]", "[net]", "write [[net]]"),
        ('qmp = "qmp.sock"', "", "qemu.qmp is missing"),
        ('qmp = "qmp.sock"', 'qmp = "no/such/folder.sock"', "qemu.qmp lies in"),
        ('qmp = "qmp.sock"', f'qmp = "{"x" * 120}"', "qemu.qmp is longer"),
        ('agent = "qga.sock"', 'agent = "other.sock"', "qemu.agent"),
        ('"-m", "512"', '"-m", 512', "qemu.command holds 512"),
        ('"-m", "512"', r'"-m", "\u0000"', "qemu.command holds"),
        ('"-display", "none"', '"-incoming", "defer"', "contains -incoming"),
        ('"-display", "none"', '"--incoming", "defer"', "contains --incoming"),
        ('"-display", "none"', '"-S"', "contains -S"),
        ('"-display", "none"', '"-daemonize"', "contains -daemonize"),
        ('"-display", "none"', '"-qmp", "stdio"', "contains -qmp"),
        ('"-display", "none"', '"-snapshot"', "contains -snapshot"),
        ('node = "disk0"', 'node = "disk1"', "disk[0].node"),
        ('path = "a.qcow2"', 'path = "b.qcow2"', "which does not exist"),
        ('path = "a.qcow2"', 'path = "vm.toml"', "opens another file"),
        ('format = "qcow2"', 'format = "vmdk"', "disk[0].format"),
        ('device = "nic0"', 'device = "nic1"', "net[0].device"),
        ('device = "nic0"', 'device = "nic0"\n[[net]]\ndevice = "nic0"', "twice"),
        ('bus = "pci.0"', "bus = true", "medium.bus is True"),
        ('bus = "pci.0"', 'slot = "1"', "medium.slot is not a known key"),
        ("[vm]", "[vm", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(folder: Path, old: str, new: str, named: str) -> None:
    assert old in GOOD
    with pytest.raises(UsageError) as caught:
        _load(folder, GOOD.replace(old, new, 1))
    assert named in caught.value.message
    assert "vm-toml.md" in caught.value.hint


def test_a_file_without_disks_is_refused(folder: Path) -> None:
    text = GOOD[: GOOD.index("[[disk]]")] + GOOD[GOOD.index("[[net]]") :]
    with pytest.raises(UsageError, match="disk is missing"):
        _load(folder, text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        vmtoml.load(tmp_path / "vm.toml")


def test_long_folder_is_fine_because_sockets_are_relative(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    (deep / "a.qcow2").touch()
    config = _load(deep, GOOD)
    assert config.short(config.qmp) == "qmp.sock"


def test_link_that_was_down_is_said_to_stay_so(folder: Path) -> None:
    text = GOOD.replace('device = "nic0"', 'device = "nic0"\nstays_down = true')
    config = _load(folder, text)
    assert config.nets == (vmtoml.Net("nic0", "net0", stays_down=True),)
    assert _load(folder, vmtoml.dump(config)).nets == config.nets


def test_link_of_the_quarantine_is_told_and_does_not_stay_down(folder: Path) -> None:
    text = GOOD.replace('device = "nic0"', 'device = "nic0"\nquarantine = true')
    config = _load(folder, text)
    assert config.nets == (vmtoml.Net("nic0", "net0", quarantine=True),)
    assert config.quarantine == ("nic0",)
    assert _load(folder, vmtoml.dump(config)).nets == config.nets
    assert _load(folder, GOOD).quarantine == ()
    both = text.replace("quarantine", "stays_down = true\nquarantine")
    with pytest.raises(UsageError, match=r"net\[0\].quarantine contradicts stays_down"):
        _load(folder, both)


def test_doubled_commas_are_one_comma() -> None:
    options = cmdline.parse("driver=file,filename=a,,b=c,node-name=n")
    assert options == {"driver": "file", "filename": "a,b=c", "node-name": "n"}
    assert cmdline.parse(f"x={cmdline.quote('a,b')}") == {"x": "a,b"}


def test_a_loop_of_file_references_ends() -> None:
    loop = [("blockdev", {"node-name": "a", "file": "a"})]
    assert cmdline.disk_files(loop, "a") == set()


def test_scsi_bus_is_told_from_a_pci_bus() -> None:
    command = ["qemu", "-device", "virtio-scsi-pci,id=scsi0", "-device", "pcie-root-port,id=p.0"]
    assert cmdline.is_scsi_bus(command, "scsi0.0")
    assert not cmdline.is_scsi_bus(command, "p.0")
    assert not cmdline.is_scsi_bus(command, "pci.0")


MANAGED = GOOD.replace(
    """    "-chardev",""",
    """    "-netdev", "user,id=mgmt,restrict=on,hostfwd=tcp:127.0.0.1:0-:22",
    "-device", "virtio-net-pci,netdev=mgmt,id=mgmt0",
    "-chardev",""",
)
SSH = """
[ssh]
device = "mgmt0"
identity = "key"
"""


def test_management_network_is_read_and_written(folder: Path) -> None:
    (folder / "key").touch()
    config = _load(folder, MANAGED + SSH)
    assert config.channels == ("qemu-ga", "ssh")
    assert config.management is not None
    assert config.management.identity == folder / "key"
    assert _load(folder, vmtoml.dump(config)) == config
    assert _load(folder, MANAGED).channels == ("qemu-ga",)
    alone = _load(folder, (MANAGED + SSH).replace('agent = "qga.sock"', ""))
    assert alone.channels == ("ssh",)
    assert config.management.user == "root"
    other = _load(folder, MANAGED + SSH + 'user = "web.admin"\n')
    assert other.management is not None
    assert other.management.user == "web.admin"
    assert _load(folder, vmtoml.dump(other)) == other


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("restrict=on,", "", "ssh.device 'mgmt0' has a back end without restrict=on"),
        ('identity = "key"', 'user = "-oProxyCommand=x"', "has the user '-oProxyCommand=x'"),
        ('device = "mgmt0"', 'device = "nic0"', "ssh.device 'nic0' has a back end without"),
        ('device = "mgmt0"', "", "ssh.device is missing"),
        ('identity = "key"', 'identity = "none"', "which is no file"),
        ('identity = "key"', 'shell = "sh"', "ssh.shell is not a known key"),
        ('device = "nic0"', 'device = "mgmt0"', "ssh.device is 'mgmt0', which"),
    ],
)
def test_management_network_that_is_off_is_refused(
    folder: Path, old: str, new: str, words: str
) -> None:
    (folder / "key").touch()
    with pytest.raises(UsageError) as caught:
        _load(folder, (MANAGED + SSH).replace(old, new))
    assert words in caught.value.message


def test_medium_comes_by_a_disk_that_has_a_place_or_by_the_channel(folder: Path) -> None:
    machine = '"qemu-system-x86_64",\n    "-machine", "q35",'
    without = GOOD.replace('"qemu-system-x86_64",', machine)
    _load(folder, GOOD).refuse_unresumable()
    with pytest.raises(UnsupportedGuestError, match="lacks a pcie-root-port"):
        _load(folder, without).refuse_unresumable()
    carried = _load(folder, without.replace('bus = "pci.0"', 'by = "channel"'))
    carried.refuse_unresumable()
    assert _load(folder, vmtoml.dump(carried)) == carried
    with pytest.raises(UsageError, match=r"medium\.by is 'post'"):
        _load(folder, GOOD.replace('bus = "pci.0"', 'by = "post"'))


def test_helper_has_a_port_of_its_own_and_comes_after_the_agent(folder: Path) -> None:
    port = """"-chardev", "socket,id=oua,path=oua.sock,server=on,wait=off",
    "-device", "virtserialport,chardev=oua,name=org.ouassister.0",
]
qmp"""
    text = GOOD.replace("]\nqmp", port, 1).replace("[[disk]]", 'helper = "oua.sock"\n[[disk]]')
    config = _load(folder, text)
    assert (config.helper, config.channels) == (folder / "oua.sock", ("qemu-ga", "virtio-port"))
    assert _load(folder, vmtoml.dump(config)).helper == config.helper
    for helper in ("qga.sock", "other.sock"):  # no port of that name, and no socket
        with pytest.raises(UsageError, match=r"qemu\.helper is .*, which no"):
            _load(folder, text.replace('helper = "oua.sock"', f'helper = "{helper}"'))
    alone = _load(folder, text.replace('agent = "qga.sock"\n', ""))
    assert alone.channels == ("virtio-port",)
