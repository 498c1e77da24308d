"""Dealing samples to splits: nothing shared, nothing lost, whatever the order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.pipeline.errors import DataError
from edgewright.pipeline.task import data_digests
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.tasks.splitting import stratified_split


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), max_size=60), st.integers(0, 3))
def test_every_sample_lands_in_one_split_and_equal_ones_together(rows: list[tuple[int, int]], seed: int) -> None:
    digests = [bytes([content]) for content, _ in rows]
    targets = torch.tensor([label for _, label in rows], dtype=torch.int64)
    split = stratified_split(digests, targets, "abc", seed=seed)
    assert sorted(row for chosen in split.values() for row in chosen) == list(range(len(rows)))
    contents = [{digests[row] for row in chosen} for chosen in split.values()]
    assert sum(map(len, contents)) == len(set(digests))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    firsts = {d: digests.index(d) for d in set(digests)}
    if all(rows[firsts[d]][1] == label for d, (_, label) in zip(digests, rows, strict=True)):
        again = stratified_split([digests[i] for i in order], targets[order], "abc", seed=seed)
        assert [{digests[order[row]] for row in chosen} for chosen in again.values()] == contents


@pytest.mark.parametrize("count", [4, 5, 9, 40])
def test_small_classes_reach_every_split(count: int) -> None:
    digests = [bytes([i]) for i in range(2 * count)]
    targets = torch.arange(2 * count) % 2
    for chosen in stratified_split(digests, targets, "ab").values():
        assert set(targets[chosen].tolist()) == {0, 1}


def test_shares_are_kept_and_the_seed_matters() -> None:
    digests = [str(i).encode() for i in range(1000)]
    targets = torch.zeros(1000, dtype=torch.int64)
    split = stratified_split(digests, targets, "a", {"train": 3, "test": 1})
    assert [len(rows) for rows in split.values()] == [750, 250]
    assert split == stratified_split(digests, targets, "a", {"train": 3, "test": 1})
    assert split != stratified_split(digests, targets, "a", {"train": 3, "test": 1}, seed=1)


def test_bad_shares_and_targets() -> None:
    with pytest.raises(DataError, match="the fraction of 'test' is 0"):
        stratified_split([b"a"], torch.zeros(1), "a", {"train": 1, "test": 0})
    with pytest.raises(DataError, match="sample 0 has class 2, and there are 2 labels"):
        stratified_split([b"a"], torch.tensor([2]), "ab")


def test_from_arrays_keeps_equal_images_of_different_classes_together() -> None:
    x = torch.rand(60, 1, 2, 2)
    x[30:] = x[:30]
    y = torch.arange(60) // 30
    task = ImageClassification.from_arrays(x, y, ["a", "b"])
    data_digests(task)
    assert sum(len(split) for split in task.splits.values()) == 60
    with pytest.raises(DataError, match="unknown split 'holdout'"):
        ImageClassification.from_arrays(x, y, ["a", "b"], fractions={"train": 1, "holdout": 1})  # type: ignore[dict-item]
