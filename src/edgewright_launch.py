"""The command `edgewright`: makes sure that `edgewright` means our files, then runs the command line.

`edgewright` has no ``__init__``: it is a namespace of four packages. So a user's ``edgewright.py``, or a
folder ``edgewright`` of theirs with an ``__init__.py`` or a ``models`` in it, can take its place or a part of
it, and what follows would be errors that nobody understands. Standard library only, and quick.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("edge_runtime", "export", "models", "pipeline")


def find_shadow() -> str | None:
    """What is wrong with where `edgewright` is found, naming the file in the way; None if all is well."""
    # Not executed here: a namespace has no file, and anything that has one is not ours.
    spec = importlib.util.find_spec("edgewright")
    if spec is None:
        return "the package edgewright is not installed for this Python: install it with pip"
    if spec.origin is not None:
        return _in_the_way(spec.origin, "edgewright")
    own = Path(__file__).absolute().parent / "edgewright"
    for package in PACKAGES:
        expected = own / package / "__init__.py"
        # Ours first: another installation of edgewright may have the part that is missing here.
        if not expected.is_file():
            return f"{expected.parent} is missing: install edgewright again with pip"
        found = importlib.util.find_spec(f"edgewright.{package}")
        if found is None:
            return f"edgewright.{package} is not found, though {expected} is there: install edgewright again with pip"
        place = found.origin or next(iter(found.submodule_search_locations or ()), "an unknown place")
        if Path(place).resolve() != expected.resolve():
            return _in_the_way(place, f"edgewright.{package}")
    return None


def _in_the_way(place: str, name: str) -> str:
    return (
        f"{name} is found at {place}, which does not belong to edgewright and hides it: rename that file or "
        f"folder, or "
        "take the folder above it out of PYTHONPATH (python -m also adds the current folder)"
    )


def main() -> None:
    """Runs the command line, and ends the process with its exit code."""
    shadow = find_shadow()
    if shadow is not None:
        print(f"error: {shadow}", file=sys.stderr)
        sys.exit(2)
    from edgewright.pipeline.cli import main as run_cli

    sys.exit(run_cli())


if __name__ == "__main__":
    main()
