"""A bundle whose model reads files that are not the bundle's: refused by name, wherever in the model it says so."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from edgewright.export import export_bundle
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.pipeline import ImageClassification

Path("secret").write_bytes(np.ones(4096, np.float32).tobytes())
torch.manual_seed(0)
y = torch.arange(30) % 3
task = ImageClassification.from_arrays(torch.randn(30, 8) + y[:, None], y, ["a", "b", "c"])
base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
model = MultiExit(base, [HeadSpec("0", 64)], [2], 3, "max_probability").eval()
model.thresholds.fill_(0.4)
export_bundle(model, task, "good", parity_rows=6, external_above=0)


def initializers(graph):
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from initializers(attribute.g)


def outside(tensor, location):
    size = int(np.prod(tensor.dims)) * 4
    made = TensorProto(name=tensor.name, dims=tensor.dims, data_type=1, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        made.external_data.add(key=key, value=value)
    return made


def place_branch(proto, location):
    main = list(proto.graph.initializer)
    tensor = next(t for t in initializers(proto.graph) if t.data_location and t not in main)
    tensor.CopyFrom(outside(tensor, location))


def place_main(proto, location):
    tensor = next(t for t in proto.graph.initializer if t.data_location)
    tensor.CopyFrom(outside(tensor, location))


def place_constant(proto, location):
    value = outside(TensorProto(name="c", dims=[4]), location)
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=value))


CASES = {
    "branch": (place_branch, "../secret"),
    "main": (place_main, "../secret"),
    "constant": (place_constant, "../secret"),
    "absolute": (place_branch, str(Path("secret").resolve())),
    "other_case": (place_branch, "MODEL.onnx.data"),
}
for name, (change, location) in CASES.items():
    shutil.rmtree("bad", ignore_errors=True)
    shutil.copytree("good", "bad")
    path = Path("bad/model.onnx")
    proto = onnx.load(str(path), load_external_data=False)
    change(proto, location)
    path.write_bytes(proto.SerializeToString())
    manifest = json.loads(Path("bad/manifest.json").read_text())
    data = path.read_bytes()
    manifest["files"]["model.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest).encode()
    Path("bad/manifest.json").write_bytes(text)
    Path("bad/manifest.sha256").write_text(hashlib.sha256(text).hexdigest() + "\n")
    command = [str(Path(sys.executable).parent / "edgewright"), "verify", "bad"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = " ".join((done.stdout + done.stderr).split())
    right = done.returncode == 2 and Path(location).name in said and "none of the files" in said
    print(f"{'right' if right else 'wrong'} {name}: exit {done.returncode}, {said[-160:]!r}")
