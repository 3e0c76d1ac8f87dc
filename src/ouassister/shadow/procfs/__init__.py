"""The shadow's /proc: the guest's processes and system beside the updater's own processes."""

from ouassister.shadow.procfs.record import VALUES as VALUES
from ouassister.shadow.procfs.record import recorder as recorder
from ouassister.shadow.procfs.server import Procfs as Procfs
