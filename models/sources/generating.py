"""What a model of the transformers library is, as far as generating goes: a true sentence for each that cannot."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

_RECURRENT = ("cache_params", "state", "rnn_state", "recurrent_state")
"""Arguments of a forward that carries a state from token to token."""

_KEYS_AND_VALUES = frozenset(
    {"attention", "full_attention", "sliding_attention", "chunked_attention", "dense", "sparse", "moe", "mlp", "dummy"}
)
"""Kinds of layers, in the words of a configuration, that keep keys and values of the tokens, or nothing."""

_WHOLE = (
    "What is left without a cache: train, prune and factorize it; with export.generator false the file reads whole "
    "windows of tokens, where torch can export its layers (those that go token by token become a long graph)"
)


class NotOneAnswer(ValueError):
    """A model of which a call with one input does not give logits; says what it is and what it needs."""


def refuse_without_cache(model: nn.Module) -> None:
    """Lets pass what keeps keys and values of every token, and them alone.

    Args:
        model: of the transformers library.

    Raises:
        ValueError: says what it is instead, and what can be done with it.
    """
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in accepted:
        raise ValueError(f"{name} is an encoder-decoder: {_ADAPTER}")
    recurrent = next((argument for argument in _RECURRENT if argument in accepted), None)
    if recurrent is not None and "past_key_values" not in accepted:
        raise ValueError(
            f"{name} keeps a recurrent state ({recurrent}) and no keys and values: a generator's file holds a cache of "
            f"keys and values, and its first tokens would need another graph than the following ones. {_WHOLE}"
        )
    if not {"attention_mask", "past_key_values"} <= accepted.keys():
        raise ValueError(
            f"{name} takes no cache (attention_mask, past_key_values): only causal language models generate"
        )
    others = sorted(_kinds_of_layers(config) - _KEYS_AND_VALUES)
    if others:
        raise ValueError(
            f"{name} is a hybrid: its layers of the kind {', '.join(others)} keep a state of their own beside or in "
            f"place of keys and values, which a generator's file does not hold. {_WHOLE}"
        )


def refuse_encoder_decoder(model: nn.Module) -> None:
    """Lets pass what answers a single input.

    Args:
        model: as loaded.

    Raises:
        NotOneAnswer: it is an encoder-decoder whose decoder wants an input of its own.
    """
    # some make the decoder's tokens of the encoder's by themselves
    if "decoder_input_ids" in inspect.signature(model.forward).parameters and not _shifts_by_itself(model):
        raise NotOneAnswer(f"it holds {type(model).__name__}, an encoder-decoder: {_ADAPTER}")


_ADAPTER = (
    "its decoder reads what its encoder made of the input beside tokens of its own, two networks that run a different "
    "number of times. Take one in each recipe: `model.args: {part: encoder}` gives the encoder's hidden states, `part: "
    "decoder` takes the tokens so far and those states and gives logits. One network for both needs a `python:` model "
    "that takes input and decoder_input_ids and returns the logits alone"
)

HEADLESS = (
    "the network without a head: it returns hidden states and no logits. For one vector a row give `model.args: "
    "{pool: mean}` (or cls); else save it with the head of its task "
    "(AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForImageClassification, ...), or wrap it in a "
    "`python:` model whose forward puts a layer of its own on last_hidden_state and returns the logits"
)


def _kinds_of_layers(config: Any) -> set[str]:
    """Kinds of layers that a configuration names."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return {str(kind) for kind in (getattr(text, "layer_types", None) or ())}


def _shifts_by_itself(model: nn.Module) -> bool:
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return False
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device))
    except (ValueError, TypeError):
        return False
    return True
