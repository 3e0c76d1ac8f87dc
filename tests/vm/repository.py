"""A package repository on loopback, with packages made for the tests.

It is a real one: built by dpkg-deb and apt-ftparchive, served over HTTP. A path in ``missing``
answers 404, as mirrors in the middle of a sync do.
"""

from __future__ import annotations

import http.server
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Package:
    """What one binary package is made of."""

    name: str
    version: str = "1.0"
    depends: str = ""
    files: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    conffiles: tuple[str, ...] = ()
    scripts: dict[str, str] = field(default_factory=dict)
    control: dict[str, str] = field(default_factory=dict)  # further control files, as they are
    copies: dict[str, Path] = field(default_factory=dict)  # programs of the host's


def build(package: Package, folder: Path) -> Path:
    """Build the .deb with dpkg-deb."""
    tree = folder / f"{package.name}-{package.version}"
    control = tree / "DEBIAN"
    control.mkdir(parents=True)
    lines = [f"Package: {package.name}", f"Version: {package.version}", "Architecture: all"]
    lines += ["Maintainer: Tests <tests@localhost>", "Description: made for a test"]
    if package.depends:
        lines.append(f"Depends: {package.depends}")
    (control / "control").write_text("\n".join(lines) + "\n")
    if package.conffiles:
        (control / "conffiles").write_text("\n".join(package.conffiles) + "\n")
    for name, text in package.control.items():
        (control / name).write_text(text)
    for name, script in package.scripts.items():
        (control / name).write_text(f"#!/bin/sh\nset -e\n{script}\n")
        (control / name).chmod(0o755)
    for path, content in package.files.items():
        target = tree / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
        if "/bin/" in path or "/init.d/" in path:
            target.chmod(0o755)
    for path, source in package.copies.items():
        target = tree / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    for path, link in package.links.items():
        target = tree / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(link)
    deb = folder / f"{package.name}_{package.version}_all.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(deb)],
        check=True,
        capture_output=True,
    )
    return deb


class Repository:
    """Serves a folder of packages; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.missing: set[str] = set()
        self.more = ""  # stanzas of what does not lie in the folder
        self.requests: list[str] = []
        handler = partial(_Handler, self, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Repository:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self) -> None:
        """Write the indexes for what lies in the folder, and ``more``."""
        index = subprocess.run(
            ["apt-ftparchive", "packages", "."],
            cwd=self.folder,
            check=True,
            capture_output=True,
        ).stdout
        (self.folder / "Packages").write_bytes(index + self.more.encode())
        release = subprocess.run(
            ["apt-ftparchive", "release", "."],
            cwd=self.folder,
            check=True,
            capture_output=True,
        ).stdout
        (self.folder / "Release").write_bytes(release)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, repository: Repository, *args: Any, directory: str) -> None:  # noqa: ANN401
        self._repository = repository
        super().__init__(*args, directory=directory)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self._repository.requests.append(name)
        if name in self._repository.missing:
            self.send_error(404)
            return
        super().do_GET()

    def log_message(self, *_arguments: object) -> None:
        """Keep the test's output clean."""
