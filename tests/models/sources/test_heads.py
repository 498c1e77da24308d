"""Heads of the transformers library: tiny random configurations, saved and named by folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from edgewright.edge_runtime import AnswerSpec, load, verify
from edgewright.export import export_bundle
from edgewright.models.registry import build
from edgewright.pipeline.tasks.array_task import ArrayTask

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 9, dtype=torch.int64)
MASK[1, 6:] = 0


def _bert(**options: Any) -> Any:
    return transformers.BertConfig(**_TEXT, **options)


def _distilbert(**options: Any) -> Any:
    return transformers.DistilBertConfig(vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=32, **options)


def _modernbert() -> Any:
    return transformers.ModernBertConfig(
        **_TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    )


def _t5() -> Any:
    return transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )


def _whisper() -> Any:
    return transformers.WhisperConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=16,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip


def _vit() -> Any:
    return transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )


def _mobilevit() -> Any:
    return transformers.MobileViTConfig(
        image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 16], num_attention_heads=2
    )


def _segformer() -> Any:
    return transformers.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        num_labels=3,
    )  # fmt: skip


def _wav2vec2() -> Any:
    return transformers.Wav2Vec2Config(
        **_TEXT, conv_dim=[8, 8], conv_stride=[4, 4], conv_kernel=[8, 8], num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=3,
    )  # fmt: skip


def _saved(kind: str, config: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    whole = getattr(transformers, kind)(config).eval()
    whole.save_pretrained(folder)
    return whole


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))

LOGITS = {
    "BertForSequenceClassification": (_bert, (IDS, MASK), (2, 2)),
    "BertForTokenClassification": (_bert, (IDS, MASK), (2, 9, 2)),
    "DistilBertForSequenceClassification": (_distilbert, (IDS, MASK), (2, 2)),
    "ModernBertForSequenceClassification": (_modernbert, (IDS, MASK), (2, 2)),
    "ViTForImageClassification": (_vit, (IMAGES[:, :, :16, :16],), (2, 2)),
    "MobileViTForImageClassification": (_mobilevit, (IMAGES,), (2, 2)),
    "SegformerForImageClassification": (_segformer, (IMAGES,), (2, 3)),
    "SegformerForSemanticSegmentation": (_segformer, (IMAGES,), (2, 3, 16, 16)),
    "Wav2Vec2ForSequenceClassification": (_wav2vec2, (SOUND,), (2, 3)),
}


@pytest.mark.parametrize("kind", LOGITS)
def test_a_head_gives_its_logits(kind: str, tmp_path: Path) -> None:
    config, inputs, shape = LOGITS[kind]
    whole = _saved(kind, config(), tmp_path)
    mask = {"attention_mask": inputs[1]} if len(inputs) > 1 else {}
    with torch.no_grad():
        found = build(f"hf:{tmp_path}", {}, Path())(*inputs)
        wanted = whole(**{whole.main_input_name: inputs[0]}, **mask).logits
    assert found.shape == shape and torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["BertForQuestionAnswering", "DistilBertForQuestionAnswering"])
def test_answers_to_questions_are_two_outputs_by_name(kind: str, tmp_path: Path) -> None:
    whole = _saved(kind, _bert() if kind.startswith("Bert") else _distilbert(), tmp_path)
    with torch.no_grad():
        found = build(f"hf:{tmp_path}", {}, Path())(IDS, MASK)
        wanted = whole(input_ids=IDS, attention_mask=MASK)
    assert list(found) == ["start_logits", "end_logits"]
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in found)


ENCODERS = {
    "BertModel": (_bert, (IDS, MASK)),
    "DistilBertModel": (_distilbert, (IDS, MASK)),
    "ModernBertModel": (_modernbert, (IDS, MASK)),
    "ViTModel": (_vit, (IMAGES[:, :, :16, :16],)),
    "MobileViTModel": (_mobilevit, (IMAGES,)),
    "SegformerModel": (_segformer, (IMAGES,)),
    "Wav2Vec2Model": (_wav2vec2, (SOUND,)),
    "BertForMaskedLM": (_bert, (IDS, MASK)),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_without_a_head_states_are_pooled(kind: str, tmp_path: Path) -> None:
    config, inputs = ENCODERS[kind]
    whole = _saved(kind, config(), tmp_path)
    mask = {"attention_mask": inputs[1]} if len(inputs) > 1 else {}
    model = build(f"hf:{tmp_path}", {"pool": "mean"}, Path())
    with torch.no_grad():
        found = model(*inputs)
        states: Tensor = whole.base_model(**{whole.main_input_name: inputs[0]}, **mask).last_hidden_state
    if states.dim() == 4:
        wanted = states.mean(dim=(2, 3))
    elif mask:
        wanted = torch.stack([states[0].mean(dim=0), states[1, :6].mean(dim=0)])
    else:
        wanted = states.mean(dim=1)
    assert torch.allclose(found, wanted, atol=1e-5)
    if states.dim() == 3:
        with torch.no_grad():
            assert torch.allclose(build(f"hf:{tmp_path}", {"pool": "cls"}, Path())(*inputs), states[:, 0], atol=1e-5)
    assert not any(name.endswith("pooler.dense") for name, _ in model.named_modules())


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "WhisperForConditionalGeneration"])
def test_an_encoder_and_a_decoder_are_two_models(kind: str, tmp_path: Path) -> None:
    whole = _saved(kind, _t5() if kind.startswith("T5") else _whisper(), tmp_path)
    given = IDS if kind.startswith("T5") else torch.randn(2, 8, 32)
    tokens = torch.tensor([[0, 5, 7], [0, 9, 3]])
    encoder = build(f"hf:{tmp_path}", {"part": "encoder"}, Path())
    decoder = build(f"hf:{tmp_path}", {"part": "decoder"}, Path())
    with torch.no_grad():
        states = encoder(given)
        found = decoder(tokens, states)
        wanted = whole(**{whole.main_input_name: given}, decoder_input_ids=tokens).logits
        pooled = build(f"hf:{tmp_path}", {"part": "encoder", "pool": "mean"}, Path())(given)
    assert torch.allclose(found, wanted, atol=1e-4) and torch.allclose(pooled, states.mean(dim=1), atol=1e-5)
    parts = sum(p.numel() for half in (encoder, decoder) for p in half.parameters())
    shared = sum(p.numel() for p in encoder.parameters() if p.shape[:1] == (64,) and kind.startswith("T5"))
    assert parts - shared <= sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "the network without a head.*pool: mean"),
        ({"pool": "max"}, "pool is 'max'; there are mean and cls"),
        ({"pol": "mean"}, "has no argument 'pol'; there are pool, outputs, part"),
        ({"outputs": "logits"}, "give a list of names"),
        ({"pool": "mean", "outputs": ["x"]}, "do not go together"),
        ({"part": "decoder"}, "BertModel is no encoder-decoder"),
    ],
)
def test_what_a_network_without_a_head_cannot_be_is_said(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    _saved("BertModel", _bert(), tmp_path)
    with pytest.raises(ValueError, match=message):
        build(f"hf:{tmp_path}", args, Path())


def test_an_output_that_is_not_there_is_named(tmp_path: Path) -> None:
    _saved("BertModel", _bert(), tmp_path)
    model: nn.Module = build(f"hf:{tmp_path}", {"outputs": ["pooler_output"]}, Path())
    assert model(IDS)["pooler_output"].shape == (2, 16)
    with pytest.raises(ValueError, match="no output 'logits'; it has last_hidden_state, pooler_output"):
        build(f"hf:{tmp_path}", {"outputs": ["logits"]}, Path())(IDS)


def test_an_encoder_decoder_as_a_whole_is_refused_with_what_to_do(tmp_path: Path) -> None:
    _saved("T5ForConditionalGeneration", _t5(), tmp_path)
    with pytest.raises(ValueError, match="part: encoder"):
        build(f"hf:{tmp_path}", {}, Path())


class Rows(ArrayTask):
    """Only what an export asks for."""

    def __init__(self, inputs: Sequence[Tensor], names: Sequence[str], answers: Sequence[AnswerSpec]) -> None:
        super().__init__(
            {"test": (list(inputs), torch.zeros(len(inputs[0])))}, preprocessing=None, augment=None, name="rows",
            input_name=names, provenance=None, file_digests=None,
        )  # fmt: skip
        self._specs = answers

    @property
    def answers(self) -> Sequence[AnswerSpec]:
        """As given."""
        return self._specs


def _bundle(
    model: Any, inputs: Sequence[Tensor], names: Sequence[str], answers: Sequence[AnswerSpec], folder: Path
) -> dict[str, np.ndarray]:
    """What ONNX Runtime answers by output."""
    path = export_bundle(model.eval(), Rows(inputs, names, answers), folder / "bundle").path
    verify(path).raise_if_failed()
    with load(path) as runner:
        return dict(runner.run({name: x.numpy() for name, x in zip(names, inputs, strict=True)}))


@pytest.mark.slow
def test_a_pooled_encoder_answers_with_vectors(tmp_path: Path) -> None:
    whole = _saved("BertModel", _bert(), tmp_path / "model")
    model = build(f"hf:{tmp_path / 'model'}", {"pool": "mean"}, Path())
    found = _bundle(model, (IDS, MASK), ("input_ids", "attention_mask"), [AnswerSpec("vector", "embedding")], tmp_path)
    with torch.no_grad():
        states = whole(input_ids=IDS, attention_mask=MASK).last_hidden_state
    wanted = torch.stack([states[0].mean(dim=0), states[1, :6].mean(dim=0)])
    np.testing.assert_allclose(found["vector"], wanted.numpy(), atol=1e-5)


@pytest.mark.slow
def test_answers_to_questions_are_two_outputs(tmp_path: Path) -> None:
    whole = _saved("BertForQuestionAnswering", _bert(), tmp_path / "model")
    model = build(f"hf:{tmp_path / 'model'}", {}, Path())
    names = ("start_logits", "end_logits")
    answers = [AnswerSpec(name, "values", leaf=name) for name in names]
    found = _bundle(model, (IDS, MASK), ("input_ids", "attention_mask"), answers, tmp_path)
    with torch.no_grad():
        wanted = whole(input_ids=IDS, attention_mask=MASK)
    for name in names:
        np.testing.assert_allclose(found[name], wanted[name].numpy(), atol=1e-5)


@pytest.mark.slow
def test_an_encoder_and_a_decoder_file_answer_as_the_whole(tmp_path: Path) -> None:
    whole: transformers.T5ForConditionalGeneration = _saved("T5ForConditionalGeneration", _t5(), tmp_path / "model")
    encoder, decoder = (build(f"hf:{tmp_path / 'model'}", {"part": part}, Path()) for part in ("encoder", "decoder"))
    states = _bundle(encoder, (IDS,), ("input_ids",), [AnswerSpec("states", "values")], tmp_path / "encoder")["states"]
    tokens = torch.tensor([[0, 5, 7], [0, 9, 3]])
    found = _bundle(
        decoder,
        (tokens, torch.from_numpy(np.array(states))),
        ("decoder_input_ids", "encoder_states"),
        [AnswerSpec("logits", "tokens")],
        tmp_path / "decoder",
    )["logits"]
    with torch.no_grad():
        wanted = whole(input_ids=IDS, decoder_input_ids=tokens).logits
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)
