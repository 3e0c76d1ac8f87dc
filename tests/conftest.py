"""What all tiers share: a missing tool skips on a laptop and fails in CI, through one helper."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def need(tool: str) -> str:
    """Return the tool's path; skip without it, or fail where CI promises it."""
    path = shutil.which(tool)
    if path is None:
        lacking(f"{tool} is not installed ('make deps' installs it)")
    return path


def lacking(what: str) -> NoReturn:
    """This host lacks something: skip on a laptop, fail where CI promises it."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)
