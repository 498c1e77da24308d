"""LSTM and GRU made of linear layers: their input matrices can be factors, and their units can go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .factorized import FactorizedLinear

_GATES = {"lstm": 4, "gru": 3}
State = tuple[Tensor, ...]
"""Hidden state, and of an LSTM the cell state: each [N, H]."""


class _StateGates(nn.Linear):
    kept_whole = "the recurrent matrix, which the operator of an LSTM or GRU keeps whole"


class _Direction(nn.Module):
    """One layer in one direction: two linear layers, whose outputs are the gates of the first unit, then of the second.

    `input_gates` multiplies the input, for all steps at once; `state_gates` the state of the step before. Gates of a
    unit are neighbours, so that a unit can go like a filter. PyTorch and ONNX want them gate by gate.
    """

    def __init__(self, kind: str, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.input_gates: nn.Module = nn.Linear(width, _GATES[kind] * hidden, bias)
        self.state_gates: nn.Module = _StateGates(hidden, _GATES[kind] * hidden, bias)

    @property
    def hidden(self) -> int:
        """Width of the state."""
        layer: Any = self.state_gates
        return int(layer.in_features)

    def forward(self, x: Tensor, state: State, backwards: bool = False) -> tuple[Tensor, State]:
        """``x [T, N, I]`` and the state before the first step -> outputs [T, N, H], and the state after the last."""
        fused = self.fused_weights()
        if fused is not None:
            x = self.read(x)
            y, state = _fused(self.kind, x.flip(0) if backwards else x, [state], fused)
            return y.flip(0) if backwards else y, state
        outputs = []
        steps = self.input_gates(x).unbind(0)
        for step in steps[::-1] if backwards else steps:
            state = self._step(step, state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backwards else outputs), state

    def read(self, x: Tensor) -> Tensor:
        """What the fused operator takes of the input ``x [T, N, I]``: its product with the basis, if there is one."""
        layer = self.input_gates
        return layer.project(x) if isinstance(layer, FactorizedLinear) else x

    def fused_weights(self) -> list[Tensor] | None:
        """PyTorch's own weights for what `read` gives; None where a layer is another than those that are known.

        Nor are there any for those who watch a layer by hooks: they want to see it called.
        """
        first, second = self.input_gates, self.state_gates
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in (first, second)):
            return None
        # isinstance: torch.export makes a class of its own of them
        if isinstance(first, FactorizedLinear):
            found = [first.coefficients.T]
        elif isinstance(first, nn.Linear) and _is_plain(first):
            found = [first.weight]
        else:
            return None
        if not isinstance(second, nn.Linear) or not _is_plain(second):
            return None
        found.append(second.weight)
        if first.bias is not None:
            found += [first.bias, second.bias]
        return [self._by_gate(one) for one in found]

    def _by_gate(self, weight: Tensor) -> Tensor:
        """Rows in PyTorch's order, all units of the first gate first."""
        return weight.reshape(-1, _GATES[self.kind], *weight.shape[1:]).transpose(0, 1).flatten(0, 1).contiguous()

    def by_unit(self, weight: Tensor) -> Tensor:
        """Rows in the order of this layer, of rows in PyTorch's order."""
        return weight.reshape(_GATES[self.kind], -1, *weight.shape[1:]).transpose(0, 1).flatten(0, 1)

    def _step(self, read: Tensor, state: State) -> State:
        own = self.state_gates(state[0])
        if self.kind == "lstm":
            i, f, g, o = self._gates(read + own)
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c
        r, z, n = self._gates(read)
        own_r, own_z, own_n = self._gates(own)
        z = torch.sigmoid(z + own_z)
        return (((1 - z) * torch.tanh(n + torch.sigmoid(r + own_r) * own_n) + z * state[0]),)

    def _gates(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each [N, H], of ``x [N, gates of all units]``."""
        return x.view(len(x), -1, _GATES[self.kind]).unbind(-1)


def _is_plain(layer: nn.Linear) -> bool:
    """Whether it computes what PyTorch's own does, with a weight that is a parameter."""
    return type(layer).forward is nn.Linear.forward and "forward" not in vars(layer)


class OpenRecurrent(nn.Module):
    """What `nn.LSTM` and `nn.GRU` compute, called and answering like them; see the module's text.

    Each layer in each direction is a child, ``l0``, ``l0_reverse``, ``l1``, ... with the layers `input_gates` and
    `state_gates` in it. It runs, and exports, as the fused operator; with factors in place of `input_gates` on what the
    basis has multiplied, so that the operator's input is as wide as the rank. The matrices of `state_gates` stay whole:
    an ONNX LSTM or GRU has no place for two factors of them, and steps that are written out would cost a device far
    more than they save. Once units have gone, each child may have a width of its own; the last states are a tuple then,
    one [N, H] for each child, where PyTorch's are one tensor.

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
            assert isinstance(child, _Direction)
            for layer, part in ((child.input_gates, "ih"), (child.state_gates, "hh")):
                for what, mine in layer.named_parameters():
                    theirs = getattr(module, f"{what}_{part}_{name}")
                    mine.copy_(child.by_unit(theirs))
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
        if single:
            x, last = x[:, 0], [tuple(part[0] for part in state) for state in last]
        elif self.batch_first:
            x = x.transpose(0, 1)
        equal = len({state[0].shape[-1] for state in last}) == 1
        ends = tuple(torch.stack(part) if equal else part for part in zip(*last, strict=True))
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
            names = [f"l{number}{suffix}" for number in range(self.num_layers) for suffix in self._suffixes]
            return [(x.new_zeros(x.shape[1], self._direction(name).hidden),) * parts for name in names]
        given: State = hx if isinstance(hx, tuple) else (hx,)
        given = tuple(part[:, None] for part in given) if single else given
        return list(zip(*(part.unbind(0) for part in given), strict=True))

    def _layer(self, number: int, x: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        directions = [self._direction(f"l{number}{suffix}") for suffix in self._suffixes]
        fused = [weights for direction in directions if (weights := direction.fused_weights()) is not None]
        layers = [direction.input_gates for direction in directions]
        one_read = len({id(getattr(layer, "basis", None)) for layer in layers}) == 1
        if len(fused) == 2 and one_read and directions[0].hidden == directions[1].hidden:
            # both directions read the input, or one projection of it: the operator has both in it
            read = directions[0].read(x)
            y, ends = _fused(self.kind, read, states, [w for weights in fused for w in weights])
            return y, [tuple(part[i] for part in ends) for i in range(2)]
        outputs, after = [], []
        for direction, state, backwards in zip(directions, states, (False, True), strict=False):
            y, end = direction(x, state, backwards)
            outputs.append(y)
            after.append(end)
        return torch.cat(outputs, dim=-1), after


def _fused(kind: str, x: Tensor, states: list[State], weights: list[Tensor]) -> tuple[Tensor, State]:
    """PyTorch's operator, of one layer: outputs, and the last states, with an axis for the directions if it has two."""
    both = len(states) == 2
    parts = [torch.stack(part) for part in zip(*states, strict=True)]
    options = (len(weights) == 4 * len(states), 1, 0.0, False, both, False)
    if kind == "lstm":
        y, *ends = torch.lstm(x, parts, weights, *options)
    else:
        y, *ends = torch.gru(x, parts[0], weights, *options)
    return y, tuple(ends if both else (end[0] for end in ends))
