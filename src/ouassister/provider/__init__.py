"""How a VM is described, suspended and restored."""
