"""LSTM and GRU whose input matrices are layers of their own, so that these can be factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .factorized import FactorizedLinear

_GATES = {"lstm": 4, "gru": 3}
State = tuple[Tensor, ...]
"""Hidden state, and of an LSTM the cell state: each [N, H]."""


class _Direction(nn.Module):
    """One layer in one direction: `inputs` is what it multiplies its input with, for all steps at once.

    What it multiplies its own state with, step by step, is `weight_hh`. It is no layer: an ONNX LSTM or GRU has no
    place for two factors of it, and steps that are written out would cost a device far more than they save.
    """

    def __init__(self, kind: str, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.kind, self.hidden = kind, hidden
        rows = _GATES[kind] * hidden
        self.inputs: nn.Module = nn.Linear(width, rows, bias)
        self.weight_hh = nn.Parameter(torch.zeros(rows, hidden))
        self.bias_hh = nn.Parameter(torch.zeros(rows)) if bias else None

    def forward(self, x: Tensor, state: State, backwards: bool = False) -> tuple[Tensor, State]:
        """``x [T, N, I]`` and the state before the first step -> outputs [T, N, H], and the state after the last."""
        fused = self.fused_weights()
        if fused is not None:
            assert isinstance(self.inputs, FactorizedLinear)
            x = self.inputs.project(x)
            y, state = _fused(self.kind, x.flip(0) if backwards else x, [state], fused, self.bias_hh is not None)
            return y.flip(0) if backwards else y, state
        outputs = []
        steps = self.inputs(x).unbind(0)
        for step in steps[::-1] if backwards else steps:
            state = self._step(step, state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backwards else outputs), state

    def fused_weights(self) -> list[Tensor] | None:
        """PyTorch's own weights for an input that the basis has multiplied; None where `inputs` is no such layer.

        Nor is it one for those who watch it by hooks: they want to see it called.
        """
        layer = self.inputs
        if not isinstance(layer, FactorizedLinear):  # torch.export makes a class of its own of it
            return None
        if layer._forward_hooks or layer._forward_pre_hooks:
            return None
        found = [layer.coefficients.T.contiguous(), self.weight_hh]
        if self.bias_hh is not None:
            assert layer.bias is not None
            found += [layer.bias, self.bias_hh]
        return found

    def _step(self, read: Tensor, state: State) -> State:
        own = nn.functional.linear(state[0], self.weight_hh, self.bias_hh)
        if self.kind == "lstm":
            i, f, g, o = (read + own).chunk(4, dim=-1)
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c
        (r, z, n), (own_r, own_z, own_n) = read.chunk(3, dim=-1), own.chunk(3, dim=-1)
        z = torch.sigmoid(z + own_z)
        return (((1 - z) * torch.tanh(n + torch.sigmoid(r + own_r) * own_n) + z * state[0]),)


class OpenRecurrent(nn.Module):
    """What `nn.LSTM` and `nn.GRU` compute, called and answering like them; see the module's text.

    Each layer in each direction is a child, ``l0``, ``l0_reverse``, ``l1``, ... with the layer `inputs` in it. With
    factors in place of `inputs` it runs, and exports, as the fused operator on what the basis has multiplied: the
    operator's input is as wide as the rank.

    Args:
        kind: ``lstm`` or ``gru``.
        input_size: channels of the input.
        hidden_size: of the state of one direction.
        num_layers: one above the other.
        bias: whether there are biases.
        batch_first: input and output are [N, T, channels], else [T, N, channels].
        dropout: probability, in training mode, of leaving out a channel between two layers.
        bidirectional: whether a second direction runs backwards.
    """

    def __init__(
        self, kind: str, input_size: int, hidden_size: int, num_layers: int, bias: bool, batch_first: bool,
        dropout: float, bidirectional: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind, self.input_size, self.hidden_size, self.num_layers = kind, input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        for number in range(num_layers):
            width = input_size if number == 0 else hidden_size * len(self._suffixes)
            for suffix in self._suffixes:
                self.add_module(f"l{number}{suffix}", _Direction(kind, width, hidden_size, bias))

    @staticmethod
    def can_open(module: nn.Module) -> bool:
        """Whether `module` is an LSTM or a GRU of PyTorch, with float weights and without a projection."""
        return (
            type(module) in (nn.LSTM, nn.GRU)
            and getattr(module, "proj_size", 0) == 0
            and set(module._parameters) == {name for names in module._all_weights for name in names}  # type: ignore[union-attr]
        )

    @classmethod
    @torch.no_grad()
    def of(cls, module: Any) -> OpenRecurrent:
        """One that computes what `module`, see `can_open`, computes, with copies of its weights."""
        new = cls(
            "lstm" if isinstance(module, nn.LSTM) else "gru", module.input_size, module.hidden_size, module.num_layers,
            module.bias, module.batch_first, module.dropout, module.bidirectional,
        )  # fmt: skip
        new.to(module.weight_ih_l0)
        for name, child in new.named_children():
            assert isinstance(child, _Direction) and isinstance(child.inputs, nn.Linear)
            child.inputs.weight.copy_(getattr(module, f"weight_ih_{name}"))
            child.weight_hh.copy_(getattr(module, f"weight_hh_{name}"))
            if child.bias_hh is not None:
                child.inputs.bias.copy_(getattr(module, f"bias_ih_{name}"))
                child.bias_hh.copy_(getattr(module, f"bias_hh_{name}"))
        for mine, theirs in zip(new.parameters(), module.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)
        return new.train(module.training)

    def forward(self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Any]:
        """As `nn.LSTM` and `nn.GRU`, for inputs [N, T, I] or [T, N, I], or [T, I] without a batch."""
        single = input.dim() == 2
        x = input[:, None] if single else input.transpose(0, 1) if self.batch_first else input
        states = self._states(x, hx, single)
        count, last = len(self._suffixes), []
        for number in range(self.num_layers):
            if number and self.training and self.dropout:
                x = nn.functional.dropout(x, self.dropout)
            x, after = self._layer(number, x, states[number * count : (number + 1) * count])
            last += after
        ends = tuple(torch.stack(part) for part in zip(*last, strict=True))
        if single:
            x, ends = x[:, 0], tuple(part[:, 0] for part in ends)
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, ends if self.kind == "lstm" else ends[0]

    def flatten_parameters(self) -> None:
        """There is nothing to do; users' models call it."""

    def _direction(self, name: str) -> _Direction:
        found = self.get_submodule(name)
        assert isinstance(found, _Direction)
        return found

    @property
    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def _states(self, x: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None, single: bool) -> list[State]:
        """The state before the first step of every layer and direction."""
        parts = 2 if self.kind == "lstm" else 1
        if hx is None:
            zeros = x.new_zeros(self.num_layers * len(self._suffixes), x.shape[1], self.hidden_size)
            return [(zeros[i],) * parts for i in range(len(zeros))]
        given: State = hx if isinstance(hx, tuple) else (hx,)
        given = tuple(part[:, None] for part in given) if single else given
        return list(zip(*(part.unbind(0) for part in given), strict=True))

    def _layer(self, number: int, x: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        directions = [self._direction(f"l{number}{suffix}") for suffix in self._suffixes]
        fused = [weights for direction in directions if (weights := direction.fused_weights()) is not None]
        layers = [direction.inputs for direction in directions]
        first = layers[0]
        shared = isinstance(first, FactorizedLinear) and all(getattr(x, "basis", None) is first.basis for x in layers)
        if len(fused) == 2 and shared:
            # both directions read one projection: the operator has both in it
            assert isinstance(first, FactorizedLinear)
            y, ends = _fused(self.kind, first.project(x), states, [w for weights in fused for w in weights], self.bias)
            return y, [tuple(part[i] for part in ends) for i in range(2)]
        outputs, after = [], []
        for direction, state, backwards in zip(directions, states, (False, True), strict=False):
            y, end = direction(x, state, backwards)
            outputs.append(y)
            after.append(end)
        return torch.cat(outputs, dim=-1), after


def _fused(kind: str, x: Tensor, states: list[State], weights: list[Tensor], bias: bool) -> tuple[Tensor, State]:
    """PyTorch's operator, of one layer: outputs, and the last states, with an axis for the directions if it has two."""
    both = len(states) == 2
    parts = [torch.stack(part) for part in zip(*states, strict=True)]
    options = (bias, 1, 0.0, False, both, False)
    if kind == "lstm":
        y, *ends = torch.lstm(x, parts, weights, *options)
    else:
        y, *ends = torch.gru(x, parts[0], weights, *options)
    return y, tuple(ends if both else (end[0] for end in ends))
