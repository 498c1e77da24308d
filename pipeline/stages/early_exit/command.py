"""The command ``edgewright mix``: what another mix of exits would cost."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .mix import exits_of_report, mix_of_report, mix_text, numbers_of, read_latency_table, read_report


def main(arguments: Sequence[str], program: str) -> int:
    """Prints the costs; returns the exit code.

    Args:
        arguments: behind the command's name.
        program: what the help calls it.

    Raises:
        InputError: no report, no exits in it, or numbers that do not fit them.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="What a row costs on average for another mix of exits, and when exits pay. "
        "Without --shares the mix of the test split.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or its report.json")
    parser.add_argument("--shares", metavar="A,B,...", help="share of the rows at each exit, the end last")
    parser.add_argument(
        "--latency-table", type=Path, metavar="FILE", help="microseconds per exit on another device, JSON"
    )
    options = parser.parse_args(arguments)
    report = read_report(options.run)
    table = None if options.latency_table is None else read_latency_table(options.latency_table)
    cost = mix_of_report(report, None if options.shares is None else numbers_of(options.shares), table)
    print(mix_text(cost, [row["name"] for row in exits_of_report(report)["table"]]))
    return 0
