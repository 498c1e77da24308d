"""The options of an export; part of a recipe, and of the public call `export_bundle`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from edgewright.edge_runtime.targets.target import target_named, target_names

from .target import known_target

Batch: TypeAlias = Literal["single", "dynamic", "compact"]
"""What a finished bundle takes; see `ExportOptions.batch`."""


class ToleranceOptions(BaseModel):
    """An element passes parity if ``|onnx - torch| <= abs + rel * |torch|``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    abs: float = Field(default=1e-4, ge=0.0, allow_inf_nan=False)
    """Absolute part."""
    rel: float = Field(default=1e-4, ge=0.0, allow_inf_nan=False)
    """Relative part."""


class ExportOptions(BaseModel):
    """How a model becomes a bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    batch: Literal["auto", "single", "dynamic", "compact"] = "auto"
    """`single`: one row a run; `dynamic`: any number of rows, for a model without exits; `compact`: any number of
    rows, and those that an exit decides leave before the next level; `auto`: `single` for a model with exits, else
    `dynamic`."""
    opset: int | None = Field(default=None, ge=18)
    """ONNX opset; null takes the exporter's own."""
    target: Annotated[str, AfterValidator(known_target), WithJsonSchema({"enum": list(target_names())})] | None = None
    """A kind of device (`edge_runtime/targets/`): an opset or a format that its oldest ONNX Runtime does not read is
    refused; null asks for nothing."""
    simplify: Literal["none", "onnxscript", "onnxsim"] = "onnxscript"
    """Graph simplifier; its result is kept only if it passes every check."""
    tolerance: ToleranceOptions = ToleranceOptions()
    """What PyTorch and ONNX Runtime may differ by; beyond it no bundle is written."""
    shared_across_exits: Literal["bytes", "latency"] = "bytes"
    """Where the weight of a convolution that several exits use lies: `bytes`, once in the outer graph
    (smallest file); `latency`, a copy in every branch that uses it (ONNX Runtime keeps its fast convolution
    layout)."""
    split: bool = False
    """Also write the levels between the exits as files of their own (`split/`), which a host runs in turn: for targets
    where an `If` is slow, or where a CUDA graph is to hold each level. Nothing happens for a model without exits."""
    generator: bool = False
    """A causal language model with its cache, which `edgewright generate` runs: tokens, mask and past keys and values
    in, logits and the longer cache out. Without it, windows of tokens in and logits out."""
    weights: Literal["float32", "int8", "int4"] = "float32"
    """Of a generator: bits of the weights of matrix products, 32 of them to a scale; `int4` leaves shared bases at 8.
    What it changes is measured and stands in the manifest."""
    proof_tokens: int = Field(default=8192, ge=64)
    """Of a generator: the longest text that its proof reads. A model whose configuration changes something at a length
    (a window, a chunk, other rotary factors) is claimed for longer texts only if the proof got past that length."""
    zip: bool = False
    """Also write the bundle as one zip file."""

    @model_validator(mode="after")
    def _check_opset(self) -> ExportOptions:
        newest = target_named(self.target).opset if self.target is not None else None
        if newest is not None and self.opset is not None and self.opset > newest:
            raise ValueError(f"opset {self.opset} is not read by the target {self.target!r}: take {newest} or less")
        return self
