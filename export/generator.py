"""`edgewright.export.language.generator`, under the name that it had before; goes with the next release."""

import warnings

from .language.generator import *  # noqa: F403

warnings.warn("moved: import from edgewright.export.language.generator", FutureWarning, stacklevel=2)
