"""Basis sharing on random models of the transformers library: groups by structure, and all norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dying import Dying
from pydantic import ValidationError
from torch import Tensor, nn

from edgewright.models.sources.pretrained import build
from edgewright.pipeline.stage import StageResult
from edgewright.pipeline.stages.basis_sharing import updates as coefficient_updates
from edgewright.pipeline.stages.basis_sharing.stage import BasisSharingConfig, fit, rebuild
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import Task
from edgewright.pipeline.tasks.causal_lm import CausalLM
from edgewright.pipeline.tasks.image_classification import ImageClassification

WORDS = 64
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    return transformers.LlamaForCausalLM(config)


def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=WORDS, num_key_value_heads=1, **SMALL))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=24, n_layer=2, n_head=4)
    )


def opt() -> nn.Module:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=WORDS, hidden_size=24, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=24,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=32, num_labels=3, **SMALL)
    )


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **SMALL)
    )


def text() -> CausalLM:
    generator = torch.Generator().manual_seed(0)
    return CausalLM({"calibration": torch.randint(WORDS, (24, 12), generator=generator)}, WORDS)


def sentences() -> ImageClassification:
    data = text().splits["calibration"].batch(range(24)).inputs[0]
    return ImageClassification({"calibration": (data, torch.arange(24) % 3)}, ["a", "b", "c"])


def images() -> ImageClassification:
    data = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return ImageClassification({"calibration": (data, torch.arange(24) % 3)}, ["a", "b", "c"])


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Task]]] = {
    "llama": (llama, text),
    "mistral": (mistral, text),
    "gpt2": (gpt2, text),
    "opt": (opt, text),
    "bert": (bert, sentences),
    "vit": (vit, images),
}
# last names of the members of the groups in the first layer, by `groups: readers`
READERS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "mistral": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "bert": [["query", "key", "value"], ["dense"], ["dense"], ["dense"]],
    "vit": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["fc1"], ["fc2"]],
}


def loaded(name: str, folder: Path) -> tuple[nn.Module, Task]:
    """The model from files, as a user has it, with weights of a size that matters."""
    make, task = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder / name)
    return build(f"hf:{name}", {}, folder), task()


def run(model: nn.Module, task: Task, folder: Path, **config: Any) -> StageResult:
    settings = BasisSharingConfig(**{"share": "always", "min_width": 4, "align": 1, "calibration_batch": 8, **config})
    return fit(copy.deepcopy(model), task, settings, FolderContext(folder))


def inputs(task: Task) -> Tensor:
    return task.splits["calibration"].batch(range(4)).inputs[0]


@pytest.mark.parametrize("name", CASES)
class TestEveryArchitecture:
    def test_readers_of_one_input_are_found(self, name: str, tmp_path: Path) -> None:
        model, task = loaded(name, tmp_path)
        result = run(model, task, tmp_path / "s", groups="readers", ratio=0.3)
        members = [group["members"] for group in result.edit.data["groups"]]
        last = [[path.rpartition(".")[2] for path in paths] for paths in members]
        assert last[: len(READERS[name])] == READERS[name]
        both = run(model, task, tmp_path / "t", groups="readers_and_layers", ratio=0.3)
        assert [len(g["members"]) for g in both.edit.data["groups"]][:4] == [2 * len(m) for m in READERS[name]]
        assert result.metrics["removed_share"] >= 0.3 and both.metrics["removed_share"] >= 0.3
        again = rebuild(copy.deepcopy(model), result.edit)
        again.load_state_dict(result.model.state_dict())
        with torch.no_grad():
            assert torch.equal(again.eval()(inputs(task)), result.model(inputs(task)))

    def test_full_rank_equals_dense(self, name: str, tmp_path: Path) -> None:
        model, task = loaded(name, tmp_path)
        # weights of low rank, so that a rank that saves something is a full one
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear) and min(module.weight.shape) > 3:
                    u, s, v = torch.linalg.svd(module.weight, full_matrices=False)
                    module.weight.copy_(u[:, :3] * s[:3] @ v[:3])
        result = run(model, task, tmp_path / "s", groups="readers", whitening="two_sided", rank=9)
        assert len(result.edit.data["groups"]) >= 8
        with torch.no_grad():
            assert torch.allclose(result.model(inputs(task)), model(inputs(task)), atol=2e-3)


@pytest.mark.parametrize("whitening", ["none", "activation_scale", "fisher", "input", "two_sided"])
def test_every_norm_is_the_best_in_its_own_unit(whitening: str, tmp_path: Path) -> None:
    model, task = loaded("llama", tmp_path)
    result = run(model, task, tmp_path / "s", groups="readers", ratio=0.4, whitening=whitening)
    again = run(model, task, tmp_path / "t", groups="readers", ratio=0.4, whitening=whitening)
    for a, b in zip(result.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for group in result.metrics["groups"]:
        # one input per group: the spectrum's tail is the error, exactly
        if whitening != "fisher":
            assert group["measured_error"] == pytest.approx(group["predicted_error"], rel=1e-4, abs=1e-9)


def test_identical_layers_share_exactly(tmp_path: Path) -> None:
    model, task = loaded("llama", tmp_path)
    layers = model.get_submodule("model.model.layers")
    layers[1].load_state_dict(layers[0].state_dict())  # type: ignore[index]
    # of rank 12, because a basis of all 24 columns would save no weights
    for layer in layers:  # type: ignore[union-attr]
        weight = layer.mlp.gate_proj.weight
        with torch.no_grad():
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(u[:, :12] * s[:12] @ v[:12])
    options = {"layers": {"include": ["*gate_proj"]}, "rank": 12, "group_size": 2}
    result = run(model, task, tmp_path / "s", groups="layers", **options)
    alone = run(model, task, tmp_path / "t", groups="matrix", **options)
    (group,) = result.metrics["groups"]
    assert len(group["members"]) == 2 and group["rank"] == 12
    assert group["bytes_after"] < sum(g["bytes_after"] for g in alone.metrics["groups"])
    for path in group["members"]:
        made, dense = result.model.get_submodule(path), model.get_submodule(path)
        assert torch.allclose(made.dense_weight(), dense.weight, atol=1e-4)
    first, second = (result.model.get_submodule(path) for path in group["members"])
    assert first.basis is second.basis


def test_ranks_by_loss_keep_the_budget_and_move_bytes(tmp_path: Path) -> None:
    model, task = loaded("llama", tmp_path)
    uniform = run(model, task, tmp_path / "s", groups="readers", whitening="two_sided", ratio=0.4)
    moved = run(model, task, tmp_path / "t", groups="readers", whitening="two_sided", ratio=0.4, ranks="loss")
    assert moved.metrics["removed_share"] >= 0.4
    before, after = ([g["rank"] for g in r.metrics["groups"]] for r in (uniform, moved))
    assert before != after and [g["members"] for g in moved.metrics["groups"]] == [
        g["members"] for g in uniform.metrics["groups"]
    ]


def test_ratios_at_the_ends_are_kept(tmp_path: Path) -> None:
    model, task = loaded("gpt2", tmp_path)
    nothing = run(model, task, tmp_path / "s", ratio=0.0)
    assert nothing.edit.data["groups"] == [] and "no layer was factorized" in nothing.notes[0]
    options: dict[str, Any] = {"groups": "readers", "whitening": "two_sided", "ranks": "loss", "align": 8}
    for ratio in (0.6, 0.8):
        result = run(model, task, tmp_path / str(ratio), ratio=ratio, **options)
        assert result.metrics["removed_share"] >= ratio
    # one basis vector each is the least
    least = run(model, task, tmp_path / "t", ratio=0.99, **options)
    assert {group["rank"] for group in least.edit.data["groups"]} == {1}


def test_ranks_by_loss_need_gradients() -> None:
    with pytest.raises(ValidationError, match="needs whitening: two_sided"):
        BasisSharingConfig(ranks="loss")
    with pytest.raises(ValidationError, match="leave rank out"):
        BasisSharingConfig(ranks="loss", whitening="two_sided", rank=3)


def test_private_layers_share_with_nobody(tmp_path: Path) -> None:
    model, task = loaded("llama", tmp_path)
    result = run(model, task, tmp_path / "s", groups="layers", ratio=0.3, layers={"private": ["*o_proj", "*down_proj"]})
    for group in result.edit.data["groups"]:
        alone = group["members"][0].endswith(("o_proj", "down_proj"))
        assert len(group["members"]) == (1 if alone else 2)


def test_updates_undo_drift(tmp_path: Path) -> None:
    model, task = loaded("llama", tmp_path)
    options: dict[str, Any] = {"groups": "readers", "ratio": 0.5}
    with torch.no_grad():
        expected = model(inputs(task))
        errors = []
        for i, more in enumerate(({}, {"updates": 8}, {"updates": 1, "update_target": "weights"})):
            result = run(model, task, tmp_path / str(i), **options, **more)
            errors.append(float((result.model(inputs(task)) - expected).norm()))
            first = result.model.get_submodule("model.model.layers.0.self_attn.q_proj").dense_weight()
            if i == 0:
                untouched = first
            # what nothing has drifted in front of stays as it was
            assert torch.allclose(first, untouched, atol=1e-3)
    assert errors[1] < errors[0] and errors[2] != errors[0]


def test_an_update_of_the_published_method_sums_the_moments_of_a_group(tmp_path: Path) -> None:
    """METHODS §3.5: the formula as it stands there, in float64, on what the compressed model itself reads."""
    model, task = loaded("llama", tmp_path)
    published = {"groups": "layers", "refit": "group", "ratio": 0.5, "update_target": "weights", "align": 1}
    before, after, own = (
        run(model, task, tmp_path / str(i), **{**published, **more})
        for i, more in enumerate(({}, {"updates": 1}, {"updates": 1, "refit": "per_layer"}))
    )
    moments: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).double()
            moments[path] = moments.get(path, torch.zeros(x.shape[1], x.shape[1]).double()) + x.T @ x

        return hook

    shared = [group["members"] for group in before.edit.data["groups"] if len(group["members"]) == 2]
    assert len(shared) == 7
    for path in (path for members in shared for path in members):
        before.model.get_submodule(path).register_forward_pre_hook(watch(path))
    with torch.no_grad():
        before.model(*task.splits["calibration"].batch(range(len(task.splits["calibration"]))).inputs)
    largest = 0.0
    for members in shared:
        total = torch.stack([moments[path] for path in members]).sum(dim=0)
        for path in members:
            layers = [result.model.get_submodule(path) for result in (before, after, own)]
            basis = layers[0].basis.weight.detach().double()
            weight = model.get_submodule(path).weight.detach().double().T
            expected = torch.linalg.solve(basis.T @ total @ basis, basis.T @ total @ weight)
            found, alone = (layer.coefficients.detach().double() for layer in layers[1:])
            assert float((found - expected).norm() / expected.norm()) < 1e-4, path
            largest = max(largest, float((alone - expected).norm() / expected.norm()))
    assert largest > 0.01, "each layer's own inputs are another fit"


def test_updates_fitted_to_few_rows_do_no_harm_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drift is noise to a layer, and a fit to few rows fits it: the whole step makes other rows worse."""
    model, task = loaded("llama", tmp_path)
    windows = task.splits["calibration"].batch(range(24)).inputs[0]
    few = CausalLM({"calibration": windows[:2]}, WORDS)
    # one row leaves nothing to judge by, so nothing moves
    alone = CausalLM({"calibration": windows[:1]}, WORDS)
    options = {"groups": "readers", "ratio": 0.4}
    still, moved = (run(model, alone, tmp_path / f"one{n}", **options, updates=n) for n in (0, 2))
    assert moved.metrics["update_step_largest"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(still.model.parameters(), moved.model.parameters(), strict=True))
    with torch.no_grad():
        expected = model(windows[8:])

        def error(updates: int, name: str) -> float:
            options: dict[str, Any] = {"groups": "readers", "ratio": 0.4, "updates": updates}
            result = run(model, few, tmp_path / name, **options)
            return float((result.model(windows[8:]) - expected).norm())

        before, after = error(0, "before"), error(4, "after")
        monkeypatch.setattr(coefficient_updates, "_worthwhile", lambda *_: 1.0)
        whole = error(4, "whole")
    assert after < 1.01 * before < whole


@pytest.mark.parametrize(("name", "method"), [("gpt2", "lora"), ("mistral", "factors")])
def test_recovery_of_a_language_model_goes_on_where_it_was_killed(name: str, method: str, tmp_path: Path) -> None:
    model, task = loaded(name, tmp_path)
    windows = task.splits["calibration"].batch(range(24)).inputs[0]
    both = CausalLM({"train": windows.flip(0), "calibration": windows}, WORDS)
    recovery = {"method": method, "steps": 4, "save_every": 2, "batch_size": 8, "lora_rank": 2, "learning_rate": 1e-3}
    settings = BasisSharingConfig(
        ratio=0.5, groups="readers", share="always", min_width=4, recovery=recovery  # type: ignore[arg-type]
    )  # fmt: skip
    whole = fit(copy.deepcopy(model), both, settings, FolderContext(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        fit(copy.deepcopy(model), both, settings, Dying(tmp_path / "cut", 2))
    resumed = fit(copy.deepcopy(model), both, settings, FolderContext(tmp_path / "cut"))
    states = whole.model.state_dict(), resumed.model.state_dict()
    assert states[0].keys() == states[1].keys() and [row["steps"] for row in resumed.metrics["recovery"]] == [2, 4]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
