"""`python -m edgewright.edge_runtime`."""

import sys

from .cli import main

sys.exit(main())
