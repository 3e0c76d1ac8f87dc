"""The guest's kernel, read from its memory: Linux's own names."""

from ouassister.kernel.introspect import Guest, add, introspect, look, open_guest
from ouassister.kernel.program import Kernel
from ouassister.kernel.reader import GuestReader

__all__ = ["Guest", "GuestReader", "Kernel", "add", "introspect", "look", "open_guest"]
