"""State and history of each VM, in SQLite beside the change sets."""
