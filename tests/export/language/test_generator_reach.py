"""How far the file of a generator is claimed: past every length at which the model changes, or to it and no further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from edgewright.edge_runtime.bundle.bundle import open_bundle
from edgewright.edge_runtime.errors import InputError
from edgewright.edge_runtime.language.generation import Generator, generate
from edgewright.export.language.generator import export_generator
from edgewright.export.language.reach import announced_lengths, claimed_positions, proven_reach
from edgewright.export.options import ExportOptions
from edgewright.models.sources.pretrained import LogitsOnly

TOKENS = torch.randint(64, (4, 24), generator=torch.Generator().manual_seed(0))
QUICK = ExportOptions(simplify="none")
_TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 96, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def tiny(kind: str, **settings: Any) -> LogitsOnly:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**_TINY, **settings})
    return LogitsOnly(getattr(transformers, f"{kind}ForCausalLM")(config), "input_ids").eval()


def longrope(original: int, **settings: Any) -> LogitsOnly:
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original, **factors}
    return tiny("Phi3", original_max_position_embeddings=original, rope_parameters=rope, **settings)


@pytest.fixture(scope="module")
def switching(tmp_path_factory: pytest.TempPathFactory) -> tuple[LogitsOnly, Path]:
    """A model whose rotary factors switch behind 40 tokens."""
    model, folder = longrope(40), tmp_path_factory.mktemp("reach") / "bundle"
    before = [(name, x.clone()) for name, x in model.named_buffers()]
    export_generator(model, TOKENS, folder, QUICK, decode_steps=4)
    assert [(name, x.tolist()) for name, x in model.named_buffers()] == [(name, x.tolist()) for name, x in before]
    assert model.model.model.rotary_emb.rope_type == "longrope"
    return model, folder


@pytest.mark.slow
def test_positions_end_where_rotary_factors_switch_and_say_so(switching: tuple[LogitsOnly, Path]) -> None:
    model, folder = switching
    generator = Generator(folder / "model.onnx", threads=1)
    assert generator.positions == 40
    with open_bundle(folder) as opened:
        assert any("positions end at 40" in note and "longrope" in note for note in opened.manifest.notes)
    with pytest.raises(InputError, match=r"41 tokens are more than .* 40 .*rotary factors .longrope. change"):
        generator.prefill([[1] * 41])
    found = generate(generator, [TOKENS[0, :20].tolist()], 64)
    ids = TOKENS[:1, :20]
    with torch.no_grad():
        for _ in found.tokens[0]:
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(dim=-1)], dim=1)
    # the last of them needs no position of its own
    assert found.context_full and ids.shape[1] == 41 and list(found.tokens[0]) == ids[0, 20:].tolist()


class _Other(LogitsOnly):
    """A model that answers otherwise than the file, behind `length` tokens: only there, or everywhere in such texts."""

    def __init__(self, model: LogitsOnly, length: int, everywhere: bool) -> None:
        super().__init__(model.model, model.input_name)
        self.length, self.everywhere = length, everywhere

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = super().forward(inputs, attention_mask)
        changed = torch.zeros_like(logits)
        changed[:, 0 if self.everywhere else self.length :] = 0.1 if inputs.shape[1] > self.length else 0.0
        return logits + changed


@pytest.mark.slow
@pytest.mark.parametrize("everywhere", [False, True])
def test_positions_end_before_the_first_wrong_length(switching: tuple[LogitsOnly, Path], everywhere: bool) -> None:
    """Also where no configuration says that something changes; the padded row is three tokens behind."""
    model, folder = switching
    other = _Other(model, 21, everywhere).eval()
    reach = proven_reach(other, folder / "model.onnx", TOKENS, 8192, 1e-3)
    assert reach.positions == 21 and "off by up to 0.1" in reach.reason and reach.max_abs_diff <= 1e-3
    whole = proven_reach(model, folder / "model.onnx", TOKENS, 8192, 1e-3)
    assert (whole.positions, whole.tokens, whole.crossed) == (40, 40, ())


@pytest.mark.parametrize(
    ("model", "lengths"),
    [
        (lambda: tiny("Mistral", sliding_window=24), {24: "sliding_window 24"}),
        (lambda: tiny("Gemma2", sliding_window=24), {24: "sliding_window 24"}),
        (lambda: tiny("Qwen2", sliding_window=24, use_sliding_window=False), {}),
        (
            lambda: tiny("Qwen2", sliding_window=24, use_sliding_window=True, max_window_layers=0),
            {24: "sliding_window 24"},
        ),
        (lambda: longrope(40), {40: "original_max_position_embeddings 40"}),
    ],
)  # fmt: skip
def test_lengths_are_read_off_the_configuration(model: Any, lengths: dict[int, str]) -> None:
    found = announced_lengths(model())
    assert {place: name for place, name in found.items() if place >= 22} == lengths


def test_a_length_that_the_proof_does_not_reach_ends_the_claim() -> None:
    model = tiny("Mistral", sliding_window=80)
    assert claimed_positions(model, 8192) == (96, "")
    positions, reason = claimed_positions(model, 64)
    assert positions == 79 and "sliding_window 80" in reason and "64 tokens" in reason
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    positions, reason = claimed_positions(tiny("Llama", rope_parameters=dynamic), 8192)
    assert positions == 96 and "dynamic" in reason


@pytest.mark.slow
def test_windows_and_experts_are_exported_and_the_proof_gets_past_the_window(tmp_path: Path) -> None:
    """The experts' form is that of the export alone."""
    model = tiny("Mixtral", sliding_window=24, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=48)
    before = model.model.get_experts_implementation()
    made = export_generator(model, TOKENS, tmp_path / "b", QUICK, decode_steps=4)
    assert model.model.get_experts_implementation() == before != {"": "batched_mm"}
    assert made.max_abs_diff < 1e-4 and Generator(made.path, threads=1).positions == 48
    assert any("over 48 tokens, past the lengths" in note and "24" in note for note in made.manifest.notes)
