"""A user's own libvirt, which virsh starts when it is asked, with a domain that sleeps in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from tests.vm.user import User, temporary_user

from ouassister.provider.virsh import Virsh
from ouassister.testing import overlay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

URI = "qemu:///session"
_ASK_S = 120.0


@dataclass(frozen=True, slots=True)
class AsUser(Virsh):
    """virsh of a user."""

    user: User

    def command(self) -> list[str]:
        """See `Virsh`."""
        who = (f"HOME={self.user.home}", f"USER={self.user.name}")
        clean = ["env", "-u", "XDG_RUNTIME_DIR", "-u", "XDG_CONFIG_HOME", *who]
        return self.user.command([*clean, *Virsh.command(self)])


@contextlib.contextmanager
def session(kept: Path, xml: str) -> Iterator[AsUser]:
    """Give a user the domain that sleeps in ``kept``, in that user's managed save.

    Args:
        kept: Has ``save``, which another libvirt wrote, and ``base.qcow2``.
        xml: Of the domain there.
    """
    with temporary_user() as user:
        virsh = AsUser(URI, user)
        folder = user.home / "vm"
        folder.mkdir()
        base = user.place / "base.qcow2"
        convert = ["qemu-img", "convert", "-O", "qcow2", str(kept / "base.qcow2"), str(base)]
        subprocess.run(convert, check=True)
        base.chmod(0o644)
        overlay(folder / "disk.qcow2", base, "qcow2")
        shutil.copyfile(kept / "save", folder / "other.save")
        (folder / "domain.xml").write_bytes(_moved(xml, kept.parent, folder, user.place))
        settings = user.home / ".config" / "libvirt" / "qemu.conf"
        settings.parent.mkdir(parents=True)
        settings.write_text('stdio_handler = "file"\n')
        for path in (folder, *folder.iterdir(), *settings.parents[:2], settings):
            shutil.chown(path, user.uid, user.gid)
        try:
            virsh.run("define", str(folder / "domain.xml"))
            words = ("--xml", str(folder / "domain.xml"), "--running")
            virsh.run("restore", str(folder / "other.save"), *words, timeout_s=_ASK_S)
            (folder / "other.save").unlink()
            virsh.run("managedsave", "web1", timeout_s=_ASK_S)
            yield virsh
        finally:
            virsh.ask("destroy", "web1")
            for process in user.processes():  # the daemon waits two minutes for a next question
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process.split()[0]), signal.SIGKILL)
            user.await_no_processes()


def _moved(xml: str, old: Path, new: Path, place: Path) -> bytes:
    """The XML with its files where the user has them; what may be chosen anew is left out."""
    root = ElementTree.fromstring(xml.replace(str(old), str(new)))  # noqa: S314 - libvirt's own
    for name in ("kernel", "initrd"):
        found = root.find(f"os/{name}")
        assert found is not None
        shutil.copyfile(str(found.text), place / name)
        (place / name).chmod(0o644)
        found.text = str(place / name)
    for parent in (*root.iterfind("devices/disk"), root):
        for name in ("backingStore", "seclabel"):
            for part in parent.findall(name):
                parent.remove(part)
    for number, channel in enumerate(root.iterfind("devices/channel")):
        for part in channel.findall("source"):
            channel.remove(part)
        # The one that libvirt would choose is longer than an address of a socket may be.
        ElementTree.SubElement(channel, "source", mode="bind", path=str(new / f"port{number}"))
    return ElementTree.tostring(root)
