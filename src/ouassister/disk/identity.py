"""Whose disk is it? Called inside the shadow, where the guest's files are."""

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
