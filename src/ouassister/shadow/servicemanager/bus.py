"""One client: its authentication, its calls, and what the system bus itself answers.

The private socket of the service manager is a connection without a bus: no names, no Hello. The
system bus here has two names, its own and the service manager's. Who asks for another daemon is
told that there is none, and the report says so: a package whose script needs one is not emulated.

Source: D-Bus Specification 0.43, "Message Bus Messages"; dbus 1.14 bus/driver.c.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from ouassister.shadow.events import Event, Outcome
from ouassister.shadow.servicemanager import wire
from ouassister.shadow.servicemanager.manager import ERRORS, NOTHING, Answer, RefusalError, Who
from ouassister.shadow.servicemanager.properties import MANAGER, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from ouassister.shadow.servicemanager.manager import Signal
    from ouassister.shadow.servicemanager.objects import Objects

BUS: Final = "org.freedesktop.DBus"
SYSTEMD: Final = "org.freedesktop.systemd1"
SYSTEMD_UNIQUE: Final = ":1.0"
MAX_UNSENT: Final = 1 << 20  # more than that of signals: the client does not read
_ENOUGH_UNSENT: Final = 1 << 16  # answers wait with their calls until these are read
_MAX_MATCHES: Final = 512
_PEER: Final = "org.freedesktop.DBus.Peer"
_OWNERS: Final = {BUS: BUS, SYSTEMD: SYSTEMD_UNIQUE, SYSTEMD_UNIQUE: SYSTEMD_UNIQUE}
# apt asks that nobody shuts the system down meanwhile; nobody does while it sleeps.
_NEEDLESS: Final = ("org.freedesktop.login1", "Inhibit")
_ALREADY_RUNNING: Final = 2  # DBUS_START_REPLY_ALREADY_RUNNING


class Client:
    """A connection.

    Args:
        unique: Its name on the bus; empty on the private socket.
        guid: The server's id.
        pid: Of the peer, as the serving process counts.
        uid: Of the peer, as the shadow counts.
        who: Finds out whose script the peer works for; asked when it makes its first call.
        objects: The service manager.
        record: Takes each event.
    """

    def __init__(
        self,
        unique: str,
        guid: str,
        pid: int,
        uid: int,
        who: Callable[[int, int], Who],
        objects: Objects,
        record: Callable[[Event], None],
    ) -> None:
        self._unique = unique
        self._authentication = wire.Authentication(guid, uid)
        self._messages = wire.Messages()
        self._guid = guid
        self._pid, self._uid = pid, uid
        self._find = who
        self._who: Who | None = None
        self._objects = objects
        self._record = record
        self._serial = 0
        self._greeted = not unique
        self._matches = 0
        self.subscribed = not unique
        self.unsent = bytearray()
        self._calls: deque[wire.Call] = deque()

    @property
    def listening(self) -> bool:
        """Whether more may be read from it: all that it called for is answered, and read."""
        return not self._calls and len(self.unsent) < _ENOUGH_UNSENT

    @property
    def waiting(self) -> bool:
        """Whether `answer` has something to do."""
        return bool(self._calls) and len(self.unsent) < _ENOUGH_UNSENT

    @property
    def ready(self) -> bool:
        """Authenticated, and greeted where there is a bus to greet."""
        return self._authentication.done and self._greeted

    def feed(self, data: bytes) -> None:
        """Take what came in; calls wait for `answer`.

        Raises:
            ProtocolError: The connection is to be closed.
        """
        if not self._authentication.done:
            answer, data = self._authentication.feed(data)
            self.unsent += answer
        if self._authentication.done:
            self._calls += self._messages.feed(data)

    def answer(self) -> list[Signal]:
        """Answer the call that has waited longest.

        Returns:
            Signals that it leads to, to be sent to all after the answer.

        Raises:
            ProtocolError: The connection is to be closed.
        """
        self._serve(self._calls.popleft())
        signals = list(self._objects.manager.signals)
        self._objects.manager.signals.clear()
        return signals

    def send_signal(self, signal: Signal) -> None:
        """Queue a signal of the service manager.

        Raises:
            ProtocolError: Too many of them were not read.
        """
        if len(self.unsent) > MAX_UNSENT:
            raise wire.ProtocolError("the client does not read its signals")
        self._serial += 1
        sender = SYSTEMD_UNIQUE if self._unique else ""
        name = f"{MANAGER}.{signal.member}"
        address = wire.Address(sender)
        self.unsent += wire.signal(
            self._serial, address, ROOT, name, signal.signature, signal.body
        )  # fmt: skip

    def _serve(self, call: wire.Call) -> None:
        self._serial += 1
        sender = _OWNERS.get(call.destination, BUS) if self._unique else ""
        address = wire.Address(sender, self._unique)
        try:
            signature, body = self._dispatch(call)
            answer = wire.reply(self._serial, call.serial, address, signature, body)
        except RefusalError as refusal:
            answer = wire.error(self._serial, call.serial, address, refusal.name, refusal.text)
        if call.wants_reply:
            self.unsent += answer

    def _dispatch(self, call: wire.Call) -> Answer:
        if self._who is None:
            self._who = self._find(self._pid, self._uid)
        if self._unique:
            if not self._greeted and (call.destination, call.member) != (BUS, "Hello"):
                raise wire.ProtocolError("a call before Hello")
            if call.destination == BUS:
                return self._driver(call, self._who)
            if _OWNERS.get(call.destination) != SYSTEMD_UNIQUE:
                return self._foreign(call.destination, call, self._who)
        if call.interface == MANAGER and call.member == "Subscribe":
            self.subscribed = True
        return self._objects.call(call, self._who)

    def _foreign(self, name: str, call: wire.Call, who: Who) -> Answer:
        unknown = RefusalError(
            f"{ERRORS}ServiceUnknown", f"The name {name} was not provided by any .service files"
        )
        if (name, call.member) == _NEEDLESS:
            raise unknown
        words = (name[:255], f"{call.interface}.{call.member}"[:300])
        self._note(Outcome.FOREIGN, who, words, "a daemon other than the stand-ins was contacted")
        raise unknown

    def _driver(self, call: wire.Call, who: Who) -> Answer:
        """The bus's own object."""
        if call.interface == _PEER and call.member == "Ping":
            return NOTHING
        if call.interface not in ("", BUS):
            raise self._objects.unknown(call, who)
        match call.member, call.signature:
            case "Hello", "" if not self._greeted:
                self._greeted = True
                return "s", (self._unique,)
            case "AddMatch", "s":
                if self._matches >= _MAX_MATCHES:
                    raise RefusalError(f"{ERRORS}LimitsExceeded", "too many match rules")
                self._matches += 1
                return NOTHING
            case "RemoveMatch", "s":
                self._matches = max(0, self._matches - 1)
                return NOTHING
            case "ListNames", "":
                return "as", ([BUS, SYSTEMD, SYSTEMD_UNIQUE, self._unique],)
            case "ListActivatableNames", "":
                return "as", ([BUS, SYSTEMD],)
            case "GetId", "":
                return "s", (self._guid,)
            case "ReloadConfig", "":
                words = ("systemctl", "reload", "dbus.service")
                self._note(Outcome.DEFERRED, who, words, "ReloadConfig")
                return NOTHING
            case "RequestName", "su":
                (name, _flags) = call.arguments("su")
                self._note(Outcome.REFUSED, who, ("RequestName", name[:255]), "no daemon runs here")
                raise RefusalError(f"{ERRORS}AccessDenied", f"{name[:255]} is not to be owned here")
            case (
                "GetNameOwner" | "NameHasOwner" | "GetConnectionUnixUser"
                | "GetConnectionUnixProcessID" | "GetConnectionCredentials", "s",
            ):  # fmt: skip
                return self._about_name(call, who)
            case "StartServiceByName", "su":
                return self._about_name(call, who)
        raise self._objects.unknown(call, who)

    def _about_name(self, call: wire.Call, who: Who) -> Answer:
        name = str(call.arguments(call.signature)[0])
        owner = self._unique if name == self._unique else _OWNERS.get(name)
        if call.member == "NameHasOwner":
            return "b", (owner is not None,)
        if call.member == "StartServiceByName":
            return ("u", (_ALREADY_RUNNING,)) if owner else self._foreign(name, call, who)
        if owner is None:
            text = f"Could not get owner of name '{name[:255]}': no such name"
            raise RefusalError(f"{ERRORS}NameHasNoOwner", text)
        if call.member == "GetNameOwner":
            return "s", (owner,)
        ours = owner == self._unique
        pid, uid = (self._pid, self._uid) if ours else (1, 0)
        if call.member == "GetConnectionUnixUser":
            return "u", (uid,)
        if call.member == "GetConnectionUnixProcessID":
            return "u", (pid,)
        credentials: dict[str, tuple[str, Any]] = {
            "UnixUserID": ("u", uid), "ProcessID": ("u", pid),
        }  # fmt: skip
        return "a{sv}", (credentials,)

    def _note(self, outcome: Outcome, who: Who, words: tuple[str, ...], why: str) -> None:
        self._record(Event(outcome, words, who.caller.package, who.caller.script, why))
