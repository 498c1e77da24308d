"""`edgewright.pipeline.tasks.causal_lm`, under the name that it had before; goes with the next release."""

import warnings

from .tasks.causal_lm import *  # noqa: F403

warnings.warn("moved: import from edgewright.pipeline.tasks.causal_lm", FutureWarning, stacklevel=2)
