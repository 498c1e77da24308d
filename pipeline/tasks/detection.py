"""The task of finding objects: their class and the box around each."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgewright.edge_runtime.answers.boxes import BOXES, senseless
from edgewright.edge_runtime.answers.decoders import BOX, decoded, kept, places
from edgewright.edge_runtime.bundle.manifest import AnswerSpec, DecoderSpec, Preprocessing

from ..errors import DataError, ModelError
from ..metric import Answer, Metric, Score
from ..task import Batch, Split, SplitName
from .anchor_loss import AnchorLoss
from .array_task import ArrayTask, Augmentation
from .changed_split import ChangedSplit
from .detection_loss import GridLoss
from .model_decoder import decoder_of

NO_BOX = -1.0
"""Class of what fills up the boxes of a sample."""

GRID, OF_MODEL = "grid", "model"
"""Decoders by name that a recipe gives: cells of `strides`, or what the model says."""

_OUTPUT = "boxes"
_LOSSES: Mapping[str, type[GridLoss] | type[AnchorLoss]] = {GRID: GridLoss, "ssd": AnchorLoss}
_NOT_SEEN = f"the task's decoder is {OF_MODEL!r}: give it the model first, `task = task.for_model(model)`"
_METRICS = ("map", "map_50")
_JUDGED_FROM = 0.01  # average precision wants the unsure boxes too


class Detection(ArrayTask):
    """A raw head for targets float32 [N, M, 5]: class, left, top, right, bottom, in pixels.

    A grid [N, A, 4 + C] has a cell for every `strides` pixels, level by level in their order, each row by row; four
    numbers whose softplus is the distance to the sides from the cell's middle in strides, and a logit for each class.
    A head of anchors [N, A, 4 + 1 + C] (SSD) has four offsets, a logit of background, and one for each class.

    Args:
        splits: per name a `Split`, or a pair ``(inputs, targets)`` of arrays; class -1 fills up the boxes of a sample.
        classes: their names, in the order of the logits.
        size: side of the model's input in pixels, or (height, width).
        strides: of the levels of a grid.
        decoder: ``grid``; ``model``: what the model's `box_decoder` says, see `model_decoder.decoder_of`; or one of
            your own, whose thresholds are those given here.
        metric: ``map`` (mean average precision over overlaps of 0.5 to 0.95), ``map_50``, or your own.
        score_threshold: probability from which `predict` answers a box.
        iou_threshold: of two boxes of a class that overlap by more, the surer one is answered.
        preprocessing: how raw images become inputs on the device; boxes come back in pixels of the raw image.
        augment: ``(batch, generator) -> batch``, for training batches only; see `mirrored`.
        name: for reports.
        input_name: name of the ONNX input.
        provenance: where the data come from, JSON; for the report and the data digests.
        file_digests: files that the data were read from, see `pipeline.task.FromFiles`.

    Raises:
        DataError: an unknown or empty split, metric or decoder, no class, or a box that cannot be.
    """

    def __init__(
        self,
        splits: Mapping[SplitName, Split | tuple[Any, Any]],
        classes: Sequence[str],
        *,
        size: int | Sequence[int],
        strides: Sequence[int] = (8, 16, 32),
        decoder: str | DecoderSpec = GRID,
        metric: str | Metric = "map",
        score_threshold: float = 0.25,
        iou_threshold: float = 0.5,
        preprocessing: Preprocessing | None = None,
        augment: Augmentation | None = None,
        name: str = "detection",
        input_name: str | Sequence[str] = "image",
        provenance: Mapping[str, Any] | None = None,
        file_digests: Mapping[Path, str] | None = None,
    ) -> None:
        super().__init__(
            splits,
            preprocessing=preprocessing,
            augment=augment,
            name=name,
            input_name=input_name,
            provenance=provenance,
            file_digests=file_digests,
        )
        self._classes = tuple(str(label) for label in classes)
        if not self._classes or len(set(self._classes)) < len(self._classes):
            raise DataError(f"the classes are {list(self._classes)}: give at least one, each once")
        self._size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self._thresholds = score_threshold, iou_threshold
        self._metric = MeanAveragePrecision(metric) if isinstance(metric, str) else metric
        for key, split in self._splits.items():
            _check_targets(key, split.targets, len(self._classes), *self._size)
        self._decoder: DecoderSpec | None = None
        if isinstance(decoder, DecoderSpec):
            self._decode_by(decoder)
        elif decoder == GRID:
            if not strides or min(strides) < 1 or any(side % stride for stride in strides for side in self._size):
                height, width = self._size
                raise DataError(f"strides {list(strides)} do not divide an input of {height} x {width} pixels")
            self._decode_by(DecoderSpec(GRID, self._size, tuple(strides)))
        elif decoder != OF_MODEL:
            raise DataError(f"decoder is {decoder!r}: it is {GRID!r}, {OF_MODEL!r}, or a DecoderSpec")

    def _decode_by(self, decoder: DecoderSpec) -> None:
        score, overlap = self._thresholds
        self._decoder = dataclasses.replace(decoder, score_threshold=score, iou_threshold=overlap)
        if decoder.size != self._size:
            raise DataError(
                f"the decoder is for images of {decoder.size[0]} x {decoder.size[1]} pixels, and the task's have "
                f"{self._size[0]} x {self._size[1]}: give model and task the same size"
            )
        if reason := senseless(self._decoder):
            raise DataError(f"the decoder {decoder.name}: {reason}")
        self._loss = _LOSSES[decoder.name](self._decoder)
        if isinstance(self._metric, MeanAveragePrecision):
            self._metric = MeanAveragePrecision(self._metric.name, self._decoder)

    @property
    def reads_model(self) -> bool:
        """Whether the decoder is the model's, and the task has not seen it yet."""
        return self._decoder is None

    def for_model(self, model: nn.Module) -> Detection:
        """The task with the decoder of `model`, see `model_decoder.decoder_of`.

        Raises:
            ModelError: the model has none.
            DataError: it is for images of another size.
        """
        made = copy.copy(self)
        made._decode_by(decoder_of(model))
        return made

    def _losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """[N, C]."""
        if self._decoder is None:
            raise DataError(_NOT_SEEN)
        wanted = places(self._decoder), BOX + (self._decoder.name != GRID) + len(self._classes)
        if output.dim() != 3 or output.shape[1] != wanted[0] or output.shape[2] < wanted[1]:
            raise ModelError(
                f"the model returns {list(output.shape)}, and with the decoder {self._decoder.name} for "
                f"{len(self._classes)} classes it is [samples, {wanted[0]}, {wanted[1]}]"
            )
        return self._loss.parts(output, targets)

    @property
    def answers(self) -> Sequence[AnswerSpec]:
        """One: boxes."""
        if self._decoder is None:
            raise DataError(_NOT_SEEN)
        return (AnswerSpec(_OUTPUT, BOXES, self._classes, decoder=self._decoder),)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Of the classes and the boxes, mean over the samples; see `GridLoss` and `AnchorLoss`."""
        return self._losses(output, targets).sum(dim=1).mean()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the boxes."""
        return self._classes

    def classes_present(self, targets: Tensor) -> Tensor:
        """Bool [N, C]: the classes of which a sample has a box."""
        return (targets[..., :1] == torch.arange(len(self._classes), device=targets.device)).any(dim=1)

    def class_loss(self, output: Tensor, targets: Tensor, index: int) -> Tensor:
        """The part of the loss that the logits and the boxes of one class have."""
        return self._losses(output, targets)[:, index].mean()

    def of_classes(self, classes: Sequence[int]) -> Detection:
        """The task with the boxes of these classes only; every sample stays, and may show none."""
        number = torch.full((len(self._classes) + 1,), NO_BOX)
        number[list(classes)] = torch.arange(len(classes), dtype=torch.float32)

        def renumbered(targets: Tensor) -> Tensor:
            # the last place is that of what fills up
            changed = targets.clone()
            changed[..., 0] = number[targets[..., 0].long()]
            return changed

        made = copy.copy(self)
        made._classes = tuple(self._classes[index] for index in classes)
        made._splits = {key: ChangedSplit(split, renumbered) for key, split in self._splits.items()}
        made._provenance = {**self._provenance, "classes": list(made._classes)}
        return made

    @property
    def metric(self) -> Metric:
        """What floors and tolerances of recipes are measured in."""
        return self._metric


class MeanAveragePrecision:
    """Mean average precision by `torchmetrics` (pycocotools), of the boxes that the device would answer.

    Args:
        name: ``map`` or ``map_50``.
        decoder: of the head; boxes count from a score of 0.01 on. None: not known yet, nothing can be scored.

    Raises:
        DataError: an unknown name.
    """

    def __init__(self, name: str, decoder: DecoderSpec | None = None) -> None:
        if name not in _METRICS:
            raise DataError(
                f"unknown metric {name!r}; there are {' and '.join(_METRICS)}, or pass an object that is a Metric"
            )
        self.name = name
        self._decoder = None if decoder is None else dataclasses.replace(decoder, score_threshold=_JUDGED_FROM)

    def score(self, answers: Iterable[Answer]) -> Score:
        """Reads `answers` once; keeps the boxes of every sample."""
        from torchmetrics.detection import MeanAveragePrecision as Counted

        if self._decoder is None:
            raise DataError(_NOT_SEEN)

        counted = Counted(backend="pycocotools")
        rows = 0
        for output, targets in answers:
            assert isinstance(output, Tensor)
            rows += len(targets)
            every = zip(*decoded(self._decoder, output.float().numpy()), targets, strict=True)
            for boxes, scores, wanted in every:
                place, label = kept(self._decoder, boxes, scores)
                real = wanted[wanted[:, 0] >= 0]
                counted.update(
                    [
                        {
                            "boxes": torch.from_numpy(boxes[place]),
                            "scores": torch.from_numpy(scores[place, label]),
                            "labels": torch.from_numpy(label),
                        }
                    ],
                    [{"boxes": real[:, 1:], "labels": real[:, 0].long()}],
                )
        # -1 where no sample has a box
        return Score(max(0.0, float(counted.compute()[self.name])) if rows else 0.0, rows)

    def drop(self, before: float, after: float) -> float:
        """The difference: more is better."""
        return before - after


def mirrored(batch: Batch, generator: torch.Generator) -> Batch:
    """Half of the samples, left for right, with their boxes; an augmentation."""
    chosen = torch.rand(len(batch.targets), generator=generator) < 0.5
    inputs, targets = batch.inputs[0].clone(), batch.targets.clone()
    inputs[chosen] = inputs[chosen].flip(-1)
    turned = targets[chosen]
    left, right = turned[..., 1].clone(), turned[..., 3].clone()
    real = turned[..., 0] >= 0
    turned[..., 1] = torch.where(real, inputs.shape[-1] - right, left)
    turned[..., 3] = torch.where(real, inputs.shape[-1] - left, right)
    targets[chosen] = turned
    return Batch((inputs,), targets)


def _check_targets(split: SplitName, targets: Tensor, classes: int, height: int, width: int) -> None:
    if targets.dtype != torch.float32 or targets.dim() != 3 or targets.shape[2] != 5:
        raise DataError(
            f"split {split!r} has targets {targets.dtype} {list(targets.shape)}: boxes are float32 [samples, boxes, 5] "
            f"(class, left, top, right, bottom), of class {NO_BOX:g} where there is none"
        )
    label, corner, far = targets[..., 0], targets[..., 1:3], targets[..., 3:]
    real = label != NO_BOX
    sides = torch.tensor([width, height], dtype=torch.float32)
    for wrong, what in (
        (real & ((label < 0) | (label >= classes) | (label != label.round())), f"is none of the {classes} classes"),
        (real & (far <= corner).any(dim=-1), "has no area"),
        (real & ((corner < 0) | (far > sides)).any(dim=-1), f"lies outside the input of {height} x {width} pixels"),
    ):
        if wrong.any():
            row, place = (int(i) for i in wrong.nonzero()[0])
            box = [round(float(value), 2) for value in targets[row, place]]
            raise DataError(f"split {split!r}, sample {row}: the box {box} {what}: correct it or leave it out")
