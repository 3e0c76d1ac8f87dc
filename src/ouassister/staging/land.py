"""Run the extraction in the sandbox; its layer goes through a pipe to where it lands."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ouassister.changeset.extract import collect
from ouassister.errors import InternalError, OUassisterError
from ouassister.guest_shadow import EXTRACT
from ouassister.shadow import sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ouassister.changeset.extract import Extraction
    from ouassister.changeset.landing import Landing
    from ouassister.shadow.session import Shadow

_PIPE: Final = "layer.pipe"
_RECORD: Final = "record.json"
_PIPE_BYTES: Final = 1 << 20


def land(shadow: Shadow, argument: Mapping[str, object], landing: Landing) -> Extraction:
    """Find what changed.

    Args:
        shadow: Where no program runs.
        argument: Of `ouassister.changeset.extract.run`, without places for layer and record.
        landing: Takes the layer.

    Raises:
        OUassisterError: See `ouassister.changeset.extract.extract` and `Landing.receive`.
        InternalError: What landed is not what was extracted.
    """
    output = f"{sandbox.WORK}/output"
    places = {"layer": f"{output}/{_PIPE}", "record": f"{output}/{_RECORD}"}
    shadow.call(EXTRACT, "make_pipe", places["layer"])
    with _opened(shadow.output_path(_PIPE)) as pipe, _pipe() as (ended, end):
        call = shadow.begin(EXTRACT, "run", {**argument, **places})
        with ThreadPoolExecutor(1, "landing") as beside:
            receiving = beside.submit(_receive, landing, pipe, ended)
            try:
                summary = shadow.finish(call)
            except OUassisterError:
                os.write(end, b".")
                receiving.result()  # no room there explains that nobody read the pipe
                raise
            except BaseException:
                os.write(end, b".")
                raise
            receiving.result()
    extraction = collect(summary, shadow.output_path(_RECORD))
    if landing.size != extraction.layer_size:
        raise InternalError(
            f"{landing.size} bytes landed of a layer of {extraction.layer_size} bytes"
        )
    return replace(extraction, layer_sha256=landing.sha256)


def _receive(landing: Landing, pipe: list[int], ended: int) -> None:
    try:
        landing.receive(pipe[0], ended)
    finally:
        os.close(pipe.pop())  # who still writes is told


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[list[int]]:
    """The reading end of a pipe that the root of the namespace made; who takes it closes it."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    pipe = [os.open(path, flags)]
    try:
        if not stat.S_ISFIFO(os.fstat(pipe[0]).st_mode):
            raise InternalError(f"{path} is no pipe")
        os.set_blocking(pipe[0], True)
        with contextlib.suppress(PermissionError):  # pipe-user-pages-soft, pipe(7)
            fcntl.fcntl(pipe[0], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        yield pipe
    finally:
        for left in pipe:
            os.close(left)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)
