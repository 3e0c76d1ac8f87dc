"""libvirt, asked through libvirt-python where it is installed: virsh's words without a program.

A question costs 0.3 ms, where a program costs 18 and more. Words and answers are virsh's, so that
nobody above can tell; `tests/vm/test_libvirt.py` holds them against virsh itself.

Source: libvirt v9.0.0, ``tools/virsh-domain.c`` (which calls each word stands for, with which
flags), ``include/libvirt/libvirt-domain.h``.
"""

from __future__ import annotations

import functools
import importlib
import os
import queue
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from ouassister.errors import DeadlineError, HostNotReadyError, UsageError
from ouassister.provider import domain_xml
from ouassister.provider.virsh import NO_DOMAIN, Answer, Virsh, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

Object = Any  # of the library, which has no types
# Debian's python3-libvirt, for an environment of the system's own Python that does not look there.
_SYSTEM: Final = "/usr/lib/python3/dist-packages"
_CHOICE: Final = "OUASSISTER_LIBVIRT_CLIENT"
_PYTHON, _VIRSH = "python", "virsh"
# virDomainState, as virsh names them.
_STATES: Final = (
    "no state", "running", "idle", "paused", "in shutdown", "shut off", "crashed", "pmsuspended",
)  # fmt: skip
_connections: dict[str, Object] = {}


@functools.cache
def _modules() -> tuple[Object, Object] | None:
    """The library's two modules; None where it is not installed, or is for another Python."""
    for folder in (None, _SYSTEM):
        if folder is not None:
            sys.path.append(folder)
        try:
            library = importlib.import_module("libvirt")
            qemu = importlib.import_module("libvirt_qemu")
        except ImportError:
            continue
        finally:
            if folder is not None:
                sys.path.remove(folder)
        library.registerErrorHandler(lambda *_told: None, None)  # else each one is printed
        return library, qemu
    return None


def client(uri: str) -> Virsh:
    """What asks the daemon at ``uri``: libvirt-python where it is installed, else virsh.

    Raises:
        HostNotReadyError: ``OUASSISTER_LIBVIRT_CLIENT`` wants the one that is not installed.
        UsageError: It names neither.
    """
    choice = _choice()
    if choice == _PYTHON:
        _loaded()
    return Virsh(uri) if choice == _VIRSH or _modules() is None else Library(uri)


def installed() -> tuple[str, ...]:
    """Where those are that may be used, the one that is used first; raises UsageError likewise."""
    choice = _choice()
    modules = None if choice == _VIRSH else _modules()
    tool = None if choice == _PYTHON else shutil.which("virsh")
    own = () if modules is None else (str(modules[0].__file__),)
    return own + (() if tool is None else (tool,))


def _choice() -> str:
    choice = os.environ.get(_CHOICE, "")
    if choice not in ("", _PYTHON, _VIRSH):
        raise UsageError(f"{_CHOICE} is {choice!r}", hint="it takes 'python' or 'virsh'")
    return choice


@dataclass(frozen=True, slots=True)
class Library(Virsh):
    """One libvirt daemon of this host, by its URI; one connection to it for the whole process."""

    def ask(self, *words: str, timeout_s: float = 30.0) -> Answer:
        """See `Virsh.ask`. A call cannot be ended: one that hangs is left to itself."""
        told: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                told.put(self._ask(words))
            except BaseException as error:
                told.put(error)

        # Of its own, so that this one hears of signals and of the deadline.
        threading.Thread(target=work, daemon=True).start()
        try:
            answer = told.get(timeout=timeout_s)
        except queue.Empty:
            _connections.pop(self.uri, None)
            message = f"libvirt did not answer {words[0]} within {timeout_s:.0f} s"
            raise DeadlineError(message, hint="look at what hangs in libvirt's log") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _ask(self, words: tuple[str, ...]) -> Answer:
        library = _library()
        connection = self._connection()
        try:
            return Answer(True, _CALLS[words[0]](connection, *words[1:]), "")
        except library.libvirtError as error:
            told = str(error.get_error_message() or error)
            if error.get_error_code() == library.VIR_ERR_NO_DOMAIN:
                told = f"{NO_DOMAIN} '{words[1]}'"  # all that virsh says
            return Answer(False, "", one_line(told))

    def _connection(self) -> Object:
        known = _connections.get(self.uri)
        if known is not None and known.isAlive():
            return known
        library = _library()
        try:
            _connections[self.uri] = library.open(self.uri)
        except library.libvirtError as error:
            reason = one_line(str(error.get_error_message() or error))
            message = f"libvirt does not answer at {self.uri}: {reason}"
            raise HostNotReadyError(message) from error
        return _connections[self.uri]


def _library() -> Object:
    return _loaded()[0]


def _loaded() -> tuple[Object, Object]:
    modules = _modules()
    if modules is None:
        raise HostNotReadyError("libvirt-python is not installed for this Python")
    return modules


def _domain(connection: Object, word: str) -> Object:
    """By UUID or name, as virsh takes either."""
    try:
        UUID(word)
    except ValueError:
        return connection.lookupByName(word)
    return connection.lookupByUUIDString(word)


def _state(connection: Object, word: str) -> str:
    return f"{_STATES[_domain(connection, word).state()[0]]}\n"


def _dumpxml(connection: Object, word: str, *options: str) -> str:
    flags = _library().VIR_DOMAIN_XML_INACTIVE if options == ("--inactive",) else 0
    return str(_domain(connection, word).XMLDesc(flags))


def _list(connection: Object, *_options: str) -> str:
    domains = connection.listAllDomains(_library().VIR_CONNECT_LIST_DOMAINS_INACTIVE)
    return "".join(f"{one.UUIDString()} {one.name()}\n" for one in domains)


def _restore(connection: Object, save: str, _xml: str, file: str, _paused: str) -> str:
    xml = Path(file).read_text()
    connection.restoreFlags(save, xml, _library().VIR_DOMAIN_SAVE_PAUSED)
    return ""


def _start(connection: Object, word: str, _paused: str) -> str:
    _domain(connection, word).createWithFlags(_library().VIR_DOMAIN_START_PAUSED)
    return ""


def _plain(name: str) -> Callable[..., str]:
    def call(connection: Object, word: str) -> str:
        getattr(_domain(connection, word), name)()
        return ""

    return call


def _remove_save(connection: Object, word: str) -> str:
    domain = _domain(connection, word)
    if domain.hasManagedSaveImage():
        domain.managedSaveRemove()
    return ""


def _save(connection: Object, word: str, path: str) -> str:
    _domain(connection, word).save(path)
    return ""


def _forget(connection: Object, word: str, uri: str, _live: str, _remove: str) -> str:
    library = _library()
    kind, live = library.VIR_DOMAIN_METADATA_ELEMENT, library.VIR_DOMAIN_AFFECT_LIVE
    _domain(connection, word).setMetadata(kind, None, None, uri, live)
    return ""


def _set_link(connection: Object, word: str, mac: str, state: str) -> str:
    library = _library()
    domain = _domain(connection, word)
    try:
        xml = domain_xml.interface(domain.XMLDesc(0).encode(), mac, state)
    except LookupError as error:
        raise library.libvirtError(f"interface (mac: {mac}) not found") from error
    domain.updateDeviceFlags(xml.decode(), library.VIR_DOMAIN_AFFECT_LIVE)
    return ""


def _attach(connection: Object, word: str, file: str, _live: str) -> str:
    xml = Path(file).read_text()
    _domain(connection, word).attachDeviceFlags(xml, _library().VIR_DOMAIN_AFFECT_LIVE)
    return ""


def _detach(connection: Object, word: str, alias: str, _live: str) -> str:
    _domain(connection, word).detachDeviceAlias(alias, _library().VIR_DOMAIN_AFFECT_LIVE)
    return ""


def _ask_agent(connection: Object, word: str, text: str, _timeout: str, seconds: str) -> str:
    qemu = _loaded()[1]
    return f"{qemu.qemuAgentCommand(_domain(connection, word), text, int(seconds), 0)}\n"


def _monitor(connection: Object, word: str, _hmp: str, command: str) -> str:
    qemu = _loaded()[1]
    flag = qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
    return f"{qemu.qemuMonitorCommand(_domain(connection, word), command, flag)}\n"


# All that `ouassister.provider.libvirt` and its agent say, with the options that they say it with.
_CALLS: Final[dict[str, Callable[..., str]]] = {
    "attach-device": _attach,
    "destroy": _plain("destroy"),
    "detach-device-alias": _detach,
    "domif-setlink": _set_link,
    "domstate": _state,
    "dumpxml": _dumpxml,
    "list": _list,
    "managedsave": _plain("managedSave"),
    "managedsave-remove": _remove_save,
    "metadata": _forget,
    "qemu-agent-command": _ask_agent,
    "qemu-monitor-command": _monitor,
    "restore": _restore,
    "resume": _plain("resume"),
    "save": _save,
    "start": _start,
    "suspend": _plain("suspend"),
}
