"""Texts in classes: what is read and encoded, what is refused by line, and that order decides in the made-up set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgewright.edge_runtime import InputError, encode_texts, load, open_bundle
from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.inference.text_file import encoded, read_texts
from edgewright.export import export_bundle
from edgewright.pipeline.errors import DataError
from edgewright.pipeline.tasks.shipped.embedding import embedding
from edgewright.pipeline.tasks.shipped.synthetic_text import synthetic_text
from edgewright.pipeline.tasks.shipped.text_classification import text_classification


def tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[SEP]", *(f"w{i}" for i in range(20))])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B:1 [SEP]:1", special_tokens=[("[SEP]", 2)]
    )
    made.enable_truncation(3)  # the settings of some training run
    made.save(str(folder / "tokenizer.json"))
    return folder


def table(folder: Path, lines: list[str], name: str = "t.csv") -> Path:
    (folder / name).write_text("\n".join(lines))
    return folder / name


def test_tokens_mask_and_types_of_pairs(tmp_path: Path) -> None:
    lines = [f"w{i % 20} w{i // 20},w1 other,{'ab'[i % 2]}" for i in range(60)]
    file = table(tmp_path, ["text,also,label", *lines])
    task = text_classification(file, tokenizer(tmp_path), second_column="also", window=8, types=True)
    assert task.input_names == ("input_ids", "attention_mask", "token_type_ids") and task.labels == ("a", "b")
    batch = task.splits["train"].batch([0])
    ids, mask, types = (x[0].tolist() for x in batch.inputs)
    assert ids[2:] == [2, 4, 1, 2, 0, 0] and mask == [1] * 6 + [0] * 2 and types == [0, 0, 0, 1, 1, 1, 0, 0]
    assert sum(len(split) for split in task.splits.values()) == 60 and len(task.file_digests) == 2
    cut = text_classification(file, tmp_path, window=2, mask=False).splits["train"].batch([0]).inputs
    assert len(cut) == 1 and cut[0].shape == (1, 2)


def test_lines_of_json_and_splits_that_are_named(tmp_path: Path) -> None:
    rows = [{"t": f"w{i}", "y": i % 3, "part": ["train", "test"][i % 2]} for i in range(12)]
    file = table(tmp_path, [json.dumps(row) for row in rows], "t.jsonl")
    options: dict[str, Any] = {"text_column": "t", "label_column": "y", "split_column": "part", "window": 4}
    task = text_classification(file, tokenizer(tmp_path), labels=["2", "1", "0"], **options)
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 6, "test": 6}
    assert task.splits["train"].targets.tolist() == [2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["text,label", "w1,a", ",b"], {}, "line 3: 'text' is empty"),
        (["text,label", "w1,a,c"], {}, "line 2: 3 cells where the header has 2"),
        (["text,class", "w1,a"], {}, "line 1: no column 'label'; there are 'text', 'class'"),
        (["text,label", "w1,good", "w2,goood"], {"labels": ["good", "bad"]}, "line 3: unknown label 'goood'.*good"),
        (["text,label,s", "w1,a,train", "w2,a,dev"], {"split_column": "s"}, "line 3: unknown split 'dev'"),
        (["text,label"], {}, "no lines with texts"),
        (["text,label", "w1,a"], {"window": 0}, "window is 0"),
        (["text,label", "w1,a"], {"types": True, "mask": False}, "set mask too"),
    ],
)
def test_what_cannot_be_right_is_refused_by_line(
    lines: list[str], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        text_classification(table(tmp_path, lines), tokenizer(tmp_path), **options)


def test_json_that_is_none_and_files_that_are_no_tokenizers_are_refused(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    for text, message in (("{", "line 1 is no JSON"), ("[1]", "no JSON object"), ('{"text": null}', "'text' is None")):
        with pytest.raises(DataError, match=message):
            text_classification(table(tmp_path, [text], "t.jsonl"), tmp_path)
    good = table(tmp_path, ["text,label", "w1,a"])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: no tokenizer can be made"):
        text_classification(good, tmp_path / "bad.json")
    with pytest.raises(DataError, match="no tokenizer from"):
        text_classification(good, tmp_path / "none.json")


def test_texts_of_a_file_are_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\n two \n", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one", " two "]
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(InputError, match="no line with a text"):
        read_texts(tmp_path / "a.txt")
    content = (tokenizer(tmp_path) / "tokenizer.json").read_text()
    found = encoded(["w3", "w0 w0 w0 w0 w0"], content, Preprocessing(kind="text", window=3, padding=7), ["x", "m"])
    assert found["x"].tolist() == [[6, 2, 7], [3, 3, 2]] and found["m"].tolist() == [[1, 1, 0], [1, 1, 1]]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = nn.Embedding(23, 16), nn.Linear(16, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[:, :, None].to(torch.float32)
        pooled = (self.table(input_ids) * mask).sum(dim=1) / mask.sum(dim=1)
        vectors: Tensor = self.mix(pooled)
        return vectors


def test_a_bundle_of_an_encoder_answers_texts(tmp_path: Path) -> None:
    lines = [f"w{i % 20} w{i // 20},w{i // 20} w{i % 20} w1" for i in range(60)]
    file = table(tmp_path, ["first,second", *lines])
    task = embedding(csv_path=file, tokenizer_path=tokenizer(tmp_path), window=6)
    model = Encoder().eval()
    path = export_bundle(model, task, tmp_path / "bundle", parity_rows=8).path
    with open_bundle(path) as bundle, load(bundle) as runner:
        given = encode_texts(["w3 w4", "w3 w4 w4 w9"], bundle)
        found: Any = runner.predict(given)
    expected = model(*(torch.from_numpy(x) for x in given.values())).detach().numpy()
    np.testing.assert_allclose(found.vector, expected, atol=1e-5)


def test_counting_words_does_not_tell_the_made_up_sentences() -> None:
    task = synthetic_text(rows=1200)
    x, y = (
        torch.cat([task.splits[name].batch(range(len(task.splits[name]))).inputs[0] for name in names])
        for names in (["train"], ["test"])
    )
    counts = [torch.nn.functional.one_hot(z, 64).sum(dim=1).double() for z in (x, y)]
    wanted = torch.nn.functional.one_hot(task.splits["train"].targets, 3).double()
    weights = torch.linalg.lstsq(counts[0], wanted).solution
    right = (counts[1] @ weights).argmax(dim=1) == task.splits["test"].targets
    assert float(right.double().mean()) < 0.6
    again = synthetic_text(rows=1200)
    assert torch.equal(again.splits["train"].batch([5]).inputs[0], task.splits["train"].batch([5]).inputs[0])


def test_the_made_up_sentences_can_be_learned() -> None:
    """By pairs of neighbours, which a convolution sees."""
    task = synthetic_text(rows=2400)
    found = []
    for name in ("train", "test"):
        ids = task.splits[name].batch(range(len(task.splits[name]))).inputs[0]
        before = torch.nn.functional.pad(ids, (1, 0))[:, :-1]
        kind = torch.where(ids == 0, 0, torch.where(ids < 9, 1, torch.where(ids < 17, 2, 0)))
        turned = torch.where(before == 17, 3 - kind, kind) * (kind > 0)
        found.append(torch.stack([(turned == one).sum(dim=1) for one in (1, 2)], dim=1))
    labels = {(2, 0): 0, (0, 2): 1, (1, 1): 2}
    for rows, name in zip(found, ("train", "test"), strict=True):
        assert [labels[tuple(row)] for row in rows.tolist()] == task.splits[name].targets.tolist()  # type: ignore[index]
