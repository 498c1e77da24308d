"""The report's page, requirements and control on made-up figures: what is shown, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from edgewright.edge_runtime.bundle.manifest import ExitSpec
from edgewright.edge_runtime.measure.paired import paired_drop
from edgewright.pipeline.errors import QualityFloorError
from edgewright.pipeline.recipe.recipe import Requirements
from edgewright.pipeline.report.report import _marked, _two_counters, render_html
from edgewright.pipeline.runs.requirements import check_requirements
from edgewright.pipeline.section import FinishedStage, Section
from edgewright.pipeline.stages.class_aware_pruning.report import class_counts
from edgewright.pipeline.stages.class_aware_pruning.report import report as prune_report
from edgewright.pipeline.stages.early_exit.analysis import ExitAnalysis
from edgewright.pipeline.stages.early_exit.report import section as exits_section


def step(name: str, accuracy: float, macs: float, control: bool = False) -> dict[str, Any]:
    return {
        "step": name,
        "metric": "accuracy",
        "accuracy": accuracy,
        "worst_class_accuracy": accuracy - 0.1,
        "macs": macs,
        "macs_of": "graph",
        "parameters": 1000,
        "unique_weight_bytes": 4000,
        "file_bytes": None,
        "p50_ms": None,
        "p90_ms": None,
        "control": control,
    }


REPORT: dict[str, Any] = {
    "name": "<b>mine</b>",
    "task": {"name": "tiny", "labels": ["a", "b"], "test_rows": 10},
    "reference": "train",
    "final": "early_exit",
    "steps": [
        step("base", 0.1, 4e6),
        step("train", 0.98, 4e6),
        step("early_exit", 0.97, 1e6),
        step("c", 0.9, 1e6, True),
    ],
    "summary": {
        "accuracy_change": -0.01,
        "worst_class_accuracy_change": -0.01,
        "macs_reduction": 4.0,
        "bytes_reduction": 2.0,
        "parameters_reduction": 2.0,
        "latency_ratio": {"ratio": 0.5, "low": 0.4, "high": 0.625, "verdict": "faster", "statistic": "mean"},
    },
    "measurements": [],
    "parity": {
        "max_abs_diff": 1e-6,
        "rows": 10,
        "label_agreement": 1.0,
        "exit_agreement": 1.0,
        "exits_covered": 2,
        "exits_total": 2,
        "excused": [],
        "optimization_levels": {"all": 1e-6},
    },
    "sections": [],
    "ledger": {"torch_unique_bytes": 4000, "stored_weight_bytes": 4000, "runtime_weight_bytes": None, "shared": {}},
    "notes": ["a <script>alert(1)</script> note"],
    "environment": {},
}


ANALYSIS = ExitAnalysis(
    rows=(10, 0),
    accuracy=(0.9, None),
    per_class=((5, 0), (5, 0)),
    right_per_class=((5, 0), (4, 0)),
    mean_depth=(0.0, 0.0),
    survivors=((0, 10, 0),),
    wrong_exclusions=(0.0,),
    wrong_exclusion_rate=0.0,
    head_accuracy=(0.9, 0.9),
    confusions=((1, 0, 1, 1),),
    lost=1,
    won=0,
)


def finished(step: str = "prune", arrays: Mapping[str, Any] | None = None, **more: Any) -> FinishedStage:
    manifest = types.SimpleNamespace(
        exits=(ExitSpec(0, "x", 5), ExitSpec(1, "final", 9)), policy=None, operating_points=()
    )
    values = {"labels": ("x", "<y>", "z"), "task": None, "model": None, "manifest": manifest, **more}
    return FinishedStage(step, {}, lambda: arrays or {}, **values)


def reported(stage: str, section: Section | None, step: str = "prune") -> dict[str, Any]:
    """The made-up report with one section, as it is read back from JSON."""
    assert section is not None
    sections = [{"step": step, "stage": stage, **dataclasses.asdict(section)}]
    return json.loads(json.dumps({**copy.deepcopy(REPORT), "sections": sections}))


def exits() -> dict[str, Any]:
    measured = {"exits": {"latency_ms_per_exit": [0.5, 2.0]}}
    return reported(
        "early_exit", exits_section(ANALYSIS, finished(measured=measured, plain_ms=1.0), ["a", "b"]), "early_exit"
    )


def test_the_page_shows_what_there_is_and_escapes_what_users_wrote() -> None:
    page = render_html(exits())
    assert "&lt;b&gt;mine&lt;/b&gt;" in page
    assert "<script>" not in page
    assert page.count("<svg") == 4
    assert "c (control)" in page
    assert "0.5 ms on average, without exits 1 ms" in page and "Break-even: below 66.7% of the rows" in page
    assert "<code>edgewright mix</code>" in page
    assert "1 rows are wrong that the network&#39;s own end has right" in page
    assert "<td>b</td><td>a</td><td>1</td><td>1</td>" in page, "confusion caused by exclusion"
    assert "<td>b</td><td>100.00 %, 80.00 % right</td><td>–</td><td>80.00 %</td>" in page
    assert "mean latency</span><b>÷ 2.00</b>95 % 1.60 to 2.50" in page, "what was measured is what it is called"


def test_steps_that_pytorch_counted_are_marked() -> None:
    assert "°" not in render_html(REPORT), "all by the graph"
    steps = [{**row, "macs_of": "pytorch"} if row["step"] == "train" else row for row in REPORT["steps"]]
    page = render_html({**REPORT, "steps": steps})
    assert page.count("°") == 2 and "° not exported: counted by PyTorch" in page


def test_a_reduction_between_two_counters_is_noted() -> None:
    rows = {name: types.SimpleNamespace(step=name, macs_of=name) for name in ("pytorch", "graph")}
    (note,) = _two_counters(rows["pytorch"], rows["graph"])
    assert "PyTorch's count of pytorch" in note and "graph's of graph" in note
    assert _two_counters(rows["graph"], rows["graph"]) == []


def test_a_run_without_sections_shows_none() -> None:
    page = render_html(REPORT)
    assert "Early exits" not in page
    assert page.count("<svg") == 1


COUNTS = {
    "class_count.a": np.array([3.0, 0.0, 1.5, 3.0000002], np.float32),
    "class_counts.a": np.array([[1, 0, 0.5, 1], [1, 0, 1, 1], [1, 0, 0, 1]], np.float32),
    "class_count.b": np.array([1.0, 1.1], np.float32),
    "class_counts.b": np.ones((3, 2), np.float32),
    "scores.a": np.zeros(4, np.float32),
}
"""Two layers and three classes, as pruning leaves them."""


def test_class_counts_are_condensed_and_drawn() -> None:
    section = prune_report(finished(arrays=COUNTS))
    assert section is not None and section.layers == ("a", "b")
    found = section.data
    assert found["edges"][-1] == 3.0
    assert [(layer["path"], layer["filters"], sum(layer["histogram"])) for layer in found["layers"]] == [
        ("a", 4, 4),
        ("b", 2, 2),
    ]
    assert found["layers"][0]["histogram"][0] == 1 and found["layers"][0]["histogram"][-1] == 2
    assert found["layer"]["path"] == "a", "its filters differ most"
    assert found["layer"]["table"] == [[0, 0.5, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]], "columns by rising count"
    page = render_html(reported("class_aware_pruning", section))
    assert page.count("<svg") == 3 and "Class counts: prune" in page and "differ most, <code>a</code>" in page
    asked = prune_report(finished(arrays=COUNTS, layer="b"))
    assert asked is not None and asked.data["layer"]["path"] == "b" and asked.data["layer"]["asked"]
    page = render_html(reported("class_aware_pruning", asked))
    assert "<figcaption>The layer <code>b</code>" in page
    other = class_counts(COUNTS, ["x", "<y>", "z"], layer="c")
    assert other is not None and other["layer"]["path"] == "a" and not other["layer"]["asked"]


def test_steps_without_scores_have_no_class_counts() -> None:
    assert prune_report(finished()) is None
    assert prune_report(finished(arrays={"scores.a": np.zeros(4, np.float32)})) is None


def test_very_wide_layers_are_thinned_out() -> None:
    count = np.linspace(0, 300, 1000, dtype=np.float32)
    arrays = {"class_count.a": count, "class_counts.a": np.zeros((300, 1000), np.float32)}
    found = class_counts(arrays, [str(i) for i in range(300)])
    assert found is not None and sum(found["layers"][0]["histogram"]) == 1000
    assert len(found["layer"]["table"]) == len(found["layer"]["labels"]) == 128
    assert {len(row) for row in found["layer"]["table"]} == {128}
    assert (found["layer"]["labels"][0], found["layer"]["labels"][-1]) == ("0", "299")


def test_marks_become_code_and_a_lone_one_stays() -> None:
    assert str(_marked("a `b<` c ` d")) == "a <code>b&lt;</code> c ` d"
    assert str(_marked("no mark")) == "no mark"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"max_accuracy_drop": 0.005}, "test accuracy fell by 0.0100, allowed 0.005"),
        ({"macs_reduction": 5}, "macs_reduction is 4.000, required 5"),
        ({"bytes_reduction": 3}, "bytes_reduction is 2.000, required 3"),
        ({"shared_basis": True}, "no basis is shared"),
        ({"every_exit": True}, "no test row leaves at exit 'final'"),
    ],
)
def test_a_missed_requirement_is_named_with_its_figure(wanted: dict[str, Any], reason: str) -> None:
    with pytest.raises(QualityFloorError, match=reason) as caught:
        check_requirements(exits(), Requirements(**wanted))
    assert caught.value.exit_code == 4


def test_met_requirements_say_nothing() -> None:
    check_requirements(REPORT, Requirements(max_accuracy_drop=0.02, macs_reduction=4, bytes_reduction=2))
    check_requirements(REPORT, Requirements())


def test_exits_are_required_of_a_model_without_any() -> None:
    with pytest.raises(QualityFloorError, match="the model has no exits"):
        check_requirements(REPORT, Requirements(every_exit=True))


def test_a_requirement_that_is_missed_says_how_sure_it_is() -> None:
    before = np.ones(100, bool)
    after = before.copy()
    after[:10] = False
    report = copy.deepcopy(REPORT)
    report["summary"] |= {"accuracy_change": -0.1, "accuracy_drop": paired_drop(before, after).to_dict()}
    with pytest.raises(QualityFloorError, match=r"fell by 0.1000 \(10.00 points \[.*n = 100: worse\), allowed"):
        check_requirements(report, Requirements(max_accuracy_drop=0.05))


@pytest.mark.parametrize(("worse", "missed"), [(0.05, False), (0.0501, True), (None, True)])
def test_the_drop_of_any_metric_may_be_required(worse: float | None, missed: bool) -> None:
    report = copy.deepcopy(REPORT)
    report["summary"] |= {"accuracy_change": None, "quality_drop": worse}
    if not missed:
        check_requirements(report, Requirements(max_drop=0.05))
        return
    with pytest.raises(QualityFloorError, match=r"other samples|drop of the metric is 0.0501, max_drop allows 0.05"):
        check_requirements(report, Requirements(max_drop=0.05))


def test_the_page_draws_drops_and_reads_reports_that_have_none() -> None:
    assert "Worse by how much" not in render_html(REPORT)
    report = copy.deepcopy(REPORT)
    drop = paired_drop(np.ones(50), np.concatenate([np.zeros(20), np.ones(30)])).to_dict()
    report["steps"] = [{**row, "drop": drop if row["step"] == "early_exit" else None} for row in report["steps"]]
    report["summary"] |= {"drop": drop, "accuracy_drop": drop}
    page = render_html(report)
    assert "Worse by how much" in page and page.count("40.00 points [") == 2 and "n = 50: worse" in page
