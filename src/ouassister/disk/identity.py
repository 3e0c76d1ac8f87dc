"""Whose disk is it, and what of ours lies there? Called inside the shadow, where the files are."""

from __future__ import annotations

import os
import re
from typing import Any

from ouassister.text import from_text


def machine_id(argument: dict[str, Any]) -> str:
    """Read machine-id(5); anything but a regular file with 32 hex digits counts as none.

    Args:
        argument: ``root``: where a tree is mounted; ``path``: of the file in it.
    """
    path = os.fsencode(argument["root"]) + from_text(argument["path"])
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    with os.fdopen(descriptor, "rb") as file:
        text = file.read(64).strip().decode("ascii", "replace")
    return text if re.fullmatch("[0-9a-f]{32}", text) else ""


def unfinished(argument: dict[str, Any]) -> bool:
    """Tell whether the applier's journal is there: a change set is half applied, or half undone.

    Args:
        argument: ``root``: where a tree is mounted; ``path``: of the applier's folder in it.
    """
    path = os.fsencode(argument["root"]) + from_text(argument["path"])
    try:
        with os.scandir(path) as entries:
            return any(entry.name.startswith(b"journal-") for entry in entries)
    except OSError:
        return False
