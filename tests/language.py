"""A text and a random LLaMA-type model of two layers, for tests of language models."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

TEXT = " ".join(f"{i} times {i + 1} is {i * (i + 1)}." for i in range(200))


def write_llama(folder: Path, layers: int = 2, seed: int = 0) -> Path:
    """Saves it as `save_pretrained` does: bytes as vocabulary, grouped queries, tied embeddings."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
