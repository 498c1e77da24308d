"""Mixtures of experts in the library's default form, which only a form of the export's own can be traced in."""

import warnings

import torch
import transformers

from edgewright.edge_runtime.errors import EdgewrightError
from edgewright.export.language.generator import export_generator
from edgewright.export.options import ExportOptions
from edgewright.models.sources.pretrained import LogitsOnly

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "num_experts_per_tok": 2,
}  # fmt: skip


def look(name, kind, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
    model = LogitsOnly(getattr(transformers, f"{kind}ForCausalLM")(config), "input_ids").eval()
    before = model.model.get_experts_implementation()
    tokens = torch.randint(64, (4, 24), generator=torch.Generator().manual_seed(0))
    try:
        made = export_generator(model, tokens, name, ExportOptions(simplify="none"), decode_steps=4)
    except EdgewrightError as error:
        print(f"wrong {name}: {str(error)[:200]!r}")
        return
    left = model.model.get_experts_implementation() == before
    print(f"{'right' if left else 'wrong'} {name}: exported, off by {made.max_abs_diff:.2g}; model left alone: {left}")


look("mixtral", "Mixtral", num_local_experts=4)
look("qwen3_moe", "Qwen3Moe", num_experts=4, moe_intermediate_size=8)
