"""A stand-in for systemd's manager: what it answers is true of the guest, what it is told waits.

It is a process beside the shadow's programs, in their tree and out of their reach. See
docs/design/0011-service-manager.md.
"""

from ouassister.shadow.servicemanager.attached import RECORDS as RECORDS
from ouassister.shadow.servicemanager.attached import Attached as Attached
from ouassister.shadow.servicemanager.process import ServiceManager as ServiceManager
from ouassister.shadow.servicemanager.process import open_namespaces as open_namespaces
from ouassister.shadow.servicemanager.process import start as start
from ouassister.shadow.servicemanager.server import Listeners as Listeners
from ouassister.shadow.servicemanager.server import listen as listen
from ouassister.shadow.servicemanager.state import ManagerState as ManagerState
from ouassister.shadow.servicemanager.state import collect as collect
