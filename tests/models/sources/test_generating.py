"""What cannot generate, or has no logits, is told what it is and what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from edgewright.models.layers.cached_step import CachedStep
from edgewright.models.registry import build
from edgewright.models.sources.capturable import batched_experts, fixed_rotary, rotary_limit
from edgewright.models.sources.pretrained import LogitsOnly

_TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
_LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip


def _of(kind: str, config: str | None = None, **settings: Any) -> nn.Module:
    made = getattr(transformers, f"{config or kind}Config")(**settings)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: _of("Lfm2", layer_types=["conv", "full_attention"] * 2, **_TINY), "hybrid.* conv .*with export"),
        (lambda: _of("Qwen3_5", "Qwen3_5Text", **_TINY, **_LINEAR), "hybrid.* linear_attention "),
        (lambda: _of("RecurrentGemma", **_TINY, lru_width=32), "hybrid.* linear_attention "),
        (lambda: _of("Mamba", vocab_size=64, hidden_size=16, num_hidden_layers=1), "recurrent state .cache_params"),
        (
            lambda: _of("Rwkv", vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2),
            "recurrent state .state",
        ),
        (lambda: transformers.BertForMaskedLM(_bert()), "takes no cache"),
        (lambda: transformers.BartForConditionalGeneration(_bart()), "an encoder-decoder"),
    ],
)  # fmt: skip
def test_what_has_no_cache_of_keys_and_values_alone_says_what_it_is(model: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CachedStep(LogitsOnly(model(), "input_ids"))


def _bert() -> Any:
    return transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )


def _bart() -> Any:
    return transformers.BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
    )  # fmt: skip


def test_a_cache_whose_switch_is_among_the_further_arguments_is_one() -> None:
    model = _of("GraniteMoe", **{**_TINY, "num_hidden_layers": 1}, num_local_experts=4, num_experts_per_tok=2)
    step = CachedStep(LogitsOnly(model, "input_ids"))
    assert [list(x.shape) for x in step.empty_past(2)] == [[2, 2, 0, 8]] * 2


def test_models_without_a_head_and_encoder_decoders_are_refused_with_the_adapter_they_need(tmp_path: Path) -> None:
    t5 = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    whisper = transformers.WhisperConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=8,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    made = {
        transformers.BertModel(_bert()): "BertModel, the network without a head.*AutoModelForCausalLM.*python:",
        transformers.T5EncoderModel(t5): "T5EncoderModel is the network without a head",
        transformers.T5ForConditionalGeneration(t5): "T5ForCond.*encoder-decoder.*decoder_input_ids",
        transformers.WhisperForConditionalGeneration(whisper): "WhisperForCond.*encoder-decoder.*part: encoder",
    }
    for model, words in made.items():
        place = tmp_path / type(model).__name__
        model.save_pretrained(place)
        with pytest.raises(ValueError, match=words):
            build(f"hf:{place}", {}, Path())(torch.ones(1, 4, dtype=torch.int64))
    # it makes the decoder's tokens of the encoder's
    transformers.BartForConditionalGeneration(_bart()).save_pretrained(tmp_path / "bart")
    assert build(f"hf:{tmp_path / 'bart'}", {}, Path())(torch.ones(1, 4, dtype=torch.int64)).shape == (1, 4, 64)


def test_forms_for_an_export_are_restored_also_after_an_error() -> None:
    moe = _of("Mixtral", **{**_TINY, "num_hidden_layers": 1}, num_local_experts=2, num_experts_per_tok=1)
    before = moe.get_experts_implementation()  # type: ignore[operator]
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    llama = _of("Llama", **{**_TINY, "num_hidden_layers": 1}, rope_parameters=dynamic)
    rotary: Any = llama.get_submodule("model.rotary_emb")
    assert rotary_limit(LogitsOnly(llama, "input_ids")) is not None and rotary_limit(moe) is None
    with pytest.raises(RuntimeError), batched_experts(moe), fixed_rotary(llama):
        assert moe.get_experts_implementation() == {"": "batched_mm"}  # type: ignore[operator]
        assert rotary.rope_type == "default"
        raise RuntimeError
    assert moe.get_experts_implementation() == before and rotary.rope_type == "dynamic"  # type: ignore[operator]
    with batched_experts(nn.Linear(2, 2)):
        pass
