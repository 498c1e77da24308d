"""Buffers with one entry per channel, in modules that are no normalisation of PyTorch's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import net
import torch

from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.finding import find_channels


def tell(right: bool, name: str, seen: str) -> None:
    print("right" if right else "wrong", f"{name}: {' '.join(seen.split())[-300:]}", flush=True)


def narrowed(kind: str) -> tuple[bool, str]:
    model, images = net.net(kind).eval(), torch.randn(2, 3, 16, 16)
    channels = find_channels(model, (images[:1],))
    names = [group.name for group in channels.groups]
    if names != ["0", "4"]:
        return False, f"{names}, {dict(channels.refused)}"
    keep = channels.keep({"0": torch.tensor([1, 2, 5, 7])})
    small = surgery.pruned(model, keep)
    with torch.no_grad():
        off = float((small(images) - surgery.masked(model, keep)(images)).abs().max())
    shape = list(next(small[3].buffers()).shape)
    return off < 1e-4 and (4 in shape or kind == "truth_values"), f"buffer {shape}, off by {off:.1g}"


for kind in net.MIDDLES:
    try:
        right, seen = narrowed(kind)
        tell(right, kind, seen)
    except Exception as error:
        tell(False, kind, f"{type(error).__name__}: {error}")

command = [str(Path(sys.executable).parent / "edgewright"), "run", "recipe.yaml", "--out", "out"]
done = subprocess.run(command, capture_output=True, text=True, check=False)
report = Path("out/report.json")
less = Path("out/bundle/manifest.json").exists() and report.exists()
steps = json.loads(report.read_text())["steps"] if less else []
tell(
    done.returncode == 0 and less and steps[-1]["macs"] < steps[0]["macs"],
    "recipe",
    f"exit {done.returncode}, MACs {[s.get('macs') for s in steps]} {done.stderr if done.returncode else ''}",
)
