"""A real guest's save file, given by OUASSISTER_TEST_SAVE, read as a whole and cut short."""

from __future__ import annotations

import os
import resource
import shutil
import time
import uuid
from pathlib import Path

import pytest

from ouassister.errors import TruncatedStateError
from ouassister.kernel import introspect
from ouassister.memory import open_save

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def sample() -> Path:
    path = os.environ.get("OUASSISTER_TEST_SAVE")
    if not path:
        pytest.skip("OUASSISTER_TEST_SAVE names no save file")
    return Path(path)


def test_save_of_real_guest_tells_its_kernel(sample: Path) -> None:
    started = time.monotonic()
    with open_save(sample) as save:
        view = introspect(save, (b"/var/lib/dpkg",))
    assert time.monotonic() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 400 << 10
    assert view.degraded == ()
    assert view.uts.sysname == "Linux"
    assert str(uuid.UUID(view.boot_id)) == view.boot_id
    assert 0 < view.uptime_s < 86400
    assert view.suspended_at_s > 1_700_000_000
    assert view.cpus >= 1
    by_exe = {task.exe for task in view.tasks}
    assert {b"/usr/lib/systemd/systemd", b"/usr/sbin/nginx", b"/usr/sbin/sshd"} <= by_exe
    init = next(task for task in view.tasks if task.pid == 1)
    assert (init.parent, init.comm, init.kernel_thread) == (0, b"systemd", False)
    for task in view.tasks:
        assert not task.kernel_thread or (task.exe, task.cmdline) == (None, ())
    root = next(mount for mount in view.mounts if mount.target == b"/")
    assert root.fstype == "ext4"
    assert root.block is not None


@pytest.mark.parametrize("part", [0.0001, 0.3, 0.9, 0.9999])
def test_save_of_real_guest_cut_short_is_truncated(
    sample: Path, tmp_path: Path, part: float
) -> None:
    size = int(sample.stat().st_size * part)
    with sample.open("rb") as source, (tmp_path / "cut").open("wb") as target:
        shutil.copyfileobj(source, target)
        target.truncate(size)
    with pytest.raises(TruncatedStateError, match=f"{size:#x}"):
        open_save(tmp_path / "cut")
