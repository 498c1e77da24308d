"""The command line of the device: verify, predict, bench, doctor. Parsing and printing only.

Exit codes: 0 done, 1 failed otherwise, 2 bad input, 3 parity failed, 5 execution provider not available.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EdgewrightError, InputError, ParityError, ProviderError

if TYPE_CHECKING:
    from .runner import Prediction

_NEEDED = {
    "numpy": "install numpy",
    "onnxruntime": "install onnxruntime, or the build for your accelerator; `doctor` says which",
}
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: without the program's name; None: ``sys.argv``.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return command(options)
    except EdgewrightError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if options.debug or error.name not in _NEEDED:
            raise
        print(
            f"error: {error.name} is not installed for {sys.executable}: {_NEEDED[error.name]}",
            file=sys.stderr,
        )
        return ProviderError.exit_code
    except KeyboardInterrupt:
        if options.debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        kind = type(error).__name__
        print(f"internal error: {kind}: {error}; run again with --debug for the traceback", file=sys.stderr)
        return EdgewrightError.exit_code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge_runtime", description="Load, verify and measure edgewright bundles on this device."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON too")
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    session = argparse.ArgumentParser(add_help=False)
    session.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help="cpu (default), cuda, tensorrt or a full name; repeat in order of priority",
    )
    session.add_argument("--threads", type=int, metavar="N", help="intra-op threads (default: ONNX Runtime's)")
    session.add_argument("--allow-fallback", action="store_true", help="run on the CPU what the provider does not take")
    session.add_argument(
        "--optimization-level", default="all", metavar="LEVEL", help="disabled, basic, extended or all"
    )
    exits = argparse.ArgumentParser(add_help=False)
    exits.add_argument("--thresholds", metavar="T,T,...", type=_numbers, help="thresholds of the exits")
    exits.add_argument("--operating-point", metavar="NAME", help="a setting of the bundle's manifest")

    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", parents=[common, session], help="run every recorded case and compare")
    verify.set_defaults(command=_verify)
    predict = commands.add_parser("predict", parents=[common, session, exits], help="classify a .npy, .npz or image")
    predict.set_defaults(command=_predict)
    bench = commands.add_parser("bench", parents=[common, session, exits], help="measure the latency")
    bench.set_defaults(command=_bench)
    for command in (verify, predict, bench):
        command.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder or zip")
    predict.add_argument("input", type=Path, metavar="INPUT", help=".npy, .npz (a key per input) or an image")
    bench.add_argument("--inputs", type=Path, metavar="FILE", help=".npy or .npz instead of the golden cases")
    bench.add_argument("--min-seconds", type=float, default=3.0, metavar="S", help="default 3")
    bench.add_argument("--min-samples", type=int, default=64, metavar="N", help="default 64")
    bench.add_argument("--percentiles", type=_numbers, default=[], metavar="P,P,...", help="run long enough for")
    bench.add_argument("--samples-file", type=Path, metavar="FILE", help=".npy for the samples, int64 ns")
    bench.add_argument("--seed", type=int, default=0, help="of the order of the inputs")
    doctor = commands.add_parser("doctor", parents=[common], help="show this machine and its problems")
    doctor.set_defaults(command=_doctor)
    return parser


def _verify(options: argparse.Namespace) -> int:
    from .verification import verify

    report = verify(
        options.bundle,
        providers=options.provider,
        threads=options.threads,
        optimization_level=options.optimization_level,
        allow_fallback=options.allow_fallback,
    )
    print(report.text())
    _write_json(options.json, report.to_dict())
    return 0 if report.passed else ParityError.exit_code


def _predict(options: argparse.Namespace) -> int:
    from .session import load

    with load(
        options.bundle,
        providers=options.provider,
        threads=options.threads,
        thresholds=options.thresholds,
        operating_point=options.operating_point,
        allow_fallback=options.allow_fallback,
        optimization_level=options.optimization_level,
    ) as runner:
        channels = runner.manifest.preprocessing.channels if runner.manifest is not None else 3
        prediction = runner.predict(_read_input(options.input, channels))
    for line in _prediction_lines(prediction):
        print(line)
    _write_json(options.json, _prediction_dict(prediction))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from .benchmark import bench, bench_text

    row = bench(
        options.bundle,
        providers=options.provider,
        threads=options.threads,
        thresholds=options.thresholds,
        operating_point=options.operating_point,
        allow_fallback=options.allow_fallback,
        optimization_level=options.optimization_level,
        inputs=options.inputs,
        percentiles=options.percentiles,
        min_seconds=options.min_seconds,
        min_samples=options.min_samples,
        samples_file=options.samples_file,
        seed=options.seed,
    )
    print(bench_text(row))
    _write_json(options.json, row)
    return 0 if row["status"] == "ok" else EdgewrightError.exit_code


def _doctor(options: argparse.Namespace) -> int:
    from .device import doctor

    report = doctor()
    print(report.text())
    _write_json(options.json, report.to_dict())
    return 0 if report.ok else ProviderError.exit_code


def _read_input(path: Path, channels: int) -> Any:
    """Reads .npy, .npz or, where Pillow is installed, an image as uint8 [H, W, C]."""
    import numpy as np

    from .bench_inputs import read_inputs

    if path.suffix.lower() not in _IMAGES:
        return read_inputs(path)
    if not path.is_file():
        raise InputError(f"no image at {path}")
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise InputError(
            f"reading {path} needs Pillow, which is not installed: install pillow, or save the pixels as "
            "a uint8 [H, W, C] .npy"
        ) from None
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.uint8)
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} is not a readable image: {error}") from None
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _prediction_lines(prediction: Prediction) -> list[str]:
    import numpy as np

    if prediction.label.ndim != 1:
        return [f"labels {prediction.label.tolist()}"]
    best = np.take_along_axis(prediction.scores, prediction.label[:, None], axis=-1)[:, 0]
    return [
        f"row {row}: {name}  score {float(score):.4f}  exit {exit_index}"
        for row, (name, score, exit_index) in enumerate(
            zip(prediction.label_names, best, prediction.exit_index.tolist(), strict=True)
        )
    ]


def _prediction_dict(prediction: Prediction) -> dict[str, Any]:
    import numpy as np

    scores = prediction.scores.astype(object)
    scores[~np.isfinite(prediction.scores)] = None  # JSON has no NaN
    return {
        "schema_version": 1,
        "label": prediction.label.tolist(),
        "label_names": prediction.label_names,
        "scores": scores.tolist(),
        "exit_index": prediction.exit_index.tolist(),
    }


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0.5,0.9") from None


def _write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
