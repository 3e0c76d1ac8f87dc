"""Saved VMs: what a save file holds, and the fence that binds work to it."""
