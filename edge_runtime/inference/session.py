"""Loading a model and running it: strict about the provider, exact about what goes in.

`load` opens a bundle; `session_on` takes a bare ``model.onnx``, which is what the export's parity check needs
before there is a bundle. Both give a `Runner`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ..bundle.bundle import Bundle, open_bundle
from ..bundle.consistency import threshold_out_of_range
from ..bundle.manifest import GOLDEN_FILE, MODEL_FILE, RUNTIME_FILE, THRESHOLDS, TOKENIZER_FILE, Manifest
from ..errors import BundleError, InputError
from .feeds import specs_of
from .forked import abandon_in_forks
from .onnx_file import check_vector, has_branches, with_vector
from .providers import (
    CPU,
    Placement,
    fallback_reasons,
    not_started,
    placement_of,
    provider_names,
    session_providers,
    warn_of_fallback,
    without_the_broken,
)
from .runner import Runner
from .split_session import SplitSession, joined

Layout: TypeAlias = Literal["file", "split"]
"""Which form of a network with exits runs: ``model.onnx`` with its nested `If`s, or the files of ``split/`` in turn."""

LAYOUTS = ("file", "split")

_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"

OPTIMIZATION_LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


def load(
    bundle: str | os.PathLike[str] | Bundle,
    providers: Sequence[str] | str | None = None,
    threads: int | None = None,
    thresholds: Sequence[float] | None = None,
    operating_point: str | None = None,
    allow_fallback: bool = False,
    optimization_level: str = "all",
    layout: str = "file",
) -> Runner:
    """Opens a bundle and makes it ready to run.

    Args:
        bundle: folder or zip; or an open `Bundle`, which stays the caller's to close.
        providers: ``cpu``, ``cuda``, ``tensorrt`` or full names, in order of priority; None: the CPU.
        threads: intra-op threads; None: ONNX Runtime's choice.
        thresholds: [K] values for the exits, instead of those stored in the graph.
        operating_point: name of one of the manifest's settings, instead of `thresholds`.
        allow_fallback: run on the CPU what the provider does not take, everything where it does not start;
            a `ProviderFallbackWarning` and `Runner.placement` say what ran where and why.
        optimization_level: ``disabled``, ``basic``, ``extended`` or ``all``.
        layout: ``file``, or ``split`` for a bundle that was exported with it; see `Layout`.

    Raises:
        BundleError: the bundle is not intact.
        InputError: an option that does not fit.
        ProviderError: the provider is not there, or does not take every node.
    """
    owned = not isinstance(bundle, Bundle)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    try:
        manifest = opened.manifest
        explicit = explicit_thresholds(manifest, thresholds, operating_point)
        with opened.unchanged(session_files(manifest, layout)):
            runner = bundle_session(
                opened.folder,
                manifest,
                layout,
                providers=providers,
                threads=threads,
                thresholds=explicit,
                allow_fallback=allow_fallback,
                optimization_level=optimization_level,
            )
    except BaseException:
        if owned:
            opened.close()
        raise
    if owned:
        runner.owned_bundle = opened
    return runner


def session_files(manifest: Manifest, layout: str) -> list[str]:
    """The files of a bundle that ONNX Runtime may read for a session: the model's, and those that keep its weights."""
    split = frozenset(manifest.split.files) if manifest.split is not None else frozenset()
    others = {MODEL_FILE} if layout == "split" else split
    return [name for name in manifest.files if name not in {GOLDEN_FILE, RUNTIME_FILE, TOKENIZER_FILE, *others}]


def require_layout(manifest: Manifest, layout: str) -> None:
    """Refuses a layout that is none, or that this bundle does not have.

    Raises:
        InputError: says what there is.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}: use {' or '.join(LAYOUTS)}")
    if layout == "split" and manifest.split is None:
        what = "export it with `export: {split: true}`" if manifest.policy is not None else "it has no early exits"
        raise InputError(f"{manifest.name} has no split layout: {what}")


def bundle_session(folder: Path, manifest: Manifest, layout: str = "file", **options: Any) -> Runner:
    """A runner on the files of a checked bundle.

    Args:
        folder: where the bundle's files lie.
        manifest: of the bundle.
        layout: see `Layout`.
        options: providers, threads, thresholds, allow_fallback and optimization_level, as for `session_on`.

    Raises:
        BundleError: the files do not do what the manifest says.
        InputError: an option that does not fit.
        ProviderError: as in `load`.
    """
    require_layout(manifest, layout)
    if layout == "file":
        return session_on(folder / MODEL_FILE, manifest=manifest, **options)
    assert manifest.split is not None
    thresholds = options.pop("thresholds", None)
    if thresholds is None:
        thresholds = manifest.operating_points[0].thresholds
    sessions, placements = [], []
    for k, name in enumerate(manifest.split.files):
        # the last level has no exit
        own = None if k == len(thresholds) else [thresholds[k]]
        session, placement, _ = _opened(folder / name, thresholds=own, one_of_many=True, **options)
        sessions.append(session)
        placements.append(placement)
    placement = joined(placements)
    warn_of_fallback(placement.to_dict())
    chained = SplitSession(sessions, [spec.name for spec in manifest.inputs], manifest.split.row_axes)
    if {spec.name for spec in manifest.outputs} != {value.name for value in chained.get_outputs()}:
        raise BundleError(f"{folder / manifest.split.files[0]}: the split model does not answer as the manifest says")
    return Runner(
        chained,
        path=folder / manifest.split.files[0],
        placement=placement,
        manifest=manifest,
        thresholds=tuple(thresholds),
        threads=options.get("threads"),
    )


def session_on(
    model: str | os.PathLike[str],
    *,
    providers: Sequence[str] | str | None = None,
    threads: int | None = None,
    thresholds: Sequence[float] | None = None,
    allow_fallback: bool = False,
    optimization_level: str = "all",
    manifest: Manifest | None = None,
    optimized_path: str | os.PathLike[str] | None = None,
) -> Runner:
    """Makes a session on a bare ONNX file.

    Args:
        model: the file.
        providers: as in `load`.
        threads: as in `load`.
        thresholds: values for the initializer `THRESHOLDS`, as many as it has.
        allow_fallback: as in `load`.
        optimization_level: as in `load`.
        manifest: if given, the session must have its inputs and outputs.
        optimized_path: where ONNX Runtime writes the graph as it optimized it.

    Raises:
        InputError: no such file, not a model, or an option that does not fit.
        ProviderError: as in `load`.
    """
    path = Path(model)
    session, placement, values = _opened(
        path,
        providers=providers,
        threads=threads,
        thresholds=thresholds,
        allow_fallback=allow_fallback,
        optimization_level=optimization_level,
        optimized_path=optimized_path,
    )
    warn_of_fallback(placement.to_dict())
    if manifest is not None:
        _check_interface(session, manifest, path)
        if values is None and manifest.policy is not None and manifest.operating_points:
            values = manifest.operating_points[0].thresholds
    return Runner(
        session,
        path=path,
        placement=placement,
        manifest=manifest,
        thresholds=values,
        threads=threads,
    )


def _opened(
    path: Path,
    *,
    providers: Sequence[str] | str | None = None,
    threads: int | None = None,
    thresholds: Sequence[float] | None = None,
    allow_fallback: bool = False,
    optimization_level: str = "all",
    optimized_path: str | os.PathLike[str] | None = None,
    one_of_many: bool = False,
) -> tuple[Any, Placement, tuple[float, ...] | None]:
    """A session, where its nodes run, and the thresholds that were set; arguments as `session_on`.

    `one_of_many`: other sessions run before and after it, in turn.
    """
    import onnxruntime

    if not path.is_file():
        raise InputError(f"no model at {path}")
    requested = provider_names(providers)
    available = onnxruntime.get_available_providers()
    usable = session_providers(requested, available, allow_fallback)
    strict = not allow_fallback and CPU not in requested
    options = _session_options(threads, optimization_level, strict)
    if one_of_many:
        # threads that wait for more work of a finished level would take the processor from the next
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized_path is not None:
        options.optimized_model_filepath = os.fspath(optimized_path)
    values: tuple[float, ...] | None = None
    source: str | bytes = os.fspath(path)
    given: Any = None
    if thresholds is not None:
        values = _checked_thresholds(thresholds)
        if check_vector(path, THRESHOLDS, values) and usable == [CPU]:
            given = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(values, np.float32))
            options.add_initializer(THRESHOLDS, given)
        else:
            source = with_vector(path, THRESHOLDS, values)
            # A model given as bytes has no place of its own, from which to find model.onnx.data.
            options.add_session_config_entry(_EXTERNAL_FOLDER, os.fspath(path.parent.resolve()))
    session, dropped = _start(source, options, usable, requested, path, allow_fallback)
    if isinstance(source, bytes):
        session._model_bytes = None  # kept by ONNX Runtime's wrapper to start again, which nobody asks it for
    session.edgewright_thresholds = given  # ONNX Runtime reads them where they are, and does not keep them
    # what an accelerator's driver keeps does not survive a fork either
    abandon_in_forks(session, threads if requested == (CPU,) else None)
    present = session.get_providers()
    if not allow_fallback and any(name not in present for name in requested):
        raise not_started(requested, present)
    fallback = fallback_reasons(requested, available, present, dropped) if allow_fallback else ()
    return session, placement_of(session, requested, strict, fallback), values


def explicit_thresholds(
    manifest: Manifest, thresholds: Sequence[float] | None, operating_point: str | None
) -> tuple[float, ...] | None:
    """The thresholds that two options ask for; None to leave those stored in the graph.

    Raises:
        InputError: both options, an unknown operating point, thresholds for a model without exits, a wrong
            number of them, one that is not finite, or one outside the policy's range.
    """
    points = {point.name: point.thresholds for point in manifest.operating_points}
    if thresholds is not None and operating_point is not None:
        raise InputError("give thresholds or an operating point, not both")
    if operating_point is not None:
        if operating_point not in points:
            close = difflib.get_close_matches(operating_point, points, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            known = ", ".join(points) or "none"
            raise InputError(f"unknown operating point {operating_point!r}: {hint}the bundle has {known}")
        thresholds = points[operating_point]
    if thresholds is None:
        return None
    wanted = len(manifest.exits) - 1 if manifest.policy is not None else 0
    values = tuple(float(value) for value in thresholds)
    if wanted <= 0:
        raise InputError(f"{manifest.name} has no early exits, so there are no thresholds to set")
    if len(values) != wanted:
        raise InputError(f"{manifest.name} has {wanted} thresholds, got {len(values)}: {list(values)}")
    assert manifest.policy is not None
    for exit_, value in zip(manifest.exits, _checked_thresholds(values), strict=False):
        if reason := threshold_out_of_range(manifest.policy, value):
            raise InputError(f"the threshold of exit {exit_.index} ({exit_.name}), {reason}")
    return values


def _start(
    source: str | bytes, options: Any, usable: list[str], requested: tuple[str, ...], path: Path, allow_fallback: bool
) -> tuple[Any, list[str]]:
    """Creates the session; with `allow_fallback` without the providers that do not start, and says which those are."""
    import onnxruntime

    dropped: list[str] = []
    while True:
        if usable == [CPU] and has_branches(path):
            # A planned graph holds its memory while its branches run, which then compute where the caches have
            # nothing; docs/early_exit.md has what that costs.
            options.enable_mem_pattern = False
        try:
            # enable_fallback=0: ONNX Runtime's own retry on the CPU is what strictness forbids.
            session = onnxruntime.InferenceSession(source, options, providers=usable, enable_fallback=0)
            return session, dropped
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            if allow_fallback and usable != [CPU]:
                usable, broken = without_the_broken(usable)
                dropped += broken
                continue
            if not allow_fallback and requested != (CPU,):
                raise not_started(requested, (), str(error)) from error
            raise InputError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}; if the file is intact, "
                "this release is too old for its opset or IR version"
            ) from error


def _session_options(threads: int | None, optimization_level: str, strict: bool) -> Any:
    import onnxruntime

    if optimization_level not in OPTIMIZATION_LEVELS:
        known = ", ".join(OPTIMIZATION_LEVELS)
        raise InputError(f"unknown optimization level {optimization_level!r}: use {known}")
    if threads is not None and threads < 1:
        raise InputError(f"threads is a positive number, not {threads}")
    options = onnxruntime.SessionOptions()
    # errors only: ONNX Runtime warns about every initializer that a caller may replace, and `thresholds` is one
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, OPTIMIZATION_LEVELS[optimization_level]
    )
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    # Releases before 1.24 ignore a key that they do not know.
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if strict:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _checked_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    with np.errstate(over="ignore"):  # becomes infinite, and is refused as that
        values = np.asarray(thresholds, np.float32)
    if values.ndim != 1 or values.size == 0:
        raise InputError(f"thresholds are a list of numbers, got {thresholds!r}")
    if not np.isfinite(values).all():
        raise InputError(
            f"thresholds must be finite in float32, got {list(thresholds)}: the policy's `never` and "
            "`always` in the manifest switch an exit off or force it"
        )
    return tuple(values.tolist())


def _check_interface(session: Any, manifest: Manifest, path: Path) -> None:
    for kind, declared, nodes in (
        ("inputs", manifest.inputs, session.get_inputs()),
        ("outputs", manifest.outputs, session.get_outputs()),
    ):
        actual = {spec.name: spec.dtype for spec in specs_of(nodes)}
        wanted = {spec.name: spec.dtype for spec in declared}
        if actual != wanted:
            raise BundleError(f"{path}: the graph's {kind} are {actual}, the manifest says {wanted}: export it again")
