"""`edgewright.edge_runtime.language.generation`, under the name that it had before; goes with the next release."""

import warnings

from .language.generation import *  # noqa: F403

warnings.warn("moved: import from edgewright.edge_runtime.language.generation", FutureWarning, stacklevel=2)
