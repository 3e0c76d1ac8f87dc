"""The shadow's /sys: the guest's devices, modules and settings, from its memory."""
