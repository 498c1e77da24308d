"""The levels of a network with exits as chained sessions: the host decides after each whether the next one runs.

It is used like one ONNX Runtime session. Between two files the rows that are decided leave, as far as the files take
any number of rows; a level that no row needs does not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import DECIDED, EXIT_INDEX, LABEL, SCORES, THRESHOLDS
from ..errors import BundleError
from .providers import Placement

Arrays = dict[str, NDArray[Any]]

_ANSWER = (LABEL, SCORES, EXIT_INDEX)


@dataclass(frozen=True)
class _Level:
    """A file's session: what it is fed, what is fetched, and what rows are then taken out of for later levels."""

    session: Any
    reads: tuple[str, ...]
    fetches: list[str]
    row_axes: tuple[tuple[str, int], ...]
    last: bool


class _Output:
    """What `Runner` asks of an output of a session."""

    def __init__(self, name: str) -> None:
        self.name = name


class SplitSession:
    """Sessions of all levels, behind the few methods of an ONNX Runtime session that a `Runner` uses."""

    def __init__(self, sessions: Sequence[Any], inputs: Sequence[str], row_axes: Mapping[str, int]) -> None:
        """Chains.

        Args:
            sessions: one for every exit, in order.
            inputs: names of the network's inputs; their rows lie in axis 0.
            row_axes: as in `SplitSpec`.

        Raises:
            BundleError: a file reads what no earlier one gives, or gives no answer; names it.
        """
        self._sessions = tuple(sessions)
        reads = [tuple(value.name for value in session.get_inputs()) for session in sessions]
        gives = [[value.name for value in session.get_outputs()] for session in sessions]
        axes = {**dict.fromkeys(inputs, 0), **row_axes}
        known = set(inputs)
        levels = []
        for k, session in enumerate(sessions):
            last = k == len(sessions) - 1
            answer = [LABEL, SCORES] if last else [DECIDED, LABEL, SCORES]
            if missing := [name for name in reads[k] if name not in known]:
                raise BundleError(f"level {k} of the split model reads {missing[0]!r}, which no earlier level gives")
            if missing := [name for name in answer if name not in gives[k]]:
                raise BundleError(f"level {k} of the split model has no output {missing[0]!r}: export it again")
            known |= set(gives[k])
            later = {name for after in reads[k + 1 :] for name in after}
            fetches = [*answer, *(name for name in gives[k] if name in later and name not in answer)]
            carried = tuple((name, axes[name]) for name in sorted(later & known) if name in axes)
            levels.append(_Level(session, reads[k], fetches, carried, last))
        self._levels = tuple(levels)

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Runs as many levels as the rows need.

        Args:
            output_names: among label, scores and exit_index; None: these three.
            feeds: an array for every input of the network, and `THRESHOLDS` float32 [K] if this run is to have others
                than those stored.
        """
        answer = self._answer(dict(feeds))
        return [answer[_ANSWER.index(name)] for name in (_ANSWER if output_names is None else output_names)]

    def _answer(self, values: Arrays) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        places: NDArray[np.int64] | None = None  # of the rows that are left, in the batch; None: all of them
        whole: tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None = None
        for k, level in enumerate(self._levels):
            fed = {name: values[name] for name in level.reads}
            if not level.last and THRESHOLDS in values:
                fed[THRESHOLDS] = values[THRESHOLDS][k : k + 1]
            outputs = level.session.run(level.fetches, fed)
            decided = None if level.last else outputs[0]
            label, scores = outputs[:2] if decided is None else outputs[1:3]
            if decided is None or decided.all():
                exit_index = np.full(len(label), k, np.int64)
                if whole is None or places is None:
                    return label, scores, exit_index
                return _placed(whole, places, (label, scores, exit_index))
            values.update(zip(level.fetches[3:], outputs[3:], strict=True))
            if not decided.any():
                continue
            leave, stay = np.flatnonzero(decided), np.flatnonzero(~decided)
            if whole is None or places is None:
                whole = np.empty_like(label), np.empty_like(scores), np.empty(len(label), np.int64)
                places = np.arange(len(label))
            leaving = label[leave], scores[leave], np.full(len(leave), k, np.int64)
            _placed(whole, places[leave], leaving)
            places = places[stay]
            for name, axis in level.row_axes:
                values[name] = values[name].take(stay, axis=axis)
        raise AssertionError("the last level answers")

    def get_inputs(self) -> list[Any]:
        """Inputs of the first level; the others' are in the manifest."""
        return list(self._sessions[0].get_inputs())

    def get_outputs(self) -> list[_Output]:
        """label, scores and exit_index."""
        return [_Output(name) for name in _ANSWER]

    def get_providers(self) -> list[str]:
        """Those of every level: all are made with the same options."""
        return list(self._sessions[0].get_providers())


def _placed(
    whole: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    places: NDArray[np.int64],
    rows: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    for target, values in zip(whole, rows, strict=True):
        target[places] = values
    return whole


def joined(placements: Sequence[Placement]) -> Placement:
    """Where the nodes of all levels run."""
    first = placements[0]
    counts: dict[str, int] | None = {}
    for placement in placements:
        if counts is None or placement.nodes_per_provider is None:
            counts = None
            continue
        for name, count in placement.nodes_per_provider.items():
            counts[name] = counts.get(name, 0) + count
    return Placement(
        requested=first.requested,
        session=tuple(dict.fromkeys(name for placement in placements for name in placement.session)),
        strict=first.strict,
        method=first.method,
        nodes_per_provider=counts,
        cpu_nodes=tuple(name for placement in placements for name in placement.cpu_nodes)[:50],
        fallback=tuple(dict.fromkeys(reason for placement in placements for reason in placement.fallback)),
    )
