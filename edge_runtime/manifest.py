"""`edgewright.edge_runtime.bundle.manifest`, under the name that it had before; goes with the next release."""

import warnings

from .bundle.manifest import *  # noqa: F403

warnings.warn("moved: import from edgewright.edge_runtime.bundle.manifest", FutureWarning, stacklevel=2)
