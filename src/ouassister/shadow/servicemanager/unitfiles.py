"""Unit files of the guest's tree: where they lie, and what of them the stand-in answers with.

Only what a client asks for is read. Whether a unit is enabled is not decided here: the guest's own
systemctl knows (`guestctl`).

Source: systemd.unit(5), systemd.syntax(7); systemd v252 src/basic/unit-file.c,
src/shared/dropin.c (``unit_file_find_dropin_paths``), src/basic/unit-name.c.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# systemd.unit(5), "Table 1. Load path when running in system mode"; what systemd-analyze tells
# goes first, since distributions differ in where the vendor's files are.
DEFAULT_PATHS: Final = (
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    "/run/systemd/transient",
    "/run/systemd/generator.early",
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/run/systemd/system",
    "/run/systemd/system.attached",
    "/run/systemd/generator",
    "/usr/local/lib/systemd/system",
    "/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/run/systemd/generator.late",
)
INIT_SCRIPTS: Final = "/etc/init.d"
_GENERATED: Final = "/run/systemd/generator.late"
_MAX_FILE: Final = 1 << 18
_MAX_LINES: Final = 8192
_MAX_ENTRIES: Final = 4096
_MAX_LINKS: Final = 8
_MAX_LISTINGS: Final = 4096
_TICK_NS: Final = 100_000_000  # file systems count time in ticks: a later change may not show
_TYPES: Final = "service|mount|swap|socket|target|device|automount|timer|path|slice|scope"
_NAME: Final = re.compile(rf"[A-Za-z0-9:_.\\-]+(?:@[A-Za-z0-9:_.\\@-]*)?\.(?:{_TYPES})")
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_BOOLEANS: Final = {"1": True, "yes": True, "y": True, "true": True, "t": True, "on": True}

Settings = dict[tuple[str, str], list[str]]


def is_unit_name(name: str) -> bool:
    """Whether systemd would take it as the name of a unit, templates included."""
    return len(name) < 256 and _NAME.fullmatch(name) is not None


def split_name(name: str) -> tuple[str, str | None, str]:
    """Prefix, instance (None without, empty for a template) and type."""
    stem, _, kind = name.rpartition(".")
    prefix, at, instance = stem.partition("@")
    return prefix, instance if at else None, kind


def template_of(name: str) -> str:
    """The template that an instance is made of; empty when it is none."""
    prefix, instance, kind = split_name(name)
    return f"{prefix}@.{kind}" if instance else ""


@dataclass(frozen=True, slots=True)
class UnitFile:
    """A unit as its files describe it."""

    id: str  # the name that aliases lead to
    fragment: str
    masked: bool
    source: str  # of a generated one
    dropins: tuple[str, ...]
    settings: Settings
    changed_ns: int  # the newest of its files

    def last(self, section: str, key: str, default: str = "") -> str:
        """A setting that counts once."""
        values = self.settings.get((section, key))
        return self.expand(values[-1]) if values else default

    def words(self, section: str, key: str) -> list[str]:
        """A setting that is a list of words."""
        values = self.settings.get((section, key), [])
        return [word for value in values for word in self.expand(value).split()]

    def flag(self, section: str, key: str, *, default: bool = False) -> bool:
        """A boolean."""
        value = self.last(section, key)
        return _BOOLEANS.get(value.lower(), False) if value else default

    def expand(self, text: str) -> str:
        """Put names in for specifiers; what the stand-in does not know stays as it is."""
        if "%" not in text:
            return text
        prefix, instance, kind = split_name(self.id)
        stem = self.id.removesuffix(f".{kind}")
        known = {
            "n": self.id, "N": stem, "p": prefix, "P": unescape(prefix), "%": "%",
            "i": instance or "", "I": unescape(instance or ""), "j": prefix.rpartition("-")[2],
        }  # fmt: skip
        return re.sub(r"%(.)", lambda found: known.get(found[1], found[0]), text)


def unescape(name: str) -> str:
    r"""Undo systemd-escape(1): a dash is a slash, ``\x2d`` a dash."""
    return re.sub(
        r"\\x([0-9a-f]{2})|-", lambda found: chr(int(found[1], 16)) if found[1] else "/", name
    )


class UnitFiles:
    """Looks units up, each time anew: packages change them while the shadow runs.

    Args:
        root: What stands before each path; empty where the tree is the root.
    """

    def __init__(self, root: str = "") -> None:
        self._root = root
        self._paths: tuple[str, ...] | None = None
        self._listings: dict[str, tuple[int, frozenset[str]]] = {}
        self.ask_paths: Callable[[], tuple[str, ...]] = tuple  # asked once, when it matters

    @property
    def paths(self) -> tuple[str, ...]:
        """The load path, first come first served."""
        if self._paths is None:
            self._paths = self.ask_paths() or DEFAULT_PATHS
        return self._paths

    def find(self, name: str) -> UnitFile | None:
        """Find a unit; None when no file describes it."""
        for candidate in dict.fromkeys((name, template_of(name))):
            for folder in self._holding(candidate):
                path = f"{folder}/{candidate}"
                with contextlib.suppress(OSError):
                    return self._load(name, path, os.lstat(self._root + path))
        return self._init_script(name)

    def locate(self, name: str) -> str:
        """Where a unit file lies, without reading it; empty when there is none."""
        return next((f"{folder}/{name}" for folder in self._holding(name)), "")

    def generated(self) -> list[str]:
        """Where the units lie that systemd-sysv-generator makes of init scripts."""
        names = (f"{script}.service" for script in self.entries(INIT_SCRIPTS))
        return [
            f"{_GENERATED}/{name}"
            for name in names
            if is_unit_name(name) and not self.locate(name) and self._init_script(name)
        ]

    def depends(self, file: UnitFile, kind: str) -> list[str]:
        """Units that ``file`` names in ``Wants``, ``Requires``, and the like; folders included."""
        found = [name for name in file.words("Unit", kind) if is_unit_name(name)]
        suffix = {"Wants": "wants", "Requires": "requires"}.get(kind)
        if suffix is not None:
            for name in dict.fromkeys((file.id, template_of(file.id))):
                for folder in self._holding(f"{name}.{suffix}" if name else ""):
                    entries = self.entries(f"{folder}/{name}.{suffix}")
                    found += [entry for entry in entries if is_unit_name(entry)]
        return list(dict.fromkeys(found))

    def entries(self, folder: str) -> list[str]:
        """The names in a folder, sorted; none when it is not there."""
        return sorted(self._listing(folder))

    def stamp(self) -> tuple[tuple[str, int], ...]:
        """Changes when a unit file or a link of one came, went or was replaced."""
        stamps = []
        for folder in (*self.paths, INIT_SCRIPTS):
            below = [f"{folder}/{name}" for name in self.entries(folder) if _is_links(name)]
            for path in (folder, *below):
                with contextlib.suppress(OSError):
                    stamps.append((path, Path(self._root + path).stat().st_mtime_ns))
        return tuple(stamps)

    def read(self, path: str) -> str | None:
        """Read a small regular file; None for anything else."""
        try:
            descriptor = os.open(self._root + path, _READ)
        except OSError:
            return None
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            return file.read(_MAX_FILE).decode("utf-8", "replace")

    def changed_ns(self, path: str) -> int:
        """When a file or what it links to last changed; 0 when it is gone."""
        newest = 0
        with contextlib.suppress(OSError):
            newest = os.lstat(self._root + path).st_ctime_ns
            newest = max(newest, Path(self._root + path).stat().st_ctime_ns)
        return newest

    def _holding(self, name: str) -> list[str]:
        """Folders of the load path that have something of this name."""
        return [folder for folder in self.paths if name and name in self._listing(folder)]

    def _listing(self, folder: str) -> frozenset[str]:
        """Names in a folder, listed again when its time has changed.

        Every look at a file that is not there would be a question to the file system's server.
        """
        try:
            changed_ns = Path(self._root + folder).stat().st_mtime_ns
        except OSError:
            return frozenset()
        known = self._listings.get(folder)
        if known is not None and known[0] == changed_ns:
            return known[1]
        names = []
        now_ns = time.time_ns()
        with contextlib.suppress(OSError), os.scandir(self._root + folder) as scan:
            for entry, _ in zip(scan, range(_MAX_ENTRIES), strict=False):
                names.append(entry.name)
        listed = frozenset(names)
        if now_ns - changed_ns > _TICK_NS and len(self._listings) < _MAX_LISTINGS:
            self._listings[folder] = changed_ns, listed
        return listed

    def _load(self, name: str, path: str, status: os.stat_result) -> UnitFile:
        identity = name
        for _ in range(_MAX_LINKS):
            if not stat.S_ISLNK(status.st_mode):
                break
            target = str(Path(self._root + path).readlink())
            if target == "/dev/null":
                return UnitFile(identity, path, True, "", (), {}, status.st_ctime_ns)
            path = os.path.normpath(os.path.join(os.path.dirname(path), target))  # noqa: PTH118, PTH120
            base = os.path.basename(path)  # noqa: PTH119
            if is_unit_name(base) and base not in (identity, template_of(identity)):
                identity = _instantiate(base, identity)
            status = os.lstat(self._root + path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("no file")
        if status.st_size == 0:
            return UnitFile(identity, path, True, "", (), {}, status.st_ctime_ns)
        settings: Settings = {}
        parse(self.read(path) or "", settings)
        dropins = self._dropins(identity)
        changed = [status.st_ctime_ns]
        for dropin in dropins:
            parse(self.read(dropin) or "", settings)
            changed.append(self.changed_ns(dropin))
        source = (settings.get(("Unit", "SourcePath")) or [""])[-1]
        return UnitFile(identity, path, False, source, dropins, settings, max(changed))

    def _dropins(self, name: str) -> tuple[str, ...]:
        prefix, _instance, kind = split_name(name)
        bases = [name, template_of(name)]
        parts = prefix.split("-")
        bases += [f"{'-'.join(parts[:end])}-.{kind}" for end in range(len(parts) - 1, 0, -1)]
        bases.append(kind)
        found: dict[str, str] = {}
        for base in bases:
            for folder in self._holding(f"{base}.d" if base else ""):
                for entry in self.entries(f"{folder}/{base}.d"):
                    if entry.endswith(".conf"):
                        found.setdefault(entry, f"{folder}/{base}.d/{entry}")
        return tuple(found[entry] for entry in sorted(found))

    def _init_script(self, name: str) -> UnitFile | None:
        """What systemd-sysv-generator makes of an init script at the next reload."""
        stem = name.removesuffix(".service")
        path = f"{INIT_SCRIPTS}/{stem}"
        if stem == name or "@" in stem or stem.startswith("."):
            return None
        try:
            status = Path(self._root + path).stat()
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o111:
            return None
        found = re.search(r"^# Short-Description:\s*(.*)$", self.read(path) or "", re.MULTILINE)
        settings: Settings = {
            ("Unit", "Description"): [f"LSB: {found[1].strip()}" if found else f"LSB: {stem}"],
            ("Service", "Type"): ["forking"],
            ("Service", "RemainAfterExit"): ["yes"],
        }
        fragment = f"{_GENERATED}/{name}"
        return UnitFile(name, fragment, False, path, (), settings, status.st_ctime_ns)


def parse(text: str, settings: Settings) -> None:
    """Add the settings of one file; an empty value forgets those before it."""
    section, joined = "", ""
    for number, raw in enumerate(text.splitlines()):
        if number >= _MAX_LINES:
            break
        line = raw.strip()
        if line.startswith(("#", ";")) or (not line and not joined):
            continue
        if line.endswith("\\"):
            joined += line[:-1] + " "
            continue
        line, joined = joined + line, ""
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
            continue
        key, equals, value = line.partition("=")
        if not equals:
            continue
        if value.strip():
            settings.setdefault((section, key.strip()), []).append(value.strip())
        else:
            settings.pop((section, key.strip()), None)


def _is_links(name: str) -> bool:
    return name.endswith((".wants", ".requires", ".upholds", ".d"))


def _instantiate(base: str, name: str) -> str:
    """The instance of an aliased template."""
    prefix, instance, kind = split_name(base)
    if instance != "":
        return base
    wanted = split_name(name)[1]
    return f"{prefix}@{wanted}.{kind}" if wanted else base
