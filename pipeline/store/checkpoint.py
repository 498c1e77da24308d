"""Checkpoints: the base model's specification, what every stage did to it, and all tensors once. No pickle.

A checkpoint is a folder::

    checkpoint.json        schema, base, edits, names of shared tensors, versions, metrics, sha256 of the
    other files weights.safetensors    the state dict; a tensor that has several names is stored under the
    first of them edits.safetensors      tensors of the edits, ``<position>.<name>``; only if there are any

Its bytes depend on nothing but its content: no times, no paths of this machine.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgewright.edge_runtime.versions import versions
from edgewright.models import registry
from edgewright.models.sources.folding import Folds, fold

from ..errors import CheckpointError, RecipeError
from ..sources import file_digests, sha256_of
from ..stage import Edit, Json
from ..stage_registry import stage_named
from .atomic import new_folder, plain, pretty_json
from .late_tensors import register_late

SCHEMA_VERSION = 1
LIBRARIES = ("edgewright", "torch", "torchvision", "numpy", "safetensors", "timm", "transformers")
"""What the values in a checkpoint depend on."""
CHECKPOINT_FILE = "checkpoint.json"
WEIGHTS_FILE = "weights.safetensors"
EDITS_FILE = "edits.safetensors"
RUN_FILE = "run.json"
"""Lies in the run's folder, two levels above its checkpoints, and knows the recipe's folder."""


@dataclass(frozen=True)
class BaseSpec:
    """Which model the edits start from: the arguments of `edgewright.models.registry.build`, and what was folded then.

    Attributes:
        name: see `build`.
        args: see `build`.
        folds: `Folds.data` of `models.sources.folding`.
    """

    name: str
    args: Mapping[str, Json] = field(default_factory=dict)
    folds: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """What `checkpoint.json` and `edits.safetensors` hold.

    Attributes:
        base: the model before all edits.
        sources: sha256 of the source files that define the base, by portable name.
        edits: in order.
        aliases: name of a shared tensor -> the name it is stored under.
        versions: of what wrote it.
        metrics: of the last stage.
        late: what the base registers at its first call, see `late_tensors`.
    """

    base: BaseSpec
    sources: Mapping[str, str]
    edits: tuple[Edit, ...]
    aliases: Mapping[str, str]
    versions: Mapping[str, str]
    metrics: Mapping[str, Json]
    late: Mapping[str, Json] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    base: BaseSpec,
    edits: Sequence[Edit],
    model: nn.Module,
    metrics: Mapping[str, Json],
    root: Path | None = None,
) -> None:
    """Writes a checkpoint to `folder`, which appears whole or not at all and replaces what was there.

    Args:
        folder: where to.
        base: what `edits` start from.
        edits: in order.
        model: its tensors are stored.
        metrics: JSON for reports.
        root: folder of a `python:` base, default the current one.

    Raises:
        CheckpointError: the model holds something that is no tensor, or metrics that are no JSON.
    """
    with new_folder(folder) as aside:
        write_checkpoint(aside, base, edits, model, metrics, root)


def write_checkpoint(
    folder: Path,
    base: BaseSpec,
    edits: Sequence[Edit],
    model: nn.Module,
    metrics: Mapping[str, Json],
    root: Path | None = None,
    sources: Mapping[str, str] | None = None,
    late: Mapping[str, Json] | None = None,
) -> None:
    """As `save_checkpoint`, into a folder that exists and that the caller makes appear.

    Args:
        folder: exists.
        base: see `save_checkpoint`.
        edits: see `save_checkpoint`.
        model: see `save_checkpoint`.
        metrics: see `save_checkpoint`.
        root: see `save_checkpoint`.
        sources: sha256 of the files that define the base, as they were when it was built; None: as they are now.
        late: what the base registers at its first call, see `late_tensors`.
    """
    tensors, aliases = _unique_tensors(model)
    _save(tensors, folder / WEIGHTS_FILE)
    edit_tensors = {f"{i}.{name}": value for i, edit in enumerate(edits) for name, value in edit.tensors.items()}
    if edit_tensors:
        _save({name: value.detach().cpu() for name, value in edit_tensors.items()}, folder / EDITS_FILE)
    try:
        written = [{"stage": edit.stage, "data": plain(edit.data), "tensors": sorted(edit.tensors)} for edit in edits]
        data = {
            "schema_version": SCHEMA_VERSION,
            "base": {"name": base.name, "args": plain(base.args)}
            | ({"folds": plain(base.folds)} if base.folds else {}),
            "sources": dict(_base_sources(base, root) if sources is None else sources),
            "edits": written,
            "aliases": aliases,
            "versions": versions(LIBRARIES),
            "metrics": plain(metrics, finite=True),
            "files": {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))},
        }
    except TypeError as error:
        raise CheckpointError(f"an edit or a metric of the stage is no JSON: {error}; repair the stage") from error
    (folder / CHECKPOINT_FILE).write_text(pretty_json(data | ({"late": plain(late)} if late else {})), encoding="utf-8")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads and checks everything of a checkpoint but its weights, whose hash is checked too.

    Raises:
        CheckpointError: missing, damaged, or of another schema.
    """
    data = _read_json(folder)
    try:
        for name, digest in data["files"].items():
            _check_file(folder / name, digest)
        tensors = _load(folder / EDITS_FILE) if EDITS_FILE in data["files"] else {}
        edits = tuple(
            Edit(item["stage"], item["data"], {name: tensors[f"{i}.{name}"] for name in item["tensors"]})
            for i, item in enumerate(data["edits"])
        )
        if WEIGHTS_FILE not in data["files"]:
            raise KeyError(f"files.{WEIGHTS_FILE}")
        base = BaseSpec(data["base"]["name"], data["base"]["args"], data["base"].get("folds", {}))
        return Checkpoint(
            base, data["sources"], edits, data["aliases"], data["versions"], data["metrics"], data.get("late", {})
        )
    except KeyError as error:
        raise CheckpointError(
            f"{folder / CHECKPOINT_FILE} lacks {error.args[0]!r}; it is damaged: run the recipe again"
        ) from None
    except (TypeError, AttributeError):
        raise CheckpointError(
            f"{folder / CHECKPOINT_FILE} is not a checkpoint of this schema; it is damaged: run the recipe again"
        ) from None


def load_checkpoint(folder: Path, root: Path | None = None) -> nn.Module:
    """Builds the base, rebuilds every edit, and loads the weights strictly.

    Args:
        folder: the checkpoint.
        root: folder of a `python:` base; default: what the run recorded two levels up, else the current
            folder.

    Returns:
        The model, on the CPU, in eval mode.

    Raises:
        CheckpointError: damaged, or the base's sources changed so that the weights do not fit any more.
    """
    folder = Path(folder)
    checkpoint = read_checkpoint(folder)
    root = _recorded_root(folder) if root is None else root
    changed = _changed_sources(checkpoint, root)
    hint = f"; {', '.join(changed)} changed since it was written" if changed else ""
    try:
        # building draws random initial weights: the caller's random state is none of its business
        with torch.random.fork_rng(devices=[]):
            model = registry.build(checkpoint.base.name, dict(checkpoint.base.args), root)
            model = fold(model, Folds.from_data(checkpoint.base.folds))
            register_late(model, checkpoint.late)
            for edit in checkpoint.edits:
                model = stage_named(edit.stage).rebuild(model, edit)
    except RecipeError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: the model {checkpoint.base.name!r} cannot be rebuilt ({type(error).__name__}: {error}){hint}"
        ) from error
    _load_weights(model, folder, checkpoint, hint)
    if changed:
        warnings.warn(
            f"{folder}: {', '.join(changed)} changed since this checkpoint was written; its weights still "
            f"fit, but "
            "check that the model computes the same",
            UserWarning,
            stacklevel=2,
        )
    return model.eval()


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name!r} of the model is a {type(value).__name__}, and only tensors can be stored without "
                f"pickle: "
                "keep it in a buffer, or build it in the constructor"
            )
        key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        if value.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        # views of one storage that are not the same view are stored each for itself: values are what counts
        # here
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        # no metadata: its order in the file is not fixed
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, str(path))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the model's tensors cannot be stored as safetensors: {error}") from error


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): run the recipe again") from None


def _check_file(path: Path, digest: str) -> None:
    if path.name not in (WEIGHTS_FILE, EDITS_FILE):
        raise CheckpointError(f"{path.parent / CHECKPOINT_FILE} names the unknown file {path.name!r}")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: run the recipe again")
    if sha256_of(path) != digest:
        raise CheckpointError(f"{path} is damaged (its sha256 is not the recorded one): run the recipe again")


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CHECKPOINT_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} is no checkpoint: it has no {CHECKPOINT_FILE}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): run the recipe again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged (it holds no object): run the recipe again")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema_version {data.get('schema_version')!r} and this edgewright reads "
            f"{SCHEMA_VERSION}: "
            "load it with the version that wrote it, or run the recipe again"
        )
    return data


def _load_weights(model: nn.Module, folder: Path, checkpoint: Checkpoint, hint: str) -> None:
    path = folder / WEIGHTS_FILE
    stored = _load(path)
    missing = sorted(target for target in checkpoint.aliases.values() if target not in stored)
    if missing:
        raise CheckpointError(f"{path} lacks the tensor {missing[0]!r}; it is damaged: run the recipe again")
    stored |= {name: stored[target] for name, target in checkpoint.aliases.items()}
    wanted = model.state_dict()
    problems = [f"{name!r} is missing" for name in wanted if name not in stored]
    problems += [f"{name!r} is unknown to the model" for name in stored if name not in wanted]
    problems += [
        f"{name!r} is {_kind(stored[name])} and the model wants {_kind(wanted[name])}"
        for name in wanted
        if name in stored and _kind(wanted[name]) != _kind(stored[name])
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{folder}: the weights do not fit the rebuilt model: {problems[0]}{more}{hint}")
    model.load_state_dict(stored)
    _, shared = _unique_tensors(model)
    if shared != dict(checkpoint.aliases):
        name = sorted(set(shared.items()) ^ set(checkpoint.aliases.items()))[0][0]
        raise CheckpointError(f"{folder}: {name!r} is not shared with the same tensors as when it was stored{hint}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _base_sources(base: BaseSpec, root: Path | None) -> dict[str, str]:
    root = Path.cwd() if root is None else root
    return file_digests(registry.sources(base.name, root), root)


def _changed_sources(checkpoint: Checkpoint, root: Path) -> list[str]:
    try:
        now = _base_sources(checkpoint.base, root)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"the model {checkpoint.base.name!r} cannot be found from {root}: {error}") from None
    # files that the model read when it was built, such as a configuration
    beside = {name: root / name for name in checkpoint.sources if name not in now}
    now |= {name: sha256_of(path) for name, path in beside.items() if path.is_file()}
    return sorted(
        name for name in now.keys() | checkpoint.sources.keys() if now.get(name) != checkpoint.sources.get(name)
    )


def _recorded_root(folder: Path) -> Path:
    path = folder.absolute().parent.parent / RUN_FILE
    try:
        return Path(json.loads(path.read_text(encoding="utf-8"))["root"])
    except (OSError, ValueError, KeyError, TypeError):
        return Path.cwd()
