"""What the rows of `basis_sharing.py` are measured on: the model, two texts, saved statistics, perplexity."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sklearn
import torch
from figures import Figure, geometric_mean_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgewright.models.registry import build
from edgewright.pipeline.analysis.output_gradients import Gradients
from edgewright.pipeline.analysis.second_moments import SecondMoment
from edgewright.pipeline.metric import Answer, Perplexity
from edgewright.pipeline.stage import Context
from edgewright.pipeline.stages.basis_sharing.grouping import Candidate, candidates
from edgewright.pipeline.stages.basis_sharing.norms import Calibration, Norms, collect, numeric_device
from edgewright.pipeline.task import Task
from edgewright.pipeline.tasks.causal_lm import CausalLM
from edgewright.pipeline.tasks.shipped.causal_lm import causal_lm
from edgewright.pipeline.training.evaluation import answers

MODEL = "packaged:smollm2-135m"
SECOND_TEXT = "sklearn_docstrings.txt"


def dense_model() -> nn.Module:
    """SmolLM2-135M, dequantised to float32."""
    return build(MODEL, {}, Path.cwd())


def text_task(text: str | None, windows: int, test: int) -> CausalLM:
    """Windows of 256 tokens: calibration and training from the first half, the test spread over the second.

    Args:
        text: a file, or None for the articles of `pydoc_data.topics`.
        windows: calibration windows.
        test: test windows.
    """
    return causal_lm(
        path=text,
        fractions={"train": 0.1, "calibration": 0.4, "test": 0.5},
        most={"calibration": windows, "test": test},
    )


def second_text(folder: Path) -> str:
    """The path of another English text: what scikit-learn's modules say about themselves.

    Docstrings of modules, classes and functions in the order of their files, each paragraph once.
    """
    place = folder / SECOND_TEXT
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        seen = dict.fromkeys(_paragraphs(Path(sklearn.__file__).parent))
        place.write_text("\n\n".join(seen), encoding="utf-8")
    return str(place)


def _paragraphs(package: Path) -> Iterator[str]:
    for file in sorted(package.rglob("*.py")):
        if "tests" in file.parts or "externals" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                # sentences, not tables of parameters and examples
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    if len(paragraph) > 200 and not any(mark in paragraph for mark in (" : ", ">>>", "---")):
                        yield paragraph


def perplexity(model: nn.Module, task: CausalLM) -> Figure:
    """On the test windows, with the 95 % interval of the mean over windows."""
    losses = []
    for output, targets in answers(model, task.splits["test"]):
        assert isinstance(output, Tensor)
        for i in range(len(targets)):
            losses.append(math.log(Perplexity().score([Answer(output[i : i + 1], targets[i : i + 1])]).value))
    return geometric_mean_of(losses)


class SavedStatistics:
    """Runs the calibration data through the dense model once for all methods that ask the same of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self, model: nn.Module, task: Task, run: Sequence[Candidate], calibration: Calibration, context: Context
    ) -> Norms:
        """As `collect`."""
        if calibration.whitening not in ("input", "two_sided"):
            return collect(model, task, run, calibration, context)
        layers = [layer for candidate in run for layer in candidate.members]
        file = self.folder / f"{calibration.whitening}.{calibration.labels}.{len(calibration.rows)}.safetensors"
        both = self.folder / f"two_sided.data.{len(calibration.rows)}.safetensors"
        if calibration.whitening == "input" and both.exists():
            # the inputs' moments are the same
            file = both
        if not file.exists():
            norms = collect(model, task, candidates(layers, "readers", 1), calibration, context)
            _save(file, norms, {layer.path: layer.input_key for layer in layers})
        header, tensors = _load(file)
        moments = {
            layer.input_key: SecondMoment(
                tensors[f"moment/{header['readers_of'][layer.path]}"],
                *header["rows"][header["readers_of"][layer.path]],
                torch.zeros(0),
            )
            for layer in layers
        }
        part = {name: _part(tensors, name) for name in ("outputs", "pulled_back")}
        gradients = Gradients(part["outputs"], part["pulled_back"])
        return Norms(moments, gradients, calibration, numeric_device(context))


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): x for key, x in tensors.items() if key.startswith(f"{name}/")}


def _save(file: Path, norms: Norms, keys: dict[str, object]) -> None:
    first = {key: path for path, key in reversed(keys.items())}
    tensors = {f"moment/{first[key]}": moment.matrix for key, moment in norms.moments.items()}
    tensors |= {f"outputs/{path}": x for path, x in norms.gradients.outputs.items()}
    tensors |= {f"pulled_back/{path}": x for path, x in norms.gradients.pulled_back.items()}
    rows = {first[key]: [moment.rows, moment.seen] for key, moment in norms.moments.items()}
    header = {"readers_of": {path: first[key] for path, key in keys.items()}, "rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".tmp")
    save_file({k: x.contiguous() for k, x in tensors.items()}, aside, metadata={"header": json.dumps(header)})
    aside.replace(file)


def _load(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["header"])
    return header, load_file(file)
