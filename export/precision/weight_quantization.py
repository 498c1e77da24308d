"""Weights of a written file in fewer bits, by `onnxruntime.quantization`: products stay float32 (METHODS §8).

Bases are read by several layers, and an error in them reaches all of these: they keep 8 bits where the rest has 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from edgewright.edge_runtime.language.generation import Generator
from edgewright.models.layers.factorized import SharedBasis
from edgewright.models.sources.pretrained import LogitsOnly

from ..accounts.ledger import stored_bytes
from ..graph.model_file import EXTERNAL_ABOVE, data_file, save_model

WeightFormat: TypeAlias = Literal["float32", "int8", "int4"]

_BLOCK = 32
"""Weights that have one scale and one zero point.

In 4 bits dense SmolLM2 loses 0.26 nats per token so, 0.30 without zero points; with half of its decoder gone both 0.68.
"""


@dataclass(frozen=True)
class Quantization:
    """What rounding the weights of matrix products did.

    Attributes:
        weights: the format that was asked for.
        products: how many matrix products have rounded weights, by their bits.
        bytes_before: weight bytes of the float32 file.
        bytes_after: of the rounded one, scales counted.
        max_abs_diff: largest difference of a logit to PyTorch's float32 model, on the proof's prompts.
        divergence: mean Kullback-Leibler divergence of the prediction from that model's, nats per token.
        equal_tokens: share of positions with the same likeliest token.
    """

    weights: WeightFormat
    products: dict[int, int]
    bytes_before: int
    bytes_after: int
    max_abs_diff: float
    divergence: float
    equal_tokens: float

    def text(self) -> str:
        """One sentence for the manifest."""
        products = " and ".join(f"{count} in {bits} bits" for bits, count in sorted(self.products.items()))
        return (
            f"weights {self.weights}: matrix products with rounded weights: {products or 'none'}; "
            f"{self.bytes_before} -> {self.bytes_after} weight bytes; to PyTorch's float32: logits differ by up to "
            f"{self.max_abs_diff:.3g}, {self.divergence:.3g} nats per token, likeliest token equal at "
            f"{self.equal_tokens:.1%} of the positions"
        )


def quantize_weights(
    model: LogitsOnly, path: Path, weights: WeightFormat, prompts: Tensor, external_above: int = EXTERNAL_ABOVE
) -> Quantization:
    """Rounds the constant weights of the file's matrix products, in place, and measures what that changes.

    A weight that something else reads too, such as an embedding that is the head as well, stays as it is.

    Args:
        model: what the file was made from.
        path: the file, with its external data if it has any.
        weights: ``int8``, or ``int4`` with 8 bits for bases.
        prompts: int64 [N, T], what it is measured on.
        external_above: see `save_model`.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    before = stored_bytes(ir.load(path))
    proto = onnx.load(str(path))
    bases = {name for name, _ in model.named_parameters() if _is_basis(model, name)}
    readers: dict[str, int] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    stored = {tensor.name for tensor in proto.graph.initializer if len(tensor.dims) == 2}
    bits_of = {
        node.name: 8 if weights == "int8" or node.input[1] in bases else 4
        for node in proto.graph.node
        if node.op_type == "MatMul" and node.input[1] in stored and readers[node.input[1]] == 1
    }
    for bits in sorted(set(bits_of.values())):
        chosen = [name for name, wanted in bits_of.items() if wanted == bits]
        quantizer = MatMulNBitsQuantizer(
            proto, bits=bits, block_size=_BLOCK, is_symmetric=False, nodes_to_include=chosen
        )
        quantizer.process()
        proto = quantizer.model.model
    rounded = ir.from_proto(proto)
    data_file(path).unlink(missing_ok=True)
    save_model(rounded, path, external_above)
    counts = {bits: sum(x == bits for x in bits_of.values()) for bits in set(bits_of.values())}
    after = stored_bytes(rounded)
    return Quantization(weights, counts, before, after, *_changes(model, path, prompts))


def _is_basis(model: LogitsOnly, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), SharedBasis)


@torch.no_grad()
def _changes(model: LogitsOnly, path: Path, prompts: Tensor) -> tuple[float, float, float]:
    """Largest difference of a logit, mean divergence, and share of equal likeliest tokens."""
    found = torch.from_numpy(np.array(Generator(path, threads=1).prefill(prompts.tolist()))).double()
    expected = model(prompts).double()
    ours, theirs = (x.log_softmax(dim=-1).flatten(0, -2) for x in (found, expected))
    divergence = torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    equal = (found.argmax(-1) == expected.argmax(-1)).double().mean()
    return float((found - expected).abs().max()), float(divergence), float(equal)
