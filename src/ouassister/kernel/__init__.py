"""The guest's kernel, read from its memory: Linux's own names."""
