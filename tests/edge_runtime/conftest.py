"""A complete tiny bundle, built without the export room: three levels, two early exits as nested Ifs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright.edge_runtime import GoldenCase, Manifest, session_on, write_golden, write_manifest
from edgewright.edge_runtime.bundle.manifest import (
    AnswerSpec,
    ExitSpec,
    Ledger,
    NodeRow,
    OperatingPoint,
    ParityReport,
    PolicySpec,
    Preprocessing,
    TensorSpec,
    Tolerances,
)

CLASSES, WIDTH, SIDE = 4, 8, 6
NEVER, ALWAYS = 2.0, 0.0
LABELS = ("ant", "bee", "cat", "dog")


@dataclass(frozen=True)
class TinyNet:
    """The same network in numpy, which stands in for PyTorch."""

    bodies: tuple[np.ndarray, ...]
    heads: tuple[np.ndarray, ...]

    def probabilities(self, x: np.ndarray) -> list[np.ndarray]:
        hidden, result = x.reshape(len(x), -1), []
        for body, head in zip(self.bodies, self.heads, strict=True):
            hidden = np.maximum(hidden @ body, 0)
            logits = hidden @ head
            exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
            result.append((exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32))
        return result

    def run(self, x: np.ndarray, thresholds: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Outputs by name, and the margin of every row."""
        probabilities = self.probabilities(x)
        scores = probabilities[-1].copy()
        exits = np.full(len(x), len(probabilities) - 1, np.int64)
        margin = np.full(len(x), np.inf, np.float32)
        for row in range(len(x)):
            for level, threshold in enumerate(thresholds):
                top = probabilities[level][row].max()
                margin[row] = min(margin[row], abs(top - threshold))
                if top >= threshold:
                    scores[row], exits[row] = probabilities[level][row], level
                    break
        label = scores.argmax(axis=1).astype(np.int64)
        return {"label": label, "scores": scores, "exit_index": exits}, margin


def _tiny_net() -> TinyNet:
    rng = np.random.default_rng(7)
    sizes = [3 * SIDE * SIDE, WIDTH, WIDTH]
    bodies = tuple((rng.normal(size=(n, WIDTH)) / np.sqrt(n) * 1.5).astype(np.float32) for n in sizes)
    heads = tuple(rng.normal(size=(WIDTH, CLASSES)).astype(np.float32) for _ in sizes)
    return TinyNet(bodies, heads)


def _outputs() -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info("label", TensorProto.INT64, [1]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, CLASSES]),
        helper.make_tensor_value_info("exit_index", TensorProto.INT64, [1]),
    ]


def _level(net: TinyNet, k: int, names: tuple[str, str, str]) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and weights of level k; the value it hands down is ``h<k>``."""
    nodes = [
        helper.make_node("MatMul", [f"h{k - 1}", f"body{k}.weight"], [f"z{k}"], name=f"body{k}/MatMul"),
        helper.make_node("Relu", [f"z{k}"], [f"h{k}"], name=f"body{k}/Relu"),
        helper.make_node("MatMul", [f"h{k}", f"head{k}.weight"], [f"logits{k}"], name=f"head{k}/MatMul"),
        helper.make_node("Softmax", [f"logits{k}"], [f"p{k}"], name=f"head{k}/Softmax", axis=-1),
    ]
    weights = [
        numpy_helper.from_array(net.bodies[k], f"body{k}.weight"),
        numpy_helper.from_array(net.heads[k], f"head{k}.weight"),
    ]
    if k == len(net.bodies) - 1:
        return nodes + _answer(k, names), weights
    nodes += [
        helper.make_node("ReduceMax", [f"p{k}"], [f"top{k}"], name=f"exit{k}/ReduceMax", keepdims=0),
        helper.make_node("Gather", ["thresholds", f"at{k}"], [f"t{k}"], name=f"exit{k}/Gather"),
        helper.make_node("GreaterOrEqual", [f"top{k}", f"t{k}"], [f"leave{k}"], name=f"exit{k}/GreaterOrEqual"),
    ]
    weights.append(numpy_helper.from_array(np.array(k, np.int64), f"at{k}"))
    branches = {}
    for branch in ("then", "else"):
        inner = tuple(f"{name}_{branch}{k}" for name in ("label", "scores", "exit_index"))
        inner_nodes, inner_weights = (_answer(k, inner), []) if branch == "then" else _level(net, k + 1, inner)
        outputs = [
            helper.make_tensor_value_info(name, info.type.tensor_type.elem_type, None)
            for name, info in zip(inner, _outputs(), strict=True)
        ]
        branches[f"{branch}_branch"] = helper.make_graph(inner_nodes, f"exit{k}.{branch}", [], outputs, inner_weights)
    nodes.append(helper.make_node("If", [f"leave{k}"], list(names), name=f"exit{k}/If", **branches))
    return nodes, weights


def _answer(k: int, names: tuple[str, str, str]) -> list[onnx.NodeProto]:
    index = numpy_helper.from_array(np.array([k], np.int64))
    return [
        helper.make_node("ArgMax", [f"p{k}"], [names[0]], name=f"answer{k}/ArgMax", axis=-1, keepdims=0),
        helper.make_node("Identity", [f"p{k}"], [names[1]], name=f"answer{k}/Identity"),
        helper.make_node("Constant", [], [names[2]], name=f"answer{k}/Constant", value=index),
    ]


def _exit_model(net: TinyNet, thresholds: np.ndarray) -> onnx.ModelProto:
    nodes, weights = _level(net, 0, ("label", "scores", "exit_index"))
    flatten = helper.make_node("Flatten", ["x"], ["h-1"], name="Flatten")
    weights.append(numpy_helper.from_array(thresholds, "thresholds"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIDE, SIDE])
    # a graph input too, as the export makes it: a caller may replace it
    given = helper.make_tensor_value_info("thresholds", TensorProto.FLOAT, [len(thresholds)])
    graph = helper.make_graph([flatten, *nodes], "tiny", [x, given], _outputs(), weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _flat_model(net: TinyNet) -> onnx.ModelProto:
    """One level, logits, a dynamic batch."""
    nodes = [
        helper.make_node("Flatten", ["x"], ["h"], name="Flatten"),
        helper.make_node("MatMul", ["h", "w"], ["z"], name="body/MatMul"),
        helper.make_node("Relu", ["z"], ["r"], name="body/Relu"),
        helper.make_node("MatMul", ["r", "v"], ["logits"], name="head/MatMul"),
    ]
    weights = [numpy_helper.from_array(net.bodies[0], "w"), numpy_helper.from_array(net.heads[0], "v")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph(nodes, "flat", [x], [logits], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _manifest(**changes: object) -> Manifest:
    fields: dict[str, object] = {
        "name": "tiny",
        "batch": "single",
        "inputs": (TensorSpec("x", "float32", (1, 3, SIDE, SIDE)),),
        "outputs": (
            TensorSpec("label", "int64", (1,)),
            TensorSpec("scores", "float32", (1, CLASSES)),
            TensorSpec("exit_index", "int64", (1,)),
        ),
        "answers": (AnswerSpec("label", "exits", LABELS),),
        "preprocessing": Preprocessing("image", (SIDE, SIDE), 3, 1 / 255, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        "exits": (ExitSpec(0, "body0", 1000), ExitSpec(1, "body1", 2000), ExitSpec(2, "final", 3000)),
        "policy": PolicySpec("max_probability", NEVER, ALWAYS),
        "operating_points": (OperatingPoint("default", (0.5, 0.5), {"accuracy": 0.9}),),
        "tolerances": Tolerances(flip_margin=1e-6),
        "parity": ParityReport(0.0, 0.0, 6, 1.0, 1.0, 3, 3),
        "ledger": Ledger(1, 1, 4000, 1, None),
        "nodes": (NodeRow("exit0/If", "If", ("label",), "", 0, 0, 0, 0),),
        "edits": ({"stage": "early_exit", "thresholds": [0.5, 0.5]},),
        "opset": 20,
        "ir_version": 10,
        "versions": {"onnx": onnx.__version__},
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


def _write_exit_bundle(folder: Path) -> None:
    net = _tiny_net()
    x = np.random.default_rng(1).normal(size=(12, 3, SIDE, SIDE)).astype(np.float32)
    tops = [p.max(axis=1) for p in net.probabilities(x)]
    # Halfway between two rows, so that no decision hangs on the last bit.
    first = np.sort(tops[0])[-5:-3].mean()
    second = np.sort(tops[1][tops[0] < first])[-5:-3].mean()
    thresholds = np.array([first, second], np.float32)
    onnx.save(_exit_model(net, thresholds), folder / "model.onnx")
    cases = []
    for values in (thresholds, [ALWAYS, ALWAYS], [NEVER, ALWAYS], [NEVER, NEVER]):
        values = np.array(values, np.float32)
        torch, margin = net.run(x, values)
        with session_on(folder / "model.onnx", thresholds=values, manifest=_manifest()) as runner:
            reference = runner.run_rows({"x": x})
        cases.append(GoldenCase({"x": x}, torch, reference, values, margin))
    write_golden(folder / "golden.npz", cases)
    point = OperatingPoint("default", tuple(thresholds.tolist()), {"accuracy": 0.9})
    deep = OperatingPoint("deep", (NEVER, NEVER), {"accuracy": 0.95})
    write_manifest(folder, _manifest(operating_points=(point, deep)))


def _write_flat_bundle(folder: Path) -> None:
    net = _tiny_net()
    onnx.save(_flat_model(net), folder / "model.onnx")
    x = np.random.default_rng(2).normal(size=(5, 3, SIDE, SIDE)).astype(np.float32)
    torch = {"logits": np.maximum(x.reshape(5, -1) @ net.bodies[0], 0) @ net.heads[0]}
    with session_on(folder / "model.onnx") as runner:
        reference = runner.run({"x": x})
    write_golden(folder / "golden.npz", [GoldenCase({"x": x}, torch, reference)])
    manifest = _manifest(
        name="flat",
        batch="dynamic",
        inputs=(TensorSpec("x", "float32", ("batch", 3, SIDE, SIDE)),),
        outputs=(TensorSpec("logits", "float32", ("batch", CLASSES)),),
        answers=(AnswerSpec("logits", "classes", LABELS),),
        exits=(ExitSpec(0, "final", 1000),),
        policy=None,
        operating_points=(),
        preprocessing=Preprocessing(),
    )
    write_manifest(folder, manifest)


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("exits", "flat")}
    _write_exit_bundle(folders["exits"])
    _write_flat_bundle(folders["flat"])
    return folders


@pytest.fixture
def bundle(_pristine: dict[str, Path], tmp_path: Path) -> Path:
    """A bundle of its own: two early exits, one row a run, image preprocessing."""
    return Path(shutil.copytree(_pristine["exits"], tmp_path / "bundle"))


@pytest.fixture
def flat_bundle(_pristine: dict[str, Path], tmp_path: Path) -> Path:
    """A bundle of its own: logits, dynamic batch, no exits, no preprocessing."""
    return Path(shutil.copytree(_pristine["flat"], tmp_path / "flat"))


@pytest.fixture
def net() -> TinyNet:
    """The network of the bundle, in numpy."""
    return _tiny_net()


@pytest.fixture
def rows() -> np.ndarray:
    """Three inputs that are in no golden case: float32 [3, 3, 6, 6]."""
    return np.random.default_rng(9).normal(size=(3, 3, SIDE, SIDE)).astype(np.float32)


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    """Builds a manifest with some fields changed; it lists no files yet."""
    return _manifest
