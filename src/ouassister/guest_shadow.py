"""A sleeping VM with its shadow open: what every run of the guest's programs begins with."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ouassister.beside import Running, beside
from ouassister.disk.storage import create_overlays, volume_name
from ouassister.errors import OUassisterError, StateError
from ouassister.guest_model import Subject
from ouassister.interrupts import watched
from ouassister.kernel import GuestReader
from ouassister.model import Identity
from ouassister.restart import plan as restart_plan
from ouassister.shadow import labels, sandbox, tmpfs_handover, told
from ouassister.shadow.procfs.collect import collect as collect_proc
from ouassister.shadow.remove import remove_tree
from ouassister.shadow.servicemanager.state import collect as collect_services
from ouassister.shadow.session import (
    SCRIPT_TIMEOUT_S,
    Shadow,
    ShadowSpec,
    launch,
    open_shadow,
)
from ouassister.shadow.trees import handover
from ouassister.shadow.trees.collect import collect_devices, collect_system, collect_system_first
from ouassister.sleeping import Sleeping, open_sleeping, refuse_unsafe
from ouassister.text import to_text

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from ouassister.provider.interface import Vm
    from ouassister.store.database import Store
    from ouassister.timeline import Timeline

_COHERENT: Final = "ouassister.disk.coherent"
_PROOF: Final = "ouassister.disk.proof"
_NAMES: Final = "ouassister.disk.names_proof"
_IDENTITY: Final = "ouassister.disk.identity"
_TMPFS: Final = "ouassister.shadow.tmpfs_fill"
_SMALL: Final = "ouassister.disk.small_files"
EXTRACT: Final = "ouassister.changeset.extract"
KEEP: Final = "ouassister.shadow.keep"
MADE: Final = "ouassister.shadow.tmpfs_made"
_FILL: Final = {"folder": sandbox.MEMORY, "mounts": sandbox.TMPFS}
_WANT: Final = frozenset((Subject.LOCKS, Subject.TMPFS_CONTENT))
_SERVICES: Final = frozenset((Subject.TASKS, Subject.FILES, Subject.NETWORK, Subject.SWAP))
_MODULES: Final = (
    _COHERENT,
    _PROOF,
    _NAMES,
    _IDENTITY,
    EXTRACT,
    KEEP,
    MADE,
    _TMPFS,
    restart_plan.TREE,
    _SMALL,
)


@dataclass(frozen=True, slots=True)
class Options:
    """How a run behaves; none of it changes what is updated."""

    timeout_s: float = 3600.0  # of each call of the guest's updater
    keep: bool = False  # the work folder stays
    script_timeout_s: float = SCRIPT_TIMEOUT_S  # of each script of a package
    staging: bool = True  # what cannot be emulated is installed in the guest; else it is refused
    fallback: bool = False  # keep what a resume needs when paths of the guest conflict


@dataclass(frozen=True, slots=True)
class Guest:
    """A sleeping VM with its shadow open."""

    sleeping: Sleeping
    shadow: Shadow
    folder: Path
    proofs: list[int]  # calls that go on: is the view what the sleeping kernel knows?
    telling: list[Running]  # what goes on reading memory for `know`

    def know(self) -> None:
        """Let programs see the guest's processes, devices and services from now on.

        What runs before sees its files alone. That is enough for apt to fetch, and memory is read
        meanwhile.
        """
        if not self.telling:
            return
        while self.telling:
            self.telling.pop(0).wait()
        self.shadow.know()

    def prove(self, timeline: Timeline) -> None:
        """Wait for the proof that the view is true; nothing may leave the run before.

        Raises:
            CorruptGuestError: It is not.
        """
        if not self.proofs:
            return
        with timeline.phase("prove the view"):
            while self.proofs:
                self.shadow.finish(self.proofs.pop())

    def start_over(self) -> None:
        """Forget what programs did; the next see the guest as it fell asleep."""
        self.shadow.reset()
        self.shadow.call(_TMPFS, "fill", _FILL)

    def notes(self) -> tuple[str, ...]:
        """What is to be told of the view so far."""
        return (*self.sleeping.layout.notes, *handover.read_notes(self.folder / "shadow"))

    def settle(self) -> None:
        """There is no starting over any more."""
        tmpfs_handover.forget(self.folder / "shadow" / "tmpfs")

    def refuse_unfinished(self) -> None:
        """Raise when a change set of an earlier sleep is half done in the guest.

        Raises:
            StateError: It is.
        """
        volume, inside = self.sleeping.layout.locate(b"/var/lib/ouassister")
        argument = {"root": sandbox.lower(volume), "path": to_text(inside)}
        if self.shadow.call(_IDENTITY, "unfinished", argument):
            raise StateError(
                "an earlier update is half done in the guest",
                hint="let 'ouassister resume' or a boot of the guest end it; then save it again",
            )

    def identity(self) -> Identity:
        """Whose disk it is."""
        volume, inside = self.sleeping.layout.locate(b"/etc/machine-id")
        argument = {"root": sandbox.lower(volume), "path": to_text(inside)}
        return Identity(
            self.sleeping.view.boot_id, self.shadow.call(_IDENTITY, "machine_id", argument)
        )


@contextlib.contextmanager
def open_guest(
    config: Vm, store: Store, timeline: Timeline, options: Options, *, updating: bool = True
) -> Iterator[Guest]:
    """Open the saved VM and start a shadow over it; at the end nothing of it is left.

    With ``updating``, a guest whose package manager was at work is refused.
    """
    with contextlib.ExitStack() as stack:
        launched = stack.enter_context(launch(_MODULES))
        folder = stack.enter_context(_work_folder(store, config.name, keep=options.keep))
        unflushed = folder / "shadow" / "unflushed"
        unflushed.mkdir(parents=True)
        with timeline.phase("read memory"):
            sleeping = stack.enter_context(
                open_sleeping(config, _WANT, lambda number: unflushed / volume_name(number))
            )
        if updating:
            refuse_unsafe(sleeping)
        # The rest of memory is read while the shadow is being built.
        shared = folder / "shadow"
        telling = [
            stack.enter_context(beside(lambda: _write_processes(sleeping, shared))),
            stack.enter_context(beside(lambda: _write_system(sleeping, shared))),
        ]
        with handover.listen(shared) as listener:
            stack.enter_context(beside(lambda: _answer(listener, sleeping, shared)))
        stack.enter_context(watched(config.name, config.watch()))
        layout = sleeping.layout
        memory = folder / "shadow" / "tmpfs"
        memory.mkdir()
        notes = tmpfs_handover.write(memory, sleeping.view, shutil.disk_usage(folder).free)
        spec = ShadowSpec(
            work=folder,
            cache=store.vm_folder(config.name) / "cache",
            storage=create_overlays(layout.volumes, sleeping.disks, folder),
            layout=layout,
            uts=sleeping.view.uts,
            avoid=(config.folder, *(Path(stamp.path) for stamp in sleeping.fence.disks)),
        )
        with timeline.phase("start shadow"):
            shadow = stack.enter_context(open_shadow(launched, spec))
        with timeline.phase("lay memory over disk"):
            views = [
                {"image": sandbox.export(number), "handover": sandbox.unflushed(number)}
                for number, volume in enumerate(layout.volumes)
                if volume.is_ext
            ]
            filling = shadow.begin(_TMPFS, "fill", _FILL)
            for view in views:
                shadow.call(_COHERENT, "apply", view)
            shadow.mount()
            notes += tuple(shadow.finish(filling))
            if not updating:
                tmpfs_handover.forget(memory)
            # Nothing waits for these before something leaves the run: they go beside the network.
            proofs = [shadow.begin(_PROOF, "prove", view) for view in views]
            for number, volume in enumerate(layout.volumes):
                if volume.by_host_kernel:
                    names = {"mounted": sandbox.lower(number), "names": sandbox.unflushed(number)}
                    proofs.append(shadow.begin(_NAMES, "prove", names))
        layout = replace(layout, notes=(*layout.notes, *notes))
        sleeping = replace(sleeping, layout=layout)
        guest = Guest(sleeping, shadow, folder, proofs, telling)
        try:
            if updating:
                guest.refuse_unfinished()
                if sleeping.labelled:
                    labels.require(shadow)
            yield guest
        except OUassisterError:
            guest.prove(timeline)  # a view that is not true explains any other failure
            raise


def _write_processes(sleeping: Sleeping, folder: Path) -> None:
    """Write down what programs are told of the guest's processes."""
    reader = GuestReader(sleeping.memory.kernel)
    told.write_processes(folder, collect_proc(reader, sleeping.view, system=False))


def _write_system(sleeping: Sleeping, folder: Path) -> None:
    """Write down what they are told of all else: both take about as long."""
    memory = sleeping.memory
    reader = GuestReader(memory.kernel)
    handover.write(folder, handover.DEV, collect_devices(reader))
    handover.write(folder, handover.SYS_FIRST, collect_system_first(reader))
    tree = collect_proc(reader, sleeping.view, processes=False)
    told.write_system(folder, tree, collect_services(memory.look(sleeping.view, _SERVICES)))


def _answer(listener: socket.socket, sleeping: Sleeping, folder: Path) -> None:
    """Write down what they are told of /sys, when the first of them asks."""
    kernel = sleeping.memory.kernel
    handover.answer(listener, folder, lambda: collect_system(GuestReader(kernel)))


@contextlib.contextmanager
def _work_folder(store: Store, vm: str, *, keep: bool) -> Iterator[Path]:
    """A private folder of one run; leftovers of killed runs go first (we hold the VM's lock)."""
    runs = store.vm_folder(vm) / "runs"
    if runs.exists():
        remove_tree(runs)
    runs.mkdir(mode=0o700)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%dT%H%M%S-"), dir=runs))
    try:
        yield folder
    finally:
        _keep_log(folder, store.vm_folder(vm) / "last-run.log")
        if not keep:
            remove_tree(runs)


def _keep_log(folder: Path, target: Path) -> None:
    """Join what the guest's programs printed; what is not readable is not kept."""
    logs = sorted((folder / "shadow" / "output").glob("*.log"))
    with contextlib.suppress(OSError):
        target.write_bytes(b"".join(log.read_bytes() for log in logs))
