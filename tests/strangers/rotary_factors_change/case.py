"""Language models whose rotary factors change at a length: equal at every length that the bundle claims."""

import warnings

import torch
import transformers

from edgewright.edge_runtime.errors import EdgewrightError, InputError
from edgewright.edge_runtime.language.generation import Generator
from edgewright.export.language.generator import export_generator
from edgewright.export.options import ExportOptions
from edgewright.models.sources.pretrained import LogitsOnly

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
CHANGE = 32
"""Tokens at which the models change something; the proof's own generation ends at 20."""


def look(name, kind, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    model = LogitsOnly(getattr(transformers, f"{kind}ForCausalLM")(config), "input_ids").eval()
    tokens = torch.randint(64, (4, 24), generator=torch.Generator().manual_seed(0))
    try:
        made = export_generator(model, tokens, f"{name}", ExportOptions(simplify="none"), decode_steps=4)
    except EdgewrightError as error:
        print(f"right {name}: refused, {str(error)[:100]!r}")
        return
    generator = Generator(made.path, threads=1)
    text = torch.randint(64, (1, 64), generator=torch.Generator().manual_seed(1))
    generator.prefill([text[0, :20].tolist()])
    for length in range(21, 65):
        try:
            mine = generator.step(text[:, length - 1 : length].numpy())[0, -1]
        except InputError:
            said = any("positions end" in note for note in made.manifest.notes)
            print(f"{'right' if said else 'wrong'} {name}: equal up to {length - 1} tokens, then refused; said: {said}")
            return
        with torch.no_grad():
            off = float((model(text[:, :length])[0, -1] - torch.from_numpy(mine)).abs().max())
        if not off < 1e-3:
            print(f"wrong {name}: logits differ by {off:.3g} at {length} tokens of {generator.positions} claimed")
            return
    print(f"right {name}: equal up to 64 tokens")


look(
    "longrope",
    "Phi3",
    original_max_position_embeddings=CHANGE,
    rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": CHANGE,
    },
)  # fmt: skip
look(
    "dynamic_ntk",
    "Llama",
    max_position_embeddings=CHANGE,
    rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
)
