"""The listener of a filter, from its first process to its last."""

from __future__ import annotations

import os
import socket

import pytest

from ouassister.shadow import raw
from ouassister.shadow.syscalls.filter import build_filter
from ouassister.shadow.syscalls.notify import Call, Handler, serve_one

pytestmark = [pytest.mark.host, pytest.mark.timeout(60)]

_NO_NEW_PRIVS = 38  # PR_SET_NO_NEW_PRIVS (include/uapi/linux/prctl.h)


class _Nobody:
    def find(self, call: Call) -> Handler:
        raise AssertionError(f"nobody calls: {call}")


def test_listener_of_processes_that_ended_is_over() -> None:
    """It stays ready for ever: who goes on asking it takes a whole processor of the host."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            raw.prctl(_NO_NEW_PRIVS, 1)
            socket.send_fds(theirs, [b"listener"], [raw.seccomp_listener(build_filter())])
            theirs.recv(1)
            os._exit(0)
        finally:
            os._exit(1)
    theirs.close()
    with ours:
        _message, (listener,), _flags, _address = socket.recv_fds(ours, 64, 1)
        assert serve_one(listener, _Nobody())  # nothing is asked, something may be
        ours.send(b"x")
        assert os.waitpid(child, 0)[1] == 0
        assert not serve_one(listener, _Nobody())
        os.close(listener)
