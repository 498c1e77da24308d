"""What a model of the transformers library returns, as tensors: pooled vectors, outputs by name, halves of an
encoder-decoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

POOLS, PARTS = ("mean", "cls"), ("encoder", "decoder")
ARGUMENTS = ("pool", "outputs", "part")
"""What an ``hf:`` model may be given; one of them at a time, `pool` also beside ``part: encoder``."""


class Pooled(nn.Module):
    """One vector for each row: what a network without a head makes of all its tokens or places.

    ``[N, T] token ids`` (and optionally the mask [N, T], 1 for a token and 0 for padding), or whatever the network
    takes, ``-> [N, D]``.
    """

    def __init__(self, model: nn.Module, input_name: str, pool: str) -> None:
        """Wraps `model`.

        Args:
            model: returns an object with ``last_hidden_state``, [N, T, D] or, of images, [N, D, H, W].
            input_name: keyword of its main input.
            pool: ``mean`` over the tokens that the mask leaves, or ``cls``, the first.
        """
        super().__init__()
        self.model, self.input_name, self.pool = model, input_name, pool

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Vectors [N, D], float32.

        Raises:
            ValueError: the model gives no hidden states, or places where `pool` wants a first token.
        """
        states = hidden_states(self.model, self.input_name, inputs, attention_mask)
        if states.dim() == 4:
            if self.pool == "cls":
                raise ValueError(f"{type(self.model).__name__} gives a map {list(states.shape)}, no tokens: pool: mean")
            return states.mean(dim=(2, 3))
        if self.pool == "cls":
            return states[:, 0]
        # a mask over other positions than the states' (sound that is shortened) says nothing about them
        if attention_mask is None or attention_mask.shape[1] != states.shape[1]:
            return states.mean(dim=1)
        weight = attention_mask.to(states.dtype)[:, :, None]
        return (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)


class NamedOutputs(nn.Module):
    """Calls a model positionally and returns some of its outputs by name."""

    def __init__(self, model: nn.Module, input_name: str, outputs: Sequence[str]) -> None:
        """Wraps `model`.

        Args:
            model: returns an object with attributes.
            input_name: keyword of its main input.
            outputs: names of the attributes, tensors.
        """
        super().__init__()
        self.model, self.input_name, self.outputs = model, input_name, tuple(outputs)

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """The outputs.

        Raises:
            ValueError: one of them is not there; says which are.
        """
        output = _call(self.model, self.input_name, inputs, attention_mask)
        there = [name for name, value in output.items() if isinstance(value, Tensor)]
        for name in self.outputs:
            if name not in there:
                raise ValueError(f"{type(self.model).__name__} has no output {name!r}; it has {', '.join(there)}")
        return {name: output[name] for name in self.outputs}


class EncoderPart(nn.Module):
    """The encoder of an encoder-decoder: ``input (and its mask) -> hidden states [N, T, D]``."""

    def __init__(self, encoder: nn.Module, input_name: str) -> None:
        super().__init__()
        self.model, self.input_name = encoder, input_name

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states, float32."""
        return hidden_states(self.model, self.input_name, inputs, attention_mask)


class DecoderPart(nn.Module):
    """The decoder of an encoder-decoder with its head, without the encoder.

    ``tokens so far int64 [N, T], hidden states of the encoder float32 [N, S, D] (and the mask [N, S] of its input) ->
    logits [N, T, V]``.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wraps `model`, whose encoder is taken out."""
        super().__init__()
        encoder = model.get_encoder()  # type: ignore[operator]
        path = next(path for path, module in model.named_modules() if module is encoder)
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Module())
        self.model = model

    def forward(self, tokens: Tensor, encoder_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits, float32."""
        from transformers.modeling_outputs import BaseModelOutput

        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_states),
            decoder_input_ids=tokens,
            use_cache=False,
            **mask,
        )
        logits: Tensor = output.logits
        return logits


def check_arguments(args: Mapping[str, Any]) -> None:
    """Refuses what is no argument of an ``hf:`` model.

    Raises:
        ValueError: names it.
    """
    for key in args:
        if key not in ARGUMENTS:
            raise ValueError(f"has no argument {key!r}; there are {', '.join(ARGUMENTS)}: its files say the rest")
    for key, known in (("pool", POOLS), ("part", PARTS)):
        if key in args and args[key] not in known:
            raise ValueError(f"{key} is {args[key]!r}; there are {' and '.join(known)}")
    outputs = args.get("outputs", ("logits",))
    if isinstance(outputs, str) or not outputs or not all(isinstance(name, str) for name in outputs):
        raise ValueError(f"outputs is {outputs!r}: give a list of names")
    if len(args) > 1 and not (args.keys() == {"pool", "part"} and args["part"] == "encoder"):
        raise ValueError(f"{' and '.join(args)} do not go together: give one (pool goes with part: encoder)")


def with_head(model: nn.Module, args: Mapping[str, Any]) -> nn.Module | None:
    """`model` as `args` want it, or by the outputs that its class has; None where its logits are meant.

    Args:
        model: as loaded.
        args: as `check_arguments` lets pass.

    Raises:
        ValueError: `args` want of it what it has not.
    """
    name: str = model.main_input_name  # type: ignore[assignment]
    if "part" in args:
        accepted = inspect.signature(model.forward).parameters
        if "decoder_input_ids" not in accepted or not hasattr(model, "get_encoder"):
            raise ValueError(
                f"{type(model).__name__} is no encoder-decoder, which part: {args['part']} takes one half of"
            )
        if args["part"] == "decoder":
            if model.get_output_embeddings() is None:  # type: ignore[operator]
                raise ValueError(f"{type(model).__name__} has no head over tokens: save it ...ForConditionalGeneration")
            return DecoderPart(model)
        encoder = model.get_encoder()  # type: ignore[operator]
        return Pooled(encoder, name, args["pool"]) if "pool" in args else EncoderPart(encoder, name)
    if "pool" in args:
        # the task's head is left out, the network that it stands on is what gives hidden states
        base = model.base_model
        assert isinstance(base, nn.Module)
        _without_pooler(base)
        return Pooled(base, name, args["pool"])
    if "outputs" in args:
        return NamedOutputs(model, name, args["outputs"])
    if type(model).__name__.endswith("ForQuestionAnswering"):
        return NamedOutputs(model, name, ("start_logits", "end_logits"))
    return None


def hidden_states(model: nn.Module, input_name: str, inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
    """``last_hidden_state`` of what `model` returns.

    Raises:
        ValueError: it has none.
    """
    states: Tensor | None = getattr(_call(model, input_name, inputs, attention_mask), "last_hidden_state", None)
    if states is None:
        raise ValueError(f"{type(model).__name__} gives no last_hidden_state, which is what is pooled")
    return states


def _call(model: nn.Module, input_name: str, inputs: Tensor, attention_mask: Tensor | None) -> Any:
    mask = {} if attention_mask is None else {"attention_mask": attention_mask}
    cached = getattr(getattr(model, "config", None), "use_cache", None) is not None
    options = {"use_cache": False} if cached and "use_cache" in inspect.signature(model.forward).parameters else {}
    return model(**{input_name: inputs}, **mask, **options)


@torch.no_grad()
def _without_pooler(model: nn.Module) -> None:
    """Takes out the layer that a network puts on its first token beside its states, where it can do without."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        forward = inspect.getsource(type(model).forward)
        if "self.pooler is not None" in forward:
            model.pooler = None  # type: ignore[assignment]
