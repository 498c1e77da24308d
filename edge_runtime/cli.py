"""The command line of the device: verify, predict, bench, latency-table, generate, doctor. Parsing and printing only.

Exit codes: 0 done, 1 failed otherwise, 2 bad input (also if `predict` refused some rows), 3 parity failed, 5
execution provider not available or, from `doctor`, a problem found, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundle.replacing import check_place
from .errors import EdgewrightError, InputError, ParityError, ProviderError
from .language.command import add_arguments
from .process.plain_text import printable_lines
from .process.standard_streams import lost_output, standard_streams
from .process.termination import Terminated, terminable

if TYPE_CHECKING:
    from .bundle.bundle import Bundle
    from .inference.options import SessionOptions

COMMANDS = {
    "verify": "Run every recorded case of a BUNDLE here and compare.",
    "predict": "Answer an INPUT (.npy, .npz or image) with a BUNDLE: labels, values, or a class for each pixel.",
    "bench": "Measure the latency of a BUNDLE here.",
    "latency-table": "Measure what a row costs that leaves a BUNDLE at each of its exits, for the threshold search.",
    "generate": "Continue prompts with a language MODEL that has its cache.",
    "doctor": "Show this machine and what is wrong with it.",
}
"""The commands and what they do; `edgewright` offers the same ones."""

_NEEDED = {
    "numpy": "install numpy",
    "onnxruntime": "install onnxruntime, or the build for your accelerator; `doctor` says which",
}


def main(arguments: Sequence[str] | None = None, program: str = "edge_runtime") -> int:
    """Runs one command.

    Args:
        arguments: without the program's name; None: ``sys.argv``.
        program: its name in the usage.

    Returns:
        The exit code.
    """
    with standard_streams(escaping=True), terminable():
        try:
            code = _run(_parser(program).parse_args(arguments))
        except SystemExit as end:  # --help, or arguments that do not fit
            if end.code or lost_output() is None:
                raise
            code = 0
        except Terminated as end:
            return end.exit_code
        return code or _exit_code_of_lost_output()


def _run(options: argparse.Namespace) -> int:
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            _check_outputs(options)
            return command(options)
    except EdgewrightError as error:
        if options.debug:
            raise
        print(f"error: {_indented(error)}", file=sys.stderr)
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


def _exit_code_of_lost_output() -> int:
    reason = lost_output()
    if reason is None:
        return 0
    print(f"error: standard output did not take everything ({reason}), so the result is incomplete", file=sys.stderr)
    return InputError.exit_code


def _indented(text: object) -> str:
    """Further lines are set in: a line break in a name that comes from a bundle makes no line of its own."""
    return printable_lines(text).replace("\n", "\n  ")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {_indented(message)}", file=sys.stderr)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description="Load, verify and measure edgewright bundles on this device."
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
    exits.add_argument(
        "--thresholds",
        metavar="T,T,...|NAME",
        type=_thresholds,
        help="one number for every exit, or as --operating-point",
    )
    exits.add_argument("--operating-point", metavar="NAME", help="a setting of the bundle's manifest")
    layout = argparse.ArgumentParser(add_help=False)
    layout.add_argument("--layout", default="file", metavar="LAYOUT", help="file (default), or split where exported")

    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    parents = {
        "generate": [common, session],
        "doctor": [common],
        "latency-table": [common, session, layout],
    }
    run = {
        "verify": _verify,
        "predict": _predict,
        "bench": _bench,
        "latency-table": _latency_table,
        "generate": _generate,
        "doctor": _doctor,
    }
    made = {}
    for name, what in COMMANDS.items():
        made[name] = commands.add_parser(
            name, parents=parents.get(name, [common, session, exits, layout]), help=what, description=what
        )
        # what not every command has
        made[name].set_defaults(command=run[name], bundle=None, samples_file=None, record=None, save=None)
        made[name].set_defaults(thresholds=None, operating_point=None, layout="file")
        if name not in ("doctor", "generate"):
            made[name].add_argument("bundle", type=Path, metavar="BUNDLE", help="folder or zip")
        if name != "doctor":
            made[name].add_argument(
                "--follow-links", action="store_true", help="take a folder of links for the files that they lead to"
            )
    add_arguments(made["generate"])
    predict, bench, table = made["predict"], made["bench"], made["latency-table"]
    made["verify"].add_argument(
        "--raw",
        nargs="+",
        metavar="IMAGE",
        type=Path,
        help="show instead, step by step, how images become the model's input",
    )
    made["verify"].add_argument(
        "--tensor",
        metavar="FILE",
        type=Path,
        help=".npy with what you made of these images: say whether it is the same, and which step differs",
    )
    predict.add_argument("input", type=Path, metavar="INPUT", help=".npy, .npz (a key per input) or an image")
    predict.add_argument(
        "--save", metavar="FILE", type=Path, help=".png that shows the answer: a color for each class of a class map"
    )
    for measuring in (bench, table):
        measuring.add_argument("--inputs", type=Path, metavar="FILE", help=".npy or .npz instead of the golden cases")
        measuring.add_argument("--seed", type=int, default=0, help="of the order of the inputs")
    table.add_argument(
        "--record",
        metavar="OUT",
        type=Path,
        help="also write a bundle, a folder or .zip, whose manifest says what was measured here",
    )
    table.add_argument("--blocks", type=int, default=40, metavar="N", help="default 40")
    table.add_argument("--block-runs", type=int, default=5, metavar="N", help="of every exit in a block; default 5")
    bench.add_argument("--min-seconds", type=float, default=3.0, metavar="S", help="default 3")
    bench.add_argument("--min-samples", type=int, default=64, metavar="N", help="default 64")
    bench.add_argument("--percentiles", type=_numbers, default=[], metavar="P,P,...", help="run long enough for")
    bench.add_argument("--samples-file", type=Path, metavar="FILE", help=".npy for the samples, int64 ns")
    return parser


def _opened(options: argparse.Namespace) -> Bundle:
    from .bundle.bundle import open_bundle

    return open_bundle(options.bundle, options.follow_links)


def _session(options: argparse.Namespace) -> SessionOptions:
    """The options of the session that a command opens."""
    from .inference.options import SessionOptions

    thresholds, point = options.thresholds, options.operating_point
    if isinstance(thresholds, str):
        if point is not None:
            raise InputError("give --thresholds or --operating-point, not both")
        thresholds, point = None, thresholds
    return SessionOptions(
        providers=options.provider,
        threads=options.threads,
        thresholds=thresholds,
        operating_point=point,
        allow_fallback=options.allow_fallback,
        optimization_level=options.optimization_level,
        layout=options.layout,
    )


def _verify(options: argparse.Namespace) -> int:
    if options.raw is not None:
        from .proof.raw_check import check_raw

        with _opened(options) as bundle:
            compared = check_raw(bundle, options.raw, options.tensor)
        print(compared.text())
        _write_json(options.json, compared.to_dict())
        return 0 if compared.passed else ParityError.exit_code
    if options.tensor is not None:
        raise InputError("--tensor is compared with an image: give it with --raw IMAGE")
    from .proof.verification import verify

    with _opened(options) as bundle:
        report = verify(bundle, _session(options))
    print(report.text())
    _write_json(options.json, report.to_dict())
    return 0 if report.passed else ParityError.exit_code


def _predict(options: argparse.Namespace) -> int:
    from .answers.drawing import check_drawn, placed_on, save_drawn
    from .answers.text import result_dict, result_lines
    from .inference.session import load

    with _opened(options) as bundle, load(bundle, _session(options)) as runner:
        if options.save is not None:
            check_drawn(runner.answers, options.save)
        given, picture = _read_input(options.input, bundle)
        found = runner.predict(given)
        results = found if isinstance(found, dict) else {runner.answers[0].name: found}
    if picture is not None:
        results = placed_on(results, picture)
    for line in result_lines(results):
        print(line)
    _write_json(options.json, result_dict(results))
    if options.save is not None:
        save_drawn(results, options.save, picture)
    refused = {row for result in results.values() for row in result.refused}
    if not refused:
        return 0
    rows = next(iter(results.values())).rows
    print(f"error: {options.input}: {len(refused)} of {rows} rows were refused, see above", file=sys.stderr)
    return InputError.exit_code


def _bench(options: argparse.Namespace) -> int:
    from .measure.benchmark import bench

    with _opened(options) as bundle:
        row = bench(
            bundle,
            _session(options),
            inputs=options.inputs,
            percentiles=options.percentiles,
            min_seconds=options.min_seconds,
            min_samples=options.min_samples,
            samples_file=options.samples_file,
            seed=options.seed,
        )
    print(row.text())
    _write_json(options.json, row.to_dict())
    return 0 if row.status == "ok" else EdgewrightError.exit_code


def _latency_table(options: argparse.Namespace) -> int:
    from .bundle.latency_record import check_record_target, record_latency
    from .measure.exit_latency import latency_table, latency_table_text

    if options.record is not None:
        check_record_target(options.record, options.bundle)
    with _opened(options) as bundle:
        table = latency_table(
            bundle,
            _session(options),
            inputs=options.inputs,
            blocks=options.blocks,
            block_runs=options.block_runs,
            seed=options.seed,
        )
        print(latency_table_text(table))
        _write_json(options.json, table)
        if options.record is not None:
            record_latency(bundle, [table], options.record)
    return 0


def _generate(options: argparse.Namespace) -> int:
    from .language.command import run

    _write_json(options.json, run(options, _session(options)))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .device import doctor

    report = doctor()
    print(report.text())
    _write_json(options.json, report.to_dict())
    return 0 if report.ok else ProviderError.exit_code


def _read_input(path: Path, bundle: Bundle) -> tuple[Any, Any]:
    """Reads .npy, .npz, .csv, .txt, .wav or, with Pillow, an image; preprocessed unless the graph takes bytes.

    Returns:
        What `predict` is given, and the pixels [1, H, W, C] of an image as they were, None of an array.
    """
    from .inference.image_file import SUFFIXES, read_image
    from .inference.preprocess import preprocess_image
    from .inference.sound_file import SUFFIXES as SOUNDS
    from .inference.sound_file import load_sound
    from .inference.table_file import SUFFIXES as TABLES
    from .inference.table_file import load_table
    from .inference.text_file import SUFFIXES as TEXTS
    from .inference.text_file import encode_texts, read_texts
    from .measure.bench_inputs import read_inputs

    if not path.is_file():
        raise InputError(f"no input at {path}")
    manifest = bundle.manifest
    if path.suffix.lower() in TABLES:
        return load_table(path, manifest.preprocessing), None
    if path.suffix.lower() in SOUNDS:
        return load_sound(path, manifest.preprocessing), None
    if path.suffix.lower() in TEXTS and manifest.preprocessing.kind == "text":
        return encode_texts(read_texts(path), bundle), None
    if path.suffix.lower() not in SUFFIXES:
        return read_inputs(path), None
    preprocessing = manifest.preprocessing
    if any(spec.dtype == "uint8" for spec in manifest.inputs):
        pixels = read_image(path, preprocessing)
        return pixels, pixels[None]
    if preprocessing.kind != "image":
        raise InputError(
            f"{path} is an image, and the bundle {manifest.name} does not say how images become its input: give what "
            "the model takes as a .npy"
        )
    pixels = read_image(path, preprocessing)
    return preprocess_image(pixels, preprocessing), pixels[None]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0.5,0.9") from None


def _thresholds(text: str) -> list[float] | str:
    """Numbers, or the name of an operating point: what has no comma and is no number."""
    try:
        return _numbers(text)
    except argparse.ArgumentTypeError:
        if "," in text:
            raise
        return text


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuses places for results before anything has run.

    Raises:
        InputError: a folder that does not exist, a place inside the bundle, which would be altered by it, or one place
            for two results.
    """
    places = [path for path in (options.json, options.samples_file, options.record, options.save) if path is not None]
    for path in places:
        check_place(path, options.bundle)
    if len({path.resolve() for path in places}) < len(places):
        raise InputError(f"cannot write two results to {places[-1]}: give each a name of its own")


def _write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
