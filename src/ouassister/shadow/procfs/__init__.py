"""The shadow's /proc: the guest's processes and system beside the updater's own processes."""
