"""A libvirt domain: found by name or UUID, restored paused with its links down, driven.

What a domain is restored with is the XML in its own saved image, so that is what is read while it
sleeps. The image is never written: libvirt is given the changed XML beside it.

Source: libvirt v9.0.0 ``src/qemu/qemu_driver.c`` (``qemuDomainRestoreInternal``,
``qemuDomainObjStart``: a managed save is told by its file, ``qemuDomainManagedSaveRemove``).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, urlencode

from ouassister.access import AGENT, PORT_NAME, SSH, Access
from ouassister.errors import (
    DeadlineError,
    NotSuspendedError,
    OUassisterError,
    RunningVMError,
    StateError,
    UnsupportedGuestError,
    UsageError,
)
from ouassister.provider import domain_xml, libvirt_python
from ouassister.provider.domain_xml import Hardware
from ouassister.provider.management import Management, forwarded_port
from ouassister.provider.port import PortChannel
from ouassister.provider.retire import rename_save
from ouassister.provider.running import has_writer
from ouassister.provider.ssh import SshChannel
from ouassister.provider.virsh import DEFAULT, NO_DOMAIN, Virsh
from ouassister.provider.virsh_agent import VirshAgent
from ouassister.state.data import map_file
from ouassister.state.formats import LIBVIRT
from ouassister.state.libvirt_save import read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ouassister.provider.channel import Channel
    from ouassister.provider.disks import Disk
    from ouassister.provider.links import Link

SCHEME: Final = "libvirt:"
_SAVE_S: Final = 600.0  # for what reads or writes the whole memory
_ASK_S: Final = 1.0  # between two questions to libvirt while a run is watched
_POLL_S: Final = 0.05
_STOPPED: Final = "shut off"
_MEDIUM_SERIAL: Final = 20  # VIRTIO_BLK_ID_BYTES, virtio 1.2, 5.2.6


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain; see `interface.Vm`."""

    virsh: Virsh
    hardware: Hardware
    save: Path
    managed: bool  # the save is libvirt's own, by the domain's name
    local_mirrors: tuple[tuple[str, int], ...]
    host_kernel_mounts: bool
    quarantine: tuple[str, ...] = ()  # addresses of interfaces; see `Vm`
    management: Management | None = None

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.hardware.name

    @property
    def source(self) -> str:
        """What `load` takes."""
        return f"{SCHEME}{self.hardware.uuid}?{urlencode({'connect': self.virsh.uri})}"

    @property
    def folder(self) -> Path:
        """Where the save file is."""
        return self.save.parent

    @property
    def formats(self) -> frozenset[str]:
        """What libvirt restores."""
        return frozenset(row.name for row in LIBVIRT)

    @property
    def disks(self) -> tuple[Disk, ...]:
        """By the XML."""
        return self.hardware.disks

    @property
    def channels(self) -> tuple[str, ...]:
        """See `Vm`: by the XML."""
        return self.hardware.channels + ((SSH,) if self.management is not None else ())

    @property
    def carried(self) -> bool:
        """No: what a domain has not is refused (`refuse_unresumable`)."""
        return False

    @property
    def untold_links(self) -> tuple[Link, ...]:
        """None: the XML of the save has each link's state."""
        return ()

    @property
    def closed_by_gate(self) -> tuple[str, ...]:
        """None: the XML of the save has them."""
        return ()

    def keep_closed(self, devices: Sequence[str]) -> None:
        """See `closed_by_gate`."""

    def state(self) -> str:
        """The domain's state, as libvirt says it: ``running``, ``paused``, ``shut off``..."""
        answer = self.virsh.ask("domstate", self.hardware.uuid)
        if answer.ok:
            return answer.output.strip()
        if NO_DOMAIN in answer.reason:
            return _STOPPED  # a transient domain, saved to a file
        raise StateError(f"libvirt does not tell the state of {self.name}: {answer.reason}")

    def is_running(self) -> bool:
        """See `Vm`."""
        return self.state() != _STOPPED or has_writer(self.disks)

    def watch(self) -> Callable[[], bool]:
        """See `Vm`: the disks are looked at each time, libvirt is asked each second."""
        asked_at = time.monotonic()

        def started() -> bool:
            nonlocal asked_at
            if has_writer(self.disks):
                return True
            if time.monotonic() < asked_at + _ASK_S:
                return False
            asked_at = time.monotonic()
            try:
                return self.state() != _STOPPED
            except OUassisterError as error:
                raise OSError(error.message) from error  # who cannot tell must not go on

        return started

    def refuse_unresumable(self) -> None:
        """See `Vm`."""
        if self.hardware.lacking:
            raise UnsupportedGuestError(
                f"{self.name} cannot be resumed with an update: it lacks {self.hardware.lacking}",
                hint="docs/how-to/libvirt.md tells what a domain must have",
            )

    def medium_place(self) -> Path | None:
        """See `Vm`: QEMU may be another user's, and can open files where the first disk lies."""
        return self.disks[0].path.resolve().parent

    def restore(self) -> RunningDomain:
        """See `Vm`."""
        try:
            xml = domain_xml.closed(_saved_xml(self.save))
        except FileNotFoundError as error:
            raise NotSuspendedError(f"there is no save file {self.save}") from error
        if self.state() != _STOPPED:
            raise RunningVMError(f"the domain {self.name} runs already")
        vm = RunningDomain(self)
        with tempfile.NamedTemporaryFile(suffix=".xml") as file:
            file.write(xml)
            file.flush()
            words = ("restore", str(self.save), "--xml", file.name, "--paused")
            try:
                self.virsh.run(*words, timeout_s=_SAVE_S)
            except DeadlineError:
                vm.kill()
                raise
        try:
            # Only now: a network device sets its link as it was saved when its state is loaded
            # (virtio_net_post_load_device, hw/net/virtio-net.c), whatever the XML says.
            vm.set_links(up=False)
        except BaseException:
            vm.kill()
            raise
        return vm

    def boot(self) -> RunningDomain:
        """See `Vm`."""
        self.virsh.run("start", self.hardware.uuid, "--paused", timeout_s=_SAVE_S)
        vm = RunningDomain(self)
        try:
            vm.set_links(up=False)
        except BaseException:
            vm.kill()
            raise
        return vm

    def attach(self) -> RunningDomain:
        """See `Vm`."""
        if self.state() == _STOPPED:
            raise StateError(f"the domain {self.name} does not run", hint="start or resume it")
        return RunningDomain(self)

    def retire_save(self) -> None:
        """See `Vm`: a managed save is removed, as libvirt does when it starts the domain."""
        if self.managed and self.save.exists():
            self.virsh.run("managedsave-remove", self.hardware.uuid)
        # A file that came to its place behind libvirt's back: virsh says that it removed nothing,
        # and is content. The domain would be started from it all the same.
        rename_save(self.save)


class RunningDomain:
    """A domain that runs or is paused; see `interface.Running`."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self._virsh = domain.virsh
        self._uuid = domain.hardware.uuid
        self._agent: VirshAgent | None = None
        self._port: PortChannel | None = None
        self._ssh: SshChannel | None = None
        self._access = Access()

    def __enter__(self) -> RunningDomain:
        """Close at the end of the block."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Hang up; the domain goes on."""
        for channel in (self._port, self._ssh):
            if channel is not None:
                channel.close()
        self._port = self._ssh = None

    def reach(self, access: Access) -> None:
        """See `Running`."""
        if access.channel not in self.domain.channels:
            raise UsageError(
                f"the domain {self.domain.name} has no channel {access.channel}",
                hint="docs/how-to/libvirt.md tells how to give it one",
            )
        self._access = access

    def channel(self) -> Channel:
        """See `Running`."""
        if self._access.channel == AGENT:
            return self.qga()
        management = self.domain.management
        if self._access.channel == SSH and management is not None:
            if self._ssh is None:
                words = ("qemu-monitor-command", self._uuid, "--hmp", "info usernet")
                port = forwarded_port(self._virsh.run(*words), management)
                if port is None:
                    raise StateError(f"QEMU forwards no port to {management.device}")
                keys = self._access.host_keys
                self._ssh = SshChannel(port, management.identity, keys, management.user)
            return self._ssh
        if self._port is None:
            place = domain_xml.helper_socket(self._virsh.run("dumpxml", self._uuid).encode())
            if place is None:
                raise StateError(f"libvirt does not tell where the port of {PORT_NAME} is")
            try:
                self._port = PortChannel(place)
            except OSError as error:
                message = f"cannot connect to the helper's port {place}: {error.strerror}"
                raise StateError(message, hint="run as the user who runs QEMU, or root") from error
        return self._port

    def qga(self) -> VirshAgent:
        """The agent, through libvirt, which is connected to its channel all the time."""
        if self._agent is None:
            self._agent = VirshAgent(self._virsh, self._uuid)
        return self._agent

    def runs(self) -> bool:
        """See `Running`."""
        return self.domain.state() == "running"

    def cont(self) -> None:
        """Let the guest run, if it does not."""
        answer = self._virsh.ask("resume", self._uuid)
        if not answer.ok and self.domain.state() != "running":
            raise StateError(f"libvirt does not let {self.domain.name} run: {answer.reason}")

    def set_links(self, *, up: bool) -> None:
        """Open the links that were up when the domain was saved, or close all.

        libvirt tells QEMU of a link only when it believes that it changes: to be sure that one is
        closed it is opened first, while no instruction of the guest runs.
        """
        links = self.domain.hardware.links
        if up:
            for link in links:
                if link.up and link.mac.lower() not in self.domain.quarantine:
                    self._link(link.mac, "up")
            with contextlib.suppress(OUassisterError):  # it says what is true while all are down
                self._virsh.run("metadata", self._uuid, domain_xml.GATE, "--live", "--remove")
            return
        runs = self.domain.state() == "running"
        if runs:
            self._virsh.run("suspend", self._uuid)
        for link in links:
            self._link(link.mac, "up")
            self._link(link.mac, "down")
        if runs:
            self._virsh.run("resume", self._uuid)

    def open_quarantine(self) -> None:
        """See `Running`."""
        for mac in self.domain.quarantine:
            self._link(mac, "up")

    def _link(self, mac: str, state: str) -> None:
        self._virsh.run("domif-setlink", self._uuid, mac, state)

    def attach_medium(self, path: Path, serial: str) -> None:
        """See `Running`."""
        if not serial or len(serial.encode()) > _MEDIUM_SERIAL:
            raise UsageError(
                f"the serial {serial!r} is empty or longer than {_MEDIUM_SERIAL} bytes"
            )
        if os.geteuid() == 0:
            # QEMU may be another user's: it gets the file as it has the first disk.
            owner = self.domain.disks[0].path.stat()
            os.chown(path, owner.st_uid, owner.st_gid)
            path.parent.chmod(0o711)
        xml = domain_xml.medium(path.absolute(), serial, self.domain.hardware.target)
        with tempfile.NamedTemporaryFile(suffix=".xml") as file:
            file.write(xml)
            file.flush()
            self._virsh.run("attach-device", self._uuid, file.name, "--live")

    def detach_medium(self, *, timeout_s: float = 30.0) -> None:
        """See `Running`."""
        if not self._has_medium():
            return
        end = time.monotonic() + timeout_s
        self._virsh.run("detach-device-alias", self._uuid, domain_xml.MEDIUM, "--live")
        while self._has_medium():
            if time.monotonic() >= end:
                raise DeadlineError(
                    f"the guest did not let go of its disk within {timeout_s:.0f} s"
                )
            time.sleep(_POLL_S)

    def _has_medium(self) -> bool:
        return domain_xml.has_medium(self._virsh.run("dumpxml", self._uuid).encode())

    def suspend(self) -> None:
        """Save the domain to where its save file is looked for."""
        words = (
            ("managedsave", self._uuid)
            if self.domain.managed
            else ("save", self._uuid, str(self.domain.save))
        )
        self._virsh.run(*words, timeout_s=_SAVE_S)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._virsh.run("destroy", self._uuid, timeout_s=60)


def find(word: str, uri: str = DEFAULT, save: Path | None = None) -> Domain:
    """Find the domain of a name or UUID.

    Args:
        word: Name or UUID.
        uri: libvirt's own, of a daemon of this host.
        save: What ``virsh save`` wrote; the domain's managed save without it.

    Raises:
        UsageError: libvirt knows no such domain.
        HostNotReadyError: libvirt does not answer.
        UnsupportedGuestError: See `domain_xml.parse`.
        UnsupportedStateError: The saved image's header is of a kind that was never seen.
    """
    virsh = libvirt_python.client(uri)
    saves = virsh.saves()
    known = virsh.ask("dumpxml", word, "--inactive")
    if not known.ok and save is None:
        raise UsageError(f"libvirt at {uri} has no domain {word!r}: {known.reason}")
    own = known.output.encode()
    name, uuid = domain_xml.identity(own) if known.ok else ("", "")
    path = _managed(saves, name) if save is None else save
    asleep = not known.ok or virsh.run("domstate", uuid).strip() == _STOPPED
    try:
        xml = _saved_xml(path) if asleep else virsh.run("dumpxml", uuid).encode()
    except FileNotFoundError as error:
        if save is not None and not known.ok:
            raise UsageError(f"there is no save file {save}") from error
        xml = own
    hardware = domain_xml.parse(xml)
    if hardware.uuid != uuid if known.ok else word not in (hardware.name, hardware.uuid):
        raise UsageError(f"{path} is the saved image of {hardware.name} ({hardware.uuid})")
    mirrors, mounts = domain_xml.settings(own or xml)
    apart = domain_xml.quarantine(own or xml, hardware)
    network = domain_xml.ssh_network(own or xml, xml)
    return Domain(virsh, hardware, path, save is None, mirrors, mounts, apart, network)


def load(source: str, save: Path | None = None) -> Domain:
    """Find a domain by its `Domain.source` again; raises as `find`."""
    uuid, _, query = source.removeprefix(SCHEME).partition("?")
    (uri,) = parse_qs(query)["connect"]
    return find(uuid, uri, save)


def suspended(uri: str = DEFAULT) -> tuple[tuple[str, str], ...]:
    """Names and sources of the domains that have a managed save; none where libvirt is not."""
    virsh = libvirt_python.client(uri)
    saves = virsh.saves()
    try:
        lines = virsh.run("list", "--inactive", "--uuid", "--name").splitlines()
        pairs = [line.split(None, 1) for line in lines if line.strip()]
        # libvirt itself starts a domain from this file when it is there.
        asleep = [one for one in pairs if len(one) == 2 and _managed(saves, one[1]).exists()]
    except (OUassisterError, PermissionError):
        return ()
    query = urlencode({"connect": uri})
    return tuple((name.strip(), f"{SCHEME}{uuid}?{query}") for uuid, name in asleep)


def _managed(saves: Path, name: str) -> Path:
    return saves / f"{name.strip()}.save"


def _saved_xml(save: Path) -> bytes:
    """The XML in a saved image.

    Raises:
        FileNotFoundError: There is none.
    """
    save.stat()
    file = map_file(save)
    try:
        return read_header(file, str(save)).xml
    finally:
        file.close()
