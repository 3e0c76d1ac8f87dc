"""A server that slept for long: everything that its release had since, awake and asleep.

Usage: ``python -m bench.sleeper_bench RESULT``; the result goes into the file's ``sleeper``.

The guest is a Debian 11 as it was last released, with a database, web and name servers and a Java
runtime, and nothing of its security archive; the kernel is held back. One clone is resumed with its
links up and upgraded by its own apt: `conventional_s` runs from the first instruction to apt's end,
what maintainer scripts restart included; its three parts are told apart, since lists and archives
come from a mirror that may be fast or slow. The other one is updated asleep and resumed: `online_s`
runs from the first instruction to the open gate, and includes what scripts and what memory say must
be restarted; with ``--gate exposed`` the rest follows, and `settled_s` has it all. Each runs alone.
`ratio_installed` leaves out what the mirror has a part in.

What of the change set has the content that it had before is counted, too: dpkg writes such files
anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.fidelity.twins import QUIET, again, as_unit

from ouassister import pipeline
from ouassister.changeset import archive
from ouassister.errors import OUassisterError
from ouassister.model import Gate, Kind, Mode, Request
from ouassister.provider import qemu, vmtoml
from ouassister.store.database import Store
from ouassister.testing import Recipe, build_image, clone, guest_run, make_suspended
from ouassister.testing.guest import locked
from ouassister.timeline import Timeline, stderr_story

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.model import Changeset, Phase
    from ouassister.provider.vmtoml import VmConfig

_BUILD: Final = Path(__file__).parents[1] / "build"
_SUITE: Final = "bullseye"
_SERVER: Final = (
    "mariadb-server", "apache2", "libapache2-mod-php", "php-mysql", "bind9", "default-jre-headless",
    "rsyslog", "cron", "logrotate", "sudo", "curl", "wget", "git", "vim", "less", "man-db",
    "python3", "gnupg", "locales", "bash-completion", "unattended-upgrades", "lsof", "rsync",
    "initramfs-tools", "dnsutils", "fail2ban",
)  # fmt: skip
_NOT: Final = "nginx-light"  # of the usual guest: another web server has its port
_KERNEL: Final = "linux-image-cloud-amd64"
_MEMORY_MIB: Final = 1536
_DISK_MIB: Final = 6144
_BAR: Final = 20.0
_LIMIT_S: Final = 3000.0
_ATTEMPTS: Final = 3
# A database that somebody uses, and no timer that is due when the guest wakes up.
_TABLE: Final = (
    "CREATE DATABASE shop; CREATE TABLE shop.orders (id INT PRIMARY KEY, word TEXT);"
    " INSERT INTO shop.orders SELECT seq, repeat('x', 500) FROM shop.seq_1_to_2000"
)
# Of the newest kernel the mirrors have lost a part: without a hold the two would differ.
_PREPARE: Final = f'mariadb -e "{_TABLE}" && apt-mark hold {_KERNEL} && {QUIET}'
_COUNT: Final = "mariadb -N -e 'SELECT COUNT(*) FROM shop.orders'"
_PROVE: Final = f"dpkg --audit; {_COUNT}; systemctl --failed --no-legend --plain"
# As a careful administrator would: nobody is asked, and what was edited stays. What a mirror has
# lost does not keep the rest away, asleep either.
_APT: Final = (
    "DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Options::=--force-confdef"
    " -o Dpkg::Options::=--force-confold"
)
_UPGRADE: Final = "upgrade --with-new-pkgs --fix-missing"
_CALLS: Final = {
    "update": f"{_APT} update",
    "download": f"{_APT} {_UPGRADE} --download-only",
    "install": f"{_APT} {_UPGRADE} --no-download",
}
_HASH: Final = ("find", "/", "-xdev", "-type", "f", "-exec", "sha256sum", "-z", "--", "{}", "+")


def sleeping() -> Path:
    """The ``vm.toml`` of the suspended server; cached."""
    usual = tuple(name for name in Recipe().packages if name != _NOT)
    packages = (*usual, *_SERVER)
    recipe = Recipe(_SUITE, hostname="sleeper", packages=packages, disk_mib=_DISK_MIB)
    image = build_image(_BUILD / "guests", recipe, outdated=True, progress=print)
    folder = _BUILD / "guests" / f"{image.disk.parent.name}-{_MEMORY_MIB}-suspended"
    booted = make_suspended(image, folder, memory_mib=_MEMORY_MIB, progress=print)
    use = hashlib.sha256(_PREPARE.encode()).hexdigest()[:8]
    used = folder.with_name(f"{folder.name}-{use}")
    with locked(used.with_name(f"{used.name}.lock")):
        if not (used / "save.img").is_file() or (used / "save.img").is_symlink():
            shutil.rmtree(used, ignore_errors=True)
            with again(clone(booted, used)) as vm:
                guest_run(vm, _PREPARE, timeout_s=_LIMIT_S)
    return used / "vm.toml"


def awake(config: VmConfig) -> dict[str, float]:
    """Upgrade it by its own apt; seconds of each part, and of all from the first instruction."""
    with qemu.restore(config, links_up=True) as vm:
        try:
            vm.qga()
            vm.cont()
            start = begun = time.monotonic()
            vm.qga().execute("guest-set-time", time=time.time_ns())
            seconds = {}
            for name, command in _CALLS.items():
                status, told = as_unit(vm, command)
                # What the mirror has lost cannot be downloaded; the rest is there.
                if status != 0 and name != "download":
                    raise RuntimeError(f"awake: {command!r}: {told}")
                seconds[name], begun = round(time.monotonic() - begun, 1), time.monotonic()
            seconds["all"] = round(time.monotonic() - start, 1)
            print("awake:", guest_run(vm, _PROVE, timeout_s=_LIMIT_S).stdout.decode())
        finally:
            vm.kill()
    return seconds


def asleep(config: VmConfig, home: Path, gate: Gate) -> dict[str, Any]:
    """Update it asleep, and resume it."""
    with Store(home) as store:
        story = Timeline(stderr_story)
        update = pipeline.update_sleeping(config, Request(), store, story, pipeline.Options())
        changeset, _layer = archive.load(store.changesets(config.name), update.changeset_id)
        before = _hashes(config, store)
        try:
            resumed = pipeline.resume(config, store, Timeline(stderr_story), extent=gate)
        finally:
            proof = _end(config)
    print("asleep:", proof)
    staged = {one.name: one.reason for one in update.modes if one.mode is Mode.STAGED}
    return {
        "gate": gate,
        "online_s": round(resumed.online_s, 1),
        "settled_s": round(resumed.settled_s, 1),
        "offline_s": round(update.offline_s, 1),
        "download_s": round(update.download_s, 1),
        "packages": len(update.changes),
        "left_out": [f"{one.package}: {one.reason}" for one in update.left_out],
        "staged": staged,
        "failed_actions": resumed.failed_actions,
        "notes": resumed.notes,
        "layer_bytes": update.layer_bytes,
        **_count(changeset, before),
        "actions": [one.shown for one in update.actions],
        "phases": {
            "offline": _seconds(update.phases),
            "online": _seconds(resumed.phases),
            "in_guest": _seconds(resumed.guest_phases),
        },
    }


def _seconds(phases: Iterable[Phase]) -> dict[str, float]:
    found: Counter[str] = Counter()
    for one in phases:
        found[one.name] += one.seconds
    return {name: round(seconds, 2) for name, seconds in found.items()}


def _end(config: VmConfig) -> str:
    """End a guest that may run; what it says of itself."""
    told = ""
    try:
        with qemu.attach(config) as vm:
            for _attempt in range(_ATTEMPTS):  # the agent is restarted half a minute after a resume
                try:
                    told = guest_run(vm, _PROVE, timeout_s=_LIMIT_S).stdout.decode()
                    break
                except OUassisterError as error:
                    told = f"it does not answer: {error.message}"
            vm.kill()
    except OUassisterError as error:
        told = f"it does not run: {error.message}"
    return told


def _hashes(config: VmConfig, store: Store) -> dict[bytes, str]:
    """The content of every file of the sleeping guest."""
    options = pipeline.Options()
    _status, told = pipeline.run_program(
        config, _HASH, store, Timeline(None), options, capture=True
    )
    lines = (line.partition(b"  ") for line in told.split(b"\0") if line)
    return {path: digest.decode("ascii") for digest, _, path in lines}


def _count(changeset: Changeset, before: dict[bytes, str]) -> dict[str, int]:
    """How much of a change set is content that was there before."""
    files = [entry for entry in changeset.entries if entry.kind is Kind.FILE]
    same = [entry for entry in files if before.get(entry.path) == entry.sha256]
    return {
        "files": len(files),
        "bytes": sum(entry.size for entry in files),
        "unchanged_files": len(same),
        "unchanged_bytes": sum(entry.size for entry in same),
        "staged_bytes": sum(one.size for one in changeset.staged),
    }


def main(arguments: list[str]) -> int:
    """Measure both; 1 when the bar is missed."""
    parser = argparse.ArgumentParser(prog="sleeper_bench")
    parser.add_argument("result", type=Path)
    parser.add_argument("--gate", type=Gate, choices=tuple(Gate), default=Gate.FULL)
    parser.add_argument(
        "--only-asleep", action="store_true", help="the other part as last measured"
    )
    chosen = parser.parse_args(arguments)
    toml = sleeping()
    work = _BUILD / "sleeper-bench"
    shutil.rmtree(work, ignore_errors=True)
    begun, load = time.strftime("%Y-%m-%dT%H:%M:%S"), round(os.getloadavg()[0], 1)
    told = json.loads(chosen.result.read_text()) if chosen.result.exists() else {}
    if not chosen.only_asleep:
        told["sleeper"] = {"conventional": awake(vmtoml.load(clone(toml, work / "twin")))}
        chosen.result.write_text(json.dumps(told, indent=1) + "\n")
        shutil.rmtree(work)
    found: dict[str, Any] = {"begun": begun, "load": load, "bar": _BAR}
    found["conventional"] = told["sleeper"]["conventional"]
    found |= asleep(vmtoml.load(clone(toml, work / "ours")), work / "state", chosen.gate)
    shutil.rmtree(work)
    parts = found["conventional"]
    found["conventional_s"] = parts["all"]
    found["ratio"] = round(parts["all"] / found["online_s"], 1)
    found["ratio_installed"] = round(parts["install"] / found["online_s"], 1)
    found["held"] = found["ratio"] >= _BAR
    told["sleeper"] = found
    chosen.result.write_text(json.dumps(told, indent=1) + "\n")
    word = "holds " if found["held"] else "MISSED"
    print(word, f"{found['online_s']} s online, {parts['all']} s awake: {found['ratio']} times")
    return 0 if found["held"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
