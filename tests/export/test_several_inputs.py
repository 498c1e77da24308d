"""A sequence classifier of transformers with token ids and a mask: exits in one file or split, one row or many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgewright.edge_runtime import load, session_on, verify
from edgewright.edge_runtime.bundle.manifest import OperatingPoint
from edgewright.edge_runtime.inference.split_session import SplitSession
from edgewright.export import ExportOptions, export_bundle
from edgewright.export.exits.control_flow import sink
from edgewright.export.exits.policy_graph import policy_graphs
from edgewright.export.exits.split_levels import split_levels
from edgewright.export.graph.capture import capture
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.models.registry import build
from edgewright.pipeline.stages.early_exit.automatic_places import boundaries
from edgewright.pipeline.tasks.image_classification import ImageClassification
from edgewright.pipeline.tasks.splits import TensorSplit

transformers = pytest.importorskip("transformers")
NAMES = ["input_ids", "attention_mask"]
ROWS, LENGTH = 7, 6
MIXED = [0.35, 0.6]
"""Thresholds with which rows of one batch leave at different exits."""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[MultiExit, tuple[torch.Tensor, torch.Tensor]]:
    """A BERT of two layers with a masked head after the first and a class-token head in the second; and its inputs."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    base = build(f"hf:{folder}", {}, Path.cwd())
    ids = torch.randint(20, (ROWS, LENGTH))
    mask = (torch.arange(LENGTH) < torch.tensor([6, 2, 4, 1, 6, 3, 5])[:, None]).long()
    places = {place.path: place for place in boundaries(base, (ids, mask))}
    first, second = places["model.bert.encoder.layer.0"], places["model.bert.encoder.layer.1.attention.output"]
    specs = [first.head(mask=(1, LENGTH), hidden=8), second.head(token=0)]
    assert (specs[0].mask, specs[1].token) == (1, 0)
    model = MultiExit(base, specs, [3, 3], 3, "class_exclusion_softmax").eval()
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter, std=1.5)
    model.thresholds.copy_(torch.tensor(MIXED))
    return model, (ids, mask)


def rows_of(inputs: tuple[torch.Tensor, ...], rows: slice) -> dict[str, np.ndarray]:
    return {name: x[rows].numpy() for name, x in zip(NAMES, inputs, strict=True)}


def settings(model: MultiExit) -> list[list[float]]:
    """Every exit forced, and a mix."""
    never, always = model.policy.never, model.policy.always
    return [[always, never], [never, always], [never, never], MIXED]


def same(got: dict[str, np.ndarray], want, rows: slice) -> None:
    np.testing.assert_array_equal(got["exit_index"], want.exit_index[rows])
    np.testing.assert_array_equal(got["label"], want.label[rows])
    np.testing.assert_allclose(got["scores"], want.scores[rows], atol=1e-5)


@pytest.fixture(scope="module")
def bundle(network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network in both layouts, for any number of rows, with a second operating point."""
    model, inputs = network
    split = TensorSplit(inputs, torch.arange(ROWS) % 3)
    task = ImageClassification({"test": split}, ["no", "so so", "yes"], input_name=NAMES)
    points = [OperatingPoint("balanced", tuple(model.thresholds.tolist())), OperatingPoint("at_once", (1.0, 0.0))]
    path = tmp_path_factory.mktemp("bundle") / "b"
    export_bundle(model, task, path, ExportOptions(batch="compact", split=True), operating_points=points)
    return path


@pytest.mark.slow
def test_one_row_a_run(network, tmp_path: Path) -> None:
    model, inputs = network
    flat = capture(model, tuple(x[:1] for x in inputs), NAMES, None)
    policy = policy_graphs(model.policy.name, 3, flat.graph.opset_imports[""], False)
    ir.save(sink(flat, policy, model.thresholds.tolist())[0], tmp_path / "single.onnx")
    levels = split_levels(flat, policy, model.thresholds.tolist(), [rows_of(inputs, slice(0, 1))])
    for k, level in enumerate(levels.models):
        ir.save(level, tmp_path / f"{k}.onnx")
    chain = SplitSession([session_on(tmp_path / f"{k}.onnx").session for k in range(3)], NAMES, levels.row_axes)
    for thresholds in settings(model):
        with torch.no_grad():
            want = model.decide(model.all_logits(*inputs), torch.tensor(thresholds))
        session = session_on(tmp_path / "single.onnx", thresholds=thresholds)
        for row in range(ROWS):
            here, feeds = slice(row, row + 1), rows_of(inputs, slice(row, row + 1))
            same(session.run(feeds), want, here)
            answer = chain.run(None, {**feeds, "thresholds": np.asarray(thresholds, np.float32)})
            same(dict(zip(("label", "scores", "exit_index"), answer, strict=True)), want, here)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["file", "split"])
def test_any_number_of_rows(network, bundle: Path, layout: str) -> None:
    model, inputs = network
    left = set()
    for thresholds in settings(model):
        with torch.no_grad():
            want = model.decide(model.all_logits(*inputs), torch.tensor(thresholds))
        left |= set(want.exit_index.tolist())
        with load(bundle, layout=layout, thresholds=thresholds, threads=1) as runner:
            for rows in (slice(0, ROWS), slice(2, 3), slice(0, 0)):
                same(runner.run(rows_of(inputs, rows)), want, rows)
    assert left == {0, 1, 2} and len(set(want.exit_index.tolist())) > 1, "the last setting mixes exits in a batch"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["file", "split"])
def test_operating_points_are_switched_and_verified(network, bundle: Path, layout: str) -> None:
    model, inputs = network
    given = rows_of(inputs, slice(0, ROWS))
    with torch.no_grad():
        want = model(*inputs)
    with load(bundle, layout=layout, threads=1) as runner:
        same(runner.predict(given)._asdict(), want, slice(0, ROWS))
    with load(bundle, layout=layout, operating_point="at_once", threads=1) as runner:
        assert (runner.predict(given).exit_index == 0).all()
    assert verify(bundle, layout=layout, threads=1).exits_covered == 3
    assert verify(bundle, layout=layout, operating_point="at_once", threads=1).passed
