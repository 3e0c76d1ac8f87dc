"""Which packages of an update cannot be emulated, and how they travel to the guest.

held      →  HeldFile       what sleeping processes hold open for writing, from memory
judge     →  reasons        what became of a run, package by package
settle    →  Settled        emulate, stage the culprits, begin again, until it ends well
carry     →  Staged         archives become files of the change set
predict   →  PackageMode    a guess, before anything has run

docs/design/0016-staging.md tells why.
"""
