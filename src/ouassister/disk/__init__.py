"""The guest's disks as a private, writable copy."""
