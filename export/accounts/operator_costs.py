"""Multiply-accumulates of ONNX operators from the shapes they run with (METHODS §0.1).

A MAC counts as a weight's if one factor is constant, as attention's if both depend on the input, and not at all if
both are constant: ONNX Runtime computes such a product once, when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TypeAlias

import onnx
import onnx_ir as ir

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Factor:
    """A value that is multiplied: what it is like when one row runs."""

    shape: Shape
    constant: bool


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates with a weight, and of two activations."""

    weight: int = 0
    attention: int = 0

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.weight + other.weight, self.attention + other.attention)


def _product(amount: int, left: Factor, right: Factor) -> Macs:
    if left.constant and right.constant:
        return Macs()
    return Macs(amount, 0) if left.constant or right.constant else Macs(0, amount)


def _convolution(_: ir.Node, factors: Sequence[Factor | None], output: Shape) -> Macs:
    x, weight = _both(factors)
    return _product(prod(output) * prod(weight.shape[1:]), x, weight)


def _transposed_convolution(_: ir.Node, factors: Sequence[Factor | None], __: Shape) -> Macs:
    x, weight = _both(factors)
    return _product(prod(x.shape) * prod(weight.shape[1:]), x, weight)


def _matrix_product(node: ir.Node, factors: Sequence[Factor | None], output: Shape) -> Macs:
    left, right = _both(factors)
    transposed = node.op_type == "Gemm" and _integer(node, "transA", 0) == 1
    return _product(prod(output) * (left.shape[0] if transposed else left.shape[-1]), left, right)


def _einsum(node: ir.Node, factors: Sequence[Factor | None], _: Shape) -> Macs:
    """Factor after factor, from the left; axes that only one side has are summed before, products without a sum are
    elementwise and free."""
    terms, result = _einsum_axes(node.attributes["equation"].as_string(), [f for f in factors if f is not None])
    given = [f for f in factors if f is not None]
    sizes = {axis: size for term, f in zip(terms, given, strict=True) for axis, size in zip(term, f.shape, strict=True)}
    macs, axes, constant = Macs(), set(terms[0]), given[0].constant
    for i in range(1, len(terms)):
        later = set(result).union(*terms[i + 1 :])
        own = set(terms[i])
        summed = (axes & own) - later
        if summed:
            involved = (axes & own) | ((axes | own) & later)
            amount = prod(sizes[axis] for axis in involved)
            macs += _product(amount, Factor((), constant), given[i])
        axes, constant = (axes | own) & later, constant and given[i].constant
    return macs


def _einsum_axes(equation: str, factors: Sequence[Factor]) -> tuple[list[list[str]], list[str]]:
    """Names of every factor's axes and of the result's; those behind an ellipsis are counted from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spread = [len(f.shape) - len(term.replace("...", "")) for term, f in zip(terms, factors, strict=True)]
    most = max((n for term, n in zip(terms, spread, strict=True) if "..." in term), default=0)

    def names(term: str, ellipsis: int) -> list[str]:
        before, dots, after = term.partition("...")
        return [*before, *([f".{i}" for i in range(ellipsis, 0, -1)] if dots else []), *after]

    if not arrow:
        letters = [c for c in left if c.isalpha()]
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return [names(term, n) for term, n in zip(terms, spread, strict=True)], names(right, most)


def _recurrence(_: ir.Node, factors: Sequence[Factor | None], __: Shape) -> Macs:
    """Every step multiplies the input and the hidden state with all gates' weights, in every direction."""
    x, weight, hidden_weight = factors[:3]
    assert x is not None and weight is not None and hidden_weight is not None
    steps = x.shape[0] * x.shape[1]
    return _product(steps * prod(weight.shape), x, weight) + _product(
        steps * prod(hidden_weight.shape), Factor((), False), hidden_weight
    )


def _attention(_: ir.Node, factors: Sequence[Factor | None], output: Shape) -> Macs:
    """softmax(Q Kᵀ) V over all heads and the cached positions: each query element meets every position once, and so
    does each output element."""
    query, key, value = factors[:3]
    past = factors[4] if len(factors) > 4 else None
    assert query is not None and key is not None and value is not None
    positions = key.shape[-2] + (past.shape[-2] if past is not None else 0)
    cached = past is not None and not past.constant
    weights = Factor((), query.constant and key.constant and not cached)
    return _product(prod(query.shape) * positions, query, Factor((), key.constant and not cached)) + _product(
        prod(output) * positions, weights, Factor((), value.constant and not cached)
    )


def _both(factors: Sequence[Factor | None]) -> tuple[Factor, Factor]:
    left, right = factors[:2]
    assert left is not None and right is not None
    return left, right


def _integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


@dataclass(frozen=True)
class _Rule:
    formula: Callable[[ir.Node, Sequence[Factor | None], Shape], Macs]
    inputs: tuple[int, ...] = (0, 1)


_RULES: Mapping[str, _Rule] = {
    "Conv": _Rule(_convolution),
    "ConvInteger": _Rule(_convolution),
    "QLinearConv": _Rule(_convolution, (0, 3)),
    "DeformConv": _Rule(_convolution),
    "ConvTranspose": _Rule(_transposed_convolution),
    "Gemm": _Rule(_matrix_product),
    "MatMul": _Rule(_matrix_product),
    "MatMulInteger": _Rule(_matrix_product),
    "QLinearMatMul": _Rule(_matrix_product, (0, 3)),
    "Einsum": _Rule(_einsum, ()),
    "LSTM": _Rule(_recurrence, (0, 1, 2)),
    "GRU": _Rule(_recurrence, (0, 1, 2)),
    "RNN": _Rule(_recurrence, (0, 1, 2)),
    "Attention": _Rule(_attention, (0, 1, 2, 3, 4)),
}
"""Formula and positions of the inputs it asks for; ``()`` is all of them."""

_WITHOUT_FORMULA = frozenset({"DFT", "STFT", "Det", "Loop", "Scan", "If", "SequenceMap"})
"""Standard operators that multiply, or hold graphs that may."""

_KNOWN_OPSET = 24
"""Standard operators that came later may multiply: nobody has looked."""


def is_standard(node: ir.Node) -> bool:
    """Whether the node is an operator of ONNX itself."""
    return node.domain in ("", "ai.onnx")


def factors_of(node: ir.Node) -> list[ir.Value | None] | None:
    """The inputs whose shapes `macs_of` asks for; None for a node without a formula."""
    rule = _RULES.get(node.op_type) if is_standard(node) else None
    if rule is None:
        return None
    return [node.inputs[i] if i < len(node.inputs) else None for i in rule.inputs or range(len(node.inputs))]


def macs_of(node: ir.Node, factors: Sequence[Factor | None], output: Shape) -> Macs:
    """What a node with a formula costs.

    Args:
        node: an operator for which `factors_of` is not None.
        factors: what the values of `factors_of` are like, None where it has None.
        output: shape of the node's first output.
    """
    return _RULES[node.op_type].formula(node, factors, output)


def may_multiply_unknown(node: ir.Node) -> bool:
    """Whether the node may hold products that `macs_of` knows nothing of."""
    if is_standard(node) and node.op_type in _RULES:
        return False
    return not is_standard(node) or node.op_type in _WITHOUT_FORMULA or node.op_type not in _known_operators()


@lru_cache(maxsize=1)
def _known_operators() -> frozenset[str]:
    return frozenset(
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == "" and schema.since_version <= _KNOWN_OPSET
    )
