"""Which system calls the shadow answers itself, and how."""
