"""``python -m ouassister``."""

import sys

from ouassister.cli import main

sys.exit(main())
