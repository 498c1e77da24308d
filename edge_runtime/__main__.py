"""`python -m edgewright.edge_runtime`."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  # whoever installed nothing with pip may have any
    sys.stderr.write(
        f"error: edge_runtime needs Python 3.10 or newer, and {sys.executable} is "
        f"{sys.version_info[0]}.{sys.version_info[1]}: use another one\n"
    )
    sys.exit(2)

from .cli import main

sys.exit(main())
