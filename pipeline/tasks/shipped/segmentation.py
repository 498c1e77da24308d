"""Image files with a mask file each: a folder of images, and a folder of masks of the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.edge_runtime.inference.image_file import SUFFIXES
from edgewright.models.sources.python_source import did_you_mean

from ...errors import DataError
from ...metric import IGNORED
from ...stage import Progress
from ...task import SPLITS, Batch, SplitName
from ..image_files import (
    ImageReader,
    check_image_arguments,
    common_white,
    image_preprocessing,
    images_in,
    size_of_image,
)
from ..input_files import FileSplit
from ..segmentation import Segmentation
from ..splitting import stratified_split

_INDEX_MODES = frozenset(("1", "L", "P", "I", "I;16"))
_AT_ONCE = 64


def segmentation(
    images_path: str | Path,
    masks_path: str | Path,
    classes: Sequence[str],
    size: int | Sequence[int] = 256,
    *,
    ignore: int | None = 255,
    channels: int = 3,
    max_value: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fractions: Mapping[SplitName, float] | None = None,
    seed: int = 0,
    flip: bool = False,
    metric: str = "mean_iou",
    workers: int = 4,
    memory_mb: int = 512,
) -> Segmentation:
    """``images_path/NAME.jpg`` and ``masks_path/NAME.png``, a mask's value being the number of the class.

    Folders called train, calibration, validation and test in both are the splits; without them the files are dealt out
    by `seed` and content. Images are read as `image_folder` reads them. Masks are grey or palette images as large as
    their image; both are resized to `size`, masks to the nearest pixel. Files are read when they are needed, each mask
    once before anything is trained.

    Args:
        images_path: folder of the images; folders inside are followed.
        masks_path: folder of the masks, with the same names and folders.
        classes: name of the value 0, 1, 2, ...
        size: side of the input in pixels, or (height, width).
        ignore: value of pixels that nothing is learned from and that are not judged; None: there are none.
        channels: 3 for RGB, 1 for grey; images are converted.
        max_value: as of `image_folder`.
        mean: per channel, of pixels in 0 ... 1; default ImageNet's.
        std: likewise.
        fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
        seed: of the split.
        flip: mirror half of the training images, with their masks.
        metric: ``mean_iou`` or ``pixel_accuracy``.
        workers: threads that read files.
        memory_mb: keep the inputs of a split in memory if they take no more than this.

    Raises:
        DataError: no such folder, an image without a mask or the other way round, a mask of another size or with a
            value that is no class; names the file.
    """
    images, masks = Path(images_path), Path(masks_path)
    check_image_arguments(size, channels, max_value)
    pairs = _pairs(images, masks)
    if max_value is None:
        max_value = common_white([image for image, _ in pairs], workers)
    preprocessing = image_preprocessing(size, channels, mean, std, max_value)
    reader = ImageReader(preprocessing, workers, memory_mb)
    parts = _given(pairs, images)
    if parts is None:
        digests = reader.digests([image for image, _ in pairs])
        together = torch.zeros(len(pairs), dtype=torch.int64)
        dealt = stratified_split(digests, together, ("all",), fractions, seed)
        parts = {name: [pairs[row] for row in rows] for name, rows in dealt.items()}
    splits = {name: MaskedImages(part, reader, len(classes), ignore) for name, part in parts.items() if part}
    return Segmentation(
        splits,
        classes,
        metric=metric,
        preprocessing=preprocessing,
        augment=_mirrored if flip else None,
        name=images.parent.name or "segmentation",
    )


class MaskedImages:
    """A split of images with masks, see `edgewright.pipeline.task.Split`; reads both when they are needed.

    Args:
        pairs: image and mask of every sample.
        reader: of the images.
        classes: how many there are.
        ignore: value of pixels without a class.
    """

    def __init__(
        self, pairs: Sequence[tuple[Path, Path]], reader: ImageReader, classes: int, ignore: int | None
    ) -> None:
        self._images = FileSplit([image for image, _ in pairs], torch.zeros(len(pairs), dtype=torch.int64), reader)
        self._masks = [mask for _, mask in pairs]
        self._reader, self._classes, self._ignore = reader, classes, ignore

    @property
    def targets(self) -> Tensor:
        """Class of every pixel, int64 [len, H, W]; reads every mask."""
        return self.targets_of(range(len(self)))

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash of every image's bytes; masks of equal images belong together."""
        return self._images.sample_digests

    @property
    def file_digests(self) -> Mapping[Path, str]:
        """See `edgewright.pipeline.task.FromFiles`."""
        masks = zip(self._masks, self._reader.digests(self._masks), strict=True)
        return {**self._images.file_digests, **{file: digest.hex() for file, digest in masks}}

    def __len__(self) -> int:
        return len(self._masks)

    def check_targets(self, classes: int) -> None:
        """Reads every mask once, and holds it against its image.

        Raises:
            DataError: names a mask of another size than its image, or with a value that is no class.
        """
        del classes  # what the split was made with
        for image, mask in zip(self._images.files, self._masks, strict=True):
            values = _values(mask)
            if values.shape != (size := size_of_image(image)):
                raise DataError(
                    f"{mask} is {_sides(values.shape)} and its image {image} {_sides(size)} pixels: a mask is as large "
                    "as its image; export it again, without cropping or scaling"
                )
            known = (
                values < self._classes if self._ignore is None else (values < self._classes) | (values == self._ignore)
            )
            if not known.all():
                raise DataError(
                    f"{mask} has a pixel of value {int(values[~known][0])}, and the {self._classes} classes are 0 to "
                    f"{self._classes - 1}"
                    + (f" ({self._ignore} is ignored)" if self._ignore is not None else "")
                    + ": name the class, or set `ignore` to this value"
                )

    def read_all(self, progress: Progress, description: str) -> None:
        """Decodes every image once, and keeps the inputs where they fit into memory."""
        self._images.read_all(progress, description)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`, float32 [N, C, H, W] and int64 [N, H, W].

        Raises:
            DataError: names a file that cannot be read.
        """
        rows = [int(i) for i in torch.as_tensor(indices, dtype=torch.int64).tolist()]
        return Batch(self._images.batch(rows).inputs, self.targets_of(rows))

    def targets_of(self, rows: Sequence[int]) -> Tensor:
        """See `edgewright.pipeline.task.TargetsInParts`.

        Raises:
            DataError: names a mask that cannot be read.
        """
        height, width = self._reader.shape[1:]
        found = np.full((len(rows), height, width), IGNORED, np.int64)
        for place, row in enumerate(rows):
            self._reader.check_same(self._masks[row])
            values = _resized(_values(self._masks[row]), height, width)
            found[place] = np.where(values == self._ignore, IGNORED, values) if self._ignore is not None else values
        return torch.from_numpy(found)


def _pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Image and mask files of equal names, sorted."""
    for folder, what in ((images, "images"), (masks, "masks")):
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}: give the folder of the {what}")
    of = [_by_name(images), _by_name(masks)]
    for here, there, what in ((of[0], of[1], "mask"), (of[1], of[0], "image")):
        for name, file in here.items():
            if name not in there:
                other = masks if what == "mask" else images
                raise DataError(
                    f"{file} has no {what} in {other}{did_you_mean(name, list(there))}: add it, or remove the file"
                )
    if not of[0]:
        raise DataError(f"{images} holds no image ({', '.join(sorted(SUFFIXES))})")
    return [(file, of[1][name]) for name, file in sorted(of[0].items())]


def _by_name(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(images_in(folder)):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise DataError(f"{found[name]} and {file} differ by their suffix alone: which is meant? Remove one")
        found[name] = file
    return found


def _given(pairs: Sequence[tuple[Path, Path]], images: Path) -> dict[SplitName, list[tuple[Path, Path]]] | None:
    """The splits that folders name; None where there are no such folders."""
    tops = {image.relative_to(images).parts[0] for image, _ in pairs if image.parent != images}
    named = tops & set(SPLITS)
    if not named:
        return None
    outside = next((image for image, _ in pairs if image.relative_to(images).parts[0] not in named), None)
    if outside is not None:
        raise DataError(f"{outside} lies beside the split folders {', '.join(sorted(named))}: move it into one of them")
    return {
        name: [pair for pair in pairs if pair[0].relative_to(images).parts[0] == name]
        for name in SPLITS
        if name in named
    }


def _values(file: Path) -> NDArray[np.int64]:
    """The numbers of a mask [H, W], of a palette those of its entries and not their colours."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            if image.mode not in _INDEX_MODES:
                raise DataError(
                    f"{file} is an image of mode {image.mode}: a mask has one number for each pixel (grey or palette); "
                    "turn its colours into numbers first"
                )
            return np.asarray(image).astype(np.int64)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise DataError(f"{file} is no readable mask ({error}): repair it or remove it with its image") from error


def _resized(values: NDArray[np.int64], height: int, width: int) -> NDArray[np.int64]:
    """The value of the nearest pixel, as the middle of the new one lies."""
    down, across = (
        np.minimum((np.arange(new) + 0.5) * old / new, old - 1).astype(np.int64)
        for new, old in zip((height, width), values.shape, strict=True)
    )
    found: NDArray[np.int64] = values[down[:, None], across]
    return found


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _mirrored(batch: Batch, generator: torch.Generator) -> Batch:
    """Half of the samples, left for right, with their masks."""
    chosen = torch.rand(len(batch.targets), generator=generator) < 0.5
    inputs, targets = batch.inputs[0].clone(), batch.targets.clone()
    inputs[chosen], targets[chosen] = inputs[chosen].flip(-1), targets[chosen].flip(-1)
    return Batch((inputs,), targets)
