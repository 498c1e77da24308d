"""Weights files as training scripts leave them: loaded where one mapping fits all keys, else refused by key."""

import contextlib
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from edgewright.models.sources.weights import load_weights

warnings.filterwarnings("ignore")


def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


torch.manual_seed(3)
THEIRS = build()
STATE = THEIRS.state_dict()


def keys(change):
    return {change(key): value for key, value in STATE.items()}


def attempt(name, data, words=None, model=None):
    model = build() if model is None else model
    path = Path(f"{name}.pt")
    torch.save(data, path)
    try:
        notes = load_weights(model, path).notes
    except ValueError as error:
        right = words is not None and all(word in str(error) for word in words)
        print("right" if right else "wrong", f"{name}: refused, {str(error)[:200]!r}", flush=True)
        return
    except Exception as error:
        print(f"wrong {name}: {type(error).__name__}: {str(error)[:150]!r}", flush=True)
        return
    same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), STATE.values(), strict=True))
    print("right" if same and words is None and notes else "wrong", f"{name}: equal {same}, {notes}", flush=True)


attempt("compiled_part", keys(lambda k: k.replace("2.", "2._orig_mod.", 1) if k.startswith("2.") else k))
attempt("parallel_of_compiled", keys(lambda k: "module._orig_mod." + k))
attempt("averaged", torch.optim.swa_utils.AveragedModel(THEIRS).state_dict())
attempt("averaged_parallel", torch.optim.swa_utils.AveragedModel(nn.DataParallel(THEIRS)).state_dict())
attempt("net", keys(lambda k: "net." + k))
attempt("two_prefixes", {"state_dict": keys(lambda k: "model.encoder." + k), "epoch": 4})
attempt("lightning", {"state_dict": keys(lambda k: "model." + k), "hyper_parameters": {"lr": 0.1}, "loops": {}})
attempt("entry_net", {"net": dict(STATE), "acc": 91.2, "optimizer": {"state": {}, "param_groups": []}})
attempt("inside_of_the_model", dict(STATE), model=nn.ModuleDict({"backbone": build()}))
attempt(
    "criterion_beside", {"state_dict": keys(lambda k: "model." + k) | {"loss.weight": torch.ones(2)}}, ("loss.weight",)
)
attempt("prefix_of_some", keys(lambda k: "net." + k if k.startswith("0") else k), ("net.0.weight",))
weight = STATE["0.weight"]
for name, value, word in (
    ("sparse", weight.to_sparse(), "to_dense"),
    ("quantized", torch.quantize_per_tensor(weight, 0.1, 0, torch.quint8), "quantize"),
    ("per_channel", torch.quantize_per_channel(weight, torch.ones(4), torch.zeros(4), 0, torch.qint8), "quantize"),
    ("meta", weight.to("meta"), "meta"),
    ("complex", weight.to(torch.complex64), "complex"),
    ("packed", weight.to(torch.int8), "int8"),
):
    for prefix in ("", "module."):
        state = {prefix + key: value if key == "0.weight" else old for key, old in STATE.items()}
        attempt(f"{name}{'-wrapped' if prefix else ''}", state, ("0.weight", word))
save_file({f"_orig_mod.{key}": value.contiguous() for key, value in STATE.items()}, "w.safetensors")
model = build()
with contextlib.suppress(ValueError):
    load_weights(model, Path("w.safetensors"))
same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), STATE.values(), strict=True))
print("right" if same else "wrong", f"safetensors: equal {same}", flush=True)
