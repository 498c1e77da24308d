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

from edgewright.edge_runtime.bundle.manifest import EXIT_INDEX, LABEL, LOGITS, SCORES, THRESHOLDS
from edgewright.edge_runtime.errors import InputError, ParityError
from edgewright.edge_runtime.inference.runner import Runner
from edgewright.models.layers.multi_exit import MultiExit

from ..source import Source
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


class Reference:
    """The PyTorch side: logits of all heads, and the answer for given thresholds.

    Args:
        model: what was exported.
        labels: names of the classes; without any, and without exits, the outputs are numbers that decide nothing.
    """

    def __init__(self, model: nn.Module, labels: Sequence[str]) -> None:
        self.model = model.eval()
        self.exits = len(model.specs) if isinstance(model, MultiExit) else 0
        self.decides = bool(labels) or self.exits > 0

    @torch.no_grad()
    def logits(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Of every head, the network's own last."""
        if isinstance(self.model, MultiExit):
            return self.model.all_logits(*inputs)
        return [self.model(*inputs)]

    @torch.no_grad()
    def answer(
        self, logits: Sequence[Tensor], thresholds: Sequence[float] | None, shifts: Sequence[float]
    ) -> tuple[Arrays, NDArray[np.float32]]:
        """Outputs as the exported graph names them, and the margin of every row, to be held to ``max(shifts)``."""
        if not self.decides:
            return {LOGITS: logits[0].numpy()}, np.zeros(len(logits[0]), np.float32)
        if not isinstance(self.model, MultiExit):
            # in units of a logit, as `MultiExit.margins`: an error of e in every logit moves it by at most e
            top = logits[0].topk(min(2, logits[0].shape[-1]), dim=-1).values.double()
            return {LOGITS: logits[0].numpy()}, ((top[..., 0] - top[..., -1]) / 2).float().numpy()
        values = None if thresholds is None else torch.tensor(thresholds, dtype=torch.float32)
        output = self.model.decide(logits, values)
        arrays = {LABEL: output.label.numpy(), SCORES: output.scores.numpy(), EXIT_INDEX: output.exit_index.numpy()}
        return arrays, self.model.margins(logits, values, shifts).numpy()

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
    _known: dict[int, Tensor] = field(default_factory=dict)
    """Row -> [heads, ...]."""

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
            values = torch.stack(self.torch.logits(self.inputs(some)), dim=1)
            found.update(zip(some, values, strict=True))
            if (len(self._known) + len(some)) * values[0].nbytes <= _KNOWN_BYTES:
                self._known.update(zip(some, values, strict=True))
        return list(torch.stack([found[row] for row in rows]).unbind(dim=1))

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
