"""What is read of a domain's XML, what is refused in it, and what is changed before a resume."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase

import pytest

from ouassister.errors import UnsupportedGuestError
from ouassister.provider.disks import Disk
from ouassister.provider.domain_xml import (
    SETTINGS,
    Link,
    closed,
    has_medium,
    helper_socket,
    medium,
    parse,
    quarantine,
    settings,
    ssh_network,
)
from ouassister.provider.management import Management

DISK = """
<disk type='file' device='disk'>
  <driver name='qemu' type='qcow2' cache='none'/>
  <source file='/vms/web1.qcow2' index='1'/>
  <target dev='vda' bus='virtio'/>
  <serial>root</serial>
</disk>
"""
NIC = "<interface type='network'><mac address='52:54:00:00:00:0{0}'/>{1}</interface>"
UP, DOWN = NIC.format(1, ""), NIC.format(2, "<link state='down'/>")
CHANNEL = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
OTHERS = """
<disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>
<disk type='network' device='disk'><source protocol='nbd'/><target dev='vdb'/><readonly/></disk>
<disk type='file' device='floppy'><target dev='fda'/></disk>
"""
PORTS = """
<controller type='pci' index='0' model='pcie-root'/>
<controller type='pci' index='1' model='pcie-root-port'>
  <address type='pci' bus='0x00'/>
</controller>
<interface type='user'>
  <mac address='52:54:00:00:00:09'/><address type='pci' bus='0x01'/>
</interface>
"""


def xml(
    devices: str = DISK + UP + DOWN,
    *,
    more: str = "",
    kind: str = "qemu",
    name: str = "web1",
    machine: str = "pc-i440fx-7.2",
) -> bytes:
    return (
        f"<domain type='{kind}'><name>{name}</name><uuid>u-1</uuid>"
        f"<os><type machine='{machine}'>hvm</type></os>"
        f"<devices>{devices}{CHANNEL}</devices>{more}</domain>"
    ).encode()


def test_disks_and_links_are_what_the_xml_says() -> None:
    hardware = parse(xml(DISK + OTHERS + UP + DOWN))
    assert (hardware.name, hardware.uuid) == ("web1", "u-1")
    assert hardware.disks == (Disk("vda", Path("/vms/web1.qcow2"), "qcow2", "root"),)
    assert hardware.links == (
        Link("52:54:00:00:00:01", up=True),
        Link("52:54:00:00:00:02", up=False),
    )
    assert hardware.target not in ("vda", "vdb")
    assert hardware.lacking == ""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("type='file'", "type='network'", "disk vda of web1 is of type network"),
        ("type='file'", "type='block'", "of type block"),
        ("type='file'", "type='volume'", "of type volume"),
        ("file='/vms/web1.qcow2'", "", "of type file"),
        (" type='qcow2'", "", "has the format none"),
        ("type='qcow2'", "type='vmdk'", "has the format vmdk"),
        ("<driver name='qemu' type='qcow2' cache='none'/>", "", "has the format none"),
        ("<serial>", "<shareable/><serial>", "is shareable"),
        ("<serial>", "<transient/><serial>", "has transient"),
        ("<serial>", "<mirror type='file'/><serial>", "has mirror"),
        ("<serial>", "<encryption format='luks'/><serial>", "has encryption"),
        ("index='1'/>", "index='1'><slices/></source>", "has slices"),
        ("<serial>", "<backingStore type='block'><a/></backingStore><serial>", "no file"),
        (
            "<serial>",
            "<backingStore type='file'><format type='raw'/><source file='/b'/></backingStore>"
            "<serial>",
            "without an end",
        ),
    ],
)
def test_disk_that_is_in_no_rule_is_refused(old: str, new: str, words: str) -> None:
    assert old in DISK
    with pytest.raises(UnsupportedGuestError, match=words):
        parse(xml(DISK.replace(old, new)))


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        (xml(UP), "has no disk"),
        (xml(OTHERS), "has no disk"),
        (xml(kind="xen"), "of type 'xen'"),
        (xml(name="a/b"), "cannot name a folder"),
        (xml(name=".."), "cannot name a folder"),
        (xml(DISK + UP + UP), "two interfaces with the address '52:54:00:00:00:01'"),
        (xml(DISK + UP.replace("'network'", "'hostdev'")), "is a device of the host's"),
        (b"<domain", "cannot be read"),
        (b"<network/>", "of a 'network'"),
    ],
)
def test_domain_that_is_in_no_rule_is_refused(domain: bytes, words: str) -> None:
    with pytest.raises(UnsupportedGuestError, match=words):
        parse(domain)


def test_backing_chain_is_told_where_the_xml_has_one() -> None:
    assert parse(xml()).disks[0].declared is None
    ended = DISK.replace("<serial>", "<backingStore/><serial>")
    assert parse(xml(ended)).disks[0].declared == ()
    chain = (
        "<backingStore type='file'><format type='qcow2'/><source file='/b'/>"
        "<backingStore type='file'><format type='raw'/><source file='/c'/><backingStore/>"
        "</backingStore></backingStore><serial>"
    )
    declared = parse(xml(DISK.replace("<serial>", chain))).disks[0].declared
    assert declared == ((Path("/b"), "qcow2"), (Path("/c"), "raw"))


def test_closed_domain_has_no_link_up_and_knows_which_were() -> None:
    before = parse(xml()).links
    changed = closed(xml(more="<metadata><x:y xmlns:x='urn:x'/></metadata>"))
    assert (changed.count(b"<link "), changed.count(b'<link state="down"')) == (2, 2)
    assert parse(changed).links == before
    assert b"migration.announce-rounds=0" in changed
    assert b"urn:x" in changed


def test_domain_that_slept_behind_its_gate_is_closed_again_and_knows_the_same() -> None:
    once = closed(xml())
    assert closed(once) == once
    assert once.count(b"migration.announce-rounds") == 1


def test_gate_that_somebody_opened_says_nothing_any_more() -> None:
    opened = closed(xml(DISK + UP + DOWN)).replace(b'state="down"', b'state="up"', 1)
    only = closed(xml(DISK + DOWN + UP)).replace(b'state="down"', b'state="up"', 1)
    assert [link.up for link in parse(opened).links] == [True, False]
    assert [link.up for link in parse(only).links] == [True, False]


@pytest.mark.parametrize(
    ("devices", "free"),
    [
        (DISK + PORTS, False),
        (DISK + PORTS.replace("bus='0x01'", "bus='0x00'"), True),
        (DISK + PORTS + "<controller type='pci' index='2' model='pcie-to-pci-bridge'/>", True),
    ],
)
def test_q35_needs_a_free_port(devices: str, free: bool) -> None:
    hardware = parse(xml(devices, machine="pc-q35-7.2"))
    assert hardware.lacking == ("" if free else "a free pcie-root-port")
    assert parse(xml(devices)).lacking == ""


def test_port_of_the_helper_is_a_channel_and_libvirt_tells_where_it_is() -> None:
    assert parse(xml()).channels == ("qemu-ga",)
    asleep = xml().replace(b"org.qemu.guest_agent.0", b"org.ouassister.0")
    assert (parse(asleep).channels, parse(asleep).lacking) == (("virtio-port",), "")
    assert helper_socket(asleep) is None
    source = b"<channel type='unix'><source mode='bind' path='/run/x/org.ouassister.0'/>"
    awake = asleep.replace(b"<channel type='unix'>", source)
    assert helper_socket(awake) == Path("/run/x/org.ouassister.0")
    assert helper_socket(xml()) is None
    both = asleep.replace(b"</devices>", CHANNEL.encode() + b"</devices>")
    assert parse(both).channels == ("qemu-ga", "virtio-port")


NETWORK = "user,id=mgmt,restrict=on,net=10.77.0.0/24,hostfwd=tcp:127.0.0.1:0-:22"


def passed_on(network: str) -> bytes:
    words = ("-netdev", network, "-device", "virtio-net-pci,id=mgmt0,netdev=mgmt,addr=10")
    args = "".join(f"<q:arg value='{word}'/>" for word in words)
    space = "http://libvirt.org/schemas/domain/qemu/1.0"
    return xml(more=f"<q:commandline xmlns:q='{space}'>{args}</q:commandline>")


def named(attributes: str) -> bytes:
    return xml(more=f"<metadata><o:vm xmlns:o='{SETTINGS}' {attributes}/></metadata>")


def test_network_for_ssh_is_one_that_is_passed_on_to_qemu(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch()
    told = named(f"ssh-device='mgmt0' ssh-identity='{key}' ssh-user='deploy'")
    found = ssh_network(told, passed_on(NETWORK))
    assert found == Management("mgmt0", "mgmt", 0, 22, key, "deploy")
    assert ssh_network(named("ssh-device='mgmt0'"), passed_on(NETWORK)) == Management(
        "mgmt0", "mgmt", 0, 22, None
    )
    assert ssh_network(named("local-mirrors=''"), passed_on(NETWORK)) is None
    assert ssh_network(xml(), passed_on(NETWORK)) is None


@pytest.mark.parametrize(
    ("attributes", "network", "words"),
    [
        ("ssh-device='other'", NETWORK, "'other' is the id of no -device"),
        ("ssh-device='mgmt0'", NETWORK.replace("restrict=on,", ""), "without restrict=on"),
        ("ssh-device='mgmt0' ssh-identity='key'", NETWORK, "which is no file"),
        ("ssh-device='mgmt0' ssh-identity='/no/key'", NETWORK, "which is no file"),
        ("ssh-device='mgmt0' ssh-user='a b'", NETWORK, "no name of one"),
    ],
)
def test_network_for_ssh_that_will_not_do_is_refused(
    attributes: str, network: str, words: str
) -> None:
    with pytest.raises(UnsupportedGuestError, match=words):
        ssh_network(named(attributes), passed_on(network))


def test_agent_needs_its_channel_and_the_medium_a_name() -> None:
    other = xml().replace(b"org.qemu.guest_agent.0", b"com.redhat.spice.0")
    assert parse(other).channels == ()  # what can be used is chosen by reaching/
    assert parse(xml().replace(b"type='unix'", b"type='spicevmc'")).channels == ()
    many = "".join(DISK.replace("vda", f"vd{letter}") for letter in ascii_lowercase)
    assert parse(xml(many)).lacking == "a free name of a virtio disk"


def test_medium_is_a_read_only_disk_that_is_no_volume() -> None:
    disk = medium(Path("/vms/m.img"), "oua-1", "vdz").decode()
    plugged = xml(DISK + disk)
    assert has_medium(plugged)
    assert not has_medium(xml())
    assert parse(plugged).disks == parse(xml()).disks


def test_settings_come_from_our_own_metadata() -> None:
    words = "local-mirrors='127.0.0.1:80 [::1]:3142' host-kernel-mounts='yes'"
    told = f"<metadata><o:vm xmlns:o='urn:ouassister:vm:1' {words}/></metadata>"
    assert settings(xml(more=told)) == ((("127.0.0.1", 80), ("::1", 3142)), True)
    assert settings(xml()) == ((), False)
    with pytest.raises(UnsupportedGuestError, match="'nowhere' where host:port belongs"):
        settings(xml(more=told.replace("127.0.0.1:80", "nowhere")))


def test_quarantine_is_an_interface_and_its_link_says_nothing_of_the_gate() -> None:
    words = "<metadata><o:vm xmlns:o='urn:ouassister:vm:1' quarantine='{}'/></metadata>"
    told = xml(DISK + UP + DOWN, more=words.format("52:54:00:00:00:02"))
    assert quarantine(told, parse(told)) == ("52:54:00:00:00:02",)
    assert quarantine(xml(), parse(xml())) == ()
    opened = closed(told).replace(b'<link state="down" /></interface><channel', b"<X", 1)
    assert b"<X" in opened
    opened = opened.replace(b"<X", b'<link state="up" /></interface><channel')
    assert parse(opened).links == parse(told).links
    other = xml(more=words.format("52:54:00:00:00:0f"))
    with pytest.raises(UnsupportedGuestError, match="which no interface has"):
        quarantine(other, parse(other))
