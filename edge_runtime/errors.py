"""The errors a user can meet, from here up to the command line.

::

    EdgewrightError                 exit code 1
    ├── InputError                  2   the caller gave something unusable
    │   ├── BundleError                 a bundle that is missing, altered, truncated or of another schema
    │   └── ExportError                 a model that cannot become ONNX (raised on the exporting side only)
    ├── ParityError                 3   two runtimes disagree beyond the tolerance, or one cannot run what it should
    ├── QualityFloorError           4   the result exists and is not good enough
    └── ProviderError               5   the execution provider that was asked for is not there

``edgewright.pipeline.errors`` continues this tree. Every text says what happened, to which file,
layer or node, and what to do next.
"""

from __future__ import annotations

from .process.plain_text import printable_lines


class EdgewrightError(Exception):
    """Base of every error raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1

    def __str__(self) -> str:
        """The text, without what would steer a terminal: parts of it come from bundles and other files."""
        return printable_lines(super().__str__())


class InputError(EdgewrightError):
    """The caller gave something unusable: a file, an array, an option."""

    exit_code = 2


class BundleError(InputError):
    """A bundle is missing, altered, truncated, of an unknown schema, or names a file outside itself."""


class ExportError(InputError):
    """A model cannot become ONNX: an operation without translation, or control flow that depends on data."""


class ParityError(EdgewrightError):
    """Two runtimes disagree beyond the tolerance, or ONNX Runtime cannot run what was exported for it."""

    exit_code = 3


class QualityFloorError(EdgewrightError):
    """The work finished, and its result breaks a floor that the caller set."""

    exit_code = 4


class ProviderError(EdgewrightError):
    """The execution provider that was asked for is not available, or did not take every node."""

    exit_code = 5
