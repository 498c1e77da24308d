"""Every stage, every criterion, every policy: one line here, all checks of `stage_tester`."""

from __future__ import annotations

from pathlib import Path

import pytest
from stage_tester import StageCase, check_stage
from tiny import (
    tiny_boxes,
    tiny_denoiser,
    tiny_detector,
    tiny_labels,
    tiny_map,
    tiny_noisy,
    tiny_pages,
    tiny_recurrent,
    tiny_residual,
    tiny_sentences,
    tiny_siamese,
    tiny_sound,
    tiny_sounds,
    tiny_text,
    tiny_things,
    tiny_transformer,
    tiny_values,
    tiny_vectors,
)

from edgewright.pipeline.stage_registry import SHIPPED, stage_named
from edgewright.pipeline.tasks.shipped.synthetic_regression import synthetic_regression

_SHORT = {"epochs": 2, "batch_size": 32}
_ONCE = {"epochs": 1, "batch_size": 32}
_HALF = {"max_frac_per_iter": 0.5, "retrain": _ONCE, "max_drop": 0.5}

CASES = [
    StageCase("train-sgd", "train", _SHORT, tiny_residual),
    StageCase("train-adamw", "train", {**_SHORT, "optimizer": "adamw", "learning_rate": 1e-3}, tiny_transformer),
    StageCase("train-again", "train", _SHORT, tiny_residual, prior=(("train", _SHORT),)),
    StageCase(
        "prune-class-count", "class_aware_pruning", {"target_mac_reduction": None, "retrain": _ONCE, "finetune": _ONCE}
    ),
    StageCase("prune-l1", "class_aware_pruning", {**_HALF, "criterion": "l1", "finetune": _ONCE}),
    StageCase(
        "prune-threshold",
        "class_aware_pruning",
        {"target_mac_reduction": None, "max_iterations": 1, "retrain": _ONCE, "max_drop": 0.5},
    ),
    StageCase("prune-auto", "class_aware_pruning", _HALF),
    StageCase(
        "prune-transformer",
        "class_aware_pruning",
        {"criterion": "fisher", "target_mac_reduction": 0.2, "retrain": _ONCE, "max_drop": 0.5},
        tiny_transformer,
    ),
    StageCase(
        "prune-similarity",
        "class_aware_pruning",
        {**_HALF, "criterion": "similarity", "hand_over": True, "prune_residual": True},
    ),
    StageCase("share-cnn", "basis_sharing"),
    StageCase("share-transformer", "basis_sharing", {}, tiny_transformer),
    StageCase(
        "share-by-loss",
        "basis_sharing",
        {"whitening": "two_sided", "ranks": "loss", "groups": "readers", "updates": 2},
        tiny_transformer,
    ),
    StageCase("share-recurrent", "basis_sharing", {"groups": "readers", "updates": 2, "min_width": 8}, tiny_recurrent),
    StageCase("share-siamese", "basis_sharing", {"whitening": "two_sided", "updates": 2, "min_width": 8}, tiny_siamese),
    StageCase("prune-siamese", "class_aware_pruning", {**_HALF, "criterion": "l1"}, tiny_siamese),
    StageCase("train-values", "train", _SHORT, tiny_values, synthetic_regression),
    StageCase("prune-values", "class_aware_pruning", {**_HALF, "criterion": "l1"}, tiny_values, synthetic_regression),
    StageCase("share-values", "basis_sharing", {}, tiny_values, synthetic_regression),
    StageCase("train-vectors", "train", _SHORT, tiny_vectors, tiny_things),
    StageCase("prune-vectors", "class_aware_pruning", {**_HALF, "criterion": "taylor"}, tiny_vectors, tiny_things),
    StageCase("share-vectors", "basis_sharing", {}, tiny_vectors, tiny_things),
    StageCase("train-map", "train", _SHORT, tiny_map, tiny_pages),
    StageCase("prune-map", "class_aware_pruning", {**_HALF, "criterion": "taylor"}, tiny_map, tiny_pages),
    StageCase(
        "prune-map-class-count",
        "class_aware_pruning",
        {**_HALF, "criterion": "class_count", "tau_mode": "relative", "tau": 0.3},
        tiny_map,
        tiny_pages,
    ),
    StageCase("share-map", "basis_sharing", {}, tiny_map, tiny_pages),
    StageCase("prune-image", "class_aware_pruning", {**_HALF, "criterion": "taylor"}, tiny_denoiser, tiny_noisy),
    StageCase("share-image", "basis_sharing", {}, tiny_denoiser, tiny_noisy),
    StageCase("prune-text", "class_aware_pruning", _HALF, tiny_text, tiny_sentences),
    StageCase("prune-sound", "class_aware_pruning", _HALF, tiny_sound, tiny_sounds),
    StageCase("exit-text", "early_exit", {"training": _ONCE, "at": ("near",)}, tiny_text, tiny_sentences),
    StageCase("train-labels", "train", _SHORT, tiny_residual, tiny_labels),
    StageCase("prune-labels", "class_aware_pruning", {**_HALF, "criterion": "class_count"}, tiny_residual, tiny_labels),
    StageCase("share-labels", "basis_sharing", {}, tiny_residual, tiny_labels),
    StageCase("train-boxes", "train", _SHORT, tiny_detector, tiny_boxes),
    StageCase("prune-boxes", "class_aware_pruning", {**_HALF, "criterion": "taylor"}, tiny_detector, tiny_boxes),
    StageCase(
        "prune-boxes-class-count",
        "class_aware_pruning",
        {**_HALF, "criterion": "class_count", "tau_mode": "relative", "tau": 0.3},
        tiny_detector,
        tiny_boxes,
    ),
    StageCase("share-boxes", "basis_sharing", {"min_width": 6}, tiny_detector, tiny_boxes),
    StageCase("exit-exclusion", "early_exit", {"training": _ONCE, "at": ("blocks.0",)}),
    StageCase(
        "exit-probability",
        "early_exit",
        {"training": _ONCE, "policy": "max_probability", "at_macs": (0.4,)},
        tiny_transformer,
    ),
    StageCase(
        "prune-share-exit",
        "early_exit",
        {"training": _ONCE, "at": ("blocks.0", "blocks.1")},
        prior=(("class_aware_pruning", _HALF), ("basis_sharing", {})),
    ),
]


_QUICK = {"train-values", "prune-values", "share-values"}
"""One of each stage, in the fast tier too; a network with exits takes half a minute."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.id, marks=() if case.id in _QUICK else pytest.mark.slow) for case in CASES],
)
def test_stage_keeps_the_contract(case: StageCase, tmp_path: Path) -> None:
    check_stage(case, tmp_path)


def test_every_stage_has_a_case() -> None:
    assert {case.stage for case in CASES} == set(SHIPPED)
    assert {case.stage for case in CASES if case.id in _QUICK} == set(SHIPPED) - {"early_exit"}


@pytest.mark.parametrize("name", SHIPPED)
def test_stage_is_declared_completely(name: str) -> None:
    stage = stage_named(name)
    assert stage.name == name
    assert stage.config(), "every field has a default"
    assert "test" not in stage.splits
    assert stage.preview is not None
    assert (stage.requires | stage.after.keys() | stage.forbids.keys()) <= set(SHIPPED)
    assert not {"name", "id", "config"} & stage.config.model_fields.keys(), "recipes use these keys themselves"
    undescribed = [key for key, value in stage.config.model_fields.items() if not value.description]
    assert not undescribed
