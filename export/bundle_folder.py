"""The folder of a bundle while it is made: aside, whole, and in place with one rename."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgewright.edge_runtime.bundle.manifest import MANIFEST_FILE
from edgewright.edge_runtime.errors import InputError

DISTRIBUTIONS = ("edgewright", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")
"""Whose versions a manifest names."""


def check_target(target: Path) -> None:
    """Refuses to write over something that is no bundle.

    Raises:
        InputError: `target` is taken, or cannot be looked at.
    """
    with writing(target):
        taken = target.exists() and not (
            target.is_dir() and (not any(target.iterdir()) or (target / MANIFEST_FILE).exists())
        )
    if taken:
        raise InputError(f"{target} exists and is no bundle: it is left alone, choose another folder")


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns what the file system says into the user's error."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"the bundle {target} cannot be written, in {target.parent}: {error.strerror or error}; choose another "
            "folder, or make this one writable and free some space"
        ) from error


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, so that the finished bundle is one rename away."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    with folder as path:
        yield Path(path)


def put_in_place(work: Path, target: Path) -> None:
    """Puts the finished folder in place; there is never half a bundle under the target's name."""
    if target.exists():
        old = work.parent / "old"
        target.replace(old)
    work.replace(target)
