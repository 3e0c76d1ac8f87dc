"""Applies a change set from inside the resumed guest, behind a closed gate."""
