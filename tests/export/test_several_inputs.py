"""A sequence classifier of transformers with token ids and a mask: exits, one file, every branch, one row or many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgewright.edge_runtime.session import session_on
from edgewright.export.capture import capture
from edgewright.export.control_flow import sink
from edgewright.export.policy_graph import policy_graphs
from edgewright.export.row_compaction import compact
from edgewright.models.layers.multi_exit import MultiExit
from edgewright.models.registry import build
from edgewright.pipeline.stages.exit_auto import boundaries

transformers = pytest.importorskip("transformers")
NAMES = ["input_ids", "attention_mask"]
ROWS, LENGTH = 7, 6


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
    return model, (ids, mask)


def rows_of(inputs: tuple[torch.Tensor, ...], rows: slice) -> dict[str, np.ndarray]:
    return {name: x[rows].numpy() for name, x in zip(NAMES, inputs, strict=True)}


def settings(model: MultiExit) -> list[list[float]]:
    """Every exit forced, and a mix."""
    never, always = model.policy.never, model.policy.always
    return [[always, never], [never, always], [never, never], [0.35, 0.6]]


def same(got: dict[str, np.ndarray], want, rows: slice) -> None:
    np.testing.assert_array_equal(got["exit_index"], want.exit_index[rows])
    np.testing.assert_array_equal(got["label"], want.label[rows])
    np.testing.assert_allclose(got["scores"], want.scores[rows], atol=1e-5)


def test_one_row_a_run(network, tmp_path: Path) -> None:
    model, inputs = network
    flat = capture(model, tuple(x[:1] for x in inputs), NAMES, None)
    policy = policy_graphs(model.policy.name, 3, flat.graph.opset_imports[""], False)
    ir.save(sink(flat, policy, model.thresholds.tolist())[0], tmp_path / "single.onnx")
    for thresholds in settings(model):
        with torch.no_grad():
            want = model.decide(model.all_logits(*inputs), torch.tensor(thresholds))
        session = session_on(tmp_path / "single.onnx", thresholds=thresholds)
        for row in range(ROWS):
            same(session.run(rows_of(inputs, slice(row, row + 1))), want, slice(row, row + 1))


def test_any_number_of_rows(network, tmp_path: Path) -> None:
    model, inputs = network
    flat = capture(model, tuple(x[:2] for x in inputs), NAMES, [{0: "batch"}, {0: "batch"}])
    policy = policy_graphs(model.policy.name, 3, flat.graph.opset_imports[""], any_rows=True)
    feeds = [rows_of(inputs, slice(0, rows)) for rows in (2, 3)]
    ir.save(compact(flat, policy, model.thresholds.tolist(), feeds)[0], tmp_path / "compact.onnx")
    left = set()
    for thresholds in settings(model):
        with torch.no_grad():
            want = model.decide(model.all_logits(*inputs), torch.tensor(thresholds))
        left |= set(want.exit_index.tolist())
        session = session_on(tmp_path / "compact.onnx", thresholds=thresholds)
        for rows in (slice(0, ROWS), slice(2, 3), slice(0, 0)):
            same(session.run(rows_of(inputs, rows)), want, rows)
    assert left == {0, 1, 2} and len(set(want.exit_index.tolist())) > 1, "the last setting mixes exits in a batch"
