"""Archives of staged packages as files of the change set: verified before, and once more after.

They lie in a folder of ours in the guest, so that the applier puts them there, verifies them and
can undo them as it does all else, and the change set's id covers them.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final

from ouassister.errors import UpdaterError
from ouassister.model import Kind, Staged
from ouassister.shadow.events import open_regular
from ouassister.text import to_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from ouassister.model import Archive, Entry, PackageChange, Request
    from ouassister.shadow.session import Shadow

FOLDER: Final = b"/var/cache/ouassister"
_FILE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~%_-]{0,250}\.deb")
_COPY: Final = (
    'umask 077; to=$1; shift; cd /var/cache/apt/archives && mkdir -p "$to" && exec cp -- "$@" "$to"'
)
_MODE: Final = 0o600
_TIMEOUT_S: Final = 600.0
_OUTPUT: Final = "carry.log"


def folder_of(plan_id: str) -> bytes:
    """Where in the guest the archives of a plan go."""
    return FOLDER + b"/" + plan_id[:16].encode()


def name_of(word: str) -> str:
    """The package that a word of a request names."""
    return re.split("[:=]", word)[0]


def staged(
    reasons: Mapping[PackageChange, str],
    archives: Iterable[Archive],
    request: Request,
    folder: Path,
) -> tuple[Staged, ...]:
    """Describe staged packages with their archives, each held against the package lists.

    Args:
        reasons: The changes, and why.
        archives: Of the plan.
        request: What the user asked for.
        folder: Of archives, on the host.

    Raises:
        UpdaterError: An archive is not there, or is not what the lists say.
    """
    known = tuple(archives)
    asked = {name_of(word) for word in request.install}
    return tuple(
        _describe(change, reason, known, folder, requested=change.name in asked)
        for change, reason in reasons.items()
    )


def put(shadow: Shadow, packages: Iterable[Staged], folder: bytes) -> None:
    """Copy archives into the guest's tree, by the guest's own programs.

    Raises:
        UpdaterError: They could not.
    """
    files = [package.file for package in packages if package.file]
    if not files:
        return
    argv = ["sh", "-c", _COPY, "ouassister", folder.decode("ascii"), *files]
    status = shadow.run(argv, output=_OUTPUT, timeout_s=_TIMEOUT_S)
    if status != 0:
        with shadow.output_path(_OUTPUT).open(errors="backslashreplace") as file:
            words = file.read(1000).strip()
        raise UpdaterError(f"archives could not be put into the guest's tree: {words}")


def check(packages: Iterable[Staged], folder: bytes, entries: Iterable[Entry]) -> None:
    """Hold what was extracted against what was verified.

    Raises:
        UpdaterError: An archive is not in the change set as it should be.
    """
    there = {entry.path: entry for entry in entries}
    for package in packages:
        if not package.file:
            continue
        path = folder + b"/" + package.file.encode("ascii")
        entry = there.get(path)
        if entry is None or entry.kind is not Kind.FILE:
            raise UpdaterError(
                f"{to_text(path)} is not in the change set",
                hint="its folder is a link, or not on a disk: the package cannot travel there",
            )
        if (entry.sha256, entry.size, entry.mode, entry.uid) != (
            package.sha256,
            package.size,
            _MODE,
            0,
        ):
            raise UpdaterError(f"{to_text(path)} is not the archive that was verified")


def _describe(
    change: PackageChange,
    reason: str,
    archives: tuple[Archive, ...],
    folder: Path,
    *,
    requested: bool,
) -> Staged:
    base = (change.name, change.architecture, change.old, change.new)
    if not change.new:
        return Staged(*base, "", 0, "", requested, reason)
    archive = next((one for one in archives if _is_of(change, one)), None)
    if archive is None or not _FILE.fullmatch(archive.file_name):
        raise UpdaterError(f"{change.name} {change.new} has no archive that could be staged")
    algorithm, _, expected = archive.digest.partition(":")
    digest, sha256, size = hashlib.new(algorithm.lower()), hashlib.sha256(), 0
    try:
        with open_regular(folder / archive.file_name) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                sha256.update(chunk)
                size += len(chunk)
    except FileNotFoundError as error:
        raise UpdaterError(f"the archive {archive.file_name} is gone") from error
    if digest.hexdigest() != expected:
        raise UpdaterError(f"a script changed the archive {archive.file_name}")
    return Staged(*base, archive.file_name, size, sha256.hexdigest(), requested, reason)


def _is_of(change: PackageChange, archive: Archive) -> bool:
    ending = f"_{change.architecture}.deb"
    return archive.package == change.name and archive.file_name.endswith(ending)
