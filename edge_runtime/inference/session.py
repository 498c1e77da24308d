"""Loading a model and running it: strict about the provider, exact about what goes in.

`load` opens a bundle; `session_on` takes a bare ``model.onnx``, which is what the export's parity check needs
before there is a bundle. Both give a `Runner`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.bundle import Bundle, open_bundle
from ..bundle.consistency import unlike
from ..bundle.external_data import beside_its_weights, keeps_weights_elsewhere
from ..bundle.manifest import GOLDEN_FILE, MODEL_FILE, RUNTIME_FILE, THRESHOLDS, TOKENIZER_FILE, Manifest
from ..errors import BundleError, InputError
from ..machine.numpy_abi import import_onnxruntime
from ..process.scratch import Scratch
from .feeds import specs_of
from .forked import abandon_in_forks
from .onnx_file import check_vector, has_branches, with_vector
from .options import OPTIMIZATION_LEVELS, SessionKeywords, SessionOptions
from .providers import (
    CPU,
    Placement,
    fallback_reasons,
    not_started,
    placement_of,
    session_providers,
    warn_of_fallback,
    without_the_broken,
)
from .runner import Runner
from .split_session import SplitSession, joined

if TYPE_CHECKING:
    from typing_extensions import Unpack

_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def load(
    bundle: str | os.PathLike[str] | Bundle, options: SessionOptions | None = None, **given: Unpack[SessionKeywords]
) -> Runner:
    """Opens a bundle and makes it ready to run.

    Args:
        bundle: folder or zip; or an open `Bundle`, which stays the caller's to close.
        options: all options of the session; None: its defaults.
        given: fields of `SessionOptions` by keyword: providers, threads, thresholds, operating_point, allow_fallback,
            optimization_level, layout; they replace those of `options`.

    Raises:
        BundleError: the bundle is not intact.
        InputError: an option that does not fit.
        ProviderError: the provider is not there, or does not take every node.
    """
    options = SessionOptions.of(options, given)
    owned = not isinstance(bundle, Bundle)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    try:
        options = options.on(opened.manifest)
        with opened.unchanged(session_files(opened.manifest, options.layout)):
            runner = bundle_session(opened.folder, opened.manifest, options)
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


def bundle_session(folder: Path, manifest: Manifest, options: SessionOptions) -> Runner:
    """A runner on the files of a checked bundle.

    Args:
        folder: where the bundle's files lie.
        manifest: of the bundle.
        options: of the session.

    Raises:
        BundleError: the files do not do what the manifest says.
        InputError: an option that does not fit.
        ProviderError: as in `load`.
    """
    options = options.on(manifest)
    if options.layout == "file":
        return session_on(folder / MODEL_FILE, options, manifest=manifest)
    assert manifest.split is not None
    thresholds = options.thresholds
    if thresholds is None:
        thresholds = manifest.operating_points[0].thresholds
    sessions, placements = [], []
    for k, name in enumerate(manifest.split.files):
        # the last level has no exit
        own = options.replaced(thresholds=None if k == len(thresholds) else [thresholds[k]])
        session, placement = _opened(folder / name, own, one_of_many=True)
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
        threads=options.threads,
    )


def session_on(
    model: str | os.PathLike[str],
    options: SessionOptions | None = None,
    *,
    manifest: Manifest | None = None,
    optimized_path: str | os.PathLike[str] | None = None,
    **given: Unpack[SessionKeywords],
) -> Runner:
    """Makes a session on a bare ONNX file.

    Args:
        model: the file.
        options: as in `load`; `thresholds` are the values of the initializer `THRESHOLDS`, as many as it has.
        manifest: if given, the session must have its inputs and outputs.
        optimized_path: where ONNX Runtime writes the graph as it optimized it.
        given: as in `load`; an operating point and another layout are a bundle's only.

    Raises:
        InputError: no such file, not a model, or an option that does not fit.
        ProviderError: as in `load`.
    """
    path = Path(model)
    options = SessionOptions.of(options, given).on_bare(path)
    session, placement = _opened(path, options, optimized_path=optimized_path)
    warn_of_fallback(placement.to_dict())
    values = None if options.thresholds is None else tuple(options.thresholds)
    if manifest is not None:
        _check_interface(session, manifest, path)
        if values is None and manifest.policy is not None and manifest.operating_points:
            values = manifest.operating_points[0].thresholds
    return Runner(
        session, path=path, placement=placement, manifest=manifest, thresholds=values, threads=options.threads
    )


def _opened(
    path: Path,
    options: SessionOptions,
    *,
    optimized_path: str | os.PathLike[str] | None = None,
    one_of_many: bool = False,
) -> tuple[Any, Placement]:
    """A session, and where its nodes run.

    Args:
        path: of the model.
        options: whose thresholds are those of this file.
        optimized_path: as in `session_on`.
        one_of_many: other sessions run before and after it, in turn.
    """
    onnxruntime = import_onnxruntime()
    if not path.is_file():
        raise InputError(f"no model at {path}")
    requested, allow_fallback = tuple(options.providers), options.allow_fallback
    available = onnxruntime.get_available_providers()
    usable = session_providers(requested, available, allow_fallback)
    strict = not allow_fallback and CPU not in requested
    settings = _settings(options, strict)
    if one_of_many:
        # threads that wait for more work of a finished level would take the processor from the next
        settings.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized_path is not None:
        settings.optimized_model_filepath = os.fspath(optimized_path)
    source: str | bytes = os.fspath(path)
    given: Any = None
    place: Scratch | None = None
    if (values := options.thresholds) is not None:
        if check_vector(path, THRESHOLDS, values) and usable == [CPU]:
            given = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(values, np.float32))
            settings.add_initializer(THRESHOLDS, given)
        else:
            source = with_vector(path, THRESHOLDS, values)
            if _loses_weights_of_branches(onnxruntime.__version__) and keeps_weights_elsewhere(path):
                place = beside_its_weights(source, path)
                source = os.fspath(place.path / path.name)
            # A model given as bytes has no place of its own, from which to find model.onnx.data.
            settings.add_session_config_entry(_EXTERNAL_FOLDER, os.fspath(path.parent.resolve()))
    try:
        session, dropped = _start(source, settings, usable, requested, path, allow_fallback)
    finally:
        if place is not None:
            place.cleanup()
    if isinstance(source, bytes):
        session._model_bytes = None  # kept by ONNX Runtime's wrapper to start again, which nobody asks it for
    session.edgewright_thresholds = given  # ONNX Runtime reads them where they are, and does not keep them
    # what an accelerator's driver keeps does not survive a fork either
    abandon_in_forks(session, options.threads if requested == (CPU,) else None)
    present = session.get_providers()
    if not allow_fallback and any(name not in present for name in requested):
        raise not_started(requested, present)
    fallback = fallback_reasons(requested, available, present, dropped) if allow_fallback else ()
    return session, placement_of(session, requested, strict, fallback)


def _loses_weights_of_branches(version: str) -> bool:
    """Whether this ONNX Runtime looks for the external weights of a branch in the working directory where the model
    was given as bytes: the releases before 1.21 do, and heed `_EXTERNAL_FOLDER` in the main graph alone."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (1, 21)


def _start(
    source: str | bytes, settings: Any, usable: list[str], requested: tuple[str, ...], path: Path, allow_fallback: bool
) -> tuple[Any, list[str]]:
    """Creates the session; with `allow_fallback` without the providers that do not start, and says which those are."""
    import onnxruntime

    dropped: list[str] = []
    while True:
        if usable == [CPU]:
            # what fails here is raised as well, and ONNX Runtime's log prints the names of nodes as they are
            settings.log_severity_level = 4
        if usable == [CPU] and has_branches(path):
            # A planned graph holds its memory while its branches run, which then compute where the caches have
            # nothing; docs/early_exit.md has what that costs.
            settings.enable_mem_pattern = False
        try:
            # enable_fallback=0: ONNX Runtime's own retry on the CPU is what strictness forbids.
            session = onnxruntime.InferenceSession(source, settings, providers=usable, enable_fallback=0)
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


def _settings(options: SessionOptions, strict: bool) -> Any:
    """What ONNX Runtime is told of them."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    # errors only: ONNX Runtime warns about every initializer that a caller may replace, and `thresholds` is one
    settings.log_severity_level = 3
    settings.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, OPTIMIZATION_LEVELS[options.optimization_level]
    )
    settings.intra_op_num_threads = options.threads or 0
    settings.inter_op_num_threads = 1
    # Releases before 1.24 ignore a key that they do not know.
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if strict:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return settings


def _check_interface(session: Any, manifest: Manifest, path: Path) -> None:
    for kind, declared, nodes in (
        ("inputs", manifest.inputs, session.get_inputs()),
        ("outputs", manifest.outputs, session.get_outputs()),
    ):
        actual = {spec.name: spec.dtype for spec in specs_of(nodes)}
        wanted = {spec.name: spec.dtype for spec in declared}
        if actual != wanted:
            raise BundleError(f"{path}: the graph's {kind} are {actual}, the manifest says {wanted}: export it again")
        shapes = {spec.name: spec.shape for spec in specs_of(nodes)}
        for declaration in declared:
            if reason := unlike(shapes[declaration.name], declaration):
                raise BundleError(f"{path}: {kind[:-1]} {reason}: export it again")
