"""Where a run stands after its last good iteration, saved and loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from ...analysis.channels import surgery
from ...stage import Json, State
from .setup import Setup


@dataclass
class Progress:
    """The last good iteration.

    Attributes:
        model: its weights.
        kept: per group the units of the original that are left.
        log: one row per iteration, the one that was undone included.
        stopped: why the loop ended; None while it goes on.
        notes: for the report.
        artifacts: the last scores.
    """

    model: nn.Module
    kept: dict[str, Tensor]
    log: list[dict[str, Json]] = field(default_factory=list)
    stopped: str | None = None
    notes: list[str] = field(default_factory=list)
    artifacts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def iterations(self) -> int:
        """Finished ones."""
        return len(self.log)


def load(setup: Setup) -> Progress | None:
    """Where an interrupted run stood; None if it had not finished an iteration."""
    state = setup.context.load("iteration")
    if state is None:
        return None
    kept = {name: _from_runs(runs) for name, runs in state.data["kept"].items()}
    model = surgery.pruned(setup.base, setup.channels.keep(kept))
    weights = {key.removeprefix("model."): value for key, value in state.tensors.items() if key.startswith("model.")}
    model.load_state_dict(weights)
    artifacts = {key.removeprefix("artifact."): v for key, v in state.tensors.items() if key.startswith("artifact.")}
    data = state.data
    return Progress(model, kept, list(data["log"]), data["stopped"], list(data["notes"]), artifacts)


def save(setup: Setup, progress: Progress) -> None:
    """After every iteration."""
    tensors = {f"model.{key}": value for key, value in progress.model.state_dict().items()}
    tensors.update({f"artifact.{key}": value for key, value in progress.artifacts.items()})
    runs = surgery.to_json({"": progress.kept})[""]
    data = {"kept": runs, "log": progress.log, "stopped": progress.stopped, "notes": progress.notes}
    setup.context.save("iteration", State(data, tensors))


def _from_runs(runs: Json) -> Tensor:
    return surgery.from_json({"": {"": runs}})[""][""]
