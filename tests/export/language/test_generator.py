"""A language model with its cache as one file: the same logits as PyTorch without a cache, dense and factorized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
import yaml
from language import write_llama

from edgewright.edge_runtime import verify
from edgewright.edge_runtime.bundle.bundle import open_bundle, pack_zip, write_manifest
from edgewright.edge_runtime.cli import main
from edgewright.edge_runtime.errors import BundleError, InputError
from edgewright.edge_runtime.language.generation import Generator, generate
from edgewright.edge_runtime.language.sampling import Sampling
from edgewright.export.graph.model_file import save_model
from edgewright.export.language.generator import export_generator
from edgewright.export.precision.weight_quantization import quantize_weights
from edgewright.models.sources.pretrained import LogitsOnly
from edgewright.pipeline.errors import ModelError, RecipeError
from edgewright.pipeline.runs.runner import run
from edgewright.pipeline.store.checkpoint import load_checkpoint

IDS = torch.randint(256, (12, 9), generator=torch.Generator().manual_seed(0))


def write_recipe(folder: Path) -> Path:
    """A LLaMA of two layers, words as tokens, a text, and a recipe from all that to a generator."""
    tokenizers = pytest.importorskip("tokenizers")
    write_llama(folder / "llama")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder / "llama")
    numbers = torch.randint(256, (3000,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in numbers))
    recipe = {
        "name": "tiny",
        "model": "hf:llama",
        "task": {"name": "causal_lm", "args": {"path": "text.txt", "window": 12, "tokenizer_path": "llama"}},
        "stages": [{"name": "basis_sharing", "ratio": 0.4, "groups": "readers", "share": "always", "min_width": 4}],
        "export": {"generator": True},
        "benchmark": {"enabled": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def factorized(tmp_path_factory: pytest.TempPathFactory) -> tuple[LogitsOnly, Path]:
    """The compressed model, and its bundle, by `edgewright run`."""
    folder = tmp_path_factory.mktemp("factorized")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made = run(write_recipe(folder), folder / "out")
    model = cast(LogitsOnly, load_checkpoint(made.out / made.steps[-1].checkpoint, folder))
    return model, made.bundle


@pytest.mark.slow
def test_a_recipe_ends_in_a_proven_bundle(factorized: tuple[LogitsOnly, Path]) -> None:
    _, bundle = factorized
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
        cases = opened.golden()
    assert manifest.parity.max_abs_diff < 1e-4 and manifest.parity.label_agreement == 1.0
    assert manifest.ledger.stored_weight_bytes <= 1.01 * manifest.ledger.torch_unique_bytes
    assert {len(paths) for paths in manifest.ledger.shared.values()} == {2, 3} and len(manifest.ledger.shared) == 4
    assert [edit["stage"] for edit in manifest.edits] == ["basis_sharing"]
    # alone from an empty cache and from what that left; three together from what a padded prompt left
    assert [case.inputs["input_ids"].shape for case in cases] == [(1, 12), (1, 1), (3, 1)]
    assert [case.inputs["past.0.key"].shape[2] for case in cases] == [0, 12, 12]
    assert cases[2].inputs["attention_mask"].sum(axis=1).tolist() == [13, 12, 11]
    report = verify(bundle, threads=1)
    assert report.passed and report.max_abs_diff["torch"] < 1e-3 and report.rows == 5
    graph = onnx.load(bundle / "model.onnx").graph
    weights = [w.name for w in graph.initializer if w.name.endswith("basis.weight")]
    assert len(weights) == 8 and len(set(weights)) == 8
    # q, k, v multiply their basis once
    first = next(name for name in weights if "layers.0.self_attn.q_proj" in name)
    assert sum(first in node.input for node in graph.node) == 1
    embeddings = [w for w in graph.initializer if list(w.dims) in ([256, 32], [32, 256])]
    assert len(embeddings) == 1
    # the merged products count once, in the report too
    *others, row = json.loads((bundle.parent / "report.json").read_text())["steps"]
    assert others and {other["macs_of"] for other in others} == {"pytorch"}, "the last alone is exported"
    saved = row["metrics"]["macs_after"] - row["metrics"]["macs_after_merged"]
    assert saved > 0 and manifest.exits[0].macs == row["macs"] and row["macs_of"] == "graph"
    assert any(f"costs {row['macs']:.0f} MACs: it multiplies a basis once" in note for note in row["notes"])
    assert manifest.exits[0].attention_macs == row["attention_macs"]


@pytest.mark.slow
def test_a_prompt_gets_logits_at_its_last_token_alone(factorized: tuple[LogitsOnly, Path]) -> None:
    generator = Generator(factorized[1] / "model.onnx", threads=1)
    prompts = [IDS[0, :7].tolist(), IDS[1, :4].tolist()]
    everything = np.array(generator.prefill(prompts))
    following = np.array(generator.step(IDS[:2, :1].numpy()))
    last = np.array(generator.prefill(prompts, last_only=True))
    assert last.shape == (2, 1, 256)
    np.testing.assert_allclose(last, everything[:, -1:], atol=1e-5)
    # the cache is that of the whole prompt
    np.testing.assert_allclose(generator.step(IDS[:2, :1].numpy()), following, atol=1e-5)


@pytest.mark.slow
def test_a_changed_weight_is_found(factorized: tuple[LogitsOnly, Path], tmp_path: Path) -> None:
    shutil.copytree(factorized[1], tmp_path / "b")
    data = bytearray((tmp_path / "b" / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "b" / "model.onnx").write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"model\.onnx differs"):
        verify(tmp_path / "b")


@pytest.mark.slow
def test_rounded_weights_are_smaller_and_their_error_is_measured(
    factorized: tuple[LogitsOnly, Path], tmp_path: Path
) -> None:
    model, bundle = factorized
    found = {}
    for weights in ("int8", "int4"):
        path = tmp_path / f"{weights}.onnx"
        shutil.copy(bundle / "model.onnx", path)
        found[weights] = quantize_weights(model, path, weights, IDS[:3])
        logits = torch.from_numpy(np.array(Generator(path, threads=1).prefill(IDS[:3].tolist())))
        with torch.no_grad():
            assert float((logits - model(IDS[:3])).abs().max()) == pytest.approx(found[weights].max_abs_diff, rel=1e-3)
    eight, four = found["int8"], found["int4"]
    # 8 bases and 14 coefficients; the head is the embedding
    assert eight.products == {8: 22} and four.products == {8: 8, 4: 14}
    assert four.bytes_after < eight.bytes_after < eight.bytes_before
    assert 0.0 < eight.divergence < four.divergence and eight.max_abs_diff < 0.1 * four.max_abs_diff
    assert "8 in 8 bits" in four.text()


@pytest.mark.slow
def test_weights_beside_the_graph(
    factorized: tuple[LogitsOnly, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What happens beyond 2 GB, with the limit lowered."""
    model, inline = factorized
    greedy = generate(Generator(inline / "model.onnx", threads=1), [[65, 66]], 5).tokens[0]
    folder = tmp_path / "b"
    shutil.copytree(inline, folder)
    save_model(ir.load(inline / "model.onnx"), folder / "model.onnx", external_above=2000)
    with open_bundle(inline) as opened:
        write_manifest(folder, opened.manifest)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    places = {entry.value for w in graph.initializer for entry in w.external_data if entry.key == "location"}
    assert places == {"model.onnx.data"} and (folder / "model.onnx").stat().st_size < 150_000
    assert verify(folder, threads=1).passed
    pack_zip(folder, tmp_path / "b.zip")
    for place in (folder, tmp_path / "b.zip"):
        assert main(["generate", str(place), "--ids", "65,66", "--tokens", "5"]) == 0
        assert capsys.readouterr().out.split() == [str(token) for token in greedy]
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(folder / name, tmp_path / name)
    before = (tmp_path / "model.onnx.data").stat().st_size
    rounded = quantize_weights(model, tmp_path / "model.onnx", "int8", IDS[:3], external_above=2000)
    # the embedding, which is the head, stays float32
    assert rounded.products == {8: 22} and (tmp_path / "model.onnx.data").stat().st_size < 0.9 * before
    (folder / "model.onnx.data").write_bytes(bytes(before))
    with pytest.raises(BundleError, match=r"model\.onnx\.data differs"):
        verify(folder)


def test_recipes_that_cannot_generate_are_refused_before_anything_runs(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    of_bytes = {"task": {"name": "causal_lm", "args": {"path": "text.txt", "window": 12, "tokenizer": "bytes"}}}
    shapes = {"net": (256, 256), "narrow": (256, 100), "short": (60, 256)}
    functions = [f"def {name}():\n    return nn.Sequential(nn.Embedding{shape})\n" for name, shape in shapes.items()]
    (tmp_path / "net.py").write_text("\n".join(["from torch import nn\n", *functions]))
    for change, error, words in (
        ({"benchmark": {"enabled": True}}, RecipeError, "benchmark.enabled to false"),
        ({"export": {"weights": "int8"}}, RecipeError, "set export.generator to true"),
        ({**of_bytes, "model": "python:net.py:narrow"}, ModelError, "knows 100 tokens, and the text .* the token 119"),
        (
            {**of_bytes, "model": "python:net.py:short"},
            ModelError,
            "has 60 rows and the data the number .* own tokenizer",
        ),
        ({"model": "python:net.py:net"}, ModelError, "cannot generate: it is no model of the transformers"),
    ):
        path.write_text(yaml.safe_dump({**recipe, "stages": [], **change}))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(error, match=words):
            patch.chdir(tmp_path)
            run(path, tmp_path / "out")


@pytest.mark.slow
def test_greedy_tokens_are_pytorchs(factorized: tuple[LogitsOnly, Path]) -> None:
    model, bundle = factorized
    prompts = [IDS[0].tolist(), IDS[1, :5].tolist(), IDS[2, :7].tolist()]
    seen: list[tuple[int, int]] = []
    generator = Generator(bundle / "model.onnx", threads=1)
    found = generate(generator, prompts, 6, on_token=lambda row, token: seen.append((row, token)))
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert list(found.tokens[row]) == ids[len(prompt) :]
        assert [token for at, token in seen if at == row] == ids[len(prompt) :]
    assert found.steps == 5 and found.prompt_tokens == 21


@pytest.mark.slow
def test_stop_and_sampling(factorized: tuple[LogitsOnly, Path]) -> None:
    generator = Generator(factorized[1] / "model.onnx", threads=1)
    prompt = [IDS[0].tolist()]
    greedy = generate(generator, prompt, 6).tokens[0]
    assert generate(generator, prompt, 6, stop=[greedy[2]]).tokens[0] == greedy[: greedy.index(greedy[2]) + 1]
    for narrow in (Sampling(1.0, top_k=1, seed=5), Sampling(1.0, top_p=1e-6, seed=5)):
        assert generate(generator, prompt, 6, sampling=narrow).tokens[0] == greedy
    drawn = [generate(generator, prompt, 6, sampling=Sampling(2.0, seed=seed)).tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_it_ends_where_the_model_has_no_further_positions(factorized: tuple[LogitsOnly, Path]) -> None:
    generator = Generator(factorized[1] / "model.onnx", threads=1)
    assert generator.positions == 64 and generator.end_tokens == (2,)
    with pytest.raises(InputError, match="65 tokens are more than the model's context of 64"):
        generator.prefill([[1] * 65])
    found = generate(generator, [[1] * 62, [3]], 64)
    # the last token needs no position of its own
    assert found.context_full and [len(row) for row in found.tokens] == [3, 3]
    assert not generate(generator, [[1] * 62], 3).context_full


@pytest.mark.slow
def test_what_does_not_fit_is_refused(factorized: tuple[LogitsOnly, Path], tmp_path: Path) -> None:
    generator = Generator(factorized[1] / "model.onnx", threads=1)
    with pytest.raises(InputError, match="prefill first"):
        generator.step(np.zeros((1, 1), np.int64))
    with pytest.raises(InputError, match="at least one token"):
        generator.prefill([[1], []])
    for token in (-1, 256):
        with pytest.raises(InputError, match=f"token {token} is none of the 256"):
            generator.prefill([[1], [token]])
    with pytest.raises(InputError, match="too few"):
        export_generator(factorized[0], IDS[:2], tmp_path)


@pytest.mark.slow
def test_the_command_prints_ids_or_text_and_says_how_fast(
    factorized: tuple[LogitsOnly, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = factorized[1]
    greedy = generate(Generator(folder / "model.onnx", threads=1), [[65, 66]], 5).tokens[0]
    options = ["--tokens", "5", "--threads", "1", "--json", str(tmp_path / "r.json")]
    assert main(["generate", str(folder), "--ids", "65,66", *options]) == 0
    shown = capsys.readouterr()
    assert shown.out.split() == [str(token) for token in greedy] and "tokens/s" in shown.err
    figures = json.loads((tmp_path / "r.json").read_text())
    assert figures["tokens"] == [list(greedy)] and figures["prompt_tokens"] == 2
    # the tokenizer lies in the bundle; several prompts at once give what each gives alone
    words = [f"w{token}" for token in greedy]
    assert main(["generate", str(folder), "--prompt", "w65 w66", *options]) == 0
    assert capsys.readouterr().out.split() == words
    assert main(["generate", str(folder), "--prompt", "w7 w8 w9", "--prompt", "w65 w66", *options]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["[1]", *words]
    assert main(["generate", str(folder), "--ids", "65,66", "--stop", str(greedy[1]), *options]) == 0
    assert capsys.readouterr().out.split() == [str(token) for token in greedy[: greedy.index(greedy[1]) + 1]]


@pytest.mark.slow
def test_the_command_refuses_what_it_cannot_continue(
    factorized: tuple[LogitsOnly, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = factorized[1]
    shutil.copy(folder / "model.onnx", tmp_path / "bare.onnx")
    shutil.copytree(folder, tmp_path / "changed")
    (tmp_path / "changed" / "tokenizer.json").write_text("{}")
    for wanted, given in {
        "there is no tokenizer": [tmp_path / "bare.onnx", "--prompt", "w65"],
        "has no token": [folder, "--prompt", ""],
        "tokenizer.json": [tmp_path / "changed", "--ids", "1"],
        "set a temperature": [folder, "--ids", "1", "--top-p", "0.5"],
        "context of 64": [folder, "--ids", ",".join(["1"] * 65)],
        "lies in the bundle": [folder, "--ids", "1", "--json", folder / "r.json"],
    }.items():
        assert main(["generate", *map(str, given)]) in (1, 2)
        assert wanted in capsys.readouterr().err
