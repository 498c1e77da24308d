"""Trained networks with exits for `exit_policies.py`: tasks, networks, and how the heads were trained."""

from __future__ import annotations

import copy
import string
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgewright.export.accounts.exit_costs import exit_macs
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.models.registry import build
from edgewright.pipeline.stages.early_exit.placement import choose_places
from edgewright.pipeline.stages.early_exit.stage import collect_logits
from edgewright.pipeline.stages.early_exit.training import ExitTrainingConfig, train_heads, train_jointly
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import Task
from edgewright.pipeline.tasks import build_task
from edgewright.pipeline.tasks.shipped.glyphs import CHARACTERS
from edgewright.pipeline.training.training import TrainingConfig, train_model

LOSSES: Mapping[str, tuple[str, str]] = {
    "pos_weight": ("class_exclusion", "pos_weight"),
    "uniform_scale": ("class_exclusion", "uniform_scale"),
    "cross_entropy": ("class_exclusion_softmax", "pos_weight"),
}
"""Per loss of the heads: a policy that is trained with it, and `exit_loss_mode`."""
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Network:
    """A task and a network trained for it, before any exit.

    Attributes:
        task: name in the registry of tasks.
        task_args: of the task; the seed comes along.
        model: name in the registry of models.
        model_args: of the model; the number of classes comes along.
        training: of the network.
        at: four places for exits.
        pool: side of the maps that the heads read.
    """

    task: str
    task_args: Mapping[str, Any]
    model: str
    model_args: Mapping[str, Any]
    training: TrainingConfig
    at: tuple[str, ...]
    pool: int


@dataclass(frozen=True)
class Setting:
    """How the heads of a network are trained.

    Attributes:
        network: a name in `NETWORKS`.
        losses: of the heads; one training each.
        exits: the training.
    """

    network: str
    losses: tuple[str, ...] = tuple(LOSSES)
    exits: ExitTrainingConfig = field(default_factory=lambda: ExitTrainingConfig(freeze_backbone=True))


def _glyphs(rows: tuple[int, int, int], characters: str) -> dict[str, Any]:
    """Without the fonts of this machine, so that every machine measures on the same images."""
    train, validation, test = rows
    counts = {"train": train, "calibration": 10, "validation": validation, "test": test}
    return {"size": 16, "system_fonts": False, "augment": False, "rows": counts, "characters": characters}


_RESNET_AT = ("stages.stage0.block0", "stages.stage0", "stages.stage1.block1", "stages.stage2.block0")
_VIT: Mapping[str, Any] = {"image_size": 16, "patch": 4, "width": 64, "depth": 6, "in_channels": 1}


def _resnet(task: str, args: Mapping[str, Any], epochs: int) -> Network:
    training = TrainingConfig(epochs=epochs, batch_size=64, learning_rate=0.1)
    return Network(task, args, "zoo:resnet_small", {}, training, _RESNET_AT, 2)


NETWORKS: Mapping[str, Network] = {
    "digits": _resnet("digits", {"size": 16}, 20),
    "glyphs": _resnet("glyphs", _glyphs((100, 20, 100), CHARACTERS), 12),
    "numerals": _resnet("glyphs", _glyphs((200, 100, 400), string.digits), 12),
    "letters_vit": Network(
        "glyphs",
        _glyphs((120, 40, 150), string.ascii_lowercase),
        "zoo:vit_small",
        _VIT,
        TrainingConfig(epochs=20, batch_size=64, learning_rate=0.002, optimizer="adamw", warmup=0.1),
        tuple(f"layers.{i}" for i in (0, 1, 2, 4)),
        1,
    ),
}  # fmt: skip
_SOFTMAX, _BEST = ("cross_entropy",), ("uniform_scale", "cross_entropy")
SETTINGS: Mapping[str, Setting] = {
    "digits": Setting("digits"),
    "glyphs": Setting("glyphs"),
    "glyphs_distilled": Setting("glyphs", _SOFTMAX, ExitTrainingConfig(freeze_backbone=True, distillation=1.0)),
    "glyphs_joint": Setting("glyphs", _BEST, ExitTrainingConfig()),
    "glyphs_joint_distilled": Setting("glyphs", _SOFTMAX, ExitTrainingConfig(distillation=1.0)),
    "numerals": Setting("numerals"),
    "numerals_distilled": Setting("numerals", _SOFTMAX, ExitTrainingConfig(freeze_backbone=True, distillation=1.0)),
    "numerals_joint": Setting("numerals", tuple(LOSSES), ExitTrainingConfig()),
    "numerals_joint_heavy": Setting("numerals", _SOFTMAX, ExitTrainingConfig(kappa=0.25)),
    "numerals_joint_distilled": Setting("numerals", _SOFTMAX, ExitTrainingConfig(distillation=1.0)),
    "letters_vit": Setting("letters_vit"),
    "letters_vit_joint": Setting("letters_vit", _BEST, ExitTrainingConfig()),
}
"""By name; a frozen network unless `joint`, which is what the stage does by default."""


def heads_of(name: str, seed: int, folder: Path, quick: bool) -> dict[str, Tensor]:
    """Logits of trained heads, from `folder` where they are.

    Returns:
        Logits ``LOSS.SPLIT.EXIT`` float [N, C], targets ``SPLIT``, and the MACs of the exits, ``macs``.
    """
    tensors = folder / f"{name}.{seed}.safetensors"
    if not tensors.exists():
        start = time.process_time()
        save_file({k: v.contiguous() for k, v in _train_heads(name, seed, folder, quick).items()}, tensors)
        print(f"{name}, seed {seed}: heads after {time.process_time() - start:.0f} s of processor time", flush=True)
    return load_file(tensors)


def _task(network: Network, seed: int) -> Task:
    return build_task(network.task, {**network.task_args, "seed": seed}, Path.cwd())


def _trained(name: str, seed: int, folder: Path, task: Task, quick: bool) -> nn.Module:
    """The network without exits, from `folder` where it is."""
    network = NETWORKS[name]
    torch.manual_seed(seed)
    model = build(network.model, {**network.model_args, "classes": len(task.labels)}, Path.cwd())
    tensors = folder / f"{name}.{seed}.network.safetensors"
    if tensors.exists():
        model.load_state_dict(load_file(tensors))
        return model.eval()
    start = time.process_time()
    training = network.training.model_copy(update={"epochs": 2}) if quick else network.training
    with tempfile.TemporaryDirectory() as scratch:
        train_model(model, task, training, FolderContext(Path(scratch), seed), "train")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tensors)
    print(f"{name}, seed {seed}: network after {time.process_time() - start:.0f} s of processor time", flush=True)
    return model.eval()


def _train_heads(name: str, seed: int, folder: Path, quick: bool) -> dict[str, Tensor]:
    setting = SETTINGS[name]
    network = NETWORKS[setting.network]
    task = _task(network, seed)
    given = _trained(setting.network, seed, folder, task, quick)
    example = task.splits["validation"].batch([0]).inputs
    places = choose_places(given, example, network.at, ())
    found = {split: task.splits[split].targets for split in SPLITS}  # type: ignore[index]
    for loss in setting.losses:
        policy, mode = LOSSES[loss]
        specs, dims = [place.head(network.pool) for place in places], [len(place.shape) for place in places]
        model = MultiExit(copy.deepcopy(given), specs, dims, len(task.labels), policy).eval()
        config = setting.exits.model_copy(update={"exit_loss_mode": mode, **({"head_epochs": 4} if quick else {})})
        with tempfile.TemporaryDirectory() as scratch:
            context = FolderContext(Path(scratch), seed)
            train_heads(model, task, config, context, augment=False)
            if not config.freeze_backbone:
                train_jointly(model, task, config, context)
        found["macs"] = torch.tensor(exit_macs(model, task, "validation"))
        for split in SPLITS:
            logits = collect_logits(model, task.splits[split])  # type: ignore[index]
            found |= {f"{loss}.{split}.{k}": head for k, head in enumerate(logits)}
    return found
