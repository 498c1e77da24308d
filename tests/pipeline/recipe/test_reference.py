from __future__ import annotations

import re

from edgewright.pipeline.recipe.recipe import Recipe
from edgewright.pipeline.recipe.reference import REFERENCE_FILE, reference_text
from edgewright.pipeline.stages import STAGE_NAMES, stage_named


def _rows(section: str) -> dict[str, str]:
    """Field -> the rest of its row."""
    text = reference_text().split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE))


def test_the_file_is_current() -> None:
    assert REFERENCE_FILE.read_text(encoding="utf-8") == reference_text(), (
        "run `python -m edgewright.pipeline.recipe.reference` and commit the file"
    )


def test_every_field_of_every_stage_has_a_row_with_a_description() -> None:
    assert _rows("Recipe").keys() == set(Recipe.model_fields)
    for name in STAGE_NAMES:
        rows = _rows(f"Stage `{name}`")
        assert rows.keys() == {"name", "id", *stage_named(name).config.model_fields}
        assert all(not row.endswith("| ") and row.count(" | ") >= 2 for row in rows.values())


def test_types_limits_and_defaults() -> None:
    rows = _rows("Stage `class_aware_pruning`")
    assert rows["min_width"].startswith("number (at least 0.0, at most 1.0) | `0.1` | Share of its original filters")
    assert "`similarity`" in rows["criterion"] and "| `auto` |" in rows["criterion"]
    assert "[TrainingConfig](#trainingconfig) or null | `null`" in rows["finetune"]
    assert _rows("Recipe")["model"].startswith("[ModelSpec](#modelspec) or text | required")


def test_links_lead_to_headings() -> None:
    text = reference_text()
    headings = {line[3:].lower().replace("`", "").replace(" ", "-") for line in text.splitlines() if line[:3] == "## "}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
