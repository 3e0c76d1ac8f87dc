"""The guest's kernel, read from its memory: Linux's own names."""

from ouassister.kernel.introspect import Guest, introspect, open_guest
from ouassister.kernel.program import Kernel

__all__ = ["Guest", "Kernel", "introspect", "open_guest"]
