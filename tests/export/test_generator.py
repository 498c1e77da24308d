"""A language model with its cache as one file: the same logits as PyTorch without a cache, dense and factorized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest
import torch
from language import write_llama

from edgewright.edge_runtime.cli import main
from edgewright.edge_runtime.errors import InputError
from edgewright.edge_runtime.generation import Generator, generate
from edgewright.export.generator import GeneratorExport, export_generator
from edgewright.models.pretrained import LogitsOnly
from edgewright.models.registry import build
from edgewright.pipeline.causal_lm import CausalLM
from edgewright.pipeline.context import FolderContext
from edgewright.pipeline.stages.basis_sharing import BasisSharingConfig, fit

IDS = torch.randint(256, (12, 9), generator=torch.Generator().manual_seed(0))


def dense(folder: Path) -> LogitsOnly:
    return cast(LogitsOnly, build(f"hf:{write_llama(folder / 'llama')}", {}, folder))


@pytest.fixture(scope="module")
def factorized(tmp_path_factory: pytest.TempPathFactory) -> tuple[LogitsOnly, GeneratorExport]:
    folder = tmp_path_factory.mktemp("factorized")
    config = BasisSharingConfig(ratio=0.4, groups="readers", share="always", min_width=4)
    result = fit(dense(folder), CausalLM({"calibration": IDS}, 256), config, FolderContext(folder / "state"))
    model = cast(LogitsOnly, result.model)
    return model, export_generator(model, IDS, folder / "out", decode_steps=12)


def test_the_file_is_proven_and_stores_every_weight_once(factorized: tuple[LogitsOnly, GeneratorExport]) -> None:
    _, made = factorized
    assert made.max_abs_diff < 1e-4 and made.weight_bytes <= 1.01 * made.torch_bytes
    graph = onnx.load(made.path).graph
    weights = [w.name for w in graph.initializer if w.name.endswith("basis.weight")]
    assert len(weights) == 8 and len(set(weights)) == 8
    # q, k, v multiply their basis once
    first = next(name for name in weights if "layers.0.self_attn.q_proj" in name)
    assert sum(first in node.input for node in graph.node) == 1
    embeddings = [w for w in graph.initializer if list(w.dims) in ([256, 32], [32, 256])]
    assert len(embeddings) == 1


def test_greedy_tokens_are_pytorchs(factorized: tuple[LogitsOnly, GeneratorExport]) -> None:
    model, made = factorized
    prompts = [IDS[0].tolist(), IDS[1, :5].tolist(), IDS[2, :7].tolist()]
    seen: list[tuple[int, int]] = []
    found = generate(Generator(made.path, threads=1), prompts, 6, on_token=lambda row, token: seen.append((row, token)))
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert list(found.tokens[row]) == ids[len(prompt) :]
        assert [token for at, token in seen if at == row] == ids[len(prompt) :]
    assert found.steps == 5 and found.prompt_tokens == 21


def test_stop_and_sampling(factorized: tuple[LogitsOnly, GeneratorExport]) -> None:
    generator = Generator(factorized[1].path, threads=1)
    prompt = [IDS[0].tolist()]
    greedy = generate(generator, prompt, 6).tokens[0]
    assert generate(generator, prompt, 6, stop=greedy[2]).tokens[0] == greedy[: greedy.index(greedy[2]) + 1]
    assert generate(generator, prompt, 6, temperature=1.0, top_k=1, seed=5).tokens[0] == greedy
    drawn = [generate(generator, prompt, 6, temperature=2.0, seed=seed).tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_does_not_fit_is_refused(factorized: tuple[LogitsOnly, GeneratorExport], tmp_path: Path) -> None:
    generator = Generator(factorized[1].path, threads=1)
    with pytest.raises(InputError, match="prefill first"):
        generator.step(np.zeros((1, 1), np.int64))
    with pytest.raises(InputError, match="at least one token"):
        generator.prefill([[1], []])
    with pytest.raises(InputError, match="temperature -1"):
        generate(generator, [[1]], 3, temperature=-1.0)
    with pytest.raises(InputError, match="too few"):
        export_generator(factorized[0], IDS[:2], tmp_path)


def test_the_command_prints_ids_or_text_and_says_how_fast(
    factorized: tuple[LogitsOnly, GeneratorExport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = factorized[1].path.parent
    greedy = generate(Generator(factorized[1].path, threads=1), [[65, 66]], 5).tokens[0]
    options = ["--tokens", "5", "--threads", "1", "--json", str(tmp_path / "r.json")]
    assert main(["generate", str(folder), "--ids", "65,66", *options]) == 0
    shown = capsys.readouterr()
    assert shown.out.split() == [str(token) for token in greedy] and "tokens/s" in shown.err
    figures = json.loads((tmp_path / "r.json").read_text())
    assert figures["tokens"] == list(greedy) and figures["prompt_tokens"] == 2
    words = {f"w{i}": i for i in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    place = ["--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main(["generate", str(folder), "--prompt", "w65 w66", *place, *options]) == 0
    assert capsys.readouterr().out.split() == [f"w{token}" for token in greedy]
    assert main(["generate", str(folder), "--prompt", "w65"]) == 2
    assert "there is no tokenizer" in capsys.readouterr().err
