"""Vectors: what belongs together, losses, metrics, and the files of the shipped task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgewright.edge_runtime import Vectors, load, verify
from edgewright.export import ExportOptions, export_bundle
from edgewright.pipeline.errors import DataError
from edgewright.pipeline.metric import Answer
from edgewright.pipeline.task import Batch, batches, data_digests
from edgewright.pipeline.tasks.embedding import Embedding
from edgewright.pipeline.tasks.embedding_metrics import Recall
from edgewright.pipeline.tasks.shipped.embedding import embedding
from edgewright.pipeline.tasks.shipped.synthetic_embedding import synthetic_embedding


def _score(task: Embedding, model: nn.Module) -> float:
    split = task.splits["test"]
    batch = split.batch(range(len(split)))
    with torch.no_grad():
        return task.metric.score([Answer(model(*batch.inputs), batch.targets)]).value


def _trained(task: Embedding, model: nn.Module, epochs: int) -> nn.Module:
    optimizer, generator = torch.optim.AdamW(model.parameters(), 2e-3), torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in batches(task.splits["train"], 64, generator, drop_last=True):
            batch = task.augment(batch, generator)
            optimizer.zero_grad()
            task.loss(model(*batch.inputs), batch.targets).backward()
            optimizer.step()
    return model


def _encoder(seed: int = 0, inputs: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))


def test_the_synthetic_set_tells_a_trained_encoder_from_none() -> None:
    task = synthetic_embedding()
    assert data_digests(task) == data_digests(synthetic_embedding())
    groups = [set(split.targets.tolist()) for split in task.splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))
    fresh, rows = _score(task, _encoder()), _score(task, nn.Identity())
    assert fresh < 0.35 and rows < 0.35
    assert _score(task, _trained(task, _encoder(), 15)) > rows + 0.2


def test_a_batch_gets_a_partner_for_each_row_that_stands_alone() -> None:
    task = synthetic_embedding(things=40, views=3)
    split = task.splits["train"]
    first = [int(np.flatnonzero(split.targets.numpy() == group)[0]) for group in split.targets.unique().tolist()]
    batch = split.batch([first[0], first[0] + 1, first[1], first[2]])
    grown = task.augment(batch, torch.Generator().manual_seed(0))
    assert grown.targets[4:].tolist() == batch.targets[2:].tolist()
    assert all(not torch.equal(grown.inputs[0][4 + i], batch.inputs[0][2 + i]) for i in range(2))


def test_the_loss_of_groups_is_the_softmax_over_the_other_rows() -> None:
    task = synthetic_embedding(things=40, views=3)
    output = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    found = task.loss(output, torch.tensor([7, 7, 9]))
    # cosines 1 and 0 of the two rows that have a partner
    assert float(found) == pytest.approx(float(-torch.tensor([10.0, 0.0]).log_softmax(0)[0]), rel=1e-5)
    output.requires_grad_()
    alone = task.loss(output, torch.tensor([1, 2, 3]))
    alone.backward()
    assert float(alone.detach()) == 0.0 and output.grad is not None and not output.grad.any()


def test_recall_counts_rows_with_one_of_their_group_among_the_nearest() -> None:
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.3], [-1.0, 0.0]])
    groups = torch.tensor([0, 0, 1, 2, 1, 3])
    score = Recall(1).score([Answer(vectors[:3], groups[:3]), Answer(vectors[3:], groups[3:])])
    assert score.rows == 4 and score.value == 0.5
    assert Recall(4).score([Answer(vectors, groups)]).value == 1.0


def test_scored_pairs_are_fitted_and_judged_by_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 8, generator=generator), torch.randn(300, 8, generator=generator)
    score = nn.functional.cosine_similarity(a[:, :4], b[:, :4], dim=1)
    task = Embedding.from_pairs(a, b, score)
    assert task.metric.name == "spearman" and all(len(split) % 2 == 0 for split in task.splits.values())
    half = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        half.weight.copy_(torch.eye(8)[:4])
    assert _score(task, half) == pytest.approx(1.0) and _score(task, nn.Identity()) < 0.9
    batch = task.splits["train"].batch(range(20))
    assert float(task.loss(half(batch.inputs[0]), batch.targets).detach()) == pytest.approx(0.0, abs=1e-6)
    grown = task.augment(Batch((batch.inputs[0][::2],), batch.targets[::2]), generator)
    assert sorted(grown.targets[:, 0].tolist()) == sorted(batch.targets[:, 0].tolist())


def test_pairs_that_share_a_row_stay_in_one_split_and_belong_together() -> None:
    rows = torch.arange(200.0).reshape(100, 2)
    # 0-1-2, 3-4-5, ...: two pairs each
    first, second = rows[:99].reshape(33, 3, 2)[:, :2].flatten(0, 1), rows[:99].reshape(33, 3, 2)[:, 1:].flatten(0, 1)
    task = Embedding.from_pairs(first, second)
    assert sum(len(split) for split in task.splits.values()) == 99
    data_digests(task)  # refuses rows that two splits share
    for split in task.splits.values():
        assert (torch.unique(split.targets, return_counts=True)[1] == 3).all()


def test_without_labels_the_dense_encoder_is_the_teacher() -> None:
    rows = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    teacher = _encoder(1)
    task = Embedding.from_encoder(teacher, rows)
    assert task.metric.name == "cosine" and _score(task, teacher) == pytest.approx(1.0)
    fresh = _score(task, _encoder(2))
    assert _score(task, _trained(task, _encoder(2), 20)) > fresh + 0.3


def test_a_bundle_gives_the_vectors_of_the_model(tmp_path: Path) -> None:
    model = _encoder().eval()
    task = synthetic_embedding(things=40, views=3)
    path = tmp_path / "bundle"
    export_bundle(model, task, path, ExportOptions())
    verify(path).raise_if_failed()
    batch = task.splits["test"].batch(range(4))
    with load(path) as runner:
        found = runner.predict(batch.inputs[0].numpy())
    assert isinstance(found, Vectors)
    np.testing.assert_allclose(found.vector, model(*batch.inputs).detach().numpy(), atol=1e-4)


def _x(rows: int = 40) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (torch.arange(40), {}, "no two rows of the split 'train' belong together"),
        (torch.zeros(40, 3), {}, r"the group of a row is int64 \[N\]"),
        (torch.zeros(40, dtype=torch.int64), {"metric": "recall@x"}, "give recall@K"),
        (torch.zeros(40, dtype=torch.int64), {"metric": "spearman"}, "give recall@K"),
        (torch.zeros(40, 3), {"taught": True}, "vector of zeros"),
        (torch.full((40, 2), 2.0), {}, "a pair of 40 rows"),
        (torch.zeros(40, dtype=torch.int64), {"temperature": 0.0}, "temperature is 0"),
    ],
)
def test_targets_that_say_nothing_are_refused(targets: Tensor, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Embedding({"train": (_x(), targets)}, **options)


def test_a_model_that_does_not_pool_is_told_to() -> None:
    task = synthetic_embedding(things=40, views=3)
    with pytest.raises(DataError, match=r"returns \[2, 5, 3\].*pool"):
        task.loss(torch.zeros(2, 5, 3), torch.zeros(2, dtype=torch.int64))


def _tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: at for at, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(40))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_pairs_of_texts_come_from_a_csv_file(tmp_path: Path) -> None:
    lines = [f"w{i % 40} w{i // 40},w{i // 40} w{i % 40} w1" for i in range(80)]
    (tmp_path / "pairs.csv").write_text("\n".join(["first,second", *lines]))
    task = embedding(csv_path=tmp_path / "pairs.csv", tokenizer_path=_tokenizer(tmp_path), window=4)
    assert task.input_names == ("input_ids", "attention_mask") and len(task.file_digests) == 2
    batch = task.splits["train"].batch([0, 1])
    assert batch.inputs[0].shape == (2, 4) and sorted(batch.inputs[1].sum(dim=1).tolist()) == [2, 3]
    assert sum(len(split) for split in task.splits.values()) == 160


def test_pairs_of_images_come_from_a_csv_file(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(tmp_path / f"{number}.png")
    lines = [f"{i}.png,{i + 1}.png,{i / 40}" for i in range(0, 40, 2)]
    (tmp_path / "pairs.csv").write_text("\n".join(["first,second,score", *lines]))
    task = embedding(tmp_path, tmp_path / "pairs.csv", size=8, score_column="score")
    assert task.metric.name == "spearman" and task.splits["train"].batch([0]).inputs[0].shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("first,second\na,\n", {}, "line 2: one side of the pair is empty"),
        ("first,other\na,b\n", {}, "no column 'second'; it has first, other"),
        ("first,second,s\na,b,x\n", {"score_column": "s"}, "line 2: the score 'x' is no number"),
        ("first,second,s\na,b,4\n", {"score_column": "s"}, "line 2: the score 4 is not in -1 ... 1"),
        ("first,second\n", {}, "has no pairs"),
        ("first,second\na,b\n", {"path": "."}, "one of both"),
    ],
)
def test_files_that_cannot_be_right_are_refused_by_line(tmp_path: Path, text: str, options: dict, message: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        embedding(csv_path=tmp_path / "p.csv", tokenizer_path=_tokenizer(tmp_path), **options)
