"""Paths that are not as the change set expects: what the applier told, and what becomes of it.

A conflict refuses the whole change set, or its packages are installed by the guest's own dpkg
(docs/design/0023-conflicts-per-package.md).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ouassister.changeset.medium import PACKAGE_DATABASES
from ouassister.reflect import applier_protocol
from ouassister.reflect.applier_protocol import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ouassister.model import Differing
    from ouassister.reflect.applier_protocol import ApplierResult

CODE: Final = "conflict"
_COUNT: Final = re.compile(r"; ([0-9]{1,9}) paths are not as expected$")  # guest/check.c


def told(output: bytes) -> tuple[Differing, ...]:
    """Paths that the applier says are not as expected; not all of them, when there are many.

    Raises:
        ProtocolError: A line of it is none that an applier prints.
    """
    return applier_protocol.differing(output, CODE)


def are_all(result: ApplierResult, found: tuple[Differing, ...]) -> bool:
    """Whether every path that differs was told.

    The applier counts those that it does not tell. One that has undone its work had met the first.
    """
    if result.outcome is not Outcome.REFUSED:
        return False
    match = _COUNT.search(result.reason)
    return len(found) == (int(match[1]) if match else 1)


def is_of_database(paths: Iterable[bytes]) -> bool:
    """Whether one of the paths is the package manager's own."""
    return any(
        path == folder or path.startswith(folder + b"/") or folder.startswith(path + b"/")
        for path in paths
        for folder in PACKAGE_DATABASES
    )


def may_fall_back(result: ApplierResult, found: tuple[Differing, ...]) -> bool:
    """Whether the guest's own dpkg may install what the applier did not put in place.

    The guest must be as it was. Not where the package database differs: somebody else has
    installed something, and the plan is not for this guest any more. The applier names such a path
    before any other.
    """
    untouched = result.outcome in (Outcome.REFUSED, Outcome.UNDONE)
    paths = (result.path, *(one.path for one in found))
    return untouched and result.code == CODE and not is_of_database(paths)
