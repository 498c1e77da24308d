"""The two sides of a parity check: the PyTorch model, and the exported file on real rows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.edge_runtime.answers.classes import CLASSES, EXITS, exits_answer
from edgewright.edge_runtime.answers.kind import LABEL_DIFFERS
from edgewright.edge_runtime.answers.table import kind_of
from edgewright.edge_runtime.answers.values import VALUES
from edgewright.edge_runtime.bundle.manifest import EXIT_INDEX, LABEL, SCORES, THRESHOLDS, AnswerSpec
from edgewright.edge_runtime.errors import ExportError, InputError, ParityError
from edgewright.edge_runtime.inference.runner import Runner
from edgewright.models.layers.multi_exit import MultiExit

from ..graph.leaves import leaves_of
from ..source import Source, answers_of
from .agreement import Arrays

BATCH = 64
"""Most rows that are run together."""

_KNOWN_BYTES = 2**28
"""Most bytes of logits that a `Subject` remembers."""


def _cannot_run(runner: Runner, rows: int, thresholds: Sequence[float] | None, error: Exception) -> ParityError:
    """What to raise where ONNX Runtime fails in a file that was just exported.

    Args:
        runner: of the file.
        rows: that it was given.
        thresholds: that it was given, if any.
        error: its own, or a runner's around it.
    """
    setting = "" if thresholds is None else f", thresholds {[round(t, 6) for t in thresholds]}"
    return ParityError(
        f"ONNX Runtime cannot run {runner.path} ({rows} row(s){setting}): {error.__cause__ or error}; no bundle was "
        "written. If memory did not run out, the export of an operation near the named node is wrong, or this ONNX "
        "Runtime lacks it: try another export.opset or export.simplify, and report the model"
    )


def spread_evenly(total: int, rows: int | None) -> list[int]:
    """At most `rows` numbers below `total`, as evenly as it goes; all of them if it is None."""
    if rows is None or rows >= total:
        return list(range(total))
    return sorted({round(i * (total - 1) / max(1, rows - 1)) for i in range(rows)})


def answers_in(model: nn.Module, source: Source) -> tuple[AnswerSpec, ...]:
    """What the exported file of `model` answers: what the source says, or the decision of the exits.

    Raises:
        ExportError: see `answers_of`; or exits in a model whose answer is not one class for each row.
    """
    answers = answers_of(source)
    if not isinstance(model, MultiExit):
        return answers
    if len(answers) != 1 or answers[0].leaf is not None or answers[0].kind not in (CLASSES, VALUES):
        raise ExportError(
            f"a model with exits decides on one class for each row, and the task {source.name!r} answers "
            f"{', '.join(spec.kind for spec in answers)}: leave the exits out"
        )
    return (exits_answer(answers[0].labels),)


class Reference:
    """The PyTorch side: the tensors of the answers, of exits the logits of all heads, and the outputs made of them.

    Args:
        model: what was exported.
        specs: what the exported file answers, see `answers_in`.
    """

    def __init__(self, model: nn.Module, specs: Sequence[AnswerSpec]) -> None:
        self.model = model.eval()
        self.specs = tuple(specs)
        self.exits = len(model.specs) if isinstance(model, MultiExit) else 0
        self.decides = any(kind_of(spec).decides for spec in specs)

    @torch.no_grad()
    def logits(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Of every head, the network's own last; without exits the tensor of every answer."""
        if isinstance(self.model, MultiExit):
            return self.model.all_logits(*inputs)
        return list(leaves_of(self.model(*inputs), self.specs))

    @torch.no_grad()
    def answer(
        self, logits: Sequence[Tensor], thresholds: Sequence[float] | None, shifts: Sequence[float]
    ) -> tuple[Arrays, NDArray[np.float32] | None]:
        """Outputs as the exported graph names them, and the margins of the rows, to be held to ``max(shifts)``.

        The margins are None where the outputs tell them, for every place of a row, or where nothing is decided.
        """
        if not isinstance(self.model, MultiExit):
            arrays = {spec.name: tensor.numpy() for spec, tensor in zip(self.specs, logits, strict=True)}
            alone = len(self.specs) == 1 and self.specs[0].kind == CLASSES
            return arrays, kind_of(self.specs[0]).margins(self.specs[0], arrays) if alone else None
        values = None if thresholds is None else torch.tensor(thresholds, dtype=torch.float32)
        output = self.model.decide(logits, values)
        arrays = {LABEL: output.label.numpy(), SCORES: output.scores.numpy(), EXIT_INDEX: output.exit_index.numpy()}
        return arrays, self.model.margins(logits, values, shifts).numpy()

    def named(self, index: int) -> str:
        """What the tensor at `index` of `logits` is, for messages."""
        return f"logits of head {index}" if self.exits or len(self.specs) == 1 else self.specs[index].name

    def decides_by(self, index: int) -> bool:
        """Whether anything is decided by the tensor at `index` of `logits`."""
        return self.exits > 0 or kind_of(self.specs[index]).decides

    def labels(self, outputs: Arrays) -> NDArray[np.int64]:
        """int64 [N] of the first answer that gives each row a class; empty without one."""
        spec = next((spec for spec in self.specs if spec.kind in (CLASSES, EXITS)), None)
        if spec is None:
            return np.zeros(0, np.int64)
        return kind_of(spec).decisions(spec, outputs)[LABEL_DIFFERS]

    @property
    def thresholds(self) -> list[float] | None:
        """Those the model holds; None without exits."""
        return [float(t) for t in self.model.thresholds] if isinstance(self.model, MultiExit) else None

    def forced(self) -> list[list[float]]:
        """Thresholds that send every row to exit 0, 1, ... K."""
        assert isinstance(self.model, MultiExit)
        never, always = self.model.policy.never, self.model.policy.always
        return [[never] * k + [always] + [never] * (self.exits - k - 1) for k in range(self.exits)] + [
            [never] * self.exits
        ]


@dataclass(frozen=True)
class Subject:
    """What is compared, and on which rows."""

    torch: Reference
    flat_path: Path
    model_path: Path
    source: Source
    split: str
    rows: Sequence[int]
    runner: Runner
    """on `model_path`, default level, one thread: what is recorded must be the same bytes each time."""
    _known: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """Row -> the tensor of every head or answer."""

    def inputs(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """These rows of the split."""
        return self.source.splits[self.split].batch(rows).inputs

    def feeds(self, inputs: Sequence[Tensor]) -> Arrays:
        """The same as the file takes them."""
        return {name: x.numpy() for name, x in zip(self.source.input_names, inputs, strict=True)}

    def logits(self, rows: Sequence[int]) -> list[Tensor]:
        """PyTorch's of every head; a row runs once however many checks it is in, while there is room to remember it."""
        found = {row: self._known[row] for row in rows if row in self._known}
        missing = [row for row in dict.fromkeys(rows) if row not in found]
        for start in range(0, len(missing), self.batch):
            some = missing[start : start + self.batch]
            values = list(zip(*(tensor.unbind(0) for tensor in self.torch.logits(self.inputs(some))), strict=True))
            found.update(zip(some, values, strict=True))
            if (len(self._known) + len(some)) * sum(tensor.nbytes for tensor in values[0]) <= _KNOWN_BYTES:
                self._known.update(zip(some, values, strict=True))
        return [torch.stack(column) for column in zip(*(found[row] for row in rows), strict=True)]

    @property
    def batch(self) -> int:
        """Rows that are run together; fewer where the split says that its outputs are large."""
        return min(BATCH, getattr(self.source.splits[self.split], "largest_batch", BATCH))

    def spread(self, count: int) -> list[int]:
        """At most `count` of the rows, as evenly as it goes."""
        return [self.rows[i] for i in spread_evenly(len(self.rows), count)]

    @property
    def single_rows(self) -> bool:
        """Whether the file takes one row a run."""
        return self.runner.takes_single_rows

    def answers(
        self, inputs: Sequence[Tensor], thresholds: Sequence[float] | None, runner: Runner | None = None
    ) -> Arrays:
        """What the exported file, or another `runner`, says; thresholds go in as an input of the run.

        A session for every setting would load the weights again each time. Of a file that takes one row, as many rows
        run side by side as PyTorch has threads; each on one thread, so that its bytes do not depend on their number.

        Raises:
            ParityError: ONNX Runtime cannot run the rows.
        """
        runner, feeds = runner or self.runner, self.feeds(inputs)
        rows = len(inputs[0])
        step = 1 if runner.takes_single_rows else max(1, rows)
        parts = [{name: x[i : i + step] for name, x in feeds.items()} for i in range(0, max(1, rows), step)]

        def answer(part: Arrays) -> Arrays:
            try:
                if thresholds is None:
                    return runner.run(part)
                given = {**part, THRESHOLDS: np.asarray(thresholds, np.float32)}
                return dict(zip(runner.output_names, runner.session.run(None, given), strict=True))
            except (InputError, MemoryError):
                raise
            except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
                raise _cannot_run(runner, len(next(iter(part.values()))), thresholds, error) from error

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            answers = list(pool.map(answer, parts))
        return {name: np.concatenate([each[name] for each in answers]) for name in runner.output_names}
