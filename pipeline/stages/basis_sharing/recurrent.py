"""What basis sharing says of the LSTMs and GRUs whose input matrices it has made factors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .fitting import Outcome


def with_opened(outcome: Outcome, closed: Mapping[str, nn.Module]) -> Outcome:
    """`outcome` with the paths of the LSTMs and GRUs that it factorizes, and a note of what stays whole in them."""
    members = [path for group in outcome.data["groups"] for path in group["members"]]
    opened = [path for path in closed if any(member.startswith(f"{path}.") for member in members)]
    if not opened:
        return outcome
    whole = sum(
        parameter.numel() * parameter.element_size()
        for path in opened
        for name, parameter in closed[path].named_parameters()
        if "weight_hh" in name or name.endswith("state_gates.weight")
    )
    note = (
        f"of {', '.join(map(repr, opened))} the input matrices are factors; the recurrent ones ({whole} bytes) stay "
        "whole: an ONNX LSTM or GRU has no place for factors of them"
    )
    return Outcome({**outcome.data, "opened": opened, "notes": [*outcome.data["notes"], note]}, outcome.tensors)
