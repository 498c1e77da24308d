"""Commands that stages bring to the command line; nothing is imported here, so that ``edgewright --help`` is quick."""

from __future__ import annotations

from collections.abc import Mapping

COMMANDS: Mapping[str, tuple[str, str]] = {
    "mix": (
        "edgewright.pipeline.stages.early_exit.command",
        "What a row costs on average for another mix of exits, and when exits pay.",
    ),
}
"""By name: the module whose ``main(arguments, program)`` runs it, and its line of help."""
