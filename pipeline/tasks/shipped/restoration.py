"""Image files to be given back: a folder of good images that are made worse here, or a folder of pairs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.models.sources.python_source import did_you_mean

from ...errors import DataError
from ...stage import Progress
from ...task import Batch, SplitName
from ..image_files import (
    ImageReader,
    check_image_arguments,
    common_white,
    image_preprocessing,
    images_in,
    size_of_image,
)
from ..input_files import FileSplit
from ..restoration import Degradation, Restoration, check_ssim
from ..splitting import stratified_split


def restoration(
    path: str | Path,
    degraded_path: str | Path | None = None,
    size: int | Sequence[int] = 64,
    *,
    scale: int = 1,
    noise: float = 0.0,
    channels: int = 3,
    max_value: float | None = None,
    fractions: Mapping[SplitName, float] | None = None,
    seed: int = 0,
    flip: bool = False,
    loss: str = "l1",
    metric: str = "psnr",
    workers: int = 4,
    memory_mb: int = 512,
) -> Restoration:
    """Images [N, C, H, W] in 0 ... 1 to images [N, C, scale * H, scale * W]; files are read when they are needed.

    * `noise`: what the model reads has noise, of a standard deviation as of pixels in 0 ... 1.
    * `scale`: it reads the image smaller, each pixel the mean of `scale` x `scale`. Both may be given.
    * `degraded_path`: it reads the file of the same name in that folder.
    * None of them: it gives back what it reads, as an autoencoder.

    Args:
        path: folder of good images; folders inside are followed.
        degraded_path: folder of what the model reads, with the same names and folders.
        size: side of what the model reads in pixels, or (height, width); images are resized.
        scale: how many times larger the answer is.
        noise: see above.
        channels: 3 for RGB, 1 for grey; images are converted.
        max_value: as of `image_folder`.
        fractions: share of each split, default train 0.6, calibration 0.1, validation 0.1, test 0.2.
        seed: of the split and of the noise, which is the same whenever an image is read.
        flip: mirror half of the training images.
        loss: ``l1`` or ``mse``.
        metric: ``psnr`` or ``ssim``.
        workers: threads that read files.
        memory_mb: keep the images of a split in memory if they take no more than this.

    Raises:
        DataError: no such folder, a file without its partner, or arguments that do not go together.
    """
    good = Path(path)
    degradation = Degradation(scale, noise, seed)
    check_image_arguments(size, channels, max_value)
    if degraded_path is not None and Path(degraded_path).resolve() == good.resolve():
        raise DataError(f"degraded_path is {good} too: leave it out for a model that gives back what it reads")
    if degraded_path is not None and noise:
        raise DataError("noise is made here, and degraded_path has images that are worse already: give one of both")
    pairs = _pairs(good, None if degraded_path is None else Path(degraded_path))
    if degraded_path is not None:
        _check_sizes(pairs, scale)
    if max_value is None:
        max_value = common_white([file for pair in pairs for file in pair], workers)
    read = image_preprocessing(size, channels, (0.0,) * channels, (1.0,) * channels, max_value)
    assert read.size is not None
    whole = dataclasses.replace(read, size=(scale * read.size[0], scale * read.size[1]))
    if metric == "ssim" and whole.size is not None:
        check_ssim(whole.size)
    readers = _Readers(whole, read if degraded_path is not None else None, workers, memory_mb)
    digests = readers.good.digests([pair[0] for pair in pairs])
    dealt = stratified_split(digests, torch.zeros(len(pairs), dtype=torch.int64), ("all",), fractions, seed)
    return Restoration(
        {name: ImagePairs([pairs[row] for row in rows], readers, degradation) for name, rows in dealt.items() if rows},
        loss=loss,
        metric=metric,
        preprocessing=read,
        augment=mirrored if flip else None,
        name=good.name or "restoration",
    )


class _Readers:
    """Of the good images, and of the others where they are files."""

    def __init__(self, good: Preprocessing, degraded: Preprocessing | None, workers: int, memory_mb: int) -> None:
        self.good = ImageReader(good, workers, memory_mb)
        self.degraded = None if degraded is None else ImageReader(degraded, workers, memory_mb)


class ImagePairs:
    """A split of images to restore, see `edgewright.pipeline.task.Split`; reads files when they are needed.

    Args:
        pairs: the good image and what the model reads, the same file where that is made of it.
        readers: of both.
        degradation: what is done to an image that is read from the same file.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], readers: _Readers, degradation: Degradation) -> None:
        none = torch.zeros(len(pairs), dtype=torch.int64)
        self._good = FileSplit([pair[0] for pair in pairs], none, readers.good)
        self._degraded = (
            None if readers.degraded is None else FileSplit([pair[1] for pair in pairs], none, readers.degraded)
        )
        self._degradation = degradation

    @property
    def targets(self) -> Tensor:
        """The good images, float32 [len, C, H, W]; reads every file."""
        return self.targets_of(range(len(self)))

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash of the bytes of every file, or pair of files: an edit of either is another sample."""
        good = self._good.sample_digests
        if self._degraded is None:
            return good
        pairs = zip(good, self._degraded.sample_digests, strict=True)
        return [hashlib.blake2b(one + other, digest_size=32).digest() for one, other in pairs]

    @property
    def file_digests(self) -> Mapping[Path, str]:
        """See `edgewright.pipeline.task.FromFiles`."""
        return {**self._good.file_digests, **({} if self._degraded is None else self._degraded.file_digests)}

    def __len__(self) -> int:
        return len(self._good)

    def read_all(self, progress: Progress, description: str) -> None:
        """Decodes every file once, and keeps the images where they fit into memory."""
        self._good.read_all(progress, description)
        if self._degraded is not None:
            self._degraded.read_all(progress, description)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`, twice float32 [N, C, H, W].

        Raises:
            DataError: names a file that cannot be read.
        """
        rows = [int(i) for i in torch.as_tensor(indices, dtype=torch.int64).tolist()]
        good = self.targets_of(rows)
        if self._degraded is not None:
            return Batch(self._degraded.batch(rows).inputs, good)
        digests = self._good.sample_digests
        return Batch((self._degradation.applied(good, [digests[row] for row in rows]),), good)

    def targets_of(self, rows: Sequence[int]) -> Tensor:
        """See `edgewright.pipeline.task.TargetsInParts`.

        Raises:
            DataError: names a file that cannot be read.
        """
        return self._good.batch(rows).inputs[0]


def mirrored(batch: Batch, generator: torch.Generator) -> Batch:
    """Half of the samples left for right, with their targets."""
    chosen = torch.rand(len(batch.targets), generator=generator) < 0.5
    inputs, targets = batch.inputs[0].clone(), batch.targets.clone()
    inputs[chosen], targets[chosen] = inputs[chosen].flip(-1), targets[chosen].flip(-1)
    return Batch((inputs,), targets)


def _pairs(good: Path, degraded: Path | None) -> list[tuple[Path, Path]]:
    for folder in (good, *([degraded] if degraded is not None else [])):
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}: give the folder that the image files lie in")
    here = {file.relative_to(good).as_posix(): file for file in sorted(images_in(good))}
    if not here:
        raise DataError(f"{good} holds no image")
    if degraded is None:
        return [(file, file) for file in here.values()]
    there = {file.relative_to(degraded).as_posix(): file for file in sorted(images_in(degraded))}
    for mine, others, folder in ((here, there, degraded), (there, here, good)):
        for name, file in mine.items():
            if name not in others:
                raise DataError(
                    f"{file} has no partner in {folder}{did_you_mean(name, list(others))}: add it, or remove the file"
                )
    return [(file, there[name]) for name, file in here.items()]


def _check_sizes(pairs: Sequence[tuple[Path, Path]], scale: int) -> None:
    for good, degraded in pairs:
        large, small = size_of_image(good), size_of_image(degraded)
        if large != (scale * small[0], scale * small[1]):
            raise DataError(
                f"{good} is {large[0]} x {large[1]} pixels and {degraded} {small[0]} x {small[1]}, which makes "
                f"{scale * small[0]} x {scale * small[1]} with scale {scale}: give the scale that they have"
            )
