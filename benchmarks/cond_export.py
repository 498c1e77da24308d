"""The same exits by PyTorch's own means: nested `torch.cond`, exported by torch.onnx.export(dynamo=True).

What a user without this project would do. The network is captured once by torch.export, cut into levels at the heads,
and the levels are put into nested `torch.cond` calls with the same policy.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from edgewright.export.graph.capture import Outputs
from edgewright.models.layers.multi_exit import MultiExit


class _Level(nn.Module):
    """One level as a module, with the names of the values it reads and hands on."""

    def __init__(self, body: fx.GraphModule, reads: list[str], gives: list[str]) -> None:
        super().__init__()
        self.body, self.reads, self.gives = body, reads, gives


def cut(model: MultiExit, x: Tensor) -> list[_Level]:
    """The levels between the heads; each gives its logits and what later levels read."""
    whole = torch.export.export(Outputs(model).eval(), (x,)).module()
    assert isinstance(whole, fx.GraphModule)
    (answers,) = next(n for n in whole.graph.nodes if n.op == "output").args
    assert isinstance(answers, tuple | list)
    level: dict[fx.Node, int] = {}
    for k, answer in enumerate(answers):
        pending = [answer]
        while pending:
            node = pending.pop()
            if isinstance(node, fx.Node) and node not in level:
                level[node] = k
                pending += node.all_input_nodes
    levels = []
    for k, answer in enumerate(answers):
        graph, values = fx.Graph(), {}
        mine = [n for n in whole.graph.nodes if level.get(n) == k and n.op not in ("placeholder", "get_attr", "output")]
        outer = dict.fromkeys(i for n in mine for i in n.all_input_nodes if i not in mine and i.op != "get_attr")
        for node in outer:
            values[node] = graph.placeholder(node.name)
        for weight in dict.fromkeys(i for n in mine for i in n.all_input_nodes if i.op == "get_attr"):
            values[weight] = graph.get_attr(str(weight.target))
        for node in mine:
            values[node] = graph.node_copy(node, lambda n, known=values: known[n])
        later = [n for n in mine if any(level.get(user, -1) > k for user in n.users)]
        graph.output(tuple(values[n] for n in [answer, *later]))
        levels.append(_Level(fx.GraphModule(whole, graph), [n.name for n in outer], [n.name for n in later]))
    return levels


class CondExits(nn.Module):
    """One row through nested `torch.cond`: (scores [1, C], exit_index [1])."""

    def __init__(self, model: MultiExit, x: Tensor) -> None:
        super().__init__()
        self.levels = nn.ModuleList(cut(model, x))
        self.policy = model.policy
        self.thresholds = nn.Buffer(model.thresholds.detach().clone())
        self.input = self.levels[0].reads[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Runs level 0, and as many more as it takes."""
        return self._level(0, {self.input: x}, None)

    def _level(self, k: int, known: dict[str, Tensor], excluded: Tensor | None) -> tuple[Tensor, Tensor]:
        level = self.levels[k]
        logits, *given = level.body(*(known[name] for name in level.reads))
        if k == len(self.levels) - 1:
            return self.policy.finish(logits, excluded), torch.full((1,), k, dtype=torch.int64)
        known = {**known, **dict(zip(level.gives, given, strict=True))}
        decision = self.policy.decide(logits, self.thresholds[k], excluded)
        needed = {name for later in self.levels[k + 1 :] for name in later.reads}
        names = [name for name in known if name in needed]
        memory = [] if decision.excluded is None else [decision.excluded]

        def leave(scores: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
            return scores.clone(), torch.full((1,), k, dtype=torch.int64)

        def deeper(_: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
            carried = dict(zip(names, values[: len(names)], strict=True))
            return self._level(k + 1, carried, values[-1] if memory else None)

        operands = (decision.scores, *(known[name] for name in names), *memory)
        answer: tuple[Tensor, Tensor] = torch.cond(decision.decided.reshape(()), leave, deeper, operands)
        return answer


def export_cond(model: MultiExit, x: Tensor, path: Path) -> str | None:
    """Writes the network with `torch.cond` to `path`; returns what went wrong, None if nothing did."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            exits = CondExits(model, x).eval()
            program = torch.onnx.export(exits, (x,), dynamo=True, verbose=False, input_names=["image"])
            assert program is not None
            program.save(str(path), external_data=False)
    except Exception as error:  # whatever the exporter raises is the result here
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        first = next((line for line in str(causes[-1]).splitlines() if line.strip()), "no message")
        return f"{type(causes[-1]).__name__}: {first[:300]}"
    return None
