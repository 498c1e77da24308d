from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from edgewright.edge_runtime import (
    InputError,
    SessionOptions,
    bench,
    interleaved,
    latency_table,
    load,
    open_bundle,
    session_on,
    verify,
)
from edgewright.edge_runtime.inference.options import SessionKeywords
from edgewright.edge_runtime.language.generation import Generator

DOORS = (load, verify, bench, interleaved, latency_table, session_on, Generator.__init__)


def test_the_fields_are_the_keywords() -> None:
    names = {field.name for field in fields(SessionOptions)}
    assert names == set(SessionKeywords.__annotations__)
    for door in DOORS:
        spelled = set(inspect.signature(door).parameters)
        assert {"options", "given"} <= spelled and not spelled & names, door


def test_what_is_given_is_kept_in_one_form() -> None:
    given = SessionOptions(providers="cuda", thresholds=[0.1, 2])
    assert given.providers == ("CUDAExecutionProvider",) and given.thresholds == (pytest.approx(0.1), 2.0)
    assert SessionOptions(providers=None) == SessionOptions() == SessionOptions.of(None, {"threads": None})
    assert given == SessionOptions(given.providers, thresholds=given.thresholds) and hash(given)
    with pytest.raises(FrozenInstanceError):
        given.threads = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"providers": ["cudaa"]}, "did you mean 'cuda'"),
        ({"providers": []}, "empty"),
        ({"threads": 0}, "a number from 1 to 1024, not 0"),
        ({"optimization_level": "most"}, "use disabled, basic, extended, all"),
        ({"layout": "chain"}, "use file or split"),
        ({"thresholds": [float("nan")]}, "must be finite"),
        ({"thresholds": []}, "a list of numbers"),
        ({"thresholds": [[1.0]]}, "a list of numbers"),
        ({"thresholds": ["high"]}, "a list of numbers"),
        ({"thresholds": [1e300]}, "must be finite"),
        ({"thresholds": [1], "operating_point": "deep"}, "not both"),
    ],
)
def test_every_door_refuses_alike_before_it_opens_anything(tmp_path: Path, fields, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SessionOptions(**fields)
    for door in (load, verify, bench, latency_table, session_on, Generator):
        with pytest.raises(InputError, match=message):
            door(tmp_path / "nothing", **fields)
    with pytest.raises(InputError, match=message):
        interleaved({"a": tmp_path / "nothing"}, **fields)


def test_options_go_as_a_whole_by_keyword_or_both(bundle: Path) -> None:
    whole = SessionOptions(threads=1, operating_point="deep")
    for runner in (load(bundle, whole), load(bundle, threads=1, operating_point="deep")):
        with runner:
            assert runner.threads == 1 and runner.thresholds == (2, 2)
    with load(bundle, whole, threads=2) as runner:
        assert runner.threads == 2 and runner.thresholds == (2, 2)
    assert verify(bundle, whole).threads == 1
    with pytest.raises(TypeError, match=r"by keyword, like providers=\['cuda'\]"):
        load(bundle, ["cpu"])
    with pytest.raises(TypeError, match="provider"):
        load(bundle, provider="cpu")


def test_on_a_bundle_an_operating_point_becomes_its_thresholds(bundle: Path, flat_bundle: Path) -> None:
    with open_bundle(bundle) as opened, open_bundle(flat_bundle) as flat:
        plain = SessionOptions()
        assert plain.on(opened.manifest) is plain and plain.on(flat.manifest) is plain
        deep = SessionOptions(operating_point="deep").on(opened.manifest)
        assert (deep.thresholds, deep.operating_point) == ((2, 2), None) and deep.on(opened.manifest) == deep
        with pytest.raises(InputError, match="did you mean 'deep'"):
            SessionOptions(operating_point="dep").on(opened.manifest)
        with pytest.raises(InputError, match="no early exits, so there are no thresholds"):
            SessionOptions(thresholds=[1]).on(flat.manifest)
        with pytest.raises(InputError, match="no split layout"):
            SessionOptions(layout="split").on(opened.manifest)


def test_what_only_a_bundle_has_is_refused_elsewhere(bundle: Path) -> None:
    for wrong in ({"operating_point": "deep"}, {"layout": "split"}):
        for door in (session_on, Generator):
            with pytest.raises(InputError, match="neither operating points nor layouts"):
                door(bundle / "model.onnx", **wrong)
    with pytest.raises(InputError, match="leave thresholds and operating point out"):
        latency_table(bundle, thresholds=[1, 1])
