"""The command `edgewright`: a thin mirror of the public API. Parsing and printing only.

Exit codes: 0 done, 1 failed otherwise, 2 bad input, 3 parity failed, 4 quality floor missed, 5 execution
provider not available, 130 interrupted. Heavy imports stay inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .stage_commands import COMMANDS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor, nn

    from .recipe.recipe import Recipe
    from .report.result import RunResult
    from .report.steps import StepRow

RECIPES = Path(__file__).parent / "recipes"
_INTERRUPTED = 130
_PASSED_ON: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True}

app = typer.Typer(
    name="edgewright",
    help="Compress PyTorch models, export them to ONNX with early exits and shared bases, and prove it.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: half of the time that rich needs
    add_completion=False,
    pretty_exceptions_enable=False,
)

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Set a value, e.g. stages.0.epochs=5; may be repeated."),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: without the program's name; None: ``sys.argv``.

    Returns:
        The exit code.
    """
    from edgewright.edge_runtime.process.standard_streams import lost_output, standard_streams
    from edgewright.edge_runtime.process.termination import Terminated, terminable

    with standard_streams(), terminable():
        code = 0
        try:
            app(None if arguments is None else list(arguments), prog_name="edgewright")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Terminated as end:
            return end.exit_code
        if code == 0 and (reason := lost_output()) is not None:
            _print_error(f"standard output did not take everything ({reason}), so the result is incomplete", False)
            return 2
        return code


@app.command("run")
def run_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the results.  [default: build/NAME]")] = None,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do everything again, even what is finished.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the result.")] = False,
    debug: Debug = False,
) -> None:
    """Run a recipe; run it again to go on after an interruption."""
    with _errors(debug, interrupted="run the same command again to go on where it was"):
        from rich.console import Console

        from .recipe.recipe import load_recipe
        from .runs.progress import progress_for
        from .runs.requirements import check_requirements
        from .runs.runner import run

        _short_warnings(debug)
        loaded = load_recipe(_recipe_path(recipe), overrides or ())
        folder = out or Path("build") / (loaded.name or "run")
        with contextlib.closing(progress_for(Console(stderr=True), quiet)) as progress:
            result = run(loaded, folder, fresh=fresh, progress=progress)
        console = _console()
        console.print(_steps_table(result))
        for row in result.steps:
            for note in row.notes:
                console.print(f"{row.step}: {note}", soft_wrap=True, highlight=False, markup=False, style="dim")
        for name, path in (("bundle", result.bundle), ("report", result.report)):
            if path is not None:
                console.print(f"{name}: {_shown(path)}", soft_wrap=True, highlight=False, markup=False)
        if result.report is not None:
            check_requirements(json.loads(result.report.read_text(encoding="utf-8")), loaded.require)


@app.command()
def models(
    contains: Annotated[str, typer.Argument(metavar="[TEXT]", help="Only names with this text.")] = "",
    debug: Debug = False,
) -> None:
    """List the models that recipes can name.

    Your own are python:path/to/file.py:function.
    """
    with _errors(debug):
        from edgewright.models import registry

        table = _table("model", "input", "what it is")
        for info in registry.available(contains):
            table.add_row(info.name, "x".join(map(str, info.input_shape or ())), info.description)
        _console().print(table)


@app.command()
def cuts(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name, or a recipe.")],
    input_shape: Annotated[
        str | None, typer.Option(metavar="N,C,H,W", help="Shape of the input, batch first, e.g. 1,3,32,32.")
    ] = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """List the places of a model where an exit may sit.

    With the shape of the output there and the MACs up to there.
    """
    with _errors(debug):
        from .analysis.cost import count
        from .analysis.cost import cuts as places

        network, inputs = _network(model, input_shape, overrides or ())
        whole = count(network, inputs)
        table = _table("module", "type", "output", ">MACs up to here", ">share")
        for cut in places(network, inputs):
            shape = "x".join(map(str, cut.shape[1:]))
            table.add_row(cut.path, cut.type, shape, f"{cut.macs_so_far:,}", f"{cut.share:.1%}")
        console = _console()
        console.print(table)
        console.print(f"whole model: {whole.macs:,} MACs, {whole.parameters:,} parameters", highlight=False)


@app.command()
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RECIPE", help="A model's name, or a recipe.")],
    input_shape: Annotated[
        str | None,
        typer.Option("--input-shape", "--shape", metavar="N,C,H,W", help="Shape of the input, batch first."),
    ] = None,
    export: Annotated[bool, typer.Option(help="Try the export too.")] = True,
    layers: Annotated[int, typer.Option(metavar="N", help="Most layers that are listed of a stage.")] = 12,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Say before any training what each stage would do with a model.

    Which channels can go, which layers may share, where exits can sit and why the others cannot; whether it exports,
    and what kinds of devices make of the file. Exit code 2 if a run of the recipe would be refused.
    """
    with _errors(debug):
        from .recipe.recipe import load_recipe, parse_recipe
        from .runs.outlook import outlook

        path, shape = _recipe_path(model), input_shape
        alone = path.suffix not in (".yaml", ".yml", ".json")
        if alone:
            recipe = parse_recipe({"model": model, "task": "none"}, Path.cwd(), overrides or ())
            shape = _known_shape(model, input_shape, recipe)
        else:
            recipe = load_recipe(path, overrides or ())
        found = outlook(recipe, _shape(shape), alone, export)
        if as_json is not None:
            from .store.atomic import plain, pretty_json

            as_json.write_text(pretty_json(plain(found.to_dict())), encoding="utf-8")
        from .outlook_text import show

        show(found, _console(), layers)
        if found.refused:
            raise typer.Exit(2)


@app.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of recipes, for editors."""
    with _errors(debug):
        from .recipe.schema import schema_text
        from .stage_registry import usable_stages

        typer.echo(schema_text(list(usable_stages())), nl=False)


def _add_device_commands() -> None:
    """Offers the commands of the runtime's own command line: their options are defined once, there."""
    # by name, because a plain import would make the checker of this package follow the runtime's command line
    device = importlib.import_module("edgewright.edge_runtime.cli")

    def command(context: typer.Context) -> None:
        raise typer.Exit(device.main([context.info_name or "", *context.args], program="edgewright"))

    for name, what in device.COMMANDS.items():
        app.command(name, help=what, add_help_option=False, context_settings=_PASSED_ON)(command)


def _add_stage_commands() -> None:
    """Offers the commands that stages bring; each is imported when it is called."""

    def command(context: typer.Context) -> None:
        name = context.info_name or ""
        with _errors("--debug" in context.args):
            run = importlib.import_module(COMMANDS[name][0]).main
            arguments = [argument for argument in context.args if argument != "--debug"]
            raise typer.Exit(run(arguments, f"edgewright {name}"))

    for name, (_, what) in COMMANDS.items():
        app.command(name, help=what, add_help_option=False, context_settings=_PASSED_ON)(command)


_add_device_commands()
_add_stage_commands()


@contextlib.contextmanager
def _errors(debug: bool, interrupted: str = "") -> Iterator[None]:
    """Turns errors into a text and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        _print_error("interrupted" + (f"; {interrupted}" if interrupted else ""), debug)
        raise typer.Exit(_INTERRUPTED) from None
    except typer.Exit:
        raise
    except Exception as error:
        from .errors import EdgewrightError

        if isinstance(error, EdgewrightError):
            _print_error(str(error), debug)
            raise typer.Exit(error.exit_code) from None
        kind = type(error).__name__
        _print_error(f"internal error: {kind}: {error}" + ("" if debug else "; --debug shows where"), debug)
        raise typer.Exit(1) from None


def _print_error(text: str, debug: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    if debug:
        traceback.print_exc()
    # the text keeps its line breaks, and no path in it is taken for markup or cut
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def _short_warnings(debug: bool) -> None:
    import warnings

    if not debug:
        warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"


def _recipe_path(given: str) -> Path:
    """A file, or the name of a recipe that is shipped."""
    shipped = RECIPES / f"{given}.yaml"
    return shipped if not Path(given).exists() and "/" not in given and shipped.is_file() else Path(given)


def _network(given: str, input_shape: str | None, overrides: Sequence[str]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model and one batch for it."""
    from .recipe.recipe import load_recipe, parse_recipe
    from .runs.base_model import build_named, folded
    from .runs.preparation import example_inputs

    path = _recipe_path(given)
    is_recipe = path.suffix in (".yaml", ".yml", ".json")
    recipe: Recipe
    if is_recipe:
        recipe = load_recipe(path, overrides)
    else:
        recipe = parse_recipe({"model": given, "task": "none"}, Path.cwd(), overrides)
    if not is_recipe:
        input_shape = _known_shape(given, input_shape, recipe)
    inputs = example_inputs(recipe, _shape(input_shape))
    return folded(build_named(recipe), recipe, inputs)[0], inputs


def _known_shape(given: str, input_shape: str | None, recipe: Recipe) -> str:
    """The shape that was given, or that of the model's input as the registry knows it."""
    from edgewright.models import registry

    from .errors import InputError
    from .runs.base_model import build_named

    if input_shape is not None:
        return input_shape
    known = registry.input_shape(given)
    if known is None:
        build_named(recipe)  # an unknown name is the better error
        raise InputError(f"the input of {given} is not known: give its shape with --input-shape, e.g. 1,3,224,224")
    return ",".join(map(str, (1, *known)))


def _shape(text: str | None) -> tuple[int, ...] | None:
    from .errors import InputError

    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--input-shape {text} is no list of positive numbers like 1,3,32,32")
    return tuple(int(part) for part in parts)


def _console() -> Console:
    """Standard output; wide where it goes to a file, so that tables stay whole."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=160)


def _table(*columns: str) -> Table:
    """A table; columns whose name begins with ``>`` hold numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        number = column.startswith(">")
        name = column.removeprefix(">")
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _steps_table(result: RunResult) -> Table:
    from .quality_drop import drop_text

    classes = result.steps[0].accuracy is not None
    quality = (">accuracy", ">worst") if classes else (f">{result.steps[0].metric}",)
    table = _table("step", *quality, ">MACs", ">params", ">weights kB", ">file kB", ">p50 ms", ">p90 ms")
    for row in result.steps:
        table.add_row(*_cells(row, row.step == result.reference))
    worst = "; worst: the class with the lowest accuracy" if classes else ""
    alike = all(row.macs_of == "graph" for row in result.steps)
    pytorch = "" if alike else "; °: not exported, counted by PyTorch's operators"
    final = next(row.step for row in reversed(result.steps) if row.step not in result.controls)
    drop = result.drops.get(final)
    worse = "" if drop is None else f"\n{final} against {result.reference}: drop {drop_text(drop)}"
    table.caption = f"* what the others are compared with{worst}{pytorch}{worse}"
    table.caption_justify = "left"
    return table


def _cells(row: StepRow, reference: bool) -> tuple[str, ...]:
    return (
        row.step + (" *" if reference else ""),
        *(
            (f"{row.quality:.4g}",)
            if row.accuracy is None
            else (_share(row.accuracy), _share(row.worst_class_accuracy))
        ),
        _short_count(row.macs) + ("" if row.macs_of == "graph" else " °"),
        _short_count(row.parameters),
        f"{row.unique_weight_bytes / 1000:,.1f}",
        "-" if row.file_bytes is None else f"{row.file_bytes / 1000:,.1f}",
        "-" if row.p50_ms is None else f"{row.p50_ms:.3f}",
        "-" if row.p90_ms is None else f"{row.p90_ms:.3f}",
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _short_count(value: float) -> str:
    """Three to four significant figures: 514 k, 1.25 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
