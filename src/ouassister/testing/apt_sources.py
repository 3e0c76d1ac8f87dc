"""The Debian mirrors that this host is configured with, for a guest that shall use the same.

Formats: sources.list(5), one-line and deb822; mirror lists: apt-transport-mirror(1).
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from ouassister.errors import HostNotReadyError

_ETC_APT = Path("/etc/apt")
# What a guest must share with the host to accept the same mirrors.
_SETTINGS = (
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
    "Acquire::http::Proxy",
    "Acquire::https::Proxy",
)
# Options that say how to check an index; others (Architectures, Languages...) are the host's own.
_KEPT = ("check-valid-until", "check-date", "valid-until-max", "valid-until-min", "trusted")
_POCKETS = ("-updates", "-security", "/updates")
_BARE = ("sid", "unstable")  # have no updates and no security archive of their own


@dataclass(frozen=True, slots=True)
class Source:
    """One binary source: a mirror, its suites and its components."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""
    options: tuple[tuple[str, str], ...] = field(default=())

    def stanza(self) -> str:
        """Write it as deb822."""
        lines = ["Types: deb", f"URIs: {self.uri}", f"Suites: {' '.join(self.suites)}"]
        lines.append(f"Components: {' '.join(self.components)}")
        if self.signed_by:
            lines.append(f"Signed-By: {self.signed_by}")
        lines += [f"{name}: {value}" for name, value in self.options]
        return "\n".join(lines) + "\n"


def host_sources(
    suite: str, root: Path = _ETC_APT, *, extra: str = "", updates: bool = True
) -> str:
    """The host's sources of a Debian suite, with its updates and security, as deb822.

    A mirror carries every release: where the host's apt knows only another one, its mirrors and
    keys are taken for the suite as well. ``extra`` is one more suite of the same release, such
    as its backports. Without ``updates`` there is only what was released.

    Raises:
        HostNotReadyError: The host has no Debian mirror.
    """
    found: list[Source] = []
    for path in [root / "sources.list", *sorted((root / "sources.list.d").glob("*"))]:
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".list":
            found += _one_line(text)
        elif path.suffix == ".sources":
            found += _deb822(text)
    debian = [
        replace(source, uri=uri, components=("main",), signed_by=_key(source.signed_by))
        for source in found
        if "main" in source.components and _is_debian(uri := _resolve(source.uri), source.signed_by)
    ]
    known = [name for source in debian for name in source.suites if re.fullmatch("[a-z]+", name)]
    if not known:
        message = f"apt of this host has no Debian source for {suite}"
        raise HostNotReadyError(message, hint=f"add a Debian mirror of {suite} to /etc/apt")
    host = suite if suite in known else known[0]
    pockets = [""] if suite in _BARE or not updates else ["", *_POCKETS]
    kept: list[Source] = []
    for source in debian:
        suites = [suite + pocket for pocket in pockets if host + pocket in source.suites]
        if extra and extra not in suites and host in source.suites:
            suites.append(extra)
        if suites:
            kept.append(replace(source, suites=tuple(suites)))
    return "\n".join(source.stanza() for source in dict.fromkeys(kept))


def host_settings() -> tuple[str, ...]:
    """The host's apt settings that decide whether its mirrors are accepted, as apt.conf lines."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True)
    lines = dump.stdout.splitlines()
    return tuple(line for line in lines if line.split(" ", 1)[0] in _SETTINGS and '""' not in line)


def _one_line(text: str) -> list[Source]:
    sources = []
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        match = re.fullmatch(r"deb\s+(?:\[([^]]*)]\s+)?(\S+)\s+(\S+)\s+(.+)", line)
        if match is None:
            continue
        pairs = [word.partition("=") for word in shlex.split(match[1] or "")]
        options = {name.lower(): value for name, _, value in pairs}
        sources.append(_source(match[2], (match[3],), tuple(match[4].split()), options))
    return sources


def _deb822(text: str) -> list[Source]:
    sources = []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1] in " \t":
                fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        enabled = fields.get("enabled", "yes").lower() not in ("no", "false", "0", "off")
        if not enabled or "deb" not in fields.get("types", "").split():
            continue
        suites = tuple(fields.get("suites", "").split())
        components = tuple(fields.get("components", "").split())
        for uri in fields.get("uris", "").split():
            sources.append(_source(uri, suites, components, fields))
    return sources


def _source(
    uri: str, suites: tuple[str, ...], components: tuple[str, ...], options: dict[str, str]
) -> Source:
    kept = tuple((name.title(), options[name]) for name in _KEPT if name in options)
    return Source(uri, suites, components, options.get("signed-by", ""), kept)


def _resolve(uri: str) -> str:
    """Replace a local mirror list by its first mirror: Debian's cloud images come with one."""
    scheme, _, rest = uri.partition(":")
    if scheme not in ("mirror+file", "mirror"):
        return uri
    path = Path(urlsplit(f"file:{rest}").path)
    if scheme == "mirror" or not path.is_file():
        return uri
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split("#", 1)[0].split()
        if words:
            return words[0]
    return uri


def _is_debian(uri: str, signed_by: str) -> bool:
    """Tell Debian's archive from others that use Debian's suite names."""
    if signed_by and "debian-archive" not in signed_by and "BEGIN PGP" not in signed_by:
        return False
    parts = urlsplit(uri).path.strip("/").split("/")
    return any(part in ("debian", "debian-security") for part in parts)


def _key(signed_by: str) -> str:
    """Keep a key ring only where Debian's own package puts it, in the guest too."""
    path = signed_by.strip()
    return path if path.startswith("/usr/share/keyrings/debian-archive") else ""
