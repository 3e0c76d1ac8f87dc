"""A layer on its way from the extraction into the store, and every way for it to get lost."""

from __future__ import annotations

import errno
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from ouassister.changeset import extract, landing
from ouassister.changeset.landing import LAYER, Landing
from ouassister.errors import InternalError, UsageError, WorkDiskFullError
from ouassister.shadow import sandbox
from ouassister.staging.land import land

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from ouassister.shadow.session import Shadow

BIG = 40 << 20


class Beside:
    """What `land` asks of a shadow, by a process of its own without a sandbox."""

    def __init__(self, folder: Path, run: Callable[[dict[str, Any]], object] = extract.run) -> None:
        self.folder = folder
        self._run = run
        self._pool = ProcessPoolExecutor(1, get_context("fork"))
        self._pool.submit(os.getpid).result()  # it must not have the pipe that is opened later

    def output_path(self, name: str) -> Path:
        return self.folder / name

    def call(self, _module: str, function: str, argument: str) -> object:
        return getattr(extract, function)(self._here(argument))

    def begin(self, _module: str, _function: str, argument: dict[str, Any]) -> Future[object]:
        here = {key: self._here(value) for key, value in argument.items()}
        return self._pool.submit(self._run, here)

    def finish(self, call: Future[object]) -> object:
        try:
            return call.result()
        except BrokenProcessPool as error:
            raise InternalError("the process ended without an answer") from error
        except OSError as error:
            raise InternalError(f"extraction failed: {error.strerror}") from error

    def _here(self, value: object) -> Any:  # noqa: ANN401 - JSON
        if not isinstance(value, str):
            return value
        return value.replace(f"{sandbox.WORK}/output", str(self.folder))

    def close(self) -> None:
        self._pool.shutdown()


def _dies_half_way(argument: dict[str, Any]) -> None:
    with Path(argument["layer"]).open("wb", buffering=0) as pipe:
        pipe.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


class Place:
    """Two trees, a store, and what is between them."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "store"
        self.trees = [{"upper": str(folder / "upper"), "lower": str(folder / "lower")}]
        self.output = folder / "output"
        for name in ("upper", "lower", "output"):
            (folder / name).mkdir()
        (folder / "upper" / "big").write_bytes(os.urandom(1 << 20) * (BIG >> 20))
        (folder / "upper" / "small").write_bytes(b"small")

    def land(
        self,
        into: Landing,
        run: Callable[[dict[str, Any]], object] = extract.run,
        **more: object,
    ) -> extract.Extraction:
        shadow = Beside(self.output, run)
        try:
            return land(cast("Shadow", shadow), {"trees": self.trees, **more}, into)
        finally:
            shadow.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(autouse=True)
def _ends() -> Iterator[None]:
    """A pipe that nobody reads or writes would make a test wait for ever."""

    def late(*_: object) -> None:
        raise TimeoutError("somebody waits at the pipe for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def test_layer_that_lands_is_the_one_that_a_file_would_have(place: Place) -> None:
    before = descriptors()
    with Landing(place.store) as into:
        found = place.land(into)
        landed = (into.place / LAYER).read_bytes()
    argument = {
        "trees": place.trees,
        "layer": str(place.output / "layer.tar"),
        "record": str(place.output / "record"),
    }
    assert found == extract.collect(extract.run(argument), place.output / "record")
    assert landed == (place.output / "layer.tar").read_bytes()
    assert descriptors() == before


def test_what_was_not_kept_leaves_nothing_in_the_store(place: Place) -> None:
    with Landing(place.store) as into:
        place.land(into)
        assert [path.name[:9] for path in place.store.iterdir()] == [".partial-"]
        first = into.place
        place.land(into)  # another round
        assert not first.exists()
        assert [path.name for path in place.store.iterdir()] == [into.place.name]
    assert not [*place.store.iterdir()]


@pytest.mark.parametrize(
    ("run", "more", "error", "words"),
    [
        (extract.run, {"odd": 1}, UsageError, "a request has the keys"),
        (_dies_half_way, {}, InternalError, "ended without an answer"),
    ],
)
def test_extraction_that_fails_is_told_and_nobody_waits(
    place: Place,
    run: Callable[[dict[str, Any]], object],
    more: dict[str, object],
    error: type[Exception],
    words: str,
) -> None:
    before = descriptors()
    start = time.monotonic()
    with Landing(place.store) as into, pytest.raises(error, match=words):
        place.land(into, run, **more)
    assert time.monotonic() - start < 30
    assert not place.store.exists() or not [*place.store.iterdir()]
    assert descriptors() == before


def test_layer_of_another_size_than_was_extracted_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = Landing.receive

    def loses(self: Landing, source: int, ended: int = -1) -> None:
        receive(self, source, ended)
        self.size -= 512

    monkeypatch.setattr(Landing, "receive", loses)
    with (
        Landing(place.store) as into,
        pytest.raises(InternalError, match="bytes landed of a layer of"),
    ):
        place.land(into)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_store_without_room_ends_the_extraction_and_is_what_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(_target: int, _data: memoryview) -> None:
        raise OSError(number, "full")

    monkeypatch.setattr(landing, "_write", full)
    with (
        Landing(place.store) as into,
        pytest.raises(WorkDiskFullError, match="no room for a change set"),
    ):
        place.land(into)
    assert not [*place.store.iterdir()]


def test_what_is_no_pipe_is_not_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(path: str) -> None:
        Path(path).write_bytes(b"a file")

    monkeypatch.setattr(extract, "make_pipe", make)
    with Landing(place.store) as into, pytest.raises(InternalError, match="is no pipe"):
        place.land(into)
    monkeypatch.setattr(extract, "make_pipe", lambda path: Path(path).symlink_to("/dev/zero"))
    (place.output / "layer.pipe").unlink()
    with Landing(place.store) as into, pytest.raises(OSError, match="symbolic link"):
        place.land(into)
