"""The kinds of answers: decisions, margins, agreement, and what `predict` makes of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from edgewright.edge_runtime import AnswerSpec, BundleError, Manifest, load, open_bundle, verify
from edgewright.edge_runtime.answers.class_map import ClassMap, palette
from edgewright.edge_runtime.answers.classes import exits_answer
from edgewright.edge_runtime.answers.drawing import check_drawn, save_drawn
from edgewright.edge_runtime.answers.kind import Meaning
from edgewright.edge_runtime.answers.table import KINDS, kind_of
from edgewright.edge_runtime.answers.tokens import Tokens
from edgewright.edge_runtime.answers.values import Values
from edgewright.edge_runtime.bundle.consistency import check_consistency
from edgewright.edge_runtime.bundle.manifest import PolicySpec, TensorSpec, Tolerances

LOGITS = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
SHAPES = {"classes": (6, 3), "class_map": (2, 3, 4, 5), "tokens": (2, 4, 7)}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_decision_stays_within_its_margin_and_no_further(kind: str) -> None:
    spec, how = AnswerSpec("x", kind), KINDS[kind]
    logits = np.random.default_rng(1).normal(size=SHAPES[kind])
    decided, margin = how.decisions(spec, {"x": logits})["label"], how.margins(spec, {"x": logits})
    assert margin is not None and margin.shape == decided.shape and margin.min() > 0
    axis = 1 if kind == "class_map" else -1
    best = np.arange(logits.shape[axis]).reshape([-1 if i == axis % logits.ndim else 1 for i in range(logits.ndim)])
    towards = np.where(best == np.expand_dims(decided, axis), -1.0, 1.0)
    for part, stays in ((0.99, True), (1.01, False)):
        moved = logits + part * np.expand_dims(margin.astype(np.float64), axis) * towards
        assert (how.decisions(spec, {"x": moved})["label"] == decided).all() == stays


def test_pixels_that_differ_are_one_difference_a_row_excused_by_the_widest_margin() -> None:
    spec, kind = AnswerSpec("map", "class_map"), KINDS["class_map"]
    want = np.zeros((2, 2, 3, 3), np.float32)
    want[:, 0] = 1.0
    want[1, 0, 0, 0] = 0.02
    got = want.copy()
    got[1, 1, 0, 0], got[1, 1, 2, 2] = 0.5, 1.5
    (found,) = kind.differences(spec, {"map": got}, {"map": want}, None, 0.01)
    assert (found.row, found.places, found.margin, found.excused) == (1, 2, 0.5, False)
    assert (found.expected, found.got) == (0, 1)
    got[1, 1, 2, 2] = 0.0
    (found,) = kind.differences(spec, {"map": got}, {"map": want}, None, 0.011)
    assert found.excused and found.places == 1 and found.margin == pytest.approx(0.01)


def test_values_decide_nothing_and_come_back_in_the_unit_of_the_data() -> None:
    spec = AnswerSpec("y", "values", ("a", "b"), "mm", (2.0, 10.0), (1.0, -1.0))
    outputs = {"y": np.array([[0.0, 1.0], [np.nan, 0.0], [1.0, 2.0]], np.float32)}
    kind = kind_of(spec)
    assert kind.decisions(spec, outputs) == {} and kind.margins(spec, outputs) is None
    found = kind.predict(spec, outputs, {}, Meaning())
    assert isinstance(found, Values) and (found.unit, found.labels) == ("mm", ("a", "b"))
    assert found.values[[0, 2]].tolist() == [[1.0, 9.0], [3.0, 19.0]] and found.values.dtype == np.float32
    assert list(found.refused) == [1] and "not finite" in found.refused[1] and np.isnan(found.values[1]).all()


def test_a_class_map_has_the_softmax_of_its_pixels_and_is_drawn(tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image")
    spec = AnswerSpec("map", "class_map", ("sky", "road", "tree"))
    found = kind_of(spec).predict(spec, {"map": LOGITS}, {1: "NaN"}, Meaning())
    assert isinstance(found, ClassMap)
    shares = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.probability[0], shares[0].max(axis=0), rtol=1e-5)
    assert (found.label[0] == LOGITS[0].argmax(axis=0)).all() and (found.label[1] == -1).all()
    assert sum(found.shares(0).values()) == pytest.approx(1.0) and set(found.shares(0)) <= {"sky", "road", "tree"}
    check_drawn([spec], tmp_path / "map.png")
    save_drawn({"map": found}, tmp_path / "map.png")
    image = images.open(tmp_path / "map.png")
    assert image.size == (5, 8) and (np.asarray(image)[:4] == found.label[0]).all()
    assert (np.asarray(image.convert("RGB"))[:4] == palette()[found.label[0]]).all()
    assert len({tuple(color) for color in palette().tolist()}) == 256


def test_tokens_are_those_that_follow() -> None:
    spec, logits = AnswerSpec("logits", "tokens"), LOGITS[:, 0]
    found = kind_of(spec).predict(spec, {"logits": logits}, {}, Meaning())
    assert isinstance(found, Tokens) and (found.token == logits.argmax(axis=-1)).all()


@pytest.mark.parametrize(
    ("answers", "shape", "message"),
    [
        (
            (AnswerSpec("y", "sounds"),),
            ("batch", 3),
            "'y' has the kind 'sounds', and this runtime knows classes, exits",
        ),
        ((), ("batch", 3), "answers is empty"),
        ((AnswerSpec("z", "values"),), ("batch", 3), r"the answer 'z' \(values\) has no output 'z'"),
        ((AnswerSpec("y", "class_map"),), ("batch", 3), r"'y' has the shape \['batch', 3\], and class_map are logits"),
        (
            (AnswerSpec("y", "class_map", ("a",)),),
            ("batch", 3, 4, 4),
            "labels has 1 names and the output 'y' is 3 wide",
        ),
        ((AnswerSpec("y", "values", scale=(1.0, 2.0)),), ("batch", 3), "scale has 2 numbers for the 3 columns"),
        ((AnswerSpec("y", "values", scale=(0.0,)),), ("batch", 3), "which no value comes back from"),
        ((AnswerSpec("y", "values"), AnswerSpec("y", "classes")), ("batch", 3), "output 'y' is two answers"),
        ((exits_answer("abc"),), ("batch", 3), "no exit policy"),
    ],
)
def test_answers_that_the_outputs_cannot_be_are_refused(
    make_manifest, answers: tuple[AnswerSpec, ...], shape: tuple[int | str, ...], message: str
) -> None:
    outputs = (TensorSpec("y", "float32", shape),)
    manifest = make_manifest(outputs=outputs, answers=answers, policy=None, operating_points=(), batch="dynamic")
    with pytest.raises(BundleError, match=message):
        check_consistency(manifest)


def _first_schema(manifest: Manifest, **changes: object) -> dict[str, object]:
    """The manifest as the first schema had it."""
    data = {**json.loads(manifest.to_json()), "labels": list(manifest.labels), "schema_version": 1, **changes}
    del data["answers"]
    return data


def test_bundles_of_the_first_schema_are_read_and_verified(bundle: Path, flat_bundle: Path, rows: np.ndarray) -> None:
    for folder, kind in ((bundle, "exits"), (flat_bundle, "classes")):
        with open_bundle(folder) as opened:
            manifest = opened.manifest
        text = json.dumps(_first_schema(manifest))
        (folder / "manifest.json").write_text(text)
        (folder / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())
        with open_bundle(folder) as opened:
            assert opened.manifest == manifest and [spec.kind for spec in opened.manifest.answers] == [kind]
        assert verify(folder).passed
        with load(folder) as runner:
            assert set(runner.predict(rows).label_names) <= {"ant", "bee", "cat", "dog"}


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"), [(("batch", 3), "float32", "values"), (("batch", 4, 7), "int64", "tokens")]
)
def test_without_labels_the_first_schema_meant_values_or_tokens(
    make_manifest, shape: tuple[int | str, ...], dtype: str, kind: str
) -> None:
    manifest = make_manifest(
        inputs=(TensorSpec("x", dtype, ("batch", 4)),), outputs=(TensorSpec("logits", "float32", shape),), policy=None
    )
    read = Manifest.from_json(json.dumps(_first_schema(manifest, labels=[])))
    assert read.answers == (AnswerSpec("logits", kind),) and read.schema_version == 2 and read.labels == ()


def test_a_generator_of_the_first_schema_may_flip_tokens_within_its_tolerance(make_manifest) -> None:
    manifest = make_manifest(
        inputs=(TensorSpec("input_ids", "int64", ("batch", "new")),),
        outputs=(TensorSpec("logits", "float32", ("batch", "new", 7)), TensorSpec("present.0.key", "float32", (1, 2))),
        policy=None,
        tolerances=Tolerances(torch_abs=0.5),
    )
    read = Manifest.from_json(json.dumps(_first_schema(manifest, labels=[])))
    assert [spec.kind for spec in read.answers] == ["tokens"] and read.tolerances.flip_margin == 0.5


@pytest.mark.parametrize("missing", ["labels", "outputs"])
def test_a_damaged_manifest_of_the_first_schema_is_named(make_manifest, missing: str) -> None:
    data = _first_schema(make_manifest())
    del data[missing]
    with pytest.raises(BundleError, match=f"lacks the field '{missing}'"):
        Manifest.from_json(json.dumps(data))


def test_a_label_that_flips_beyond_its_margin_fails_without_exits_too(flat_bundle: Path) -> None:
    with open_bundle(flat_bundle) as opened:
        manifest, case = opened.manifest, opened.golden()[0]
    from edgewright.edge_runtime.proof.verification import _Check

    check = _Check(dataclasses.replace(manifest, tolerances=Tolerances(reference_abs=1e3, torch_abs=1e3)))
    check.case(0, case, {"logits": case.reference["logits"][:, ::-1]})
    assert {finding.output for finding in check.findings} == {"logits"} and "wanted" in check.findings[0].message


def test_a_policy_needs_the_answer_of_exits(make_manifest) -> None:
    manifest = make_manifest(answers=(AnswerSpec("scores", "classes"),), policy=PolicySpec("max_probability", 2.0, 0.0))
    with pytest.raises(BundleError, match="not the decision of exits alone"):
        check_consistency(manifest)
