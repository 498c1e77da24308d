"""Several labels of a row: what is decided, what may flip, what `predict` says."""

from __future__ import annotations

import numpy as np
import pytest

from edgewright.edge_runtime import AnswerSpec, BundleError, Labels
from edgewright.edge_runtime.answers.kind import Meaning
from edgewright.edge_runtime.answers.multilabel import MultilabelKind
from edgewright.edge_runtime.bundle.consistency import check_consistency
from edgewright.edge_runtime.bundle.manifest import TensorSpec

KIND = MultilabelKind()
SPEC = AnswerSpec("y", "multilabel", ("cat", "dog", "elk"))
LOGITS = np.array([[2.0, -1.0, 0.5], [-3.0, -0.5, -2.0], [np.inf, 0.0, 0.0]], np.float32)


def test_each_class_is_decided_by_itself_at_its_own_threshold() -> None:
    assert KIND.decisions(SPEC, {"y": LOGITS[:2]})["label"].tolist() == [[1, 0, 1], [0, 0, 0]]
    strict = AnswerSpec("y", "multilabel", SPEC.labels, thresholds=(0.9, 0.2, 0.7))
    # logits of 0.9, 0.2, 0.7: 2.197, -1.386, 0.847
    assert KIND.decisions(strict, {"y": LOGITS[:2]})["label"].tolist() == [[0, 1, 0], [0, 1, 0]]
    margin = KIND.margins(strict, {"y": LOGITS[:1]})
    assert margin is not None
    np.testing.assert_allclose(margin, [[0.1972, 0.3863, 0.3473]], atol=1e-4)


def test_a_label_flips_within_its_margin_and_no_further() -> None:
    got = LOGITS[:2].copy()
    got[1, 1], got[0, 1] = 0.01, 0.4
    found = KIND.differences(SPEC, {"y": got}, {"y": LOGITS[:2]}, None, 0.6)
    assert [(d.row, d.excused, d.expected, d.got, d.places) for d in found] == [(0, False, 0, 1, 1), (1, True, 0, 1, 1)]


def test_predict_names_the_classes_likeliest_first() -> None:
    found = KIND.predict(SPEC, {"y": LOGITS}, {}, Meaning(model="m.onnx"))
    assert isinstance(found, Labels) and found.rows == 3
    assert found.names(0) == ["cat", "elk"] and found.text(0) == "cat 0.8808  elk 0.6225"
    assert found.text(1) == "none  (nearest dog 0.3775)"
    assert list(found.refused) == [2] and not found.present[2].any() and np.isnan(found.probability[2]).all()
    data = found.data()
    assert data["present"] == [["cat", "elk"], [], []] and data["probability"][2] == [None] * 3


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (SPEC, ("batch", 4), "labels has 3 names and the output 'y' is 4 wide"),
        (SPEC, ("batch", 3, 2), "multilabel are logits"),
        (AnswerSpec("y", "multilabel", thresholds=(0.5, 0.5)), ("batch", 3), "2 thresholds for 3 classes"),
        (AnswerSpec("y", "multilabel", thresholds=(1.0,)), ("batch", 3), "lie between 0 and 1"),
    ],
)
def test_what_cannot_be_such_an_answer_is_refused(
    make_manifest, spec: AnswerSpec, shape: tuple[int | str, ...], message: str
) -> None:
    outputs = (TensorSpec("y", "float32", shape),)
    manifest = make_manifest(outputs=outputs, answers=(spec,), policy=None, operating_points=(), batch="dynamic")
    with pytest.raises(BundleError, match=message):
        check_consistency(manifest)
