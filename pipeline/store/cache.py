"""Finished stages on disk: found again when everything they depend on is the same, never taken half-written.

The key of a stage's output is the sha256 over all that it is a function of, see `base_key` and `stage_key`;
the key of its input is one of these parts, so keys form a chain that starts at the base model. An entry is a
folder ``NN-<stage>-<first 12 characters of the key>`` that appears by one rename::

    checkpoint.json, weights.safetensors, ...     see `pipeline.checkpoint`
    result.json                                   metrics and notes
    artifacts.npz                                 arrays for the report
    key.json                                      the key, all its parts, sha256 of the other files
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgewright.edge_runtime.bundle.golden import read_npz, write_npz
from edgewright.edge_runtime.versions import versions

from ..errors import StageError
from ..sources import module_digests, sha256_of
from ..stage import Edit, Json, StageConfig
from ..stage_registry import stage_module
from .atomic import canonical_json, new_folder, plain, pretty_json, remove_leftovers
from .checkpoint import BaseSpec, write_checkpoint

KEY_FILE, RESULT_FILE, ARTIFACTS_FILE = "key.json", "result.json", "artifacts.npz"
BASE = "base"
"""Stands for the stage in the entry of the model before all stages."""
_FOLDING = "edgewright.models.sources.folding"
_LIBRARIES = ("torch", "torchvision", "numpy", "timm", "transformers")


@dataclass(frozen=True)
class Key:
    """Everything an output depends on, by name, as JSON."""

    parts: Mapping[str, Json]

    @property
    def digest(self) -> str:
        """sha256 of the parts, hex."""
        return hashlib.sha256(canonical_json(self.parts).encode()).hexdigest()

    @property
    def short(self) -> str:
        """The first 12 characters, for names of folders."""
        return self.digest[:12]


def environment(device: torch.device) -> dict[str, Json]:
    """What results depend on beside code, configuration and data."""
    return {
        "versions": versions(_LIBRARIES),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def base_key(
    base: BaseSpec,
    base_sources: Mapping[str, str],
    weights: str | None,
    task: BaseSpec,
    task_sources: Mapping[str, str],
    data: Mapping[str, str],
    seed: int,
    environment: Mapping[str, Json],
    fold: bool = True,
) -> Key:
    """Key of the model before all stages. The task and its data stand here, and so in every key of the chain.

    Args:
        base: the model.
        base_sources: sha256 of its source files.
        weights: sha256 of the user's weights file.
        task: name and arguments of the task.
        task_sources: sha256 of its source files.
        data: sha256 of every split (`pipeline.task.data_digests`).
        seed: the recipe's.
        environment: see `environment`.
        fold: whether what can be folded is folded.
    """
    parts = {
        "model": {"name": base.name, "args": plain(base.args), "weights": weights, "fold": fold},
        "sources": module_digests(_FOLDING),
        "model_sources": base_sources,
        "task": {"name": task.name, "args": plain(task.args)},
        "task_sources": task_sources,
        "data": data,
        "seed": seed,
        **environment,
    }
    return Key(plain(parts))


def stage_key(
    stage: str,
    config: StageConfig,
    position: int,
    given: Key,
    seed: int,
    environment: Mapping[str, Json],
    fold: bool = False,
) -> Key:
    """Key of what a stage makes of its input.

    Args:
        stage: its name.
        config: its configuration.
        position: counted from 1; the seed of its context depends on it.
        given: key of its input.
        seed: the recipe's.
        environment: see `environment`.
        fold: whether what the stage leaves is folded.
    """
    parts = {
        "stage": stage,
        "position": position,
        "config": config.model_dump(),
        "sources": module_digests(stage_module(stage)),
        "input": given.digest,
        "seed": seed,
        **environment,
    }
    if fold:
        parts["folding"] = module_digests(_FOLDING)
    return Key(plain(parts))


@dataclass(frozen=True)
class Entry:
    """A finished stage on disk."""

    folder: Path
    key: Key
    metrics: Mapping[str, Json]
    notes: tuple[str, ...]

    def artifacts(self) -> dict[str, NDArray[Any]]:
        """Arrays for the report, by name."""
        return read_artifacts(self.folder)


def read_artifacts(folder: Path) -> dict[str, NDArray[Any]]:
    """Arrays for the report of the entry in `folder`, by name; empty if it is no stage's."""
    path = folder / ARTIFACTS_FILE
    return read_npz(path) if path.is_file() else {}


class Cache:
    """The folders ``checkpoints`` and ``state`` of a run. The caller holds the run's lock."""

    def __init__(self, out: Path) -> None:
        self._checkpoints = out / "checkpoints"
        self._states = out / "state"
        if self._checkpoints.is_dir():
            remove_leftovers(self._checkpoints)

    def folder(self, position: int, stage: str, key: Key) -> Path:
        """Where the entry lies or will lie."""
        return self._checkpoints / f"{position:02d}-{stage}-{key.short}"

    def state(self, key: Key) -> Path:
        """Where the unfinished stage keeps what it needs to go on."""
        return self._states / key.short

    def find(self, position: int, stage: str, key: Key) -> Entry | None:
        """The finished entry; None if there is none, or if a file of it is damaged."""
        folder = self.folder(position, stage, key)
        recorded = _read_key(folder)
        if recorded is None or recorded.get("key") != key.digest or _damaged(folder, recorded) is not None:
            return None
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        return Entry(folder, key, result["metrics"], tuple(result["notes"]))

    def store(
        self,
        position: int,
        stage: str,
        key: Key,
        base: BaseSpec,
        root: Path,
        edits: Sequence[Edit],
        model: nn.Module,
        metrics: Mapping[str, Json],
        notes: Sequence[str] = (),
        artifacts: Mapping[str, Any] | None = None,
        sources: Mapping[str, str] | None = None,
        late: Mapping[str, Json] | None = None,
        verify: Callable[[], None] = lambda: None,
    ) -> Entry:
        """Writes the entry, replacing what was there, then drops the stage's unfinished state.

        Args:
            position: counted from 1; 0 for the model before all stages.
            stage: its name.
            key: what the entry is found by.
            base: the model before all stages.
            root: folder of a `python:` base.
            edits: of all stages so far.
            model: as the stage left it.
            metrics: JSON.
            notes: sentences.
            artifacts: arrays for the report, by name.
            sources: see `write_checkpoint`.
            late: see `write_checkpoint`.
            verify: called when all is written, and just before it appears; what it raises leaves nothing.

        Raises:
            StageError: metrics or artifacts that cannot be stored.
            CheckpointError: a model that cannot be stored.
        """
        folder = self.folder(position, stage, key)
        arrays = {name: np.asarray(torch.as_tensor(value).cpu()) for name, value in (artifacts or {}).items()}
        try:
            result = pretty_json({"metrics": metrics, "notes": list(notes)}, finite=True)
        except TypeError as error:
            raise StageError(f"{stage}: a metric is no JSON: {error}; repair the stage") from error
        with new_folder(folder) as aside:
            write_checkpoint(aside, base, edits, model, metrics, root, sources, late)
            (aside / RESULT_FILE).write_text(result, encoding="utf-8")
            write_npz(aside / ARTIFACTS_FILE, arrays)
            files = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
            text = pretty_json({"key": key.digest, "parts": key.parts, "files": files})
            (aside / KEY_FILE).write_text(text, encoding="utf-8")
            verify()
        self.drop_state(key)
        return Entry(folder, key, json.loads(result)["metrics"], tuple(notes))

    def drop_state(self, key: Key) -> None:
        """Forgets how far an unfinished stage came."""
        shutil.rmtree(self.state(key), ignore_errors=True)

    def why_missed(self, position: int, stage: str, key: Key) -> str | None:
        """Why `find` finds nothing although this stage has run here before; None if it has not.

        Names the parts of the key that differ from those of the most similar entry.
        """
        folder = self.folder(position, stage, key)
        recorded = _read_key(folder)
        if recorded is not None and recorded.get("key") == key.digest:
            return f"{_damaged(folder, recorded)} is damaged"
        differences: list[list[str]] = []
        for other in sorted(self._checkpoints.glob(f"{position:02d}-{stage}-*")):
            parts = (_read_key(other) or {}).get("parts")
            if isinstance(parts, dict):
                differences.append(_differences(parts, dict(key.parts)))
        if not differences:
            return None
        closest: list[str] = min(differences, key=len)
        return ", ".join(closest)


def _read_key(folder: Path) -> dict[str, Any] | None:
    try:
        data = json.loads((folder / KEY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and isinstance(data.get("files"), dict) else None


def _damaged(folder: Path, recorded: Mapping[str, Any]) -> str | None:
    for name, digest in recorded["files"].items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            return str(path)
    return None


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What changed from `old` to `new`, one text per leaf: ``config.epochs: 3 -> 5``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            text
            for key in keys
            if old.get(key) != new.get(key)
            for text in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    if path == "input":
        return ["its input changed"]
    if path == "model.weights" or path.split(".")[0] in ("sources", "model_sources", "task_sources", "data"):
        return [f"{path} changed"]
    return [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    return f"{canonical_json(value):.40}"
