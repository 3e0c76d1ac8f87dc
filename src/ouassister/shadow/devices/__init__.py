"""The shadow's /dev: all nodes and links that the guest has, none of which leads to a device."""
