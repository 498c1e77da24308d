"""How `edgewright check` shows what it found, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from .runs.outlook import ExportOutlook, Outlook, StageOutlook


def show(found: Outlook, console: Console, most: int) -> None:
    """Prints it.

    Args:
        found: see there.
        console: to print on.
        most: layers that are listed of a stage; the rest is counted.
    """
    task = "" if found.task is None else f" on {found.task}"
    console.print(
        f"{found.model}{task}: {found.macs:,} MACs, {found.parameters:,} parameters", highlight=False, markup=False
    )
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    for stage in found.stages:
        _show_stage(stage, console, most)
    if found.export is not None:
        _show_export(found.export, console)
    console.print(f"\nchecked in {found.seconds:g} s, nothing was trained", highlight=False)


def _show_stage(stage: StageOutlook, console: Console, most: int) -> None:
    name = stage.stage if stage.step == stage.stage else f"{stage.step} ({stage.stage})"
    if stage.refused is not None:
        console.print(f"\n[bold]{name}[/]: [red]refused[/]", highlight=False)
        console.print(f"  {stage.refused}", highlight=False, markup=False)
        return
    if stage.preview is None:
        console.print(f"\n[bold]{name}[/]: this stage says nothing of itself", highlight=False)
        return
    console.print(f"\n[bold]{name}[/]", end="", highlight=False)
    console.print(f": {stage.preview.summary}", highlight=False, markup=False)
    for note in stage.preview.notes:
        console.print(f"  {note}", highlight=False, markup=False)
    _list(stage.preview.takes, console, most)
    if stage.preview.leaves:
        reasons: dict[str, list[str]] = {}
        for path, reason in stage.preview.leaves.items():
            reasons.setdefault(reason, []).append(path)
        console.print(f"  {len(stage.preview.leaves)} stay as they are:", highlight=False)
        grouped = {_few(paths): reason for reason, paths in reasons.items()}
        _list(grouped, console, most)


def _few(paths: list[str]) -> str:
    return ", ".join(paths[:2]) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")


def _list(rows: Mapping[str, str], console: Console, most: int) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1, 0, 2), show_edge=False)
    table.add_column(overflow="fold", ratio=1)
    table.add_column(overflow="fold", ratio=2)
    for path, text in list(rows.items())[:most]:
        table.add_row(Text(path), Text(text))
    console.print(table)
    if len(rows) > most:
        console.print(f"    and {len(rows) - most} more (--layers, --json)", highlight=False)


def _show_export(export: ExportOutlook, console: Console) -> None:
    console.print("\n[bold]export[/]: ", end="", highlight=False)
    if export.refused is not None:
        console.print("[red]refused[/]", highlight=False)
        console.print(f"  {export.refused}", highlight=False, markup=False)
        return
    if export.figures.get("generator"):
        console.print("a generator, which is proven when it is made; not tried here", highlight=False)
        return
    kinds = ", ".join(f"{name} ({kind})" for name, kind in export.answers.items())
    figures = export.figures
    console.print(
        f"{figures['nodes']} nodes, opset {figures['opset']}, {figures['file_bytes'] / 1000:,.1f} kB, answers {kinds}; "
        f"equal to PyTorch on {figures['rows']} rows (max |diff| {figures['max_abs_diff']:.1e})",
        highlight=False,
        markup=False,
    )
    rows = {}
    for target in export.targets:
        aligned = "" if target.aligned is None else f"; {target.aligned:.0%} of the MACs in widths that fit it"
        reads = f"onnxruntime {target.runtime} and newer read it{aligned}"
        rows[target.target] = reads if target.reads else f"cannot: {target.reason}"
    _list(rows, console, len(rows))
