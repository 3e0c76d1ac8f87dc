"""File trees of the guest that are handed over as one file and served by FUSE."""
