from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgewright.edge_runtime import (
    BundleError,
    GoldenCase,
    Manifest,
    ParityError,
    load,
    open_bundle,
    verify,
    write_golden,
    write_manifest,
)
from edgewright.edge_runtime.answers.classes import exclusion_differs, exits_answer
from edgewright.edge_runtime.measure.measuring import Subject
from edgewright.edge_runtime.proof.verification import _Check


def _rewrite(folder: Path, change_case=None, case: int = 0, **tolerances: float) -> None:
    """Changes one golden case or the tolerances and seals the bundle again."""
    with open_bundle(folder) as opened:
        cases, manifest = opened.golden(), opened.manifest
    if change_case is not None:
        cases[case] = change_case(cases[case])
    write_golden(folder / "golden.npz", cases)
    changed = dataclasses.replace(manifest.tolerances, **tolerances)
    write_manifest(folder, dataclasses.replace(manifest, tolerances=changed))


def _with(case: GoldenCase, group: str, name: str, change) -> GoldenCase:
    values = {key: np.array(value) for key, value in getattr(case, group).items()}
    values[name] = change(values[name])
    return dataclasses.replace(case, **{group: values})


def test_passes_and_covers_every_exit(bundle: Path) -> None:
    report = verify(bundle)
    assert report.passed, report.text()
    assert (report.exits_covered, report.exits_total) == (3, 3)
    assert report.label_agreement == report.exit_agreement == 1.0
    assert report.rows == 48 and report.cases == 4
    assert set(report.max_abs_diff) == {"reference", "torch"}
    assert len(report.text().splitlines()) < 20
    report.raise_if_failed()
    data = json.loads(report.to_json())
    assert data["passed"] and data["schema_version"] == 1


@pytest.mark.parametrize("level", ["disabled", "basic", "extended", "all"])
def test_passes_at_every_optimization_level(bundle: Path, level: str) -> None:
    assert verify(bundle, optimization_level=level, threads=1).passed


def test_a_model_without_exits(flat_bundle: Path) -> None:
    report = verify(flat_bundle)
    assert report.passed, report.text()
    assert report.label_agreement == 1.0 and report.exit_agreement is None and report.exits_total == 0


def test_a_number_beyond_the_tolerance_is_named(bundle: Path) -> None:
    def nudge(scores: np.ndarray) -> np.ndarray:
        scores[4, 2] += 0.01
        return scores

    _rewrite(bundle, lambda case: _with(case, "torch", "scores", nudge), case=1)
    report = verify(bundle)
    (finding,) = report.findings
    assert (finding.case, finding.against, finding.output, finding.row) == (1, "torch", "scores", 4)
    with pytest.raises(ParityError, match=r"case 0001, against torch, output 'scores', row 4: max \|diff\| 0\.01"):
        report.raise_if_failed()


def test_nan_in_the_reference_fails(bundle: Path) -> None:
    def spoil(scores: np.ndarray) -> np.ndarray:
        scores[0, 0] = np.nan
        return scores

    _rewrite(bundle, lambda case: _with(case, "reference", "scores", spoil))
    assert "NaN: 0 got, 1 wanted" in verify(bundle).text()


def _flip_row_two(values: np.ndarray) -> np.ndarray:
    values[2] = (values[2] + 1) % 3
    return values


@pytest.mark.parametrize("output", ["label", "exit_index"])
def test_a_flip_fails_when_its_margin_is_large(bundle: Path, output: str) -> None:
    _rewrite(bundle, lambda case: _with(case, "torch", output, _flip_row_two))
    report = verify(bundle)
    (finding,) = report.findings
    assert (finding.output, finding.row) == (output, 2) and "margin" in finding.message
    assert not report.excused


def test_a_flip_within_the_numeric_error_is_excused_and_listed(bundle: Path) -> None:
    def change(case: GoldenCase) -> GoldenCase:
        case = _with(case, "torch", "exit_index", _flip_row_two)
        # Another exit has other scores: those of the flipped row are not held against it.
        case = _with(case, "torch", "scores", lambda s: np.where(np.arange(len(s))[:, None] == 2, s + 1, s))
        margin = np.array(case.margin)
        margin[2] = 1e-7
        return dataclasses.replace(case, margin=margin)

    _rewrite(bundle, change, flip_margin=1e-6)
    report = verify(bundle)
    assert report.passed, report.text()
    (flip,) = report.excused
    assert (flip.case, flip.row, flip.output) == (0, 2, "exit_index")
    assert report.exit_agreement is not None and report.exit_agreement < 1
    assert "excused: case 0000" in report.text()


def _excludes_another_class(case: GoldenCase, row: int, margin: float) -> GoldenCase:
    """The recorded scores of `row` have one class excluded that the graph keeps; label and exit are equal."""
    scores, margins = np.array(case.torch["scores"]), np.array(case.margin)
    second, first = np.argsort(scores[row])[-2:]
    scores[row, first] += scores[row, second]
    scores[row, second] = 0.0
    margins[row] = margin
    return dataclasses.replace(case, torch={**case.torch, "scores": scores}, margin=margins)


def test_another_set_of_excluded_classes_is_excused_within_the_numeric_error(bundle: Path) -> None:
    _rewrite(bundle, lambda case: _excludes_another_class(case, 2, 1e-7), flip_margin=1e-6)
    report = verify(bundle)
    assert report.passed, report.text()
    (flip,) = report.excused
    assert (flip.case, flip.row, flip.output, flip.against) == (0, 2, "excluded", "torch")
    assert report.label_agreement == report.exit_agreement == 1.0
    assert "row 2 excludes other classes, label and exit are equal, margin 1e-07" in report.text()


def test_another_set_of_excluded_classes_is_not_excused_by_a_large_margin(bundle: Path) -> None:
    _rewrite(bundle, lambda case: _excludes_another_class(case, 2, 1e-5), flip_margin=1e-6)
    report = verify(bundle)
    (finding,) = report.findings
    assert (finding.output, finding.row) == ("scores", 2) and not report.excused


def test_a_small_margin_does_not_excuse_other_scores_of_the_same_classes(bundle: Path) -> None:
    def change(case: GoldenCase) -> GoldenCase:
        margin = np.zeros_like(case.margin)
        return dataclasses.replace(_with(case, "torch", "scores", lambda s: s * np.float32(1.01)), margin=margin)

    _rewrite(bundle, change, flip_margin=1e-6)
    report = verify(bundle)
    assert not report.passed and not report.excused


def test_a_label_that_flips_in_the_same_exit_takes_its_scores_along(bundle: Path) -> None:
    def change(case: GoldenCase) -> GoldenCase:
        label, scores = np.array(case.torch["label"]), np.array(case.torch["scores"])
        label[3] = (label[3] + 1) % 4
        scores[3] = np.eye(4, dtype=np.float32)[label[3]]  # a survivor has 1, so a flip is a difference of 1
        margin = np.array(case.margin)
        margin[3] = 0.0
        return dataclasses.replace(case, torch={**case.torch, "label": label, "scores": scores}, margin=margin)

    _rewrite(bundle, change, flip_margin=1e-6)
    report = verify(bundle)
    assert report.passed, report.text()
    assert [(flip.row, flip.output) for flip in report.excused] == [(3, "label")]


def test_nan_is_never_excused() -> None:
    got, want = np.array([[0.0, np.nan], [0.0, 1.0]]), np.array([[0.5, 0.5], [0.5, 0.5]])
    assert exclusion_differs(got, want).tolist() == [False, True]
    assert exclusion_differs(want, got).tolist() == [False, True]


def test_an_exit_that_no_case_takes_fails(bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        cases, manifest = opened.golden(), opened.manifest
    write_golden(bundle / "golden.npz", cases[1:3])
    write_manifest(bundle, manifest)
    report = verify(bundle)
    assert report.exits_covered == 2
    assert "no case leaves by exit 2" in report.text()


def test_missing_and_misshapen_records_are_findings(bundle: Path) -> None:
    def change(case: GoldenCase) -> GoldenCase:
        reference = {k: v for k, v in case.reference.items() if k != "scores"}
        torch = {**case.torch, "scores": case.torch["scores"][:, :3], "label": case.torch["label"][:5]}
        return dataclasses.replace(case, reference=reference, torch=torch)

    _rewrite(bundle, change)
    text = verify(bundle).text()
    assert "is not among the recorded ones" in text
    assert "shape [12, 4], wanted [12, 3]" in text and "shape [12], wanted [5]" in text


def test_many_failures_still_fit_one_screen(bundle: Path) -> None:
    _rewrite(bundle, lambda case: _with(case, "torch", "label", lambda v: (v + 1) % 4), case=0)
    _rewrite(bundle, lambda case: _with(case, "torch", "label", lambda v: (v + 1) % 4), case=1)
    report = verify(bundle)
    assert len(report.findings) == 24
    assert len(report.text().splitlines()) < 30 and "and 12 more failures" in report.text()


def test_the_tolerances_are_printed_and_said_to_allow_everything(bundle: Path) -> None:
    plain = verify(bundle)
    assert not plain.allowed and "CAUTION" not in plain.text()
    assert "reference 0.0001 + 0.0001 * |wanted|" in plain.text() and "margin of 1e-06" in plain.text()
    for changed, word in (
        ({"torch_abs": 1e300}, "against torch"),
        ({"reference_rel": 1e300}, "against reference"),
        ({"torch_abs": 1.0}, "against torch"),  # scores are at most 1
        ({"flip_margin": 1e300}, "every label and exit"),
    ):
        _rewrite(bundle, lambda case: case, **{**dataclasses.asdict(plain.tolerances), **changed})
        report = verify(bundle)
        assert report.passed and any(word in what for what in report.allowed), changed
        assert "CAUTION" in report.text() and f"{next(iter(changed.values())):g}" in report.text()
        json.loads(report.to_json())


def test_a_tolerance_below_zero_contradicts_itself(bundle: Path) -> None:
    with pytest.raises(BundleError, match="torch_abs"):
        _rewrite(bundle, lambda case: case, torch_abs=-1.0)


@pytest.mark.parametrize("side", ["got", "reference", "torch"])
def test_nan_on_a_row_whose_flip_is_excused_fails_all_the_same(bundle: Path, side: str) -> None:
    with open_bundle(bundle) as opened:
        case, manifest = opened.golden()[0], opened.manifest
    tolerances = dataclasses.replace(manifest.tolerances, flip_margin=1.0)
    case = dataclasses.replace(case, margin=np.zeros(12, np.float32))
    got = {name: np.array(value) for name, value in case.reference.items()}
    got["exit_index"][2] = 1 - min(1, got["exit_index"][2])
    sides = {"got": got, "reference": dict(case.reference), "torch": dict(case.torch)}
    check = _Check(dataclasses.replace(manifest, tolerances=tolerances))
    check.case(0, case, got)
    assert not check.findings and {flip.row for flip in check.excused} == {2}
    sides[side]["scores"] = np.array(sides[side]["scores"])
    sides[side]["scores"][2] = np.nan
    check = _Check(dataclasses.replace(manifest, tolerances=tolerances))
    check.case(0, dataclasses.replace(case, reference=sides["reference"], torch=sides["torch"]), sides["got"])
    assert [(finding.output, finding.row) for finding in check.findings][:1] == [("scores", 2)]


def _graph(folder: Path, change) -> None:
    """Changes the graph and seals the bundle again: a model and a manifest of two exports."""
    model = onnx.load(str(folder / "model.onnx"))
    change(model.graph)
    onnx.save(model, str(folder / "model.onnx"))
    with (folder / "manifest.json").open(encoding="utf-8") as stream:
        manifest = Manifest.from_json(stream.read())
    write_manifest(folder, manifest)


def _answers_by_exit_seven(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "then_branch":
                constant = next(n for n in attribute.g.node if n.op_type == "Constant")
                constant.attribute[0].t.CopyFrom(numpy_helper.from_array(np.array([7], np.int64)))


def test_an_exit_that_the_manifest_does_not_know_is_refused_by_name(bundle: Path) -> None:
    _graph(bundle, _answers_by_exit_seven)
    with pytest.raises(BundleError, match="leaves by exit 7, and the manifest knows the exits 0 to 2"):
        verify(bundle)
    with load(bundle, thresholds=[0.0, 0.0]) as runner:
        with pytest.raises(BundleError, match="exit 7"):
            runner.predict(np.zeros((1, 3, 6, 6), np.float32))
        subject = Subject(runner, [{"x": np.zeros((1, 3, 6, 6), np.float32)}])
        subject.run_once(0)
        with pytest.raises(BundleError, match="exit 7"):
            subject.last_exit()


@pytest.mark.parametrize("known", [True, False], ids=["declared", "computed"])
def test_a_width_of_the_scores_that_the_graph_does_not_have_is_refused(bundle: Path, known: bool) -> None:
    def unsaid(graph: onnx.GraphProto) -> None:
        scores = next(value for value in graph.output if value.name == "scores")
        if not known:  # as ONNX Runtime sees it, any width
            scores.type.tensor_type.shape.dim[1].dim_param = "classes"

    _graph(bundle, unsaid)
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
    outputs = tuple(
        dataclasses.replace(spec, shape=(1, 5)) if spec.name == "scores" else spec for spec in manifest.outputs
    )
    write_manifest(bundle, dataclasses.replace(manifest, outputs=outputs, answers=(exits_answer("abcde"),)))
    with pytest.raises(BundleError, match=r"'scores' has the shape \[1, 4\] in the graph, the manifest says \[1, 5\]"):
        verify(bundle)
