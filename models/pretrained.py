"""`edgewright.models.sources.pretrained`, under the name that it had before; goes with the next release."""

import warnings

from .sources.pretrained import *  # noqa: F403

warnings.warn("moved: import from edgewright.models.sources.pretrained", FutureWarning, stacklevel=2)
