"""The guest's own package manager, planned and run in the shadow."""
