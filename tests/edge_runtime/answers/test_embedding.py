"""A vector a row: when two point elsewhere, what `predict` says, what is no vector."""

from __future__ import annotations

import numpy as np
import pytest

from edgewright.edge_runtime import AnswerSpec, BundleError, Vectors
from edgewright.edge_runtime.answers.embedding import SMALLEST_COSINE, EmbeddingKind, cosines
from edgewright.edge_runtime.answers.kind import Meaning
from edgewright.edge_runtime.bundle.consistency import check_consistency
from edgewright.edge_runtime.bundle.manifest import TensorSpec

KIND = EmbeddingKind()
SPEC = AnswerSpec("y", "embedding")


def test_a_row_differs_where_its_vector_points_elsewhere_and_not_by_its_length() -> None:
    want = np.array([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0], [0.0, 0.0]], np.float32)
    angle = np.arccos(SMALLEST_COSINE)
    turned = [[np.cos(a), np.sin(a)] for a in (angle - 1e-3, angle + 1e-3)]
    got = np.array([*turned, [30.0, 40.0], [0.0, 0.0]], np.float32)
    (found,) = KIND.differences(SPEC, {"y": got}, {"y": want}, None, 10.0)
    assert (found.row, found.excused) == (1, False) and "cosine of 0.8996" in found.said
    np.testing.assert_allclose(cosines(got, want)[2:], [1.0, 1.0], atol=1e-7)
    assert cosines(np.zeros((1, 2)), np.ones((1, 2))).tolist() == [0.0]


def test_predict_gives_the_vector_as_it_is_and_refuses_what_overflows() -> None:
    vector = np.array([[3.0, 4.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0, 0.0], [np.inf, 0, 0, 0, 0]], np.float32)
    found = KIND.predict(SPEC, {"y": vector}, {}, Meaning(model="m.onnx"))
    assert isinstance(found, Vectors) and found.rows == 3 and list(found.refused) == [2]
    assert found.text(0) == "3 4 0 0 ... [5], norm 5"
    assert found.data()["vector"][2] == [None] * 5
    np.testing.assert_allclose(found.cosines()[:2, :2], [[1.0, 0.8], [0.8, 1.0]])


def test_what_is_no_vector_a_row_is_refused(make_manifest) -> None:
    outputs = (TensorSpec("y", "float32", ("batch", 4, 8)),)
    manifest = make_manifest(outputs=outputs, answers=(SPEC,), policy=None, operating_points=(), batch="dynamic")
    with pytest.raises(BundleError, match=r"one vector a row, \[N, D\]: pool"):
        check_consistency(manifest)
