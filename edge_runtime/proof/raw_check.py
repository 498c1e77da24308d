"""Our tensor of an image file beside one that a person made: step by step, and where they part.

Most differences between a model in PyTorch and on the device are made before the model: in how the image is read,
resized and normalised.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.bundle import Bundle, open_bundle
from ..bundle.manifest import Manifest, Preprocessing
from ..errors import InputError
from ..inference.image_file import describe, read_image
from ..inference.preprocess import STEPS, preprocessing_steps
from ..measure.bench_inputs import read_inputs
from ..process.plain_text import printable_lines
from .tensor_causes import LARGEST_OFF, MEAN_OFF, Way, explain

_NEAR = 5.0
"""Mean distance in grey levels up to which the nearest way is worth naming though it does not explain all."""


@dataclass(frozen=True)
class Step:
    """One step of our way, and in what the other tensor's differs."""

    name: str
    """see `STEPS`."""
    shape: tuple[int, ...]
    low: float
    high: float
    means: tuple[float, ...]
    """per channel."""
    yours: str | None
    """in what it differs; ``""``: in nothing; None: not known."""


@dataclass(frozen=True)
class ImageReport:
    """One image file."""

    file: str
    what: str
    """format, mode and size as stored."""
    steps: tuple[Step, ...]
    tensor: str
    """the other tensor in words; ``""`` without one."""
    same: bool
    """whether the tensors are equal but for rounding to whole grey levels; True without another one."""
    largest: float | None
    """largest distance of the tensors in grey levels, 255 of which make white; None where their shapes differ."""
    mean: float | None
    verdict: str
    first: str | None
    """the first step that differs; None: none, or not known which."""

    def text(self) -> str:
        """A table of the steps, and the verdict."""
        lines = [f"{self.file}: {self.what}"]
        for step in self.steps:
            means = " ".join(f"{value:.4g}" for value in step.means)
            ours = f"{list(step.shape)}, {step.low:.4g} ... {step.high:.4g}, mean {means}"
            lines.append(f"  {step.name:<8} ours   {ours}")
            if step.yours:
                lines.append(f"  {'':<8} yours  {step.yours}")
        if self.tensor:
            lines.append(f"  yours    {self.tensor}")
        return printable_lines("\n".join([*lines, f"  {self.verdict}"]))


@dataclass(frozen=True)
class RawReport:
    """What `check_raw` found."""

    name: str
    """the bundle's."""
    images: tuple[ImageReport, ...]
    schema_version: int = 1

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return all(image.same for image in self.images)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report."""
        return {**asdict(self), "passed": self.passed}

    def text(self) -> str:
        """All images."""
        return "\n\n".join(image.text() for image in self.images)


def check_raw(
    bundle: str | os.PathLike[str] | Bundle,
    images: Sequence[str | os.PathLike[str]],
    tensor: str | os.PathLike[str] | None = None,
) -> RawReport:
    """Shows how image files become the network's input, beside a tensor that was made of them elsewhere.

    Args:
        bundle: folder, zip or open `Bundle`.
        images: image files.
        tensor: .npy or .npz with one row for each of `images`, or without the batch axis for one of them.

    Raises:
        InputError: the bundle does not take images, a file cannot be read, or the tensor has another number of rows,
            NaN, or no numbers.
    """
    if not isinstance(bundle, Bundle):
        with open_bundle(bundle) as opened:
            return check_raw(opened, images, tensor)
    manifest = bundle.manifest
    preprocessing = manifest.preprocessing
    if preprocessing.kind != "image":
        raise InputError(f"the bundle {manifest.name} does not say how images become its input: nothing to compare")
    rows = [None] * len(images) if tensor is None else _rows(Path(tensor), len(images), manifest)
    reports = [_image(Path(image), row, preprocessing) for image, row in zip(images, rows, strict=True)]
    return RawReport(manifest.name, tuple(reports))


def _rows(path: Path, count: int, manifest: Manifest) -> Sequence[NDArray[Any]]:
    given = read_inputs(path)
    if isinstance(given, dict):
        name = manifest.inputs[0].name
        if name not in given and len(given) != 1:
            raise InputError(f"{path} holds {', '.join(given)}: none is called {name!r}, so save one array alone")
        given = given[name] if name in given else next(iter(given.values()))
    if given.dtype.kind not in "biuf":
        raise InputError(f"{path} holds {given.dtype} and no numbers: save the tensor with numpy.save")
    if not np.isfinite(given).all():
        raise InputError(f"{path} holds NaN or infinity: no image gives that, look where it was made")
    axes = 4 if manifest.preprocessing.channels > 1 else 3
    if count == 1 and given.ndim < 4:
        return [given]
    if given.ndim not in (axes, 4) or len(given) != count:
        raise InputError(f"{path} is {list(given.shape)}: save one row for each of the {count} images, in their order")
    return list(given)


def _image(path: Path, tensor: NDArray[Any] | None, preprocessing: Preprocessing) -> ImageReport:
    what, turn, alpha = describe(path)
    what += f", orientation {turn} {preprocessing.orientation}" if turn != 1 else ""
    what += f", transparency {preprocessing.alpha}" if alpha is not None else ""
    steps, ours = _our_steps(path, preprocessing)
    if tensor is None:
        return ImageReport(str(path), what, steps, "", True, None, None, "this is what the model is given", None)
    described = f"{tensor.dtype} {list(tensor.shape)}, {tensor.min():.4g} ... {tensor.max():.4g}"
    largest, mean = _distance(tensor, ours, preprocessing)
    if largest is not None and mean is not None and largest <= LARGEST_OFF and mean <= MEAN_OFF:
        verdict = "same"
        if largest >= 0.01:
            verdict += f": off by up to {largest:.2f} of 255 grey levels, as rounding to whole levels makes it"
        return ImageReport(str(path), what, steps, described, True, largest, mean, verdict, None)
    way = explain(tensor.astype(np.float32), path, preprocessing)
    causes = way.causes if way is not None and way.mean <= _NEAR else None
    steps = tuple(replace(step, yours=None if causes is None else causes.get(step.name, "")) for step in steps)
    first = next((step.name for step in steps if step.yours), None)
    off = "differs" if largest is None else f"differs by up to {largest:.3g} of 255 grey levels, {mean:.3g} in the mean"
    verdict = off + _reason(way, causes, first, path)
    return ImageReport(str(path), what, steps, described, False, largest, mean, verdict, first)


def _our_steps(path: Path, preprocessing: Preprocessing) -> tuple[tuple[Step, ...], NDArray[np.float32]]:
    """Every step in numbers, and the last one's result without the batch axis."""
    steps = []
    values = np.empty(0, np.float32)
    for name, values in preprocessing_steps(read_image(path, preprocessing), preprocessing):
        channels_last = np.moveaxis(values[0], 0, -1) if name == STEPS[-1] else values[0]
        means = tuple(map(float, channels_last.mean((0, 1), dtype=np.float64)))
        shape = values.shape if name == STEPS[-1] else values.shape[1:]
        steps.append(Step(name, shape, float(values.min()), float(values.max()), means, ""))
    return tuple(steps), values[0]


def _distance(
    tensor: NDArray[Any], ours: NDArray[np.float32], preprocessing: Preprocessing
) -> tuple[float | None, float | None]:
    """Largest and mean distance in grey levels."""
    if tensor.ndim == 2 and preprocessing.channels == 1:
        tensor = tensor[None]
    if tensor.shape != ours.shape:
        return None, None
    std = np.array(preprocessing.std or [1.0] * preprocessing.channels)
    level = (preprocessing.max_value or 255.0) / 255 * preprocessing.scale / std
    off = np.abs(tensor.astype(np.float64) - ours) / level[:, None, None]
    return float(off.max()), float(off.mean())


def _reason(way: Way | None, causes: Mapping[str, str] | None, first: str | None, path: Path) -> str:
    """The end of the sentence that begins with how far the tensors are apart."""
    if way is None:
        return ": no image for this model has the tensor's shape"
    if causes is None:
        return ": no cause that is known explains it; is it the same image?"
    left = ""
    if not way.explains:
        decoder = ", as another JPEG decoder makes them" if path.suffix.lower() in (".jpg", ".jpeg") else ""
        left = f"; its pixels differ by up to {way.largest:.3g} levels, {way.mean:.2g} in the mean{decoder}"
    if first is None:
        return f": every step is ours{left}"
    more = len(causes) - 1
    also = f" (and {more} more step{'s' if more > 1 else ''}, see above)" if more else ""
    return f"; first step that differs: {first}: {causes[first]}{also}{left}"
