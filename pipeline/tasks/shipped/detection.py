"""Image files with boxes: a folder, and a file in the format of COCO."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError
from ...task import SPLITS, SplitName
from ..detection import GRID, NO_BOX, Detection, mirrored
from ..image_files import (
    ImageReader,
    check_image_arguments,
    common_white,
    image_preprocessing,
    size_of_image,
)
from ..input_files import FileSplit
from ..splitting import stratified_split

_SLACK = 1.0
"""Pixels by which a box may leave its image, for rounding; it is cut off there."""


def detection(
    images_path: str | Path,
    annotations_path: str | Path,
    size: int | Sequence[int] = 320,
    *,
    strides: Sequence[int] = (8, 16, 32),
    decoder: str = GRID,
    crowd: str = "refuse",
    channels: int = 3,
    max_value: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fractions: Mapping[SplitName, float] | None = None,
    seed: int = 0,
    flip: bool = False,
    metric: str = "map",
    score_threshold: float = 0.25,
    iou_threshold: float = 0.5,
    workers: int = 4,
    memory_mb: int = 512,
) -> Detection:
    """``annotations_path`` is a JSON file as COCO has it, or a folder of ``train.json``, ``test.json`` and so on.

    Of one file the images are dealt out to the splits by `seed` and content. Images are read as `image_folder` reads
    them, when they are needed, and resized to `size` with their boxes. The classes are the categories in their order.

    Args:
        images_path: the folder that `file_name` starts from.
        annotations_path: JSON with ``images``, ``annotations`` and ``categories``.
        size: side of the input in pixels, or (height, width).
        strides: of the levels of the model's head, see `Detection`.
        decoder: ``grid``, or ``model`` for a model with a `box_decoder`, such as one of torchvision.
        crowd: ``refuse`` annotations with ``iscrowd``, or ``leave_out``: their objects are then background.
        channels: 3 for RGB, 1 for grey; files are converted.
        max_value: as of `image_folder`.
        mean: per channel, of pixels in 0 ... 1; default ImageNet's.
        std: likewise.
        fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
        seed: of the split.
        flip: mirror half of the training images, with their boxes.
        metric: ``map`` or ``map_50``.
        score_threshold: probability from which `predict` answers a box.
        iou_threshold: of two boxes of a class that overlap by more, the surer one is answered.
        workers: threads that read files.
        memory_mb: keep the inputs of a split in memory if they take no more than this.

    Raises:
        DataError: no such folder or file, or an annotation that cannot be right; names the file and its id.
    """
    folder, place = Path(images_path), Path(annotations_path)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: give the folder that the image files lie in")
    if crowd not in ("refuse", "leave_out"):
        raise DataError(f"crowd is {crowd!r}: it is 'refuse' or 'leave_out'")
    check_image_arguments(size, channels, max_value)
    files = {name: place / f"{name}.json" for name in SPLITS if (place / f"{name}.json").is_file()}
    if not files and place.is_dir():
        raise DataError(
            f"{place} holds none of {', '.join(f'{name}.json' for name in SPLITS)}: add them, or give one file"
        )
    read: dict[SplitName, _Annotated] = {
        name: _read(file, folder, crowd, workers) for name, file in (files or {SPLITS[0]: place}).items()
    }
    categories = {part.categories for part in read.values()}
    if len(categories) > 1:
        raise DataError(f"the files in {place} name different categories: give all of them the same list")
    samples = {name: part.samples for name, part in read.items()}
    if max_value is None:
        max_value = common_white([sample.file for part in samples.values() for sample in part], workers)
    preprocessing = image_preprocessing(size, channels, mean, std, max_value)
    reader = ImageReader(preprocessing, workers, memory_mb)
    if not files:
        (whole,) = samples.values()
        together = torch.zeros(len(whole), dtype=torch.int64)
        dealt = stratified_split(reader.digests([s.file for s in whole]), together, ("all",), fractions, seed)
        samples = {name: [whole[row] for row in rows] for name, rows in dealt.items()}
    height, width = reader.shape[1:]
    return Detection(
        {
            name: FileSplit([s.file for s in part], _targets(part, height, width), reader)
            for name, part in samples.items()
            if part
        },
        next(iter(categories)),
        size=(height, width),
        strides=strides,
        decoder=decoder,
        metric=metric,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        preprocessing=preprocessing,
        augment=mirrored if flip else None,
        name=folder.name or "detection",
        provenance={"annotations": place.name, "crowd": crowd},
    )


@dataclass(frozen=True)
class _Sample:
    """An image, its size as it is read, and its boxes: class, left, top, right, bottom."""

    file: Path
    height: int
    width: int
    boxes: list[tuple[float, float, float, float, float]]


@dataclass(frozen=True)
class _Annotated:
    categories: tuple[str, ...]
    samples: list[_Sample]


def _targets(samples: Sequence[_Sample], height: int, width: int) -> Tensor:
    """float32 [len, M, 5] in pixels of the input."""
    found = torch.zeros(len(samples), max(1, *(len(s.boxes) for s in samples)), 5)
    found[..., 0] = NO_BOX
    for row, sample in enumerate(samples):
        across, down = width / sample.width, height / sample.height
        scale = torch.tensor([1.0, across, down, across, down])
        if sample.boxes:
            found[row, : len(sample.boxes)] = torch.tensor(sample.boxes) * scale
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    found[..., 1:] = torch.minimum(found[..., 1:].clamp(min=0), limit)  # what scaling rounds beyond the edge
    return found


def _read(file: Path, folder: Path, crowd: str, workers: int) -> _Annotated:
    """The file, every image and annotation of it held against the folder."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read ({error}): give a JSON file as COCO has it") from error
    parts = [data.get(name) if isinstance(data, dict) else None for name in ("categories", "images", "annotations")]
    for name, part in zip(("categories", "images", "annotations"), parts, strict=True):
        if not isinstance(part, list) or any(not isinstance(entry, dict) for entry in part):
            raise DataError(f"{file} lacks the list {name!r} of objects: give a JSON file as COCO has it")
    categories, images, annotations = parts
    assert categories is not None and images is not None and annotations is not None
    number = {_field(entry, "id", file, "category"): index for index, entry in enumerate(categories)}
    names = tuple(str(_field(entry, "name", file, "category")) for entry in categories)
    if not names or len(number) < len(names):
        raise DataError(f"{file} has the categories {list(names)}: at least one, each with an id of its own")
    samples: dict[Any, _Sample] = {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for entry, sample in zip(images, pool.map(lambda entry: _image(entry, file, folder), images), strict=True):
            if samples.setdefault(entry["id"], sample) is not sample:
                raise DataError(f"{file} has the image {entry['id']} twice: leave one of them out")
    if not samples:
        raise DataError(f"{file} names no image")
    for entry in annotations:
        what = f"{file}, annotation {entry.get('id', '?')}"
        owner = samples.get(_field(entry, "image_id", file, "annotation"))
        if owner is None:
            raise DataError(
                f"{what}: there is no image {entry['image_id']!r}: add the image, or leave the annotation out"
            )
        if _field(entry, "category_id", file, "annotation") not in number:
            raise DataError(
                f"{what}: unknown category {entry['category_id']!r}; there are {', '.join(map(str, number))}"
            )
        if entry.get("iscrowd"):
            if crowd == "refuse":
                raise DataError(
                    f"{what} is a crowd, which is no object by itself: leave it out, or set crowd: leave_out, and its "
                    "objects are taken for background"
                )
            continue
        owner.boxes.append((float(number[entry["category_id"]]), *_box(entry, owner, what)))
    return _Annotated(names, list(samples.values()))


def _field(entry: Mapping[str, Any], name: str, file: Path, what: str) -> Any:
    if name not in entry or isinstance(entry[name], list | dict):
        raise DataError(f"{file}: the {what} {dict(entry)!r:.120} has no {name!r}")
    return entry[name]


def _image(entry: Mapping[str, Any], file: Path, folder: Path) -> _Sample:
    """The image with its size by its own header."""
    what = f"{file}, image {_field(entry, 'id', file, 'image')}"
    name = str(_field(entry, "file_name", file, "image"))
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{what}: {name!r} is no path below {folder}")
    if not path.is_file():
        raise DataError(f"{what}: there is no image file {path}: add it, or leave the image out")
    height, width = size_of_image(path)
    said = entry.get("height", height), entry.get("width", width)
    if said != (height, width):
        raise DataError(
            f"{what}: {path} is {height} x {width} pixels and the file says {said[0]} x {said[1]}: boxes would lie "
            "elsewhere; correct the one that is wrong"
        )
    return _Sample(path, height, width, [])


def _box(entry: Mapping[str, Any], sample: _Sample, what: str) -> tuple[float, float, float, float]:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or any(type(value) not in (int, float) for value in box):
        raise DataError(f"{what}: its bbox is {box!r}, and four numbers are needed: left, top, width, height")
    left, top, width, height = (float(value) for value in box)
    if not (width > 0 and height > 0):
        raise DataError(f"{what}: its box {box} has no area: correct it or leave it out")
    right, bottom = left + width, top + height
    if min(left, top) < -_SLACK or right > sample.width + _SLACK or bottom > sample.height + _SLACK:
        raise DataError(
            f"{what}: its box {box} leaves the image {sample.file}, which is {sample.height} x {sample.width} pixels: "
            "correct it or leave it out"
        )
    cut = max(0.0, left), max(0.0, top), min(float(sample.width), right), min(float(sample.height), bottom)
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        raise DataError(f"{what}: its box {box} has no area inside the image: correct it or leave it out")
    return cut
