"""Runs programs in the sleeping guest's view (the VM Shadow)."""
