"""What changes in the shadow and never travels to the guest, with the reason for each.

A pattern is an absolute guest path; ``*`` stands for any bytes but a slash. A rule covers the
paths that its pattern matches and everything below them: ``/run`` covers the directory itself,
``/tmp/*`` its content alone.

Kept on purpose, though they look alike: ``/var/lib/dpkg/*-old`` and ``/var/cache/debconf`` (parts
of the database), ``/etc/ld.so.cache`` (programs do not start without it), ``/var/cache/man`` (a
trigger makes it in a live update too, and ``man -k`` would not know the new pages),
``__pycache__`` (valid: it names the time and size of its source, and both travel).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ouassister.errors import InternalError

SOCKET_REASON = "a socket belongs to the process that listens on it"
_NEW_DIRECTORY_REASON = "a new directory with nothing left in it"


@dataclass(frozen=True, slots=True)
class Rule:
    """Paths that never travel, and why."""

    pattern: bytes
    reason: str


_MEMORY = "not on the guest's disk: its kernel or its processes hold it in memory"
_TEMPORARY = "a temporary file of the run"
_IDENTITY = "the identity of this one machine"
_HOST_KEY = "a secret that only the guest may make; run 'ssh-keygen -A' there for a new server"
_SECRET = "a secret of the guest; nothing made on the host may stand in for it"  # noqa: S105
_NETWORK = "describes the network of the shadow, not of the guest"
_LOCK = "a lock; the guest's own programs take it"
_APT_CACHE = "a cache that apt makes again"
_APT_LISTS = "downloaded indexes; the guest's own 'apt-get update' fetches its own"
_APT_STAMP = "tells when the indexes were fetched, and those do not travel"
_INODE_CACHE = "a cache keyed by inode numbers or directory times, which are others in the guest"
_OURS = "what earlier reflections left in the guest: marker, attestation, journal"
_LOG = "a log of the run; the report of the run has it"

RULES: tuple[Rule, ...] = (
    Rule(b"/run", _MEMORY),
    Rule(b"/dev", _MEMORY),
    Rule(b"/proc", _MEMORY),
    Rule(b"/sys", _MEMORY),
    Rule(b"/tmp/*", _TEMPORARY),
    Rule(b"/var/tmp/*", _TEMPORARY),
    Rule(b"/etc/machine-id", _IDENTITY),
    Rule(b"/var/lib/dbus/machine-id", _IDENTITY),
    Rule(b"/etc/ssh/ssh_host_*", _HOST_KEY),
    Rule(b"/var/lib/systemd/random-seed", _SECRET),
    Rule(b"/var/lib/urandom/random-seed", _SECRET),
    Rule(b"/var/lib/systemd/credential.secret", _SECRET),
    Rule(b"/etc/resolv.conf", _NETWORK),
    Rule(b"/etc/.pwd.lock", _LOCK),
    Rule(b"/var/lib/dpkg/lock", _LOCK),
    Rule(b"/var/lib/dpkg/lock-frontend", _LOCK),
    Rule(b"/var/lib/dpkg/triggers/Lock", _LOCK),
    Rule(b"/var/lib/apt/daily_lock", _LOCK),
    Rule(b"/var/lib/ouassister", _OURS),
    Rule(b"/var/cache/apt/*", _APT_CACHE),
    Rule(b"/var/lib/apt/lists/*", _APT_LISTS),
    Rule(b"/var/lib/apt/periodic/*", _APT_STAMP),
    Rule(b"/var/cache/ldconfig/aux-cache", _INODE_CACHE),
    Rule(b"/var/cache/fontconfig/*", _INODE_CACHE),
    Rule(b"/var/log/apt/*", _LOG),
    Rule(b"/var/log/dpkg.log", _LOG),
    Rule(b"/var/log/alternatives.log", _LOG),
    Rule(b"/var/log/fontconfig.log", _LOG),
    Rule(b"/var/log/unattended-upgrades/*", _LOG),
)


class Filter:
    """Decides by path what stays behind.

    Args:
        rules: The first rule that covers a path gives the reason.

    Raises:
        InternalError: A pattern is not an absolute, normal path.
    """

    def __init__(self, rules: tuple[Rule, ...] = RULES) -> None:
        for rule in rules:
            parts = rule.pattern.split(b"/")
            if parts[0] or len(parts) < 2 or {b"", b".", b".."} & set(parts[1:]):
                raise InternalError(f"filter pattern {rule.pattern!r} is not an absolute path")
        self._rules = rules
        # One alternation instead of a loop: a change set has tens of thousands of paths.
        self._regex = re.compile(b"|".join(b"(%s)" % _regex(rule.pattern) for rule in rules))

    def reason(self, path: bytes) -> str | None:
        """Why ``path`` stays behind, or None when it travels."""
        match = self._regex.match(path) if self._rules else None
        if match is None or match.lastindex is None:
            return None
        return self._rules[match.lastindex - 1].reason

    def explain(self, path: bytes, below: frozenset[bytes] = frozenset()) -> str:
        """Say of a path in ``Changeset.filtered`` why it is there; ``below`` are all of those."""
        reason = self.reason(path)
        if reason is not None:
            return reason
        prefix = path + b"/"
        return _NEW_DIRECTORY_REASON if any(p.startswith(prefix) for p in below) else SOCKET_REASON


def _regex(pattern: bytes) -> bytes:
    return b"[^/]*".join(re.escape(part) for part in pattern.split(b"*")) + rb"(?:/|\Z)"
