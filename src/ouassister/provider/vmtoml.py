"""``vm.toml``: a plain QEMU virtual machine, described in one file.

The fields are documented in docs/reference/vm-toml.md. Everything is checked when it is loaded,
except that the save file exists: that is a state of the VM, and who opens it says so.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ouassister.access import AGENT, PORT, PORT_NAME, ROOT, SSH
from ouassister.errors import UnsupportedGuestError, UsageError
from ouassister.provider import links, management
from ouassister.provider.cmdline import (
    Options,
    devices,
    disk_files,
    node_names,
    port_names,
    reserved_option,
    sockets_at,
    words,
)
from ouassister.provider.disks import Disk as Disk
from ouassister.provider.hotplug import lacking
from ouassister.provider.management import Management
from ouassister.state.formats import QEMU_STREAM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ouassister.provider.qemu import RunningVM

_REFERENCE = "docs/reference/vm-toml.md lists the fields"
_FORMATS = ("qcow2", "raw")
_DISK, _CHANNEL = "disk", "channel"  # what brings a change set in
_SUN_PATH = 107  # unix(7): sun_path holds 108 bytes with its terminator


@dataclass(frozen=True, slots=True)
class Net:
    """A network device whose link is part of the gate; one that stays down is never opened.

    Where ``stays_down`` is None, the guest's memory tells whether its link was up. One of the
    quarantine is opened after a failure alone, by policy, and no other is then.
    """

    device: str
    netdev: str  # its back end, found in the command; "" when it has none
    stays_down: bool | None = None
    quarantine: bool = False


@dataclass(frozen=True, slots=True)
class VmConfig:
    """One ``vm.toml``; paths are absolute.

    Attributes:
        folder: The folder of the file: QEMU's working directory.
        qmp: Socket that the provider adds to the command as QMP server.
        agent: Host side of the guest agent's channel; None without one.
        medium_bus: Bus that takes the hot-plugged disk; "" lets QEMU choose.
        host_kernel_mounts: This host's kernel may mount private copies of file systems that
            nothing else reads.
        local_mirrors: Package mirrors, host and port, that may be reached though they are on
            this host.
        carried: No disk is plugged in at resume: the channel brings what it would bring.
        management: The network of ``[ssh]``; None without one.
        helper: Host side of the port of our own helper; None without one.
    """

    source: Path
    folder: Path
    name: str
    save: Path
    command: tuple[str, ...]
    qmp: Path
    agent: Path | None
    disks: tuple[Disk, ...]
    nets: tuple[Net, ...]
    medium_bus: str = ""
    host_kernel_mounts: bool = False
    local_mirrors: tuple[tuple[str, int], ...] = ()
    management: Management | None = None
    carried: bool = False
    helper: Path | None = None

    def short(self, path: Path) -> str:
        """Spell a path as QEMU gets it: relative where it lies in the folder."""
        return str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path)

    # What follows is `ouassister.provider.interface.Vm`.

    @property
    def quarantine(self) -> tuple[str, ...]:
        """See `Vm`."""
        return tuple(net.device for net in self.nets if net.quarantine)

    @property
    def formats(self) -> frozenset[str]:
        """What `restore` loads."""
        return frozenset((QEMU_STREAM.name,))

    @property
    def channels(self) -> tuple[str, ...]:
        """See `Vm`: a port is told of memory more than sshd is, and answers sooner."""
        found = ((AGENT, self.agent), (PORT, self.helper), (SSH, self.management))
        return tuple(name for name, place in found if place is not None)

    @property
    def gate_file(self) -> Path:
        """Where it is written which links a closed gate would open (provider/links.py)."""
        return self.folder / f"{self.name}.gate"

    @property
    def untold_links(self) -> tuple[links.Link, ...]:
        """See `Vm`: those of which the file says nothing.

        Raises:
            StateError: It is not known which links the gate has closed.
        """
        untold = [net for net in self.nets if net.stays_down is None and not net.quarantine]
        if not untold:
            return ()
        macs, closed = links.addresses(self.command), self.closed_by_gate
        return tuple(
            links.Link(net.device, macs.get(net.device, ""), net.device in closed) for net in untold
        )

    @property
    def closed_by_gate(self) -> tuple[str, ...]:
        """See `Vm`."""
        return links.read_closed(self.gate_file)

    def keep_closed(self, devices: Sequence[str]) -> None:
        """See `Vm`."""
        links.write_closed(self.gate_file, devices)

    def is_running(self) -> bool:
        """Tell whether its QEMU listens, or a process has one of its disks open for writing."""
        from ouassister.provider.running import is_running

        return is_running(self)

    def watch(self) -> Callable[[], bool]:
        """See `Vm`: a QEMU that somebody starts opens the disks for writing."""
        from ouassister.provider.running import has_writer

        return lambda: has_writer(self.disks)

    def refuse_unresumable(self) -> None:
        """See `Vm`: the medium has a place; of machines that are not known, QEMU says it."""
        if not self.carried and (missing := lacking(self.command, self.medium_bus)):
            raise UnsupportedGuestError(
                f"{self.name} cannot be resumed with an update: it lacks {missing}",
                hint="docs/how-to/channels.md tells what brings an update into a guest",
            )

    def medium_place(self) -> Path | None:
        """See `Vm`: QEMU runs as the caller."""
        return None

    def restore(self) -> RunningVM:
        """See `Vm` and `qemu.restore`."""
        from ouassister.provider import qemu

        return qemu.restore(self, links_up=False)

    def boot(self) -> RunningVM:
        """See `Vm` and `qemu.boot`."""
        from ouassister.provider import qemu

        return qemu.boot(self)

    def attach(self) -> RunningVM:
        """See `Vm` and `qemu.attach`."""
        from ouassister.provider import qemu

        return qemu.attach(self)

    def retire_save(self) -> None:
        """See `Vm`: the file is kept, under a name that says so.

        Only its owner knows what else it is good for.
        """
        from ouassister.provider.retire import rename_save

        rename_save(self.save)


class _Table:
    """One table of the file, read key by key; what is left over is an error."""

    def __init__(self, source: Path, name: str, value: object) -> None:
        self.source = source
        self.name = name
        if not isinstance(value, dict):
            raise self.error("", "is not a table")
        self.values = dict(cast("dict[str, Any]", value))

    def error(self, key: str, problem: str) -> UsageError:
        where = ".".join(filter(None, (self.name, key)))
        return UsageError(f"{self.source}: {where} {problem}", hint=_REFERENCE)

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self.values.pop(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, str):
            raise self.error(key, f"is {value!r} where a string belongs")
        if "\0" in value or (not value and default is None):
            raise self.error(key, f"is {value!r}: empty, or with a null byte")
        return value

    def flag(self, key: str) -> bool:
        value = self.values.pop(key, False)
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r} where true or false belongs")
        return value

    def texts(self, key: str, *, missing: tuple[str, ...] | None = None) -> tuple[str, ...]:
        if missing is not None and key not in self.values:
            return missing
        value = self.values.pop(key, None)
        if not isinstance(value, list) or not value:
            raise self.error(key, "must be a list of strings")
        for item in value:
            if not isinstance(item, str) or "\0" in item:
                raise self.error(key, f"holds {item!r} where a string belongs")
        return tuple(value)

    def tables(self, key: str) -> list[_Table]:
        value = self.values.pop(key, [])
        if not isinstance(value, list):
            raise self.error(key, f"is no array of tables: write [[{key}]]")
        return [_Table(self.source, f"{key}[{i}]", item) for i, item in enumerate(value)]

    def end(self) -> None:
        if self.values:
            keys = ", ".join(sorted(self.values))
            raise self.error(keys, "is not a known key")


def load(path: Path) -> VmConfig:
    """Read and check a ``vm.toml``.

    Raises:
        UsageError: The file cannot be read, or a key is off; the message names it.
    """
    source = path.absolute()
    try:
        data = tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}", hint=_REFERENCE) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{source} is not TOML: {error}", hint=_REFERENCE) from error
    root = _Table(source, "", data)
    folder = source.parent

    vm = _Table(source, "vm", root.values.pop("vm", None))
    name = vm.text("name")
    if not name.isprintable() or "/" in name:
        raise vm.error("name", f"is {name!r}: printable characters without '/' only")
    save = folder / vm.text("save")
    host_kernel_mounts = vm.flag("host_kernel_mounts")
    local_mirrors = tuple(_place(vm, word) for word in vm.texts("local_mirrors", missing=()))
    vm.end()

    qemu = _Table(source, "qemu", root.values.pop("qemu", None))
    command = qemu.texts("command")
    if (option := reserved_option(command)) is not None:
        raise qemu.error("command", f"contains {option}, which ouassister adds itself")
    qmp = _socket(qemu, "qmp", folder)
    options = words(command)
    agent, helper = (_port(qemu, key, folder, options) for key in ("agent", "helper"))
    if helper is not None and PORT_NAME not in port_names(options, helper, folder):
        raise qemu.error("helper", f"is {helper}, which no port {PORT_NAME!r} of the command has")
    qemu.end()

    disks = tuple(_disk(table, folder, options) for table in root.tables("disk"))
    if not disks:
        raise root.error("disk", "is missing: a VM has at least one [[disk]]")
    nets = tuple(_net(table, options) for table in root.tables("net"))
    bus, carried = "", False
    if "medium" in root.values:
        medium = _Table(source, "medium", root.values.pop("medium"))
        bus = medium.text("bus", default="")
        by = medium.text("by", default=_DISK)
        medium.end()
        if by not in (_DISK, _CHANNEL):
            raise medium.error("by", f"is {by!r}; known are {_DISK} and {_CHANNEL}")
        carried = by == _CHANNEL
    ssh = _ssh(root, folder, command) if SSH in root.values else None
    root.end()
    if ssh is not None and ssh.device in (net.device for net in nets):
        raise root.error(f"{SSH}.device", f"is {ssh.device!r}, which [[net]] closes")
    _unique(root, "disk", "node", (disk.node for disk in disks))
    _unique(root, "disk", "path", (str(disk.path) for disk in disks))
    _unique(root, "net", "device", (net.device for net in nets))
    return VmConfig(
        source, folder, name, save, command, qmp, agent, disks, nets, bus, host_kernel_mounts,
        local_mirrors, ssh, carried, helper,
    )  # fmt: skip


def _place(table: _Table, word: str) -> tuple[str, int]:
    host, colon, port = word.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise table.error("local_mirrors", f"holds {word!r} where host:port belongs")
    return host.strip("[]").lower(), int(port)


def dump(config: VmConfig) -> str:
    """Write a configuration as TOML; paths in its folder become relative."""
    # A JSON string is a TOML basic string, except that TOML wants DEL escaped too.
    quote: Callable[[object], str] = lambda value: json.dumps(value).replace("\x7f", "\\u007f")  # noqa: E731
    lines = ["[vm]", f"name = {quote(config.name)}", f"save = {quote(config.short(config.save))}"]
    lines += ["host_kernel_mounts = true"] if config.host_kernel_mounts else []
    if config.local_mirrors:
        places = ", ".join(quote(f"{host}:{port}") for host, port in config.local_mirrors)
        lines.append(f"local_mirrors = [{places}]")
    lines += ["", "[qemu]", "command = ["]
    lines += [f"    {quote(word)}," for word in config.command]
    lines += ["]", f"qmp = {quote(config.short(config.qmp))}"]
    for key, port in (("agent", config.agent), ("helper", config.helper)):
        lines += [f"{key} = {quote(config.short(port))}"] if port is not None else []
    for disk in config.disks:
        lines += ["", "[[disk]]", f"node = {quote(disk.node)}"]
        lines += [f"path = {quote(config.short(disk.path))}", f"format = {quote(disk.format)}"]
        lines += [f"serial = {quote(disk.serial)}"] if disk.serial else []
        lines += [f"guest = {quote(disk.guest)}"] if disk.guest else []
    for net in config.nets:
        lines += ["", "[[net]]", f"device = {quote(net.device)}"]
        if net.stays_down is not None:
            lines.append(f"stays_down = {str(net.stays_down).lower()}")
        lines += ["quarantine = true"] if net.quarantine else []
    if config.management is not None:
        lines += ["", f"[{SSH}]", f"device = {quote(config.management.device)}"]
        if config.management.identity is not None:
            lines.append(f"identity = {quote(config.short(config.management.identity))}")
        if config.management.user != ROOT:
            lines.append(f"user = {quote(config.management.user)}")
    if config.medium_bus or config.carried:
        lines += ["", "[medium]"]
        lines += [f"bus = {quote(config.medium_bus)}"] if config.medium_bus else []
        lines += [f"by = {quote(_CHANNEL)}"] if config.carried else []
    return "\n".join(lines) + "\n"


def _ssh(root: _Table, folder: Path, command: tuple[str, ...]) -> Management:
    table = _Table(root.source, SSH, root.values.pop(SSH))
    device = table.text("device")
    word = table.text("identity", default="")
    user = table.text("user", default=ROOT)
    table.end()
    identity = folder / word if word else None
    if identity is not None and not identity.is_file():
        raise table.error("identity", f"is {identity}, which is no file")
    try:
        return management.find(command, device, identity, user)
    except ValueError as error:
        raise table.error("device", f"{device!r} {error}") from error


def _socket(table: _Table, key: str, folder: Path) -> Path:
    """A socket path that QEMU can bind: short, or below its working directory."""
    path = folder / table.text(key)
    spelled = str(path.relative_to(folder) if path.is_relative_to(folder) else path)
    if len(spelled.encode()) > _SUN_PATH:
        raise table.error(key, f"is longer than the {_SUN_PATH} bytes of a socket address")
    if not path.parent.is_dir():
        raise table.error(key, f"lies in {path.parent}, which is no folder")
    return path


def _port(table: _Table, key: str, folder: Path, options: list[tuple[str, Options]]) -> Path | None:
    """The host side of a virtio port."""
    if key not in table.values:
        return None
    path = _socket(table, key, folder)
    if not sockets_at(options, path, folder):
        raise table.error(key, f"is {path}, which no socket -chardev of the command serves")
    return path


def _disk(table: _Table, folder: Path, options: list[tuple[str, Options]]) -> Disk:
    node = table.text("node")
    path = folder / table.text("path")
    kind = table.text("format")
    serial = table.text("serial", default="")
    guest = table.text("guest", default="")
    table.end()
    if kind not in _FORMATS:
        raise table.error("format", f"is {kind!r}; known are {' and '.join(_FORMATS)}")
    if node not in node_names(options):
        raise table.error("node", f"is {node!r}, which no -blockdev of the command defines")
    if not path.exists():
        raise table.error("path", f"is {path}, which does not exist")
    if not any(_same(path, folder / name) for name in disk_files(options, node)):
        raise table.error("path", f"is {path}, but node {node!r} of the command opens another file")
    return Disk(node, path, kind, serial, guest)


def _same(one: Path, other: Path) -> bool:
    return one == other or (other.exists() and one.samefile(other))


def _net(table: _Table, options: list[tuple[str, Options]]) -> Net:
    device = table.text("device")
    stays_down = table.flag("stays_down") if "stays_down" in table.values else None
    quarantine = table.flag("quarantine")
    table.end()
    if stays_down and quarantine:
        raise table.error("quarantine", "contradicts stays_down, which never opens a link")
    for values in devices(options):
        if values.get("id") == device:
            return Net(device, values.get("netdev", ""), stays_down, quarantine)
    raise table.error("device", f"is {device!r}, which no -device of the command has as its id")


def _unique(table: _Table, name: str, key: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise table.error(name, f"has {key} {value!r} twice")
        seen.add(value)
