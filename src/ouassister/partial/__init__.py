"""A change set without some of its packages, which the guest's own dpkg installs instead.

attribute  →  Portions     what belongs to which package, while the guest sleeps
status     →  stanzas      the package database without them
relations  →  broken       is that database consistent
cut        →  Cut          which packages go, and which entries stay
make       →  Changeset    the rest, and the archives of what was left out

docs/design/0023-conflicts-per-package.md tells why.
"""
