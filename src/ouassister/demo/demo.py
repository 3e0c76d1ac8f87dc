"""``ouassister demo``: build, suspend, inspect, update while it sleeps, resume, prove, compare."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from ouassister import codec, doctor, pipeline
from ouassister.changeset import archive
from ouassister.demo.baseline import chroot_install_s
from ouassister.demo.frames import count_frames
from ouassister.demo.proof import Proof, file_hashes, prove
from ouassister.demo.twin import Conventional, update_inside
from ouassister.errors import HostNotReadyError
from ouassister.model import Request
from ouassister.provider import qemu, vmtoml
from ouassister.sleeping import chain, open_sleeping
from ouassister.store.database import Store
from ouassister.testing import build_image, clone, make_suspended
from ouassister.text import size, table, to_text
from ouassister.timeline import Timeline, stderr_story

if TYPE_CHECKING:
    from pathlib import Path

    from ouassister.model import GuestView, ResumeReport, UpdateReport
    from ouassister.provider.vmtoml import VmConfig

BARS: Final = {"ratio": 20.0, "online_s": 2.0, "offline_to_chroot": 1.5}


def run_demo(folder: Path, package: str) -> tuple[dict[str, Any], str, int]:
    """Run everything in ``folder``; leaves ``demo.json`` there.

    Returns:
        The JSON value, the summary, and 0 when every proof holds, else 31. A bar that a slow or
        busy machine misses is named and no failure.

    Raises:
        HostNotReadyError: The host lacks something; 'doctor' tells the same.
    """
    _refuse_unready()
    work = folder / "demo"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    story = Timeline(stderr_story)
    with story.phase("1. build the guest (kept between runs)"):
        image = build_image(folder / "guests", progress=story.say)
    with story.phase("2. boot it and suspend it to a save file"):
        original = make_suspended(image, work / "original", machine="q35", progress=story.say)
    ours = _with_capture(vmtoml.load(clone(original, work / "web1")), work / "web1" / "frames.pcap")
    twin = vmtoml.load(clone(original, work / "web1-twin"))
    files = (ours.save.resolve(), *chain(ours))
    with story.phase("3. inspect the sleeping guest, from its save file alone"):
        with open_sleeping(ours) as sleeping:
            view, root = sleeping.view, sleeping.layout.volumes[0].pieces[0]
            disk = sleeping.disks[root.disk]
        _tell_view(view, story)
    before = file_hashes(files)
    with Store(work / "state") as store:
        story.say(f"4. update --install {package}, while it sleeps")
        update = pipeline.update_sleeping(
            ours, Request((package,)), store, Timeline(stderr_story), pipeline.Options()
        )
        unchanged = file_hashes(files) == before
        story.say(
            f"sha256 of {', '.join(path.name for path in files)}: "
            + ("as before" if unchanged else "CHANGED")
        )
        with story.phase("   the same in a plain chroot, for comparison"):
            cache = store.vm_folder(ours.name) / "cache"
            chroot_s = chroot_install_s(disk, root, cache, work, package)
        resumed, frames = _resume(ours, store, story)
        changeset, _layer = archive.load(store.changesets(ours.name), update.changeset_id)
    with story.phase("6. prove it, in the guest"), qemu.attach(ours) as vm:
        proofs = prove(vm, view, changeset, package)
        frames_after = count_frames(work / "web1" / "frames.pcap")
        vm.kill()
    proofs += (
        Proof("disk, backing files and save file were not written", unchanged, "sha256"),
        Proof("no frame left the guest before 'applied'", frames == 0, f"{frames} frames"),
        Proof(
            "the capture sees frames once the gate is open",
            frames_after > 0,
            f"{frames_after} frames",
        ),
    )
    for proof in proofs:
        story.say(f"   {'yes' if proof.holds else 'NO '}  {proof.statement} ({proof.seen})")
    with story.phase("7. the conventional way, on a twin of the same suspended VM"):
        conventional = update_inside(twin, package, story)
    value = _value(update, resumed, conventional, chroot_s, proofs, frames, unchanged)
    (folder / "demo.json").write_text(json.dumps(value, indent=2) + "\n")
    summary = _summary(value, update, resumed, conventional)
    return value, summary, 0 if value["verified"] else 31


def _refuse_unready() -> None:
    if os.geteuid() != 0:
        raise HostNotReadyError(
            "the demo builds a guest and compares with a chroot: it needs root",
            hint="run it as 'make demo', which uses sudo",
        )
    missing = [check.name for check in doctor.check_host() if not check.ok]
    if missing:
        raise HostNotReadyError(f"the host lacks {', '.join(missing)}")


def _with_capture(config: VmConfig, capture: Path) -> VmConfig:
    """Give the VM's command a capture of its network device."""
    option = f"filter-dump,id=frames,netdev={config.nets[0].netdev},file={capture.name}"
    captured = replace(config, command=(*config.command, "-object", option))
    config.source.write_text(vmtoml.dump(captured))
    return vmtoml.load(config.source)


def _tell_view(view: GuestView, story: Timeline) -> None:
    uts = view.uts
    story.say(f"   {uts.nodename}: Linux {uts.release}, up {view.uptime_s} s when suspended")
    for task in view.tasks:
        if task.exe:
            story.say(f"   pid {task.pid:>5}  {to_text(task.exe)}")
    for mount in view.mounts:
        if mount.block is not None:
            story.say(f"   {to_text(mount.source)} on {to_text(mount.target)}, {mount.fstype}")
    story.say(f"   and {sum(mount.block is None for mount in view.mounts)} mounts without a disk")


def _resume(ours: VmConfig, store: Store, story: Timeline) -> tuple[ResumeReport, int]:
    """Resume, and count frames at the moment when the gate is about to open."""
    story.say("5. resume: restored paused with links down, applied from inside, verified, link up")
    counted: list[int] = []
    capture = ours.folder / "frames.pcap"

    def log(step: str, detail: str) -> None:
        if step == "open gate" and detail == "begin":
            counted.append(count_frames(capture))

    report = pipeline.resume(ours, store, Timeline(stderr_story, log))
    return report, counted[0]


def _value(
    update: UpdateReport,
    resumed: ResumeReport,
    conventional: Conventional,
    chroot_s: float,
    proofs: tuple[Proof, ...],
    frames: int,
    unchanged: bool,
) -> dict[str, Any]:
    ratio = conventional.seconds / resumed.online_s
    to_chroot = update.offline_s / chroot_s
    missed = [
        name
        for name, holds in (
            ("ratio", ratio >= BARS["ratio"]),
            ("online_s", resumed.online_s <= BARS["online_s"]),
            ("offline_to_chroot", to_chroot <= BARS["offline_to_chroot"]),
        )
        if not holds
    ]
    return {
        "schema": 1,
        "online_s": resumed.online_s,
        "restore_s": resumed.restore_s,
        "offline_s": update.offline_s,
        "download_s": update.download_s,
        "chroot_s": round(chroot_s, 3),
        "offline_to_chroot": round(to_chroot, 2),
        "conventional_s": conventional.seconds,
        "ratio": round(ratio, 1),
        "frames_before_applied": frames,
        "disk_unchanged": unchanged,
        "verified": all(proof.holds for proof in proofs),
        "bars": BARS,
        "bars_missed": missed,
        "proofs": [codec.to_value(proof) for proof in proofs],
        "phases": {
            "offline": codec.to_value(update.phases),
            "online": codec.to_value(resumed.phases),
            "in_guest": codec.to_value(resumed.guest_phases),
            "conventional": codec.to_value(conventional.phases),
        },
        "update": codec.to_value(update),
    }


def _summary(
    value: dict[str, Any],
    update: UpdateReport,
    resumed: ResumeReport,
    conventional: Conventional,
) -> str:
    ours = [(phase.name, f"{phase.seconds:.2f} s") for phase in resumed.phases]
    theirs = [(phase.name, f"{phase.seconds:.2f} s") for phase in conventional.phases]
    rows = [("OUASSISTER, AFTER RESUME", "", "CONVENTIONAL, AFTER RESUME", "")]
    for index in range(max(len(ours), len(theirs))):
        left = ours[index] if index < len(ours) else ("", "")
        right = theirs[index] if index < len(theirs) else ("", "")
        rows.append((*left, *right))
    rows.append(
        (
            "first instruction to updated",
            f"{resumed.online_s:.2f} s",
            "first instruction to updated",
            f"{conventional.seconds:.2f} s",
        )
    )
    lines = [
        "",
        table(rows, "  "),
        "",
        f"  exposed {value['ratio']} times shorter (bar: {BARS['ratio']:.0f});"
        f" online {resumed.online_s:.2f} s (bar: {BARS['online_s']:.0f} s)",
        f"  offline {update.offline_s:.2f} s, a plain chroot {value['chroot_s']:.2f} s:"
        f" {value['offline_to_chroot']} times (bar: {BARS['offline_to_chroot']})",
        f"  change set: {update.files} files, {size(update.layer_bytes)}",
        f"  proofs: {'all hold' if value['verified'] else 'NOT ALL HOLD'};"
        f" bars missed: {', '.join(value['bars_missed']) or 'none'}",
    ]
    return "\n".join(lines)
