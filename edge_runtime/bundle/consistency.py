"""What a manifest must satisfy beyond the types of its fields, so that nothing later fails in the dark."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..answers.classes import EXITS
from ..answers.table import kind_of
from ..errors import BundleError
from ..inference.feeds import KNOWN_DTYPES
from .manifest import (
    APPLIED,
    DROPPED,
    EXIT_INDEX,
    IGNORED,
    LABEL,
    PRESENT,
    SCORES,
    DeviceLatency,
    Manifest,
    PolicySpec,
    TensorSpec,
)

VERDICTS = ("faster", "slower", "inconclusive")
"""Of `SplitRatio.verdict`."""


def check_consistency(manifest: Manifest) -> None:
    """Holds the fields of a manifest against each other.

    Raises:
        BundleError: two of them contradict each other, or one has a value that means nothing; both are named.
    """
    for spec in manifest.answers:
        kind_of(spec)  # of a kind that is not known everything else may contradict what is
    _check_tensors(manifest)
    _check_exits(manifest)
    _check_answers(manifest)
    _check_preprocessing(manifest)
    _check_split(manifest)
    _check_measured(manifest)
    _check_tolerances(manifest)


def unknown_exit(exit_index: NDArray[Any], exits: Sequence[object]) -> str | None:
    """What is wrong with exits that a graph answers with; None if all of them are among the manifest's.

    Args:
        exit_index: of any shape.
        exits: of the manifest.
    """
    for value in exit_index.ravel().tolist():
        if not 0 <= value < len(exits):
            return f"the graph leaves by exit {value}, and the manifest knows the exits 0 to {len(exits) - 1} alone"
    return None


def unlike(found: Sequence[int | str], spec: TensorSpec) -> str | None:
    """What is wrong with the shape of an array or of a graph's tensor; None if it can be that of `spec`.

    Args:
        found: sizes; a name is any size, and no sizes at all an unknown shape.
        spec: of the manifest.
    """
    fixed = zip(found, spec.shape, strict=False)
    apart = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in fixed)
    if not apart and (len(found) == len(spec.shape) or not found):
        return None
    return f"{spec.name!r} has the shape {list(found)} in the graph, the manifest says {list(spec.shape)}"


def threshold_out_of_range(policy: PolicySpec, value: float) -> str | None:
    """Why `value` is no threshold of this policy; None if it is one.

    Compared in float32, as the graph does: the ends of the range may not be float32 numbers themselves.
    """
    with np.errstate(over="ignore"):
        low, high = sorted((np.float32(policy.never), np.float32(policy.always)))
        if low <= np.float32(value) <= high:
            return None
    never, always = f"{policy.never:g} (never leaves)", f"{policy.always:g} (always leaves)"
    return f"{value:g} lies outside the range of {policy.name}, {never} to {always}"


def _check_tensors(manifest: Manifest) -> None:
    for kind, specs in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        if not specs:
            raise _contradiction(f"{kind} is empty")
        twice = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
        if twice:
            raise _contradiction(f"{kind} names {twice[0]!r} twice")
        for spec in specs:
            if any(isinstance(size, int) and size < 1 for size in spec.shape):
                raise _contradiction(f"{kind}: {spec.name!r} has the shape {list(spec.shape)}")
    for spec in manifest.inputs:
        if spec.dtype not in KNOWN_DTYPES:
            known = ", ".join(sorted(KNOWN_DTYPES))
            raise _contradiction(f"input {spec.name!r} has the dtype {spec.dtype!r}, and numpy can give {known}")


def _check_answers(manifest: Manifest) -> None:
    if not manifest.answers:
        raise _contradiction("answers is empty")
    tensors = {spec.name: spec for spec in manifest.outputs}
    meant: list[str] = []
    for spec in manifest.answers:
        kind = kind_of(spec)
        meant += kind.outputs(spec)
        missing = [name for name in kind.outputs(spec) if name not in tensors]
        if missing:
            raise _contradiction(f"the answer {spec.name!r} ({spec.kind}) has no output {missing[0]!r}")
        again = [label for label, count in Counter(spec.labels).items() if count > 1]
        if again:
            raise _contradiction(f"labels has {again[0]!r} twice, so that an answer could be either class")
        if reason := kind.unfit(spec, tensors):
            raise _contradiction(reason)
    twice = [name for name, count in Counter(meant).items() if count > 1]
    if twice:
        raise _contradiction(f"the output {twice[0]!r} is two answers")
    unknown = [name for name in tensors if name not in meant and not name.startswith(PRESENT)]
    if unknown:
        raise _contradiction(f"no answer says what the output {unknown[0]!r} means")


def _check_exits(manifest: Manifest) -> None:
    indices = [exit_.index for exit_ in manifest.exits]
    if indices != list(range(len(indices))):
        raise _contradiction(f"exits are numbered {indices}, not from 0 on")
    policy = manifest.policy
    if policy is None:
        if any(spec.kind == EXITS for spec in manifest.answers):
            raise _contradiction("an answer is the decision of exits and there is no exit policy")
        return
    missing = {LABEL, SCORES, EXIT_INDEX} - {spec.name for spec in manifest.outputs}
    if missing:
        raise _contradiction(f"there is an exit policy and no output {sorted(missing)[0]!r}")
    if [spec.kind for spec in manifest.answers] != [EXITS]:
        raise _contradiction("there is an exit policy, and answers is not the decision of exits alone")
    early = len(indices) - 1
    if early < 1:
        raise _contradiction(f"there is an exit policy and {len(indices)} exits")
    for point in manifest.operating_points:
        if len(point.thresholds) != early:
            raise _contradiction(
                f"the operating point {point.name!r} has {len(point.thresholds)} thresholds for {early} early exits"
            )
        for exit_, value in zip(manifest.exits, point.thresholds, strict=False):
            if reason := threshold_out_of_range(policy, value):
                raise _contradiction(
                    f"the operating point {point.name!r}: the threshold of exit {exit_.index} ({exit_.name}), {reason}"
                )


def _check_preprocessing(manifest: Manifest) -> None:
    given = manifest.preprocessing
    kinds = ("none", "image", "table", "text", "sound")
    if given.kind not in kinds:
        raise _contradiction(f"preprocessing has the kind {given.kind!r}, known are {', '.join(map(repr, kinds))}")
    if given.kind == "table" and not given.columns:
        raise _contradiction("preprocessing reads a table without columns")
    if given.kind == "sound" and (given.rate is None or given.rate < 1):
        raise _contradiction(f"preprocessing makes sounds of {given.rate} samples a second")
    if (given.window is None and given.kind in ("text", "sound")) or (given.window is not None and given.window < 1):
        raise _contradiction(f"preprocessing has a window of {given.window}")
    if given.channels < 1 or (given.size is not None and min(given.size) < 1):
        raise _contradiction(f"preprocessing makes images of {given.size} pixels and {given.channels} channels")
    for name, values in (("mean", given.mean), ("std", given.std)):
        wanted = len(given.columns) if given.kind == "table" else given.channels
        if values and len(values) != wanted:
            raise _contradiction(f"preprocessing.{name} has {len(values)} values for {wanted} channels or columns")
    if 0 in given.std:
        raise _contradiction("preprocessing divides by a standard deviation of 0")
    if given.max_value is not None and not 0 < given.max_value <= 2**31 - 1:
        raise _contradiction(f"preprocessing has the largest pixel value {given.max_value:g}")
    if given.orientation not in (APPLIED, IGNORED) or given.alpha != DROPPED:
        raise _contradiction(
            f"preprocessing has the orientation {given.orientation!r} and the alpha {given.alpha!r}, known are "
            f"{APPLIED!r} and {IGNORED!r}, and {DROPPED!r}"
        )


def _check_split(manifest: Manifest) -> None:
    split = manifest.split
    if split is None:
        return
    if manifest.policy is None:
        raise _contradiction("split lists files and there is no exit policy")
    if len(split.files) != len(manifest.exits):
        raise _contradiction(f"split lists {len(split.files)} files for {len(manifest.exits)} exits")
    # before a manifest is written, its files are not listed yet
    missing = [name for name in split.files if manifest.files and name not in manifest.files]
    if missing:
        raise _contradiction(f"split lists {missing[0]!r}, which is none of the bundle's files")
    for name, axis in split.row_axes.items():
        if axis < 0:
            raise _contradiction(f"split says that the rows of {name!r} lie in axis {axis}")


def _check_tolerances(manifest: Manifest) -> None:
    for name, value in vars(manifest.tolerances).items():
        if value < 0:
            raise _contradiction(f"tolerances.{name} is {value:g}, which nothing can meet")


def _check_measured(manifest: Manifest) -> None:
    for entry in manifest.measured:
        if reason := unfit_measurement(manifest, entry):
            raise _contradiction(f"measured on {entry.device!r}: {reason}")
    if len({measurement_key(entry) for entry in manifest.measured}) < len(manifest.measured):
        raise _contradiction("measured holds one device twice")


def measurement_key(entry: DeviceLatency) -> tuple[str, str, str]:
    """What two measurements share of which the later one takes the place of the earlier."""
    return entry.fingerprint, entry.device, entry.optimization_level


def unfit_measurement(manifest: Manifest, entry: DeviceLatency) -> str | None:
    """Why `entry` cannot have been measured on this bundle; None if it can."""
    exits = len(manifest.exits)
    if manifest.policy is None:
        return "the bundle has no exits"
    if "file" not in entry.exits_us or set(entry.exits_us) - {"file", "split"}:
        return f"exits_us has the layouts {sorted(entry.exits_us)}"
    if manifest.split is None and ("split" in entry.exits_us or entry.split_over_file):
        return "the bundle has no split layout"
    for layout, values in entry.exits_us.items():
        if len(values) != exits:
            return f"exits_us.{layout} has {len(values)} numbers for {exits} exits"
        if not all(0 < value < math.inf for value in values):
            return f"exits_us.{layout} is {list(values)}, which are no times"
    if len(entry.split_over_file) not in (0, exits):
        return f"split_over_file has {len(entry.split_over_file)} ratios for {exits} exits"
    for ratio in entry.split_over_file:
        if not 0 < ratio.low <= ratio.value <= ratio.high < math.inf:
            return f"split_over_file has the ratio {ratio.value} in the interval {ratio.low} to {ratio.high}"
        if ratio.verdict not in VERDICTS:
            return f"split_over_file has the verdict {ratio.verdict!r}, known are {', '.join(VERDICTS)}"
    return None


def _contradiction(what: str) -> BundleError:
    return BundleError(f"the manifest contradicts itself: {what}; the bundle is damaged: export it again")
