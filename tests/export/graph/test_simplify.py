"""Simplifiers that crash, hang, drop, duplicate or change: the input survives and the reason is told."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import simplifier_server
import torch
from exported import share_linear_bases, with_exits

from edgewright.edge_runtime.errors import InputError
from edgewright.export.accounts.ledger import unique_bytes
from edgewright.export.graph import simplify as simplify_module
from edgewright.export.graph.capture import capture
from edgewright.export.graph.simplify import simplify

FEEDS = {"image": np.random.default_rng(0).standard_normal((1, 1, 12, 12)).astype(np.float32)}


@pytest.fixture(autouse=True)
def real_process(monkeypatch):
    monkeypatch.setattr(simplify_module, "_run", simplifier_server.REAL_RUN)


@pytest.fixture(scope="module")
def flat():
    return capture(share_linear_bases(with_exits("transformer")), (torch.randn(1, 1, 12, 12),), ["image"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["onnxscript", "onnxsim"])
def test_a_good_simplifier_is_kept_and_shares_on(flat, method):
    simplified, note = simplify(flat, method, FEEDS)
    assert note.startswith(f"{method}: kept")
    assert len(list(simplified.graph)) < len(list(flat.graph))
    assert unique_bytes(simplified) <= unique_bytes(flat) + 1024
    names = [node.name for node in simplified.graph]
    assert len(set(names)) == len(names)


def test_a_weight_may_be_called_like_the_thresholds():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.thresholds = torch.nn.Parameter(torch.rand(144, 4))

        def forward(self, x):
            return x.flatten(1) @ self.thresholds

    simplified, note = simplify(capture(Net(), (torch.randn(1, 1, 12, 12),), ["image"]), "onnxscript", FEEDS)
    assert note.startswith("onnxscript: kept") and unique_bytes(simplified) == 144 * 4 * 4 > 1024


def test_none_leaves_the_graph(flat):
    assert simplify(flat, "none", FEEDS)[0] is flat


BAD = {
    "segfault": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with code -11"),
    "hang": ("import time; time.sleep(60)", "no answer"),
    "no file": ("pass", "wrote no file"),
    "garbage": ("open(target, 'wb').write(b'nonsense')", "no valid model"),
    "drops an output": ("del m.graph.output[1]; onnx.save(m, target)", "outputs changed"),
    "changes numbers": (
        "w = next(t for t in m.graph.initializer if t.name.endswith('coefficients'));"
        "w.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(w), w.name)); onnx.save(m, target)",
        "changed: max",
    ),
    "adds nodes": (
        "m.graph.node.add(op_type='Identity', name='extra', input=['image'], output=['extra']); onnx.save(m, target)",
        "nodes grew",
    ),
    "duplicates a weight": (
        "w = next(t for t in m.graph.initializer if t.name.endswith('basis.weight'));"
        "users = [(n, i) for n in m.graph.node for i, x in enumerate(n.input) if x == w.name];\n"
        "for k, (n, i) in enumerate(users):\n"
        "    for r in range(2):\n"
        "        c = m.graph.initializer.add(); c.CopyFrom(w); c.name = f'copy{k}.{r}'\n"
        "    n.input[i] = c.name\n"
        "onnx.save(m, target)",
        "stored weight bytes grew",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_a_bad_simplifier_is_survived(flat, name):
    script, reason = BAD[name]

    def command(source, target):
        setup = f"import onnx, onnx.numpy_helper\nm = onnx.load({str(source)!r})\ntarget = {str(target)!r}\n"
        return [sys.executable, "-c", setup + script]

    kept, note = simplify(flat, "none", FEEDS, timeout=4.0 if name == "hang" else 120.0, command=command)
    assert kept is flat
    assert reason in note


def test_a_full_disk_is_no_verdict_on_the_graph(flat):
    def command(source, target):
        return [sys.executable, "-c", "raise OSError(28, 'No space left on device')"]

    with pytest.raises(InputError, match=r"the place for temporary files, .* is full.*TMPDIR"):
        simplify(flat, "none", FEEDS, command=command)
