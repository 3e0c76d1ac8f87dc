"""Build a bootable Debian image from the mirrors of this host.

No loop device and no mount: mmdebstrap makes the tree, ``mke2fs -d`` the file system at its
offset in a GPT disk. Kernel and initrd stand beside the disk for direct boot (``-kernel``,
``-initrd``), so that no boot loader is needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ouassister.codec import canonical
from ouassister.errors import HostNotReadyError
from ouassister.testing.apt_sources import host_settings, host_sources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_BUILDER = 2  # part of the cache key: raise it when the same recipe gives another image
_MIB = 1 << 20
_ROOT_OFFSET = _MIB
# "Root Partition (amd64/x86_64)", Discoverable Partitions Specification.
_ROOT_TYPE = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
_PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "udev",
    "openssh-server",
    "qemu-guest-agent",
    "nginx-light",
    "iproute2",
    # networkd would drop the address as soon as the gate closes the link; ifupdown, Debian's
    # default on servers, keeps it.
    "ifupdown",
    "isc-dhcp-client",
    "apt",
    "ca-certificates",
)
# debootstrap, and with it Debian's installer, merges /usr of these; later ones do so themselves.
_SPLIT_USR = ("bullseye",)
_MERGE_USR = (
    'for d in bin sbin lib lib32 lib64 libx32; do mkdir -p "$1/usr/$d" && ln -s "usr/$d" "$1/$d"'
    " || exit 1; done"
)
# Where mmdebstrap puts the sources that it was given as a file.
_SOURCES = "etc/apt/sources.list.d/0000guest.sources"
_PREFERENCES = "etc/apt/preferences.d/older"
# apt_preferences(5): a negative priority is never installed, one above 1000 is when it is older.
_PIN = "Package: {package}\nPin: release n={suite}-{pocket}\nPin-Priority: {priority}\n"
_UNKNOWN_KEY = "NO_PUBKEY"  # as apt says it
_INTERFACES = "auto lo\niface lo inet loopback\n\nauto eth0\niface eth0 inet dhcp\n"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What goes into an image.

    ``kernel`` is the flavour of Debian's kernel, "cloud-amd64" or "amd64"; ``kernel_suite`` is
    where it comes from: "trixie-backports", say, or the newest of the release when empty.
    """

    suite: str = "bookworm"
    kernel: str = "cloud-amd64"
    kernel_suite: str = ""
    hostname: str = "web1"
    packages: tuple[str, ...] = _PACKAGES
    disk_mib: int = 4096


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A built image; nobody writes to it again."""

    disk: Path
    kernel: Path
    initrd: Path
    cmdline: str
    hostname: str


def _quiet(_line: str) -> None:
    """Progress that nobody asked for."""


def build_image(
    cache: Path,
    recipe: Recipe | None = None,
    *,
    outdated: bool = False,
    older: Sequence[str] = (),
    progress: Callable[[str], None] = _quiet,
) -> GuestImage:
    """Return the image of a recipe, built at the first call for it.

    Args:
        cache: Folder of built images; a second builder of the same image waits for the first.
        recipe: What goes into it; the standard guest when None.
        outdated: It has no updates and security fixes yet, though its sources offer them.
        older: Names of source packages of which the last point release is newer than the last
            security fix: that fix is installed, so that there is something to upgrade.
        progress: Called with one line per step.

    Raises:
        HostNotReadyError: A tool, a mirror or a right is missing.
    """
    recipe = recipe or Recipe()
    sources = host_sources(recipe.suite, extra=recipe.kernel_suite)
    settings = host_settings()
    first = host_sources(recipe.suite, extra=recipe.kernel_suite, updates=False)
    made_of = (_BUILDER, recipe, sources, settings, *((first, *older) if outdated else ()))
    key = hashlib.sha256(canonical(made_of)).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache.absolute() / f"{recipe.suite}-{key}"
    with locked(cache / f"{folder.name}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as work:
                made = Path(work, "image")
                made.mkdir()
                first = sources if older else first  # the pins choose
                installed = first if outdated else sources
                pins = _pins(recipe.suite, older) if outdated and older else ""
                _build(Path(work), made, recipe, (installed, sources), settings, pins, progress)
                made.rename(folder)
    return GuestImage(
        folder / "disk.qcow2",
        folder / "vmlinuz",
        folder / "initrd",
        "root=LABEL=root rw console=ttyS0 net.ifnames=0 quiet",
        recipe.hostname,
    )


def _build(
    work: Path,
    made: Path,
    recipe: Recipe,
    sources: tuple[str, str],  # to install from, and for later
    settings: tuple[str, ...],
    pins: str,
    progress: Callable[[str], None],
) -> None:
    if os.geteuid() != 0:
        message = "building a guest image needs root: its files belong to many users"
        raise HostNotReadyError(message, hint="run it with sudo")
    tree, raw = work / "tree", work / "disk.raw"
    source_file = work / "guest.sources"
    source_file.write_text(sources[0])
    progress(f"guest: installing Debian {recipe.suite} with mmdebstrap")
    image = f"linux-image-{recipe.kernel}"
    if recipe.kernel_suite:
        image += f"/{recipe.kernel_suite}"
    command = ["mmdebstrap", "--variant=minbase", "--mode=root", "--format=directory"]
    command.append(f"--include={','.join((*recipe.packages, image))}")
    if recipe.suite in _SPLIT_USR:
        command.append(f"--setup-hook={_MERGE_USR}")
    if pins:
        (work / "pins").write_text(pins)
        command.append(f'--setup-hook=cp {shlex.quote(str(work / "pins"))} "$1/{_PREFERENCES}"')
    command += [f"--aptopt={line}" for line in settings]
    _run([*command, recipe.suite, str(tree), str(source_file)], work)
    (tree / _SOURCES).write_text(sources[1])
    (tree / _PREFERENCES).unlink(missing_ok=True)
    _configure(tree, recipe)
    progress("guest: writing the disk")
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    (initrd,) = (tree / "boot").glob("initrd.img-*")
    shutil.copyfile(kernel, made / "vmlinuz")
    shutil.copyfile(initrd, made / "initrd")
    with raw.open("wb") as file:
        file.truncate(recipe.disk_mib * _MIB)
    table = f"label: gpt\nstart={_ROOT_OFFSET // 512}, type={_ROOT_TYPE}, name=root\n"
    _run(["sfdisk", "--quiet", str(raw)], work, stdin=table)
    # A backup of the table takes the last 33 sectors; the file system ends 1 MiB earlier.
    blocks = (recipe.disk_mib - 2) * _MIB // 4096
    command = ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-L", "root", "-d", str(tree)]
    _run([*command, "-E", f"offset={_ROOT_OFFSET}", str(raw), str(blocks)], work)
    _run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(made / "disk.qcow2")], work)
    raw.unlink()
    progress("guest: image built")


def _pins(suite: str, older: Sequence[str]) -> str:
    """Preferences of apt: what was released, and of some sources what security had before."""
    chosen = [("*", "updates", -1), ("*", "security", -1)]
    chosen += [(f"src:{name}", "security", 1001) for name in older]
    return "\n".join(
        _PIN.format(package=package, suite=suite, pocket=pocket, priority=priority)
        for package, pocket, priority in chosen
    )


def _configure(tree: Path, recipe: Recipe) -> None:
    """Write what an installer would ask for."""
    etc = tree / "etc"
    (etc / "hostname").write_text(f"{recipe.hostname}\n")
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {recipe.hostname}\n")
    (etc / "fstab").write_text("LABEL=root / ext4 errors=remount-ro 0 1\n")
    if "ifupdown" in recipe.packages:
        (etc / "network" / "interfaces").write_text(_INTERFACES)
    # Empty: systemd writes a new one at the first boot (machine-id(5)).
    (etc / "machine-id").write_text("")
    # mmdebstrap copies the host's; dhclient writes the guest's own.
    (etc / "resolv.conf").unlink(missing_ok=True)
    (etc / "resolv.conf").touch()


def _run(command: Sequence[str], folder: Path, *, stdin: str = "") -> None:
    """Run a host tool; its last lines become the cause when it fails."""
    log = folder / "log"
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    path = os.pathsep.join((environment.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    try:
        with log.open("w+b") as output:
            subprocess.run(
                command,
                input=stdin.encode(),
                stdout=output,
                stderr=output,
                check=True,
                env={**environment, "PATH": path},
            )
    except FileNotFoundError as error:
        raise HostNotReadyError(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise failure(command[0], error.returncode, log.read_text(errors="replace")) from error


def failure(tool: str, status: int, log: str) -> HostNotReadyError:
    """Tell from a tool's output why it failed; mmdebstrap's last words do not say what apt met."""
    lines = log.strip().splitlines()
    causes = [line for line in lines if line.startswith(("E: ", "Err:"))][:2] or lines[-3:]
    hint = "check the mirrors and the room on the disk"
    if _UNKNOWN_KEY in log:
        # A release gets the keys of the next ones by updates of this package; the signatures of
        # the mirror are checked in any case.
        hint = "upgrade debian-archive-keyring on this host: it lacks the keys of the suite"
    return HostNotReadyError(f"{tool} ended with status {status}: {'; '.join(causes)}", hint=hint)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file: a second builder waits for the first."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
