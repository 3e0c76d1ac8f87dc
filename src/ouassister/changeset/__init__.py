"""What the update changed: extract, store, verify, write to a medium."""
