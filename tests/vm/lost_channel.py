"""A resume in which the channel is lost among the actions, and what was seen of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ouassister import pipeline
from ouassister.demo.frames import count_frames
from ouassister.provider.qemu import RunningVM
from ouassister.reflect import apart
from ouassister.store.database import Store
from ouassister.timeline import Timeline

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from tests.vm.world import World

    from ouassister.model import ResumeReport


def resume(world: World, capture: Path, monkeypatch: pytest.MonkeyPatch) -> ResumeReport:
    """Resume; the actions are done a second time, apart from the channel, behind a closed gate."""
    frames: list[int] = []
    again: list[str] = []
    set_links, run_apart = RunningVM.set_links, apart.run

    def counted(vm: RunningVM, *, up: bool) -> None:
        if up:
            frames.append(count_frames(capture))
        set_links(vm, up=up)

    def told(*words: object, **more: object) -> object:
        again.append("apart")
        return run_apart(*words, **more)  # type: ignore[arg-type]

    with Store(world.home) as opened, monkeypatch.context() as patch:
        patch.setattr(RunningVM, "set_links", counted)
        patch.setattr(apart, "run", told)
        resumed = pipeline.resume(world.config, opened, Timeline())
    assert again == ["apart"]  # the shell with the actions ended with what the channel talks to
    assert frames == [0]
    assert resumed.failed_actions == ()
    assert "no restarted unit has failed" in resumed.verified
    print(f"{resumed.online_s:.1f} s, {resumed.phases}")
    return resumed
