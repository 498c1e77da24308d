"""edge_runtime.pyz: this package as one file that runs wherever numpy and onnxruntime are."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING

from .replacing import replaced

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_NAME = "edge_runtime"
_FIXED_DATE = (1980, 1, 1, 0, 0, 0)
_MAIN = f"""import sys

from {_NAME}.cli import main

sys.exit(main())
"""


def _sources(folder: Traversable) -> Iterator[tuple[str, bytes]]:
    """Every Python file and every table (JSON) below `folder`, by its path from there."""
    for entry in folder.iterdir():
        if entry.name.endswith((".py", ".json")):
            yield entry.name, entry.read_bytes()
        elif entry.is_dir():
            yield from ((f"{entry.name}/{name}", data) for name, data in _sources(entry))


def write_runtime_archive(path: str | os.PathLike[str]) -> None:
    """Writes the package as a zipapp, with bytes that depend on nothing but the sources.

    Inside, the package is called ``edge_runtime``, which is why all its own imports are relative. Stored
    without compression: zlib's output differs between its builds.

    Args:
        path: file to write; replaced if it exists.
    """
    root = (__package__ or _NAME).rpartition(".")[0]
    sources = {f"{_NAME}/{name}": data for name, data in _sources(resources.files(root))}
    sources["__main__.py"] = _MAIN.encode()
    with replaced(path) as temporary:
        with temporary.open("wb") as stream:
            stream.write(b"#!/usr/bin/env python3\n")
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
                for name, data in sorted(sources.items()):
                    info = zipfile.ZipInfo(name, _FIXED_DATE)
                    info.external_attr = 0o644 << 16
                    archive.writestr(info, data)
        temporary.chmod(0o755)
