"""`edgewright.pipeline.tasks.image_classification`, under the name that it had before; goes with the next release."""

import warnings

from .tasks.image_classification import *  # noqa: F403

warnings.warn("moved: import from edgewright.pipeline.tasks.image_classification", FutureWarning, stacklevel=2)
