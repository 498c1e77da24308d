"""Language models as a task: windows, perplexity, and a whole run without stages."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tokenizers
import torch
import yaml
from language import TEXT, write_llama

from edgewright import edge_runtime
from edgewright.models.registry import build
from edgewright.pipeline.errors import DataError
from edgewright.pipeline.metric import Answer, Perplexity
from edgewright.pipeline.runs.runner import run
from edgewright.pipeline.task import data_digests
from edgewright.pipeline.tasks import build_task
from edgewright.pipeline.tasks.causal_lm import CausalLM, windows_of
from edgewright.pipeline.training.evaluation import evaluate


def test_windows_follow_each_other_and_splits_are_stretches() -> None:
    found = windows_of(torch.arange(103), 10, {"calibration": 0.5, "test": 0.5}, {"test": 2})
    assert torch.equal(found["calibration"].flatten(), torch.arange(50))
    assert found["test"][:, 0].tolist() == [50, 70]


def test_a_window_that_repeats_is_in_one_split_only() -> None:
    tokens = torch.arange(10).repeat(4)
    tokens[35] = 0
    splits = windows_of(tokens, 10, {"train": 0.5, "test": 0.5})
    assert len(splits["test"]) == 1
    data_digests(CausalLM(splits, 10))


@pytest.mark.parametrize(
    ("window", "shares", "message"),
    [(1, {"test": 1.0}, "at least 2 tokens"), (10, {"test": 1.2}, "sum to 1"), (90, {"test": 0.4}, "is none")],
)
def test_windows_that_cannot_be(window: int, shares: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        windows_of(torch.arange(103), window, shares)  # type: ignore[arg-type]


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="vocabulary has 9"):
        CausalLM({"test": torch.arange(10).reshape(2, 5)}, 9)


def test_perplexity_is_exp_of_the_mean_loss_per_predicted_token() -> None:
    generator = torch.Generator().manual_seed(0)
    task = CausalLM({"test": torch.randint(7, (5, 6), generator=generator)}, 7)
    batch = task.splits["test"].batch(range(5))
    logits = torch.randn(5, 6, 7, generator=generator)
    expected = 0.0
    for row in range(5):
        for place in range(5):
            chosen = logits[row, place].log_softmax(0)[batch.inputs[0][row, place + 1]]
            expected -= float(chosen) / 25
    parts = [Answer(logits[:2], batch.targets[:2]), Answer(logits[2:], batch.targets[2:])]
    score = task.metric.score(parts)
    assert score.value == pytest.approx(math.exp(expected), rel=1e-5)
    assert score.rows == 5 and score.accuracy is None
    assert float(task.loss(logits, batch.targets)) == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_better_when_lower() -> None:
    assert Perplexity().drop(10.0, 12.0) == pytest.approx(0.2)
    assert Perplexity().drop(10.0, 9.0) < 0
    uniform = Answer(torch.zeros(1, 3, 50), torch.tensor([[1, 2, -100]]))
    assert Perplexity().score([uniform]).value == pytest.approx(50.0, rel=1e-5)
    assert Perplexity().score([Answer(torch.tensor([[[0.0, 1e4]]]), torch.tensor([[0]]))]).value == math.inf


def test_text_of_a_folder_and_the_packaged_one(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(TEXT)
    (tmp_path / "a.txt").write_text("first é")
    options = {"tokenizer": "bytes", "window": 8}
    task = build_task("causal_lm", {"path": str(tmp_path), **options}, tmp_path)
    assert bytes(task.splits["train"].batch([0]).inputs[0][0].tolist()).decode() == "first é"
    assert list(task.provenance["text"]) == ["a.txt", "b.txt"]
    packaged = build_task("causal_lm", {**options, "window": 256, "most": {"test": 64}}, tmp_path)
    assert len(packaged.splits["test"]) == 64 and set(data_digests(packaged)) >= {"train", "calibration", "test"}
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"a.txt is not UTF-8 at byte 3"):
        build_task("causal_lm", {"path": str(tmp_path), **options}, tmp_path)
    with pytest.raises(DataError, match=r"has no \.txt file"):
        (tmp_path / "none").mkdir()
        build_task("causal_lm", {"path": "none", **options}, tmp_path)


def test_the_tokenizer_file_is_taken_as_it_is_and_never_cuts_the_text(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="c"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.enable_truncation(4)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    # transformers would make another tokenizer for this type of model
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    words = ["ab"[i] for i in torch.randint(2, (200,), generator=torch.Generator().manual_seed(0)).tolist()]
    (tmp_path / "text.txt").write_text(" ".join(words))
    options = {"path": "text.txt", "tokenizer_path": ".", "window": 20}
    task = build_task("causal_lm", options, tmp_path)
    assert task.provenance["tokens"] == 200
    assert task.splits["train"].batch([0]).inputs[0][0].tolist() == ["ab".index(word) for word in words[:20]]
    (tmp_path / "text.txt").write_text("x " * 200)
    with pytest.raises(DataError, match="the tokenizer does not know it"):
        build_task("causal_lm", options, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"no tokenizer from .*: EOF while"):
        build_task("causal_lm", options, tmp_path)


@pytest.mark.slow
def test_a_run_without_stages(tmp_path: Path) -> None:
    write_llama(tmp_path / "llama", layers=1)
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = {
        "model": "hf:llama",
        "task": {"name": "causal_lm", "args": {"path": "text.txt", "tokenizer": "bytes", "window": 16}},
        "stages": [],
        "benchmark": {"enabled": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = run(tmp_path / "recipe.yaml", tmp_path / "out")
    row = result.steps[0]
    assert row.metric == "perplexity" and row.accuracy is None and row.quality > 100
    assert "perplexity" in (tmp_path / "out" / "report.html").read_text()
    report = edge_runtime.verify(result.bundle)
    report.raise_if_failed()
    # the file takes any number of rows of any length, and judges them as PyTorch does
    model = build("hf:llama", {}, tmp_path)
    ids = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(1))
    with edge_runtime.load(result.bundle) as runner, torch.no_grad():
        logits = torch.from_numpy(runner.run({"input_ids": ids.numpy()})["logits"])
        assert torch.allclose(logits, model(ids), atol=1e-4)
    task = build_task("causal_lm", recipe["task"]["args"], tmp_path)  # type: ignore[index]
    assert evaluate(model, task, "test").value == pytest.approx(row.quality, rel=1e-6)
