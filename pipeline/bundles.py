"""Which finished bundles need not be exported again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgewright.edge_runtime.versions import versions
from edgewright.export.options import ExportOptions

from .atomic import plain, pretty_json, write_text
from .cache import Key
from .sources import module_digests, sha256_of

_LIBRARIES = ("onnx", "onnx-ir", "onnxscript", "onnxsim", "onnxruntime", "onnxruntime-gpu", "safetensors")


def bundle_key(checkpoint: Key, options: ExportOptions, name: str) -> Key:
    """Key of a bundle: the checkpoint it is made from, the options, and the sources and libraries of the
    export."""
    parts = {
        "name": name,
        "checkpoint": checkpoint.digest,
        "options": options.model_dump(),
        # the whole device side: it is packed into the bundle
        "sources": module_digests("edgewright.export", "edgewright.edge_runtime"),
        "versions": versions(_LIBRARIES),
    }
    return Key(plain(parts))


def is_current(bundle: Path, key: Key) -> bool:
    """True if `bundle` was finished under `key` and none of its files changed since."""
    recorded = _recorded(bundle)
    return bundle.is_dir() and recorded.get("key") == key.digest and recorded.get("files") == _files(bundle)


def record(bundle: Path, key: Key, options: ExportOptions) -> None:
    """Notes that `bundle` is finished, and removes the zip of an older one."""
    if not options.zip and bundle.with_suffix(".zip").name in _recorded(bundle).get("files", {}):
        bundle.with_suffix(".zip").unlink(missing_ok=True)
    write_text(_record_file(bundle), pretty_json({"key": key.digest, "parts": key.parts, "files": _files(bundle)}))


def model_bytes(bundle: Path) -> int:
    """Bytes of model.onnx and its external data."""
    return sum(path.stat().st_size for path in bundle.glob("model.onnx*"))


def _recorded(bundle: Path) -> dict[str, Any]:
    try:
        data = json.loads(_record_file(bundle).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _record_file(bundle: Path) -> Path:
    return bundle.with_name(f"{bundle.name}.key.json")


def _files(bundle: Path) -> dict[str, str]:
    found = {path.name: sha256_of(path) for path in sorted(bundle.iterdir()) if path.is_file()}
    archive = bundle.with_suffix(".zip")
    return found | ({archive.name: sha256_of(archive)} if archive.is_file() else {})
