"""A D-Bus client of a few lines, and a guest's tree and state for the stand-in to serve."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING, Any

from jeepney import low_level  # type: ignore[import-untyped]

from ouassister.shadow.servicemanager.callers import Callers
from ouassister.shadow.servicemanager.guestctl import Output
from ouassister.shadow.servicemanager.process import serve
from ouassister.shadow.servicemanager.server import BUS_SOCKET, PRIVATE_SOCKET, listen
from ouassister.shadow.servicemanager.state import (
    Invocation,
    ManagerState,
    Mounted,
    Process,
    RunningUnit,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TIMEOUT_S = 20.0
ROOT = "/org/freedesktop/systemd1"
MANAGER = "org.freedesktop.systemd1.Manager"
UNITS = "/usr/lib/systemd/system"
WANTS = "/etc/systemd/system/multi-user.target.wants"
NGINX = Process(385, 1, 1, 75_000_000, "nginx", "nginx: master process")
WORKER = Process(390, 385, 1, 75_100_000, "nginx", "nginx: worker process")
STATE = ManagerState(
    booted_us=1_790_000_000_000_000,
    units=(RunningUnit("nginx.service", "/system.slice/nginx.service", (NGINX, WORKER)),),
    invocations=(
        Invocation("nginx.service", "a" * 32, 1_790_000_075_000_000),
        Invocation("setup.service", "b" * 32, 1_790_000_070_000_000),
    ),
    mounts=(Mounted("-.mount", "/dev/vda1", "/", "ext4"),),
    swaps=(),
    sockets=("/run/dbus/system_bus_socket", "/run/held"),
)
FILES = {
    "nginx.service": "[Unit]\nDescription=A web server\nWants=network.target\n[Service]\n"
    "Type=forking\nPIDFile=/run/nginx.pid\nExecStart=/usr/sbin/nginx -g 'daemon on;'\n"
    "ExecReload=-/usr/sbin/nginx -s reload\n[Install]\nWantedBy=multi-user.target\n",
    "setup.service": "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n",
    "once.service": "[Service]\nType=oneshot\nExecStart=/bin/true\n",
    "plain.service": "[Unit]\nDescription=Plain %n\n[Service]\nExecStart=/bin/true\n",
    "by-other.service": "[Unit]\nRefuseManualStart=yes\n[Service]\nExecStart=/bin/true\n",
    "at@.service": "[Unit]\nDescription=At %I\n[Service]\nExecStart=/bin/true %i\n",
    "empty.service": "",
    "dbus.socket": "[Socket]\nListenStream=/run/dbus/system_bus_socket\n",
    "other.socket": "[Socket]\nListenStream=/run/other\n",
    "held.socket": "[Socket]\nListenStream=/var/run/held\n",
    "nightly.timer": "[Timer]\nUnit=plain.service\n",
    "unused.timer": "[Timer]\nOnCalendar=daily\n",
    "network.target": "[Unit]\nDescription=Network\n",
    "multi-user.target": "[Unit]\nWants=nightly.timer dbus.socket other.socket\nAllowIsolate=yes\n",
}


def make_tree(root: Path) -> None:
    """Unit files, an alias, a mask, a drop-in and an init script."""
    folder = root / UNITS[1:]
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "default.target").symlink_to("multi-user.target")
    (folder / "web.service").symlink_to("nginx.service")
    local = root / "etc/systemd/system"
    (local / "nginx.service.d").mkdir(parents=True)
    (local / "nginx.service.d" / "local.conf").write_text("[Service]\nRestart=always\n")
    (local / "hidden.service").symlink_to("/dev/null")
    scripts = root / "etc/init.d"
    scripts.mkdir()
    (scripts / "old").write_text("#!/bin/sh\n# Short-Description: An old one\n")
    (scripts / "old").chmod(0o755)


class Client:
    """Speaks to one socket and gives what comes back."""

    def __init__(self, path: Path, *, bus: bool = False) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(str(path))
        self._parser = low_level.Parser()
        self._serial = 0
        self._bus = bus
        self.socket.sendall(b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")
        answer = b""
        while answer.count(b"\r\n") < 3:
            answer += self.socket.recv(4096)
        self.greeting = answer.split(b"\r\n")
        if bus:
            (self.name,) = self.call("Hello", path="/", interface="org.freedesktop.DBus",
                                     to="org.freedesktop.DBus")  # fmt: skip

    def send(self, member: str, signature: str = "", *body: object, **where: str) -> None:
        message = encode(self._next(), member, signature, *body, **where)  # type: ignore[arg-type]
        self.socket.sendall(message)

    def call(
        self, member: str, signature: str = "", *body: object, **where: str
    ) -> tuple[Any, ...]:
        """Call; an error answer comes as its name and text."""
        if self._bus:
            where.setdefault("to", "org.freedesktop.systemd1")
        self.send(member, signature, *body, **where)
        while True:
            message = self.receive()
            fields = message.header.fields
            if fields.get(low_level.HeaderFields.reply_serial) == self._serial:
                if message.header.message_type is low_level.MessageType.error:
                    return (fields[low_level.HeaderFields.error_name], *message.body)
                result: tuple[Any, ...] = message.body
                return result

    def receive(self) -> Any:  # noqa: ANN401 - D-Bus
        while (message := self._parser.get_next_message()) is None:
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionResetError
            self._parser.add_data(data)
        return message

    def property(self, unit: str, interface: str, name: str) -> Any:  # noqa: ANN401
        answer = self.call(
            "Get", "ss", f"org.freedesktop.systemd1.{interface}", name,
            path=f"{ROOT}/unit/{unit}", interface="org.freedesktop.DBus.Properties",
        )  # fmt: skip
        return answer[0][1] if isinstance(answer[0], tuple) else answer

    def _next(self) -> int:
        self._serial += 1
        return self._serial


def encode(
    serial: int,
    member: str,
    signature: str = "",
    *body: object,
    path: str = ROOT,
    interface: str = MANAGER,
    to: str = "",
    flags: int = 0,
) -> bytes:
    fields = {1: path, 2: interface, 3: member}
    if to:
        fields[6] = to
    if signature:
        fields[8] = signature
    header = low_level.Header(
        low_level.Endianness.little, low_level.MessageType.method_call, flags, 1, 0, serial,
        {low_level.HeaderFields(code): value for code, value in fields.items()},
    )  # fmt: skip
    encoded: bytes = low_level.Message(header, body).serialise()
    return encoded


class Systemctl:
    """Answers like the guest's systemctl would, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, argv: Sequence[str]) -> Output:
        self.asked.append(tuple(argv))
        match argv[1:]:
            case [_, _, _, "list-unit-files", "--", *names]:
                lines = ["nginx.service enabled enabled", "plain.service static -"]
                found = [line for line in lines if not names or line.split()[0] in names]
                return Output(0, "\n".join(found))
            case ["is-enabled", "--", "at@x.service"]:
                return Output(0, "enabled\n")
            case ["enable", *_, "nothere.service"]:
                text = "Failed to enable unit: Unit file nothere.service does not exist.\n"
                return Output(1, text)
            case ["enable", *_, "plain.service"]:
                return Output(0, "The unit files have no installation config (WantedBy=, ...\n")
            case ["enable" | "add-wants", *_]:
                return Output(
                    0, f"Created symlink {WANTS}/nginx.service -> {UNITS}/nginx.service.\n"
                )
            case ["disable", *_]:
                return Output(0, 'Removed "/etc/systemd/system/x.wants/nginx.service".\n')
        return Output(1, "")


class Served:
    """A stand-in in a thread, over a tree."""

    def __init__(self, root: Path) -> None:
        make_tree(root)
        self.private = root / PRIVATE_SOCKET[1:]
        self.bus = root / BUS_SOCKET[1:]
        self.records = root / "records"
        self.log = root / "journal.log"
        self.systemctl = Systemctl()
        self._stop, self._stopped = os.pipe()
        listeners = listen(str(root))
        records = os.open(self.records, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        procfs = os.open("/proc", os.O_PATH)

        def run() -> None:
            callers = Callers(procfs)
            serve(listeners, STATE, records, log, callers, self.systemctl, self._stop, str(root))
            listeners.close()
            os.close(records)
            os.close(log)
            os.close(procfs)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def stop(self) -> None:
        """Let it end; idempotent."""
        if self._thread.is_alive():
            os.close(self._stopped)
            self._thread.join(TIMEOUT_S)
            os.close(self._stop)
        assert not self._thread.is_alive()
