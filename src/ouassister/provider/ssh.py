"""The channel that the guest's own sshd is, reached through a forwarded port of this host.

OpenSSH's client does it, with nothing of the user's configuration: the keys that the guest may
prove itself by are those that lie on its disk, the one that is offered is named or the agent's, and
nothing is forwarded. One connection is kept for all programs, since a handshake costs a just
restored guest a second and more under TCG; a restart of sshd leaves it as it is (KillMode=process
of ssh.service). It ends with our process, whose end of a pipe its program in the guest reads.

A program's exit status is told by the shell that ran it, behind what the program wrote to standard
error: ssh's own status 255 may be the program's, or mean that the connection is lost.

Source: ssh(1), ssh_config(5), sshd(8); OpenSSH 9.2.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import selectors
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar, Final

from ouassister.access import ROOT, SSH
from ouassister.errors import ChannelError, DeadlineError, HostNotReadyError
from ouassister.provider.channel import OUTPUT_LIMIT, Channel, ExecResult

if TYPE_CHECKING:
    from collections.abc import Sequence

_HOST: Final = "127.0.0.1"
_ALIAS: Final = "guest"
_KEY: Final = re.compile(r"[a-z0-9@.-]{1,64} [A-Za-z0-9+/]{1,4096}={0,2}")
# Of one argument of the guest's shell (MAX_ARG_STRLEN); what is longer goes by its input.
_COMMAND_LIMIT: Final = 96 << 10
_SIGNALS: Final = 64
_PAUSE_S: Final = 0.1
_GONE_S: Final = 1.0
# Words of ssh(1) after which trying again is of no use.
_FINAL: Final = ("Host key verification failed", "Permission denied", "No such identity")
_OPTIONS: Final = (
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "GlobalKnownHostsFile=none",
    f"HostKeyAlias={_ALIAS}",
    "CheckHostIP=no",
    "UpdateHostKeys=no",
    "VerifyHostKeyDNS=no",
    "PreferredAuthentications=publickey",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "ConnectTimeout=60",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=8",
    "LogLevel=ERROR",
)
# Who is not root has sudo run each program, without a question; this word of the program's own
# shell is in its standard error before anything else, or sudo did not run it.
_SUDO: Final = """sudo -n -- /bin/sh -c 'printf "\\n%s begun\\n" "$0" >&2; exec "$@"' """


class SshChannel(Channel):
    """One session as the guest's root.

    Args:
        port: Of loopback; it leads to the guest's sshd.
        identity: File of the private key; None for those of this host's user's ssh-agent.
        host_keys: The guest's own; see `ouassister.access.Access`.
        user: Who logs in.

    Raises:
        ChannelError: Without host keys, anybody could answer.
        HostNotReadyError: There is no ssh.
    """

    name: ClassVar[str] = SSH

    def __init__(
        self, port: int, identity: Path | None, host_keys: tuple[str, ...], user: str = ROOT
    ) -> None:
        keys = [key for key in host_keys if _KEY.fullmatch(key)]
        if not keys or len(keys) != len(host_keys):
            raise ChannelError("the guest's host keys are not known, so anybody could answer")
        if shutil.which("ssh") is None:
            raise HostNotReadyError("ssh is not installed")
        self._folder = Path(tempfile.mkdtemp(prefix="ouassister-ssh-"))
        known = self._folder / "known_hosts"
        known.write_text("".join(f"{_ALIAS} {key}\n" for key in keys), encoding="ascii")
        self._control = self._folder / "control"
        self._user = user
        chosen = [f"User={user}", f"UserKnownHostsFile={_escape(known)}"]
        if identity is None:
            chosen.append("IdentityFile=none")
        else:
            chosen += ["IdentitiesOnly=yes", "IdentityAgent=none"]
            chosen.append(f"IdentityFile={_escape(identity)}")
        self._ssh = ["ssh", "-F", "none", "-T", "-p", str(port)]
        for option in (*_OPTIONS, *chosen, f"ControlPath={_escape(self._control)}"):
            self._ssh += ["-o", option]
        self._master: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """Hang up. Closing twice is fine."""
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def ping(self, *, timeout_s: float = 5.0) -> None:
        """See `Channel`."""
        self.run(["true"], timeout_s=timeout_s)

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float,
        most_s: float = 0.1,
    ) -> ExecResult:
        """See `Channel`; a program that is not there has the status 127."""
        end = time.monotonic() + timeout_s
        self._connect(end)
        token = secrets.token_hex(16)
        by_sudo = self._user != ROOT
        command, ahead = told(argv, token, by_sudo=by_sudo)
        process = subprocess.Popen(
            [*self._ssh, _HOST, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, err = _converse(process, ahead + stdin, end)
        except TimeoutError as error:
            message = f"{argv[0]} still runs in the guest after {timeout_s:.1f} s"
            raise DeadlineError(message) from error
        finally:
            _stop(process)
        status, errors = ended(err.data, err.tail, token)
        if status is None:
            self._end()
            words = _words(err.data + err.tail)
            raise ChannelError(f"the end of {argv[0]} in the guest is unknown: {words}")
        if by_sudo:
            _warnings, begun, errors = errors.partition(f"\n{token} begun\n".encode())
            if not begun:
                raise ChannelError(
                    f"sudo lets {self._user} run nothing in the guest: {_words(_warnings)}",
                    hint=f"the guest's sudoers needs: {self._user} ALL=(ALL) NOPASSWD: ALL",
                )
        return ExecResult(status, out.data, errors, out.lost or err.lost)

    def write_file(self, path: str, content: bytes, *, timeout_s: float = 30.0) -> None:
        """See `Channel`."""
        command = ["/bin/sh", "-c", 'umask 077; cat >"$1"', "ouassister", path]
        done = self.run(command, stdin=content, timeout_s=timeout_s)
        if done.exit_status != 0:
            raise ChannelError(f"{path} was not written in the guest: {_words(done.stderr)}")

    def _connect(self, end: float) -> None:
        """Keep a connection; a guest that wakes up is tried again until it answers."""
        if self._master is not None and self._master.poll() is None:
            return
        while True:
            self._end()
            log = self._folder / "log"
            with log.open("wb") as errors:
                self._master = subprocess.Popen(
                    [*self._ssh, "-o", "ControlMaster=yes", _HOST, "read _"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    start_new_session=True,
                )
            while self._master.poll() is None:
                if self._listens():
                    return
                if time.monotonic() >= end:
                    self._end()
                    raise DeadlineError("the guest's sshd did not answer in time")
                time.sleep(0.01)  # ssh does not tell when its control socket listens
            words = _words(log.read_bytes())
            if any(one in words for one in _FINAL):
                raise ChannelError(f"ssh cannot reach the guest: {words}")
            if time.monotonic() + _PAUSE_S >= end:
                raise DeadlineError(f"the guest's sshd did not answer in time: {words}")
            time.sleep(_PAUSE_S)  # a guest that wakes up does not tell when sshd answers

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(self._control))
            return True
        return False

    def _end(self) -> None:
        if self._master is not None:
            _stop(self._master)
            self._master = None
        self._control.unlink(missing_ok=True)


class Stream:
    """What a program writes: the beginning, and the last bytes where that is not all."""

    def __init__(self) -> None:
        self.data = b""
        self.tail = b""
        self.lost = False
        self._parts = bytearray()

    def add(self, data: bytes) -> None:
        """Take what was written next."""
        room = OUTPUT_LIMIT - len(self._parts)
        self._parts += data[:room]
        if data[room:]:
            self.lost = True
            self.tail = (self.tail + data[room:])[-128:]

    def finish(self) -> None:
        """Nothing more comes."""
        self.data = bytes(self._parts)


def told(argv: Sequence[str], token: str, *, by_sudo: bool = False) -> tuple[str, bytes]:
    """What the guest's shell is told: a command, and what its input has before the program's.

    Behind the program's standard error comes a line with ``token`` and its exit status; before it
    one that says that sudo has run it.
    """
    words = shlex.join(argv)
    if by_sudo:
        words = f"{_SUDO}{token} {words}"
    ahead = b""
    if len(words.encode()) > _COMMAND_LIMIT:
        ahead = words.encode()
        words = f'eval "$(head -c {len(ahead)})"'
    return f"{words}; printf '\\n%s %s\\n' {token} \"$?\" >&2", ahead


def ended(errors: bytes, tail: bytes, token: str) -> tuple[int | None, bytes]:
    """Take the exit status from behind a program's standard error; None when it is not there.

    A shell tells 128 and the signal for a program that was killed.
    """
    match = re.search(rb"\n%b ([0-9]{1,3})\n\Z" % token.encode(), errors + tail)
    if match is None:
        return None, errors
    status = int(match[1])
    killed = 128 < status <= 128 + _SIGNALS
    return (128 - status if killed else status), (errors + tail)[: match.start()][:OUTPUT_LIMIT]


def _converse(process: subprocess.Popen[bytes], data: bytes, end: float) -> tuple[Stream, Stream]:
    """Write ``data``, read both streams to their end.

    Raises:
        TimeoutError: That was not done at ``end``.
    """
    streams = (Stream(), Stream())
    left = memoryview(data)
    with selectors.DefaultSelector() as waiting:
        for file, stream in zip((process.stdout, process.stderr), streams, strict=True):
            waiting.register(_open(file), selectors.EVENT_READ, stream)
        entry = _open(process.stdin)
        os.set_blocking(entry.fileno(), False)
        waiting.register(entry, selectors.EVENT_WRITE)
        while waiting.get_map():
            ready = waiting.select(max(end - time.monotonic(), 0))
            if not ready:
                raise TimeoutError
            for key, _events in ready:
                if isinstance(key.data, Stream):
                    read = os.read(key.fd, 1 << 16)
                    if not read:
                        waiting.unregister(key.fileobj)
                    key.data.add(read)
                    continue
                try:
                    left = left[os.write(key.fd, left[: 1 << 16]) if left else 0 :]
                except BrokenPipeError:  # nobody reads it any more
                    left = left[:0]
                if not left:
                    waiting.unregister(key.fileobj)
                    entry.close()
    for stream in streams:
        stream.finish()
    return streams


def _open(file: IO[bytes] | None) -> IO[bytes]:
    assert file is not None  # noqa: S101 - PIPE was asked for
    return file


def _stop(process: subprocess.Popen[bytes]) -> None:
    for file in (process.stdin, process.stdout, process.stderr):
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
    try:
        process.wait(0)
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        process.wait(_GONE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _escape(path: Path) -> str:
    """A path as a value of ssh_config(5), which expands % and splits at blanks."""
    word = str(path.absolute()).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{word}"'


def _words(raw: bytes) -> str:
    lines = raw[-2000:].decode("utf-8", "replace").split("\n")
    text = "; ".join(line.strip() for line in lines if line.strip()) or "it said nothing"
    return "".join(char if char.isprintable() else "?" for char in text)[-500:]


def offered(identity: Path | None) -> tuple[str, ...]:
    """The public keys that the guest will be offered, each as ``TYPE BASE64``.

    None where the file needs a passphrase, or no ssh-agent has a key.
    """
    words = ["ssh-add", "-L"]
    if identity is not None:
        words = ["ssh-keygen", "-y", "-P", "", "-f", str(identity)]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=30
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ()
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    found = (" ".join(line.split()[:2]) for line in lines)
    return tuple(key for key in found if _KEY.fullmatch(key))
