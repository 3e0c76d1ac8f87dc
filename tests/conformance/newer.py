"""Debian 13's QEMU and libvirt, in a tree of their own, on a host that has older ones."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conftest import lacking, need

from ouassister.testing.apt_sources import host_settings, host_sources
from ouassister.testing.guest import locked

if TYPE_CHECKING:
    from collections.abc import Sequence

CACHE = Path(__file__).parents[2] / "build" / "conformance"
SUITE = "trixie"
PACKAGES = (
    "qemu-system-x86",
    "qemu-utils",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-clients",
    "lzop",
    "zstd",
    "xz-utils",
    "bzip2",
)
WORK = "/mnt"  # where the caller's folder lies in the tree


def build() -> Path:
    """Return the tree, made at the first call: about 40 s and 330 MB."""
    need("mmdebstrap")
    if shutil.which("unshare") is None or not Path("/proc/self/ns/mnt").exists():
        lacking("unshare(1) is needed")
    if os.geteuid() != 0:
        lacking("a tree of another release is made by root alone")
    sources, settings = host_sources(SUITE), host_settings()
    key = hashlib.sha256(repr((SUITE, PACKAGES, sources, settings)).encode()).hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    tree = CACHE / f"{SUITE}-{key}"
    with locked(CACHE / f"{tree.name}.lock"):
        if not tree.exists():
            with tempfile.TemporaryDirectory(prefix=".build-", dir=CACHE) as work:
                made = Path(work, "tree")
                source_file = Path(work, "tree.sources")
                source_file.write_text(sources)
                argv = ["mmdebstrap", "--variant=minbase", "--mode=root", "--format=directory"]
                argv += [f"--include={','.join(PACKAGES)}", "--quiet"]
                argv += [f"--aptopt={line}" for line in settings]
                subprocess.run([*argv, SUITE, str(made), str(source_file)], check=True)
                made.rename(tree)
    return tree


def inside(
    tree: Path, folder: Path, argv: Sequence[str], *, private: Sequence[str] = ()
) -> list[str]:
    """Return the command that runs ``argv`` in the tree, in ``folder``, seen as `WORK`.

    ``private`` are paths of the tree that lie in ``folder``, below ``root``, instead: files that
    are there, and directories.
    The tree may be ``/``.
    """
    root = str(tree).rstrip("/")
    lines = ["set -e", f"mount -t proc proc {root}/proc"]
    if root:
        lines += [f"mount --rbind /{one} {root}/{one}" for one in ("dev", "sys")]
    lines.append(f"mount --bind {folder} {root}{WORK}")
    for path in private:
        own = folder / "root" / path.lstrip("/")
        if not own.exists():
            own.mkdir(parents=True)
        if own.is_dir():
            lines.append(f"mkdir -p {root}{path}")
        lines.append(f"mount --bind {own} {root}{path}")
    lines.append(f'exec chroot {root or "/"} /usr/bin/env -C {WORK} -- "$@"')
    script = "\n".join(lines)
    return ["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh", *argv]
