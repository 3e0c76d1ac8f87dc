"""Reads of guest-physical memory."""

from ouassister.memory.physical import PhysicalMemory, Segment
from ouassister.memory.save import SaveFile, open_save
from ouassister.memory.virtual import NotMappedError, VirtualMemory

__all__ = [
    "NotMappedError",
    "PhysicalMemory",
    "SaveFile",
    "Segment",
    "VirtualMemory",
    "open_save",
]
