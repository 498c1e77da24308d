"""Fashion-MNIST from its idx files: those of Debian's package, or a folder that the user gives."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgewright.edge_runtime.bundle.manifest import Preprocessing

from ...errors import DataError
from ...sources import content_digest, sha256_of
from ...task import SplitName
from ..image_classification import ImageClassification
from ..splitting import stratified_split
from .augmentation import flip_and_crop
from .raw_images import RawImages, image_digests, moments

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_LABELS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_IMAGES, _CLASSES = 0x00000803, 0x00000801  # magic numbers of unsigned bytes in three axes, and in one
_FILES = {"train": "train", "test": "t10k"}
_LARGEST = 1 << 28  # bytes of an unpacked file; those of the set have 47 million
_FRACTIONS: Mapping[SplitName, float] = {"train": 0.8, "calibration": 0.02, "validation": 0.18}


def fashion_mnist(
    path: str | None = None,
    seed: int = 0,
    fractions: Mapping[SplitName, float] | None = None,
    augment: bool = False,
    most: Mapping[SplitName, int] | None = None,
) -> ImageClassification:
    """The images [1, 28, 28] of ten kinds of clothes, normalised by the train split.

    Test is the test file. Train, calibration and validation are dealt out of the training file by `seed` and content;
    training images that are byte for byte in the test file are left out, and counted in `provenance`.

    Args:
        path: folder with ``train-images-idx3-ubyte.gz`` and the other three, unpacked or not; default that of Debian's
            package ``dataset-fashion-mnist``.
        seed: of the split.
        fractions: shares of the training file, default train 0.8, calibration 0.02, validation 0.18.
        augment: mirror and move training batches by up to 2 pixels.
        most: split -> so many of its rows at most, the first by `seed`.

    Raises:
        DataError: a file is missing, damaged or of another shape, or the arguments make no sense.
    """
    folder = _DEBIAN if path is None else Path(path)
    files = {
        (part, what): _located(folder, f"{name}-{what}-ubyte", path is None)
        for part, name in _FILES.items()
        for what in ("images-idx3", "labels-idx1")
    }
    read = {file: content_digest(file) for file in files.values()}
    images = {part: _idx(files[part, "images-idx3"], _IMAGES)[..., None] for part in _FILES}
    targets = {part: _idx(files[part, "labels-idx1"], _CLASSES).astype(np.int64) for part in _FILES}
    for part in _FILES:
        _check(files[part, "images-idx3"], images[part], files[part, "labels-idx1"], targets[part])
    shares = dict(_FRACTIONS if fractions is None else fractions)
    if "train" not in shares or "test" in shares:
        raise DataError(f"fractions {shares} divide the training file: they need 'train' and cannot have 'test'")
    known = set(image_digests(images["test"]))
    hashes = image_digests(images["train"])
    fresh = np.array([row for row, digest in enumerate(hashes) if digest not in known], np.int64)
    dealt = stratified_split(
        [hashes[row] for row in fresh], torch.from_numpy(targets["train"][fresh]), _LABELS, shares, seed
    )
    rows: dict[SplitName, NDArray[np.int64]] = {name: fresh[chosen] for name, chosen in dealt.items()}
    rows = {name: _first(chosen, name, most, seed) for name, chosen in rows.items()}
    tested = _first(np.arange(len(images["test"])), "test", most, seed)
    mean, deviation = moments(images["train"][rows["train"]])
    height, width = images["train"].shape[1:3]
    preprocessing = Preprocessing("image", (height, width), 1, 1.0 / 255.0, mean, deviation)
    splits = {
        name: RawImages(images["train"][chosen], targets["train"][chosen], preprocessing)
        for name, chosen in rows.items()
    }
    splits["test"] = RawImages(images["test"][tested], targets["test"][tested], preprocessing)
    return ImageClassification(
        splits,
        list(_LABELS),
        preprocessing=preprocessing,
        augment=flip_and_crop(True, 2, (-mean[0] / deviation[0],)) if augment else None,
        name="fashion_mnist",
        provenance={
            "files": {file.name: sha256_of(file) for file in read},
            "left_out_because_in_test": len(hashes) - len(fresh),
        },
        file_digests=read,
    )


def _located(folder: Path, name: str, is_debian: bool) -> Path:
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            return file
    help_ = "apt install dataset-fashion-mnist, or give the folder as `path`" if is_debian else "unpack the set there"
    raise DataError(f"{folder} has no {name}.gz: {help_}")


def _idx(file: Path, magic: int) -> NDArray[np.uint8]:
    """The array of an idx file of unsigned bytes."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            data = stream.read(_LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}): get it again") from error
    if len(data) > _LARGEST:
        raise DataError(f"{file} unpacks to more than {_LARGEST} bytes: it is not of this set")
    axes = magic & 0xFF
    header = 4 * (1 + axes)
    if len(data) < header or int.from_bytes(data[:4], "big") != magic:
        raise DataError(
            f"{file} does not begin with the number {magic:#010x} of an idx file of {axes} axes: get it again"
        )
    shape = tuple(int.from_bytes(data[4 * (i + 1) : 4 * (i + 2)], "big") for i in range(axes))
    if len(data) - header != int(np.prod(shape, dtype=np.int64)):
        raise DataError(
            f"{file} says {list(shape)} bytes and holds {len(data) - header}: it is truncated, get it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _check(image_file: Path, images: NDArray[np.uint8], label_file: Path, targets: NDArray[np.int64]) -> None:
    if len(images) != len(targets) or not len(images):
        raise DataError(f"{image_file} has {len(images)} images and {label_file} {len(targets)} labels: get both again")
    if int(targets.max()) >= len(_LABELS):
        row = int(targets.argmax())
        raise DataError(f"{label_file}: row {row} has class {int(targets[row])} of {len(_LABELS)}: get it again")


def _first(
    rows: NDArray[np.int64], name: SplitName, most: Mapping[SplitName, int] | None, seed: int
) -> NDArray[np.int64]:
    """At most so many of the rows, chosen by the seed, in their order."""
    count = (most or {}).get(name)
    if count is None or count >= len(rows):
        return rows
    if not isinstance(count, int) or count < 1:
        raise DataError(f"most {dict(most or {})}: give at least one row of a split")
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].numpy()
    found: NDArray[np.int64] = rows[np.sort(chosen)]
    return found
