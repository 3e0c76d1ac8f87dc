"""Backing chains: followed by declared formats only, and refused when they are not sound."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.conftest import need

from ouassister.errors import StateError, UnsupportedError
from ouassister.provider.backing import backing_chain
from ouassister.provider.vmtoml import Disk

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host

# Header extension "Backing file format name" (docs/interop/qcow2.txt).
BACKING_FORMAT = bytes.fromhex("E2792ACA")


def _image(folder: Path, *words: str) -> None:
    command = [need("qemu-img"), *words]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=30)


def _chain(path: Path, kind: str = "qcow2") -> tuple[Path, ...]:
    return backing_chain(Disk("disk0", path, kind))


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A qcow2 layer over a raw file, both named so that naive quoting breaks."""
    _image(tmp_path, "create", "-q", "-f", "raw", "b,driver=qcow2.raw", "1M")
    _image(tmp_path, "create", "-q", "-f", "qcow2", "-b", "b,driver=qcow2.raw", "-F", "raw", "a,b")
    return tmp_path


def test_chain_names_the_disk_and_all_below_it(pair: Path) -> None:
    assert _chain(pair / "a,b") == (pair / "a,b", pair / "b,driver=qcow2.raw")


def test_chain_leaves_files_as_they_were(pair: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in pair.iterdir()}
    _chain(pair / "a,b")
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in pair.iterdir()} == before


def test_raw_disk_that_looks_like_qcow2_is_not_probed(pair: Path) -> None:
    assert _chain(pair / "a,b", "raw") == (pair / "a,b",)


def test_undeclared_backing_format_is_refused(pair: Path) -> None:
    image = pair / "a,b"
    raw = image.read_bytes()
    assert raw.count(BACKING_FORMAT) == 1
    image.write_bytes(raw.replace(BACKING_FORMAT, b"\x11\x22\x33\x44"))
    with pytest.raises(UnsupportedError, match="not qcow2 or raw"):
        _chain(image)


def test_backing_file_of_an_unknown_format_is_refused(tmp_path: Path) -> None:
    _image(tmp_path, "create", "-q", "-f", "vmdk", "b.vmdk", "1M")
    _image(tmp_path, "create", "-q", "-f", "qcow2", "-b", "b.vmdk", "-F", "vmdk", "a")
    with pytest.raises(UnsupportedError, match="vmdk"):
        _chain(tmp_path / "a")


def test_backing_file_on_the_network_is_refused(tmp_path: Path) -> None:
    words = ["create", "-q", "-u", "-f", "qcow2", "-b", "nbd://example/x", "-F", "raw", "a", "1M"]
    _image(tmp_path, *words)
    with pytest.raises(UnsupportedError, match="no local file"):
        _chain(tmp_path / "a")


def test_external_data_file_is_refused(tmp_path: Path) -> None:
    _image(tmp_path, "create", "-q", "-f", "qcow2", "-o", "data_file=data", "a", "1M")
    with pytest.raises(UnsupportedError, match="data in another file"):
        _chain(tmp_path / "a")


def test_encrypted_image_is_refused(tmp_path: Path) -> None:
    # The old method: LUKS would measure the processor's time, which fails on some hosts.
    secret = ["--object", "secret,id=s,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=s"]
    _image(tmp_path, "create", "-q", "-f", "qcow2", *secret, "a", "1M")
    with pytest.raises(UnsupportedError, match="encrypted"):
        _chain(tmp_path / "a")


def test_cycle_is_refused(tmp_path: Path) -> None:
    _image(tmp_path, "create", "-q", "-f", "qcow2", "a", "1M")
    _image(tmp_path, "create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "b")
    _image(tmp_path, "rebase", "-u", "-f", "qcow2", "-b", "b", "-F", "qcow2", "a")
    with pytest.raises(StateError, match="comes back"):
        _chain(tmp_path / "b")


def test_missing_backing_file_is_refused(pair: Path) -> None:
    (pair / "b,driver=qcow2.raw").unlink()
    with pytest.raises(StateError, match="cannot read the disk image"):
        _chain(pair / "a,b")


def test_damaged_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"nonsense" * 100)
    with pytest.raises(StateError, match="no sound qcow2 image"):
        _chain(tmp_path / "a")


def test_chain_that_the_description_has_otherwise_is_refused(pair: Path) -> None:
    top, below = pair / "a,b", pair / "b,driver=qcow2.raw"
    said = Disk("disk0", top, "qcow2", declared=((below, "raw"),))
    assert backing_chain(said) == (top, below)
    for declared in ((), ((below, "qcow2"),), ((top, "raw"),), ((below, "raw"), (top, "raw"))):
        with pytest.raises(UnsupportedError, match="by the VM's description"):
            backing_chain(Disk("disk0", top, "qcow2", declared=declared))
