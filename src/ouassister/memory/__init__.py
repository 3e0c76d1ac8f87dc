"""Reads of guest-physical memory."""
