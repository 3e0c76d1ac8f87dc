"""What a libvirt domain's XML says of disks, links and the places of its devices.

What is in no rule here and could change what a disk holds is refused by its name.

Source: libvirt v9.0.0, ``docs/formatdomain.rst``; ``src/conf/domain_conf.c``
(``virDomainDiskDefParseXML``, ``virDomainNetDefParseXML``); QEMU v7.2.0 ``hw/net/virtio-net.c``
(``virtio_net_post_load_device``), ``migration/options.c`` (``announce-rounds``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree

from ouassister.access import AGENT, PORT, PORT_NAME, ROOT
from ouassister.errors import UnsupportedGuestError
from ouassister.provider import management
from ouassister.provider.disks import Disk

if TYPE_CHECKING:
    from ouassister.provider.management import Management

SETTINGS: Final = "urn:ouassister:vm:1"
GATE: Final = "urn:ouassister:gate:1"
MEDIUM: Final = "ua-ouassister-medium"
_QEMU: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
_NO_ANNOUNCEMENT: Final = "migration.announce-rounds=0"
_FORMATS: Final = ("qcow2", "raw")
# Of a disk: what does not change what it holds. Everything else is refused.
_DISK_PARTS: Final = frozenset(
    ("acpi", "address", "alias", "backingStore", "blockio", "boot", "driver", "geometry", "iotune",
     "product", "readonly", "serial", "shareable", "source", "target", "vendor", "wwn")
)  # fmt: skip
_SOURCE_PARTS: Final = frozenset(("seclabel", "privateData"))
_AGENT: Final = "org.qemu.guest_agent.0"
_CHANNELS: Final = ((AGENT, _AGENT), (PORT, PORT_NAME))
_PORTS: Final = frozenset(("pcie-root-port", "pcie-switch-downstream-port"))
_BRIDGES: Final = frozenset(("pci-bridge", "pcie-to-pci-bridge"))


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface of the domain, and whether its link is up."""

    mac: str
    up: bool


@dataclass(frozen=True, slots=True)
class Hardware:
    """What is needed of a domain's XML.

    Attributes:
        links: Every interface; ``up`` as it shall be once the gate opens.
        target: A free name of a virtio disk, for the medium.
        channels: Names of those that it has a port for; see `ouassister.access`.
        lacking: What an update needs at resume and the domain has not; "" when it has all.
        local_mirrors: From our own metadata; see `vmtoml.VmConfig`.
        host_kernel_mounts: The same.
    """

    name: str
    uuid: str
    disks: tuple[Disk, ...]
    links: tuple[Link, ...]
    target: str
    channels: tuple[str, ...]
    lacking: str
    local_mirrors: tuple[tuple[str, int], ...]
    host_kernel_mounts: bool


def parse(xml: bytes) -> Hardware:
    """Read a domain's XML.

    Raises:
        UnsupportedGuestError: A disk or an interface is of a kind that is in no rule.
    """
    root = _root(xml)
    name, uuid = identity(xml)
    if root.get("type") not in ("qemu", "kvm"):
        raise UnsupportedGuestError(f"{name} is a domain of type {root.get('type')!r}")
    disks = tuple(_disk(name, one) for one in root.iterfind("devices/disk") if _is_volume(one))
    if not disks:
        raise UnsupportedGuestError(f"{name} has no disk that it may write to")
    mirrors, mounts = _settings(root, name)
    target = _free_target(root)
    channels = tuple(name for name, port in _CHANNELS if _port(root, port) is not None)
    lacking = _lacking(root, target)
    links = _links(root, name)
    return Hardware(name, uuid, disks, links, target, channels, lacking, mirrors, mounts)


def identity(xml: bytes) -> tuple[str, str]:
    """Read a domain's name and UUID alone."""
    root = _root(xml)
    name, uuid = root.findtext("name", ""), root.findtext("uuid", "")
    if not name.isprintable() or "/" in name or name in ("", ".", ".."):
        raise UnsupportedGuestError(f"the domain's name {name!r} cannot name a folder")
    return name, uuid


def settings(xml: bytes) -> tuple[tuple[tuple[str, int], ...], bool]:
    """Read our own metadata alone: local mirrors, and whether the host's kernel may mount."""
    root = _root(xml)
    return _settings(root, root.findtext("name", ""))


def quarantine(xml: bytes, hardware: Hardware) -> tuple[str, ...]:
    """Addresses of the interfaces that our own metadata keeps for the quarantine.

    Raises:
        UnsupportedGuestError: The domain has no such interface.
    """
    macs = _quarantine(_root(xml))
    for mac in macs:
        if all(link.mac.lower() != mac for link in hardware.links):
            raise UnsupportedGuestError(
                f"{hardware.name}: quarantine holds {mac!r}, which no interface has as its address"
            )
    return macs


def ssh_network(told: bytes, xml: bytes) -> Management | None:
    """The network for ssh that our own metadata names: a device that is passed on to QEMU.

    Args:
        told: Has the metadata.
        xml: Of the domain as it sleeps or runs.

    Raises:
        UnsupportedGuestError: It is not there, or more than this host and the guest could meet
            there.
    """
    root = _root(xml)
    name, found = root.findtext("name", ""), _root(told).find(f"metadata/{{{SETTINGS}}}vm")
    device = "" if found is None else found.get("ssh-device", "")
    if found is None or not device:
        return None
    words = [
        one.get("value", "") for one in root.iterfind(f"{{{_QEMU}}}commandline/{{{_QEMU}}}arg")
    ]
    word = found.get("ssh-identity", "")
    if word and not (Path(word).is_absolute() and Path(word).is_file()):
        raise UnsupportedGuestError(f"{name}: ssh-identity is {word!r}, which is no file's path")
    identity = Path(word) if word else None
    try:
        return management.find(["", *words], device, identity, found.get("ssh-user", ROOT))
    except ValueError as error:
        raise UnsupportedGuestError(
            f"{name}: ssh-device {device!r} {error}", hint="docs/how-to/libvirt.md tells what it is"
        ) from error


def helper_socket(xml: bytes) -> Path | None:
    """The host's end of our helper's port, in the XML of a domain that runs or is paused."""
    source = _port(_root(xml), PORT_NAME)
    place = "" if source is None else source.get("path", "")
    return Path(place) if place else None


def closed(xml: bytes) -> bytes:
    """Change a saved domain's XML so that it wakes up with every link down.

    The links that were up are written into its metadata, where a later call finds them. QEMU
    announces a restored guest by frames of its own, before anybody can close a link whose state
    was loaded as up; an argument keeps it from that.
    """
    root = _root(xml)
    links = _links(root, root.findtext("name", ""))
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ElementTree.SubElement(root, "metadata")
    for old in metadata.findall(f"{{{GATE}}}gate"):
        metadata.remove(old)
    gate = ElementTree.SubElement(metadata, f"{{{GATE}}}gate")
    for link in links:
        if link.up:
            ElementTree.SubElement(gate, f"{{{GATE}}}open", mac=link.mac)
    for interface in root.iterfind("devices/interface"):
        state = interface.find("link")
        if state is None:
            state = ElementTree.SubElement(interface, "link")
        state.set("state", "down")
    words = root.find(f"{{{_QEMU}}}commandline")
    if words is None:
        words = ElementTree.SubElement(root, f"{{{_QEMU}}}commandline")
    if all(word.get("value") != _NO_ANNOUNCEMENT for word in words):
        for value in ("-global", _NO_ANNOUNCEMENT):
            ElementTree.SubElement(words, f"{{{_QEMU}}}arg", value=value)
    return ElementTree.tostring(root)


def medium(path: Path, serial: str, target: str) -> bytes:
    """The XML of the change set's disk."""
    disk = ElementTree.Element("disk", type="file", device="disk")
    ElementTree.SubElement(disk, "driver", name="qemu", type="raw")
    ElementTree.SubElement(disk, "source", file=str(path))
    ElementTree.SubElement(disk, "backingStore")
    ElementTree.SubElement(disk, "target", dev=target, bus="virtio")
    ElementTree.SubElement(disk, "readonly")
    ElementTree.SubElement(disk, "serial").text = serial
    ElementTree.SubElement(disk, "alias", name=MEDIUM)
    return ElementTree.tostring(disk)


def interface(xml: bytes, mac: str, state: str) -> bytes:
    """The XML of the interface of that address, as the domain has it, with its link ``up`` or down.

    Raises:
        LookupError: The domain has none.
    """
    for card in _root(xml).iterfind("devices/interface"):
        address = card.find("mac")
        if address is not None and address.get("address", "").lower() == mac.lower():
            link = card.find("link")
            link = ElementTree.SubElement(card, "link") if link is None else link
            link.set("state", state)
            return ElementTree.tostring(card)
    raise LookupError(mac)


def has_medium(xml: bytes) -> bool:
    """Tell whether the change set's disk is plugged in."""
    return any(one.get("name") == MEDIUM for one in _root(xml).iterfind("devices/disk/alias"))


def _root(xml: bytes) -> ElementTree.Element:
    try:
        root = ElementTree.fromstring(xml)  # noqa: S314 - libvirt's own, and the host's
    except ElementTree.ParseError as error:
        raise UnsupportedGuestError(f"the domain's XML cannot be read: {error}") from error
    if root.tag == "domain":
        return root
    raise UnsupportedGuestError(f"the XML is that of a {root.tag!r}, not of a domain")


def _is_volume(disk: ElementTree.Element) -> bool:
    """What the guest cannot write to holds nothing that an update changes."""
    return disk.get("device", "disk") == "disk" and disk.find("readonly") is None


def _disk(domain: str, disk: ElementTree.Element) -> Disk:
    target = disk.find("target")
    name = "" if target is None else target.get("dev", "")
    where = f"disk {name} of {domain}"
    kind, source, driver = disk.get("type"), disk.find("source"), disk.find("driver")
    if kind != "file" or source is None or not source.get("file"):
        raise UnsupportedGuestError(f"{where} is of type {kind}: only files are known")
    if driver is None or driver.get("type") not in _FORMATS:
        found = "none" if driver is None else driver.get("type", "none")
        raise UnsupportedGuestError(
            f"{where} has the format {found}: qcow2 or raw has to be declared",
            hint="set <driver type='...'/> to what the image is; formats are never guessed",
        )
    if disk.find("shareable") is not None:
        raise UnsupportedGuestError(f"{where} is shareable: others may write to it at any time")
    odd = [part.tag for part in disk if part.tag not in _DISK_PARTS]
    odd += [part.tag for part in source if part.tag not in _SOURCE_PARTS]
    odd += [] if disk.get("snapshot") in (None, "internal", "external", "no") else ["snapshot"]
    if odd:
        raise UnsupportedGuestError(f"{where} has {', '.join(odd)}, which is in no rule")
    return Disk(
        node=name,
        path=Path(source.get("file", "")),
        format=driver.get("type", ""),
        serial=disk.findtext("serial", ""),
        declared=_declared(where, disk),
    )


def _declared(where: str, disk: ElementTree.Element) -> tuple[tuple[Path, str], ...] | None:
    """The backing chain that the XML declares; None when it leaves that to the images."""
    chain: list[tuple[Path, str]] = []
    store = disk.find("backingStore")
    if store is None:
        return None
    while store is not None and len(store):
        source, form = store.find("source"), store.find("format")
        if store.get("type") != "file" or source is None or not source.get("file"):
            raise UnsupportedGuestError(f"{where} has a backing store that is no file")
        chain.append((Path(source.get("file", "")), "" if form is None else form.get("type", "")))
        following = store.find("backingStore")
        if following is None:
            raise UnsupportedGuestError(f"{where} has a backing chain without an end in the XML")
        store = following
    return tuple(chain)


def _links(root: ElementTree.Element, domain: str) -> tuple[Link, ...]:
    found: list[Link] = []
    for interface in root.iterfind("devices/interface"):
        address, state = interface.find("mac"), interface.find("link")
        mac = "" if address is None else address.get("address", "")
        if interface.get("type") == "hostdev":
            raise UnsupportedGuestError(f"interface {mac} of {domain} is a device of the host's")
        if not mac or any(link.mac == mac for link in found):
            raise UnsupportedGuestError(f"{domain} has two interfaces with the address {mac!r}")
        found.append(Link(mac, state is None or state.get("state") != "down"))
    gate = root.find(f"metadata/{{{GATE}}}gate")
    apart = _quarantine(root)  # opened after a failure, which says nothing of the others
    if gate is None or any(link.up for link in found if link.mac.lower() not in apart):
        return tuple(found)  # nobody closed them, or somebody opened one since
    opened = {one.get("mac") for one in gate}
    return tuple(Link(link.mac, link.mac in opened) for link in found)


def _free_target(root: ElementTree.Element) -> str:
    taken = {target.get("dev") for target in root.iterfind("devices/disk/target")}
    names = (f"vd{letter}" for letter in reversed(ascii_lowercase))
    return next((name for name in names if name not in taken), "")


def _lacking(root: ElementTree.Element, target: str) -> str:
    """What the medium would miss: pcie.0 of a q35 takes no device while it runs."""
    if not target:
        return "a free name of a virtio disk"
    kind = root.find("os/type")
    if kind is None or "q35" not in kind.get("machine", ""):
        return ""
    used = {address.get("bus", "") for address in root.iterfind("devices/*/address[@type='pci']")}
    taken = {int(bus, 0) for bus in used if bus}
    for controller in root.iterfind("devices/controller[@type='pci']"):
        free = int(controller.get("index", "0")) not in taken
        if controller.get("model") in _BRIDGES or (controller.get("model") in _PORTS and free):
            return ""
    return "a free pcie-root-port"


def _port(root: ElementTree.Element, name: str) -> ElementTree.Element | None:
    """The host's end of the virtio port of a name; an empty one where libvirt has yet to choose."""
    for channel in root.iterfind("devices/channel[@type='unix']"):
        target = channel.find("target[@type='virtio']")
        if target is not None and target.get("name") == name:
            found = channel.find("source")
            return channel if found is None else found
    return None


def _quarantine(root: ElementTree.Element) -> tuple[str, ...]:
    found = root.find(f"metadata/{{{SETTINGS}}}vm")
    return () if found is None else tuple(found.get("quarantine", "").lower().split())


def _settings(root: ElementTree.Element, domain: str) -> tuple[tuple[tuple[str, int], ...], bool]:
    found = root.find(f"metadata/{{{SETTINGS}}}vm")
    if found is None:
        return (), False
    mirrors: list[tuple[str, int]] = []
    for word in found.get("local-mirrors", "").split():
        host, colon, port = word.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise UnsupportedGuestError(
                f"{domain}: local-mirrors holds {word!r} where host:port belongs"
            )
        mirrors.append((host.strip("[]").lower(), int(port)))
    return tuple(mirrors), found.get("host-kernel-mounts") == "yes"
