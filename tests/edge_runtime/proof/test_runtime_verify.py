from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edgewright.edge_runtime import (
    BundleError,
    GoldenCase,
    ParityError,
    open_bundle,
    verify,
    write_golden,
    write_manifest,
)
from edgewright.edge_runtime.bundle.answer import exclusion_differs


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
