"""The options of a session, one dataclass: built and checked where a call comes in, and passed on as it is."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np

from ..bundle.consistency import threshold_out_of_range
from ..bundle.manifest import Manifest
from ..errors import InputError
from .providers import CPU, provider_names

Layout: TypeAlias = Literal["file", "split"]
"""Which form of a network with exits runs: ``model.onnx`` with its nested `If`s, or the files of ``split/`` in turn."""

LAYOUTS = ("file", "split")

_MOST_THREADS = 1024

OPTIMIZATION_LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


class SessionKeywords(TypedDict, total=False):
    """The fields of `SessionOptions` as keyword arguments, with all that may be given for them."""

    providers: Sequence[str] | str | None
    threads: int | None
    thresholds: Sequence[float] | None
    operating_point: str | None
    allow_fallback: bool
    optimization_level: str
    layout: str


@dataclass(frozen=True)
class SessionOptions:
    """How a model is made ready to run; taken by `load`, `verify`, `bench` and all else that opens a session.

    Attributes:
        providers: ``cpu``, ``cuda``, ``tensorrt`` or full names, in order of priority; None: the CPU. Kept as the tuple
            of full names.
        threads: intra-op threads; None: ONNX Runtime's choice.
        thresholds: [K] values for the exits, instead of those stored in the graph. Kept as float32 has them.
        operating_point: name of one of the manifest's settings, instead of `thresholds`.
        allow_fallback: run on the CPU what the provider does not take, everything where it does not start; a
            `ProviderFallbackWarning` and `Runner.placement` say what ran where and why.
        optimization_level: ``disabled``, ``basic``, ``extended`` or ``all``.
        layout: ``file``, or ``split`` for a bundle that was exported with it; see `Layout`.

    Raises:
        InputError: an unknown provider, level or layout, thresholds that are no finite numbers, or thresholds and an
            operating point.
    """

    providers: Sequence[str] = (CPU,)
    threads: int | None = None
    thresholds: Sequence[float] | None = None
    operating_point: str | None = None
    allow_fallback: bool = False
    optimization_level: str = "all"
    layout: str = "file"

    def __post_init__(self) -> None:
        object.__setattr__(self, "providers", provider_names(self.providers))
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise InputError(f"threads is a number from 1 to {_MOST_THREADS}, not {self.threads}")
        if self.optimization_level not in OPTIMIZATION_LEVELS:
            known = ", ".join(OPTIMIZATION_LEVELS)
            raise InputError(f"unknown optimization level {self.optimization_level!r}: use {known}")
        if self.layout not in LAYOUTS:
            raise InputError(f"unknown layout {self.layout!r}: use {' or '.join(LAYOUTS)}")
        if self.thresholds is not None:
            if self.operating_point is not None:
                raise InputError("give thresholds or an operating point, not both")
            object.__setattr__(self, "thresholds", _checked_thresholds(self.thresholds))

    @classmethod
    def of(cls, options: SessionOptions | None, given: SessionKeywords) -> SessionOptions:
        """The options of a call that takes them as a whole, as keywords, or as a whole with some replaced.

        Raises:
            InputError: as the class.
            TypeError: `options` is something else, or a keyword is none of the fields.
        """
        if options is not None and not isinstance(options, cls):
            raise TypeError(
                f"options of the session are given by keyword, like providers=['cuda'] or threads=1, or as one "
                f"SessionOptions, not as {options!r}"
            )
        return (options or cls()).replaced(**given)

    def replaced(self, **fields: Any) -> SessionOptions:
        """The same with other values in some fields, checked again."""
        return dataclasses.replace(self, **fields)

    def on(self, manifest: Manifest) -> SessionOptions:
        """The same for a bundle: `thresholds` stand where an operating point was named, None for the graph's own.

        Raises:
            InputError: an unknown operating point, thresholds for a model without exits, a wrong number of them, one
                outside the policy's range, or a layout that the bundle does not have.
        """
        if self.layout == "split" and manifest.split is None:
            what = "export it with `export: {split: true}`" if manifest.policy is not None else "it has no early exits"
            raise InputError(f"{manifest.name} has no split layout: {what}")
        thresholds = self.thresholds
        if self.operating_point is not None:
            thresholds = _point_named(self.operating_point, manifest)
        if thresholds is None:
            return self
        wanted = len(manifest.exits) - 1 if manifest.policy is not None else 0
        if wanted <= 0:
            raise InputError(f"{manifest.name} has no early exits, so there are no thresholds to set")
        if len(thresholds) != wanted:
            raise InputError(f"{manifest.name} has {wanted} thresholds, got {len(thresholds)}: {list(thresholds)}")
        assert manifest.policy is not None
        resolved = self.replaced(thresholds=thresholds, operating_point=None)
        for exit_, value in zip(manifest.exits, resolved.thresholds or (), strict=False):
            if reason := threshold_out_of_range(manifest.policy, value):
                raise InputError(f"the threshold of exit {exit_.index} ({exit_.name}), {reason}")
        return resolved

    def on_bare(self, path: Path) -> SessionOptions:
        """The same for a bare ``.onnx``.

        Raises:
            InputError: what only a bundle has is asked for.
        """
        return self.without(
            "operating_point",
            "layout",
            because=f"{path} is a bare model and has neither operating points nor layouts: give thresholds",
        )

    def without(self, *names: str, because: str) -> SessionOptions:
        """The same, where these fields are as they are by default.

        Raises:
            InputError: they are not; the text is `because`.
        """
        standard = {field.name: field.default for field in dataclasses.fields(self)}
        if any(getattr(self, name) != standard[name] for name in names):
            raise InputError(because)
        return self

    def of_the_machine(self) -> dict[str, Any]:
        """The options that do not depend on the model, as plain data for the settings of a report."""
        return {
            "providers": list(self.providers),
            "threads": self.threads,
            "allow_fallback": self.allow_fallback,
            "optimization_level": self.optimization_level,
        }


def _point_named(name: str, manifest: Manifest) -> Sequence[float]:
    points = {point.name: point.thresholds for point in manifest.operating_points}
    if name not in points:
        close = difflib.get_close_matches(name, points, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"unknown operating point {name!r}: {hint}the bundle has {', '.join(points) or 'none'}")
    return points[name]


def _checked_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    try:
        with np.errstate(over="ignore"):  # becomes infinite, and is refused as that
            values = np.asarray(thresholds, np.float32)
    except (TypeError, ValueError):
        values = np.zeros(0, np.float32)
    if values.ndim != 1 or values.size == 0:
        raise InputError(f"thresholds are a list of numbers, got {thresholds!r}")
    if not np.isfinite(values).all():
        raise InputError(
            f"thresholds must be finite in float32, got {list(thresholds)}: the policy's `never` and "
            "`always` in the manifest switch an exit off or force it"
        )
    return tuple(values.tolist())
