"""Weights files: what loads, and what is refused with which words."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file
from torch import nn

from edgewright.models.sources.weights import load_weights


def net() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2), fc=nn.Linear(2, 3)))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_torch_file_loads(tmp_path: Path, wrap: str | None, prefix: str) -> None:
    theirs, ours = net(), net()
    state: dict[str, Any] = {prefix + key: value for key, value in theirs.state_dict().items()}
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "w.pt")
    assert load_weights(ours, tmp_path / "w.pt") == ()
    assert same(theirs, ours)


def test_a_safetensors_file_loads_without_counters_and_in_half_precision(tmp_path: Path) -> None:
    theirs, ours = net(), net()
    state = {k: v.half() for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, str(tmp_path / "w.safetensors"))
    load_weights(ours, tmp_path / "w.safetensors")
    assert torch.equal(ours.get_parameter("fc.weight"), theirs.get_parameter("fc.weight").half().float())


def test_a_tied_weight_is_enough_once(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(3, 3, bias=False), b=nn.Linear(3, 3, bias=False)))
    model.b.weight = model.a.weight
    save_file({"a.weight": torch.ones(3, 3)}, str(tmp_path / "w.safetensors"))
    load_weights(model, tmp_path / "w.safetensors")
    assert model.b.weight is model.a.weight and float(model.b.weight.detach().sum()) == 9


def test_parts_that_the_model_was_built_without_are_left_out(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self, aux: bool) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2, bias=False)
            self.aux = nn.Linear(2, 2) if aux else None

    torch.save(Net(True).state_dict(), tmp_path / "w.pth")
    assert load_weights(Net(False), tmp_path / "w.pth") == ("aux.weight", "aux.bias")
    # a bias that the layer here lacks is no switched-off part
    torch.save({"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"not in the model: 'fc.bias'"):
        load_weights(Net(False), tmp_path / "b.pth")


def change(**entries: Any) -> dict[str, Any]:
    state = dict(net().state_dict())
    for key, value in entries.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (change(fc__bias=None), r"missing in the file: 'fc.bias'"),
        (change(extra=torch.ones(1)), r"not in the model: 'extra'"),
        (change(fc__weight=torch.ones(4, 2)), r"'fc.weight' is \[4, 2\] in the file and \[3, 2\] in the model"),
        (change(fc__bias=torch.tensor([1.0, float("nan"), 0.0])), r"weight 'fc.bias' holds NaN or infinity"),
        (change(conv__bias=torch.full((2,), float("inf"))), r"weight 'conv.bias' holds NaN or infinity"),
        ({"fc": {"weight": torch.ones(1)}}, r"the entry 'fc' is a dict, not a tensor"),
        ({}, "holds nothing"),
        ([torch.ones(1)], "holds a list, not a state dict"),
        ({f"x{i}": torch.ones(1) for i in range(9)}, r"missing in the file: .* and 5 more; not in .* and 6 more"),
    ],
)
def test_state_dicts_that_do_not_fit(tmp_path: Path, state: Any, message: str) -> None:
    torch.save(state, tmp_path / "w.pt")
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_whole_pickled_model_is_refused_with_advice(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"never unpickled here. Where it can be loaded, convert it") as caught:
        load_weights(net(), tmp_path / "w.pt")
    assert "holds Python objects (torch.nn.modules" in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's own text advises to unpickle it


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"fc.weight": Code()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt holds Python objects .* never unpickled here"):
        load_weights(net(), tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda data: data[: len(data) // 2], "is damaged or truncated: copy or save it again"),
        (lambda data: data[:-40], "is damaged or truncated"),
        (lambda data: b"", "is empty: save it again"),
        (lambda data: b"hello world", "is no file that torch.save wrote"),
        (lambda data: safetensors_bytes(net().state_dict()), r"give it the ending \.safetensors"),
    ],
)
def test_a_pt_file_that_is_no_or_half_a_one_is_not_blamed_for_objects(tmp_path: Path, content, message: str) -> None:
    torch.save(net().state_dict(), tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(content((tmp_path / "w.pt").read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(net(), tmp_path / "w.pt")
    assert "Python objects" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_damaged_and_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"weights file .*{name} does not exist"):
        load_weights(net(), tmp_path / name)
    state = net().state_dict()
    if name.endswith("pt"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, str(tmp_path / name))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    with pytest.raises(ValueError, match=name):
        load_weights(net(), tmp_path / name)
