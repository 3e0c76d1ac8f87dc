"""A plain QEMU virtual machine: restored paused with its links down, driven, suspended again.

The save file is QEMU's migration stream. It reaches QEMU as a file descriptor (``fd:`` of
docs/devel/migration.rst), so that no shell sees its path.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any, TypeVar

from ouassister.access import AGENT, PORT, SSH, Access
from ouassister.durable import sync_folder
from ouassister.errors import (
    DeadlineError,
    HostNotReadyError,
    NotSuspendedError,
    OUassisterError,
    QemuLostError,
    QemuRefusedError,
    RunningVMError,
    StateError,
    UsageError,
)
from ouassister.provider.cmdline import is_scsi_bus, quote
from ouassister.provider.management import forwarded_port
from ouassister.provider.port import PortChannel
from ouassister.provider.qga import Qga
from ouassister.provider.qmp import Qmp
from ouassister.provider.running import is_running as is_running
from ouassister.provider.ssh import SshChannel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ouassister.provider.channel import Channel
    from ouassister.provider.vmtoml import Net, VmConfig

T = TypeVar("T", Qga, PortChannel)
_MEDIUM = "ouassister-medium"
_POLL_S = 0.002
# Children that outlive the RunningVM which started them; kept so that they can be reaped.
_children: dict[int, subprocess.Popen[bytes]] = {}


def log_path(config: VmConfig) -> Path:
    """Where QEMU's own messages go."""
    return config.folder / f"{config.name}.qemu.log"


def start(config: VmConfig, *extra: str) -> RunningVM:
    """Start the VM's command with ``extra`` arguments and connect; without ``-S`` it boots.

    Raises:
        RunningVMError: It runs already.
        QemuLostError: QEMU ended at once; the message is its own.
    """
    if is_running(config):
        raise RunningVMError(f"the VM {config.name} runs already")
    argv = [*config.command, "-qmp"]
    argv += [f"unix:{quote(config.short(config.qmp))},server=on,wait=off", *extra]
    config.qmp.unlink(missing_ok=True)  # of a QEMU that was killed; nobody listens
    with log_path(config).open("wb") as log:
        try:
            process = subprocess.Popen(
                argv,
                cwd=config.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise HostNotReadyError(f"cannot start {argv[0]}: {error.strerror}") from error
    _children[process.pid] = process
    try:
        return RunningVM(config, _connect(config, process))
    except BaseException as error:
        _kill(process)
        if isinstance(error, QemuLostError):
            raise QemuLostError(f"QEMU ended at once: {_last_words(config)}") from error
        raise


def restore(config: VmConfig, *, links_up: bool, extra_args: Sequence[str] = ()) -> RunningVM:
    """Load the save file into a new QEMU, paused; its links are down unless ``links_up``.

    The caller owns the result; QEMU goes on when the caller ends. When this raises, no process
    is left.

    Raises:
        NotSuspendedError: There is no save file.
        RunningVMError: The VM runs already.
        QemuLostError: QEMU cannot load the state; the message is its own.
        DeadlineError: QEMU did not finish loading.
    """
    try:
        save = os.open(config.save, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotSuspendedError(f"there is no save file {config.save}") from error
    except OSError as error:
        raise StateError(f"cannot read {config.save}: {error.strerror}") from error
    try:
        vm = start(config, "-S", "-incoming", "defer", *extra_args)
        try:
            # After a migration QEMU announces the guest by frames of its own, and asks virtio-net
            # to do so too, before anybody can close the link (announce_timer, net/announce.c).
            vm.qmp.execute("migrate-set-parameters", announce_rounds=0)
            vm.qmp.send_fd("save", save)
            vm.qmp.execute("migrate-incoming", uri="fd:save", timeout_s=120)
            _wait_status(vm.qmp, "paused", timeout_s=120)
            # Only now: virtio-net sets the link as it was saved when its state is loaded
            # (virtio_net_post_load_device, hw/net/virtio-net.c).
            vm.set_links(up=links_up)
        except BaseException as error:
            vm.kill()
            if isinstance(error, QemuLostError):
                message = f"QEMU cannot load {config.save}: {_last_words(config)}"
                raise QemuLostError(message, hint=StateError.default_hint) from error
            raise
    finally:
        os.close(save)
    return vm


def boot(config: VmConfig) -> RunningVM:
    """Start the VM from its disks alone, paused, with every link down.

    When this raises, no process is left; see `start`.
    """
    vm = start(config, "-S")
    try:
        vm.set_links(up=False)
    except BaseException:
        vm.kill()
        raise
    return vm


def attach(config: VmConfig) -> RunningVM:
    """Connect to the VM's running QEMU.

    Raises:
        StateError: None runs.
    """
    try:
        return RunningVM(config, Qmp(config.qmp))
    except OSError as error:
        message = f"no QEMU of {config.name} answers at {config.qmp}: {error.strerror}"
        raise StateError(message, hint="start or resume the VM") from error


class RunningVM:
    """A QEMU process with this VM in it.

    Closing hangs up; the VM goes on.
    """

    def __init__(self, config: VmConfig, qmp: Qmp) -> None:
        self.config = config
        self.qmp = qmp
        self.pid = qmp.pid
        self._agent: Qga | None = None
        self._access = Access()
        self._gate_closed = False  # by us
        self._ssh: SshChannel | None = None
        self._port: PortChannel | None = None

    def __enter__(self) -> RunningVM:
        """Close at the end of the block."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Hang up; the VM goes on."""
        for channel in (self._agent, self._port, self._ssh):
            if channel is not None:
                channel.close()
        self._agent = self._port = self._ssh = None
        self.qmp.close()

    def reach(self, access: Access) -> None:
        """See `interface.Running`."""
        if access.channel not in self.config.channels:
            raise UsageError(
                f"{self.config.source} has no channel {access.channel}",
                hint="docs/reference/vm-toml.md tells how to give it one",
            )
        self._access = access

    def channel(self) -> Channel:
        """See `interface.Running`."""
        if self._access.channel == AGENT:
            return self.qga()
        if self._access.channel == PORT and self.config.helper is not None:
            if self._port is None:
                self._port = _connected(PortChannel, self.config.helper)
            return self._port
        management = self.config.management
        if self._ssh is None and management is not None:
            table = self.qmp.execute_with("human-monitor-command", {"command-line": "info usernet"})
            port = forwarded_port(str(table), management)
            if port is None:
                raise StateError(f"QEMU forwards no port to {management.device}")
            keys = self._access.host_keys
            self._ssh = SshChannel(port, management.identity, keys, management.user)
        if self._ssh is None:
            raise UsageError(f"{self.config.source}: [{SSH}] is missing")
        return self._ssh

    def qga(self) -> Qga:
        """The guest agent's channel, connected once.

        Connect before `cont`: without a peer qemu-ga polls its port each 100 ms only
        (ga_channel_recv, qga/channel-posix.c).
        """
        if self.config.agent is None:
            message = f"{self.config.source}: qemu.agent is missing, so the guest is out of reach"
            raise UsageError(message, hint="docs/reference/vm-toml.md tells how to give it one")
        if self._agent is None:
            self._agent = _connected(Qga, self.config.agent)
        return self._agent

    def status(self) -> str:
        """QEMU's run state: ``running``, ``paused``, ``postmigrate``..."""
        return str(self.qmp.execute("query-status")["status"])

    def runs(self) -> bool:
        """See `interface.Running`."""
        return self.status() == "running"

    def cont(self) -> None:
        """Let the guest run."""
        if self._gate_closed:
            self._write_closed()
        self.qmp.execute("cont")

    def set_links(self, *, up: bool) -> None:
        """Open or close every link of the gate.

        One that stays down, was down by the guest's memory, or is of the quarantine, is closed and
        never opened.

        Both ends are set: a link that is down at the NIC alone still passes frames of the back
        end to a netdev's filters (net/net.c, qemu_send_packet_async_with_flags).
        """
        if not up and self.runs():
            self._write_closed()  # before the guest can notice
        for net in self.config.nets:
            if not up or self._opens(net):
                self._set_link(net, up=up)
        self._gate_closed = not up
        if up:
            self.config.keep_closed(())

    def _opens(self, net: Net) -> bool:
        was_down = net.stays_down is None and net.device in self._access.links_down
        return not (net.stays_down or net.quarantine or was_down)

    def _write_closed(self) -> None:
        """Keep what the gate would open, so that a guest that sleeps again behind it is known."""
        self.config.keep_closed([net.device for net in self.config.nets if self._opens(net)])

    def open_quarantine(self) -> None:
        """See `interface.Running`."""
        for net in self.config.nets:
            if net.quarantine:
                self._set_link(net, up=True)

    def _set_link(self, net: Net, *, up: bool) -> None:
        ends = (net.netdev, net.device) if up else (net.device, net.netdev)
        for end in filter(None, ends):
            self.qmp.execute("set_link", name=end, up=up)

    def attach_medium(self, path: Path, serial: str) -> None:
        """Plug a raw image in as a read-only disk; a paused guest sees it at `cont`.

        It is a SCSI disk where the configuration names the bus of a virtio-scsi controller, else
        a virtio disk of its own.

        Raises:
            UsageError: The serial is empty or has more than a virtio disk's 20 bytes.
        """
        if not serial or len(serial.encode()) > 20:  # VIRTIO_BLK_ID_BYTES, virtio 1.2, 5.2.6
            raise UsageError(f"the serial {serial!r} is empty or longer than 20 bytes")
        node: dict[str, object] = {
            "driver": "raw",
            "node-name": _MEDIUM,
            "read-only": True,
            "file": {"driver": "file", "filename": str(path.absolute())},
        }
        self.qmp.execute_with("blockdev-add", node)
        scsi = self.config.medium_bus and is_scsi_bus(self.config.command, self.config.medium_bus)
        device: dict[str, object] = {
            "driver": "scsi-hd" if scsi else "virtio-blk-pci",
            "id": _MEDIUM,
            "drive": _MEDIUM,
            "serial": serial,
        }
        if self.config.medium_bus:
            device["bus"] = self.config.medium_bus
        try:
            self.qmp.execute_with("device_add", device)
        except OUassisterError:
            self.qmp.execute("blockdev-del", node_name=_MEDIUM)
            raise

    def detach_medium(self, *, timeout_s: float = 30.0) -> None:
        """Unplug what `attach_medium` plugged in; the guest must run, since it has to agree.

        Raises:
            DeadlineError: The guest did not let go of it.
        """
        with self.qmp.listen("DEVICE_DELETED") as wait:
            try:
                self.qmp.execute("device_del", id=_MEDIUM)
            except QemuRefusedError as error:
                if error.error_class != "DeviceNotFound":
                    raise
            else:
                wait(timeout_s, lambda event: event["data"].get("device") == _MEDIUM)
        self.qmp.execute("blockdev-del", node_name=_MEDIUM)

    def add_frame_capture(self, netdev: str, path: Path) -> None:
        """Record every frame that passes a netdev from now on, as pcap."""
        self.qmp.execute_with(
            "object-add",
            {
                "qom-type": "filter-dump",
                "id": f"ouassister-dump-{netdev}",
                "netdev": netdev,
                "file": str(path.absolute()),
            },
        )

    def suspend(self, save: Path | None = None, *, timeout_s: float = 300.0) -> None:
        """Stop the guest, write its state to the save file, and end QEMU.

        The file appears whole or not at all. On failure the guest runs on.

        Raises:
            StateError: QEMU could not save; the message is its own.
            DeadlineError: It took longer than ``timeout_s``.
        """
        save = self.config.save if save is None else save
        part = save.with_name(f"{save.name}.part")
        was_running = self.status() == "running"
        file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self.qmp.execute("stop")
            # Without this QEMU saves at 128 MiB/s (MAX_THROTTLE, migration/migration.c).
            self.qmp.execute("migrate-set-parameters", max_bandwidth=1 << 40)
            self.qmp.send_fd("save", file)
            self.qmp.execute("migrate", uri="fd:save")
            self._wait_migrated(timeout_s)
            os.fsync(file)
            part.rename(save)
            sync_folder(save.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            with contextlib.suppress(OUassisterError):
                self.qmp.execute("migrate_cancel")
                if was_running:
                    self.qmp.execute("cont")
            raise
        finally:
            os.close(file)
        self.quit()

    def quit(self, *, timeout_s: float = 30.0) -> None:
        """End QEMU at once, as a power cut would, and wait for its end."""
        with contextlib.suppress(QemuLostError):
            self.qmp.execute("quit")
        self.close()
        _wait_exit(self.pid, timeout_s)

    def kill(self) -> None:
        """Kill QEMU: it may not answer any more."""
        self.close()
        if (process := _children.pop(self.pid, None)) is not None:
            _kill(process)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        _wait_exit(self.pid, 30.0)

    def _wait_migrated(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while True:
            state: dict[str, Any] = self.qmp.execute("query-migrate")
            status = state.get("status")
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                detail = state.get("error-desc", "no reason given")
                message = f"QEMU could not save the VM: {detail}"
                raise StateError(message, hint="look for room on the save file's disk")
            if time.monotonic() >= end:
                raise DeadlineError(f"saving the VM took longer than {timeout_s:.0f} s")
            time.sleep(_POLL_S)


def _connected(kind: Callable[[Path], T], path: Path) -> T:
    try:
        return kind(path)
    except OSError as error:
        raise StateError(f"cannot connect to the guest's port {path}: {error.strerror}") from error


def _connect(config: VmConfig, process: subprocess.Popen[bytes]) -> Qmp:
    """Connect as soon as QEMU listens."""
    end = time.monotonic() + 30
    while True:
        if process.poll() is not None:
            raise QemuLostError(f"QEMU ended with status {process.returncode}")
        try:
            return Qmp(config.qmp, timeout_s=30)
        except OSError as error:
            if time.monotonic() >= end:
                raise DeadlineError(f"QEMU does not listen at {config.qmp}") from error
        time.sleep(_POLL_S)


def _wait_status(qmp: Qmp, wanted: str, *, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while (status := qmp.execute("query-status")["status"]) != wanted:
        if status != "inmigrate":
            raise StateError(f"QEMU is {status!r} after loading the save file, not {wanted!r}")
        if time.monotonic() >= end:
            raise DeadlineError(f"loading the save file took longer than {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def _wait_exit(pid: int, timeout_s: float) -> None:
    """Wait for the end of a process, which need not be our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise DeadlineError(f"QEMU (pid {pid}) did not end within {timeout_s:.0f} s")
    finally:
        os.close(descriptor)
    if (process := _children.pop(pid, None)) is not None:
        process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    _children.pop(process.pid, None)


def _last_words(config: VmConfig) -> str:
    """The end of QEMU's log, as one line."""
    raw = log_path(config).read_bytes()[-2000:]
    lines = [line.strip() for line in raw.decode("utf-8", "replace").splitlines()]
    told = [line for line in lines if line and "terminating on signal" not in line]
    text = "; ".join(told) or "it said nothing"
    return "".join(char if char.isprintable() else "?" for char in text)
