"""Bundles of a run: which need not be exported again, and what the exported graph adds to a step's row."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.edge_runtime.bundle.manifest import MANIFEST_FILE, Manifest
from edgewright.edge_runtime.versions import versions
from edgewright.export.options import ExportOptions

from ..report.steps import StepRow
from ..sources import module_digests, sha256_of
from ..stage_registry import stage_named
from ..store.atomic import plain, pretty_json, write_text
from ..store.cache import BASE, Key

_LIBRARIES = ("onnx", "onnx-ir", "onnxscript", "onnxsim", "onnxruntime", "onnxruntime-gpu", "safetensors")


@dataclass(frozen=True)
class Exported:
    """The bundle of a step, made now or before.

    Attributes:
        path: its folder.
        manifest: what it says.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def found(cls, path: Path) -> Exported:
        """One that is there already."""
        return cls(path, Manifest.from_json((path / MANIFEST_FILE).read_text(encoding="utf-8")))


def bundle_key(checkpoint: Key, options: ExportOptions, name: str) -> Key:
    """Key of a bundle: the checkpoint it is made from, the options, and the sources and libraries of the
    export."""
    parts = {
        "name": name,
        "checkpoint": checkpoint.digest,
        "options": options.model_dump(),
        "sources": export_digests(),
        "versions": versions(_LIBRARIES),
    }
    return Key(plain(parts))


def export_digests() -> dict[str, str]:
    """sha256 of the sources of ours that a bundle depends on; the whole device side, which is packed into it."""
    return module_digests("edgewright.export", "edgewright.edge_runtime")


def is_current(bundle: Path, key: Key) -> bool:
    """True if `bundle` was finished under `key` and none of its files changed since."""
    recorded = _recorded(bundle)
    return bundle.is_dir() and recorded.get("key") == key.digest and recorded.get("files") == _files(bundle)


def record(bundle: Path, key: Key, options: ExportOptions) -> None:
    """Notes that `bundle` is finished, and removes the zip of an older one."""
    archive = _archive(bundle)
    if not options.zip and archive.name in _recorded(bundle).get("files", {}):
        archive.unlink(missing_ok=True)
    write_text(_record_file(bundle), pretty_json({"key": key.digest, "parts": key.parts, "files": _files(bundle)}))


def model_bytes(bundle: Path) -> int:
    """Bytes of model.onnx and its external data."""
    return sum(path.stat().st_size for path in bundle.glob("model.onnx*"))


def with_bundle(row: StepRow, made: Exported) -> StepRow:
    """Adds what the exported graph knows: the file's size and the MACs, their mean where rows leave at exits.

    The graph's cost of the deepest path is held to the one that PyTorch's operators gave; a difference becomes a note.

    Args:
        row: as measured, before it was exported.
        made: the bundle of this step.
    """
    exits = made.manifest.exits
    end = exits[-1]
    row = dataclasses.replace(row, file_bytes=model_bytes(made.path))
    expects = None if row.stage == BASE else stage_named(row.stage).expected_macs
    expected = None if expects is None else expects(row.metrics, row.macs)
    if expected is not None and (end.macs, end.attention_macs) == (expected.macs, row.attention_macs):
        note = f"the exported graph costs {end.macs} MACs: {expected.because}"
        row = dataclasses.replace(row, notes=(*row.notes, note))
    elif (end.macs, end.attention_macs) != (row.macs, row.attention_macs):
        note = (
            f"the exported graph costs {end.macs} MACs and {end.attention_macs} of attention to its end, PyTorch's "
            f"operators {row.macs:.0f} and {row.attention_macs:.0f}: one of them does not count, or does not run, "
            "what the other does; the manifest's node table tells where"
        )
        row = dataclasses.replace(row, notes=(*row.notes, note))
    shares = row.exit_shares or (1.0,)
    return dataclasses.replace(
        row,
        macs=sum(share * way.macs for share, way in zip(shares, exits, strict=True)),
        attention_macs=sum(share * way.attention_macs for share, way in zip(shares, exits, strict=True)),
        macs_of="graph",
    )


def _recorded(bundle: Path) -> dict[str, Any]:
    try:
        data = json.loads(_record_file(bundle).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _record_file(bundle: Path) -> Path:
    return bundle.with_name(f"{bundle.name}.key.json")


def _archive(bundle: Path) -> Path:
    """Where the export puts a bundle's zip."""
    return bundle.with_name(f"{bundle.name}.zip")


def _files(bundle: Path) -> dict[str, str]:
    found = {
        path.relative_to(bundle).as_posix(): sha256_of(path) for path in sorted(bundle.rglob("*")) if path.is_file()
    }
    archive = _archive(bundle)
    return found | ({archive.name: sha256_of(archive)} if archive.is_file() else {})
