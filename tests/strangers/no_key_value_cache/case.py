"""Networks that keep another state than keys and values, have no head, or read two inputs: told what they are."""

import inspect
import warnings
from pathlib import Path

import torch
import transformers

from edgewright.edge_runtime.errors import EdgewrightError
from edgewright.export.language.generator import export_generator
from edgewright.models.sources.pretrained import build

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
TOKENS = torch.randint(64, (4, 24), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
WHISPER = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 16,
    "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
BERT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
MAMBA = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}


def look(kind, config, settings, *words):
    torch.manual_seed(0)
    config = getattr(transformers, f"{config}Config")
    known = inspect.signature(config).parameters
    getattr(transformers, kind)(config(**{k: v for k, v in settings.items() if k in known})).save_pretrained(kind)
    try:
        export_generator(build(f"hf:{kind}", {}, Path()), TOKENS, f"out_{kind}")
        said = "exported"
    except (EdgewrightError, ValueError) as error:
        said = str(error)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    right = all(word in said for word in words)
    print(f"{'right' if right else 'wrong'} {kind}: {said[:160]!r}".replace("\n", " "))


look("Lfm2ForCausalLM", "Lfm2", {**SIZES, "layer_types": ["conv", "full_attention"] * 2}, "conv", "state")
look("Qwen3_5ForCausalLM", "Qwen3_5Text", {**SIZES, **LINEAR}, "linear_attention", "state")
look("RecurrentGemmaForCausalLM", "RecurrentGemma", {**SIZES, "lru_width": 32}, "linear_attention", "state")
look("MambaForCausalLM", "Mamba", MAMBA, "recurrent state", "keys and values")
look("RwkvForCausalLM", "Rwkv", {**MAMBA, "attention_hidden_size": 16, "num_hidden_layers": 2}, "recurrent state")
look("BertModel", "Bert", BERT, "without a head", "last_hidden_state")
look("LlamaModel", "Llama", SIZES, "without a head", "AutoModelForCausalLM")
look("T5ForConditionalGeneration", "T5", T5, "encoder-decoder", "part: encoder")
look("WhisperForConditionalGeneration", "Whisper", WHISPER, "encoder-decoder", "part: encoder")
