"""The architectures of `benchmarks/breadth.py`: how each is built with random weights, what it takes and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modules
import torch
from torch import Tensor, nn

CLASSES, CHANNELS, VOCABULARY = 4, 3, 96
_NORM_ROWS = 8


@dataclass(frozen=True)
class Input:
    """One input of a model: its name, its shape without the batch, and how its values are drawn."""

    name: str
    shape: tuple[int, ...]
    values: str = "normal"
    """``normal``, ``bytes`` (uint8), ``tokens``, ``ones`` (a mask)."""


@dataclass(frozen=True)
class Architecture:
    """What a cell needs to know.

    Attributes:
        build: makes it in eval mode, after the seed was set.
        inputs: in the order of its forward.
        kind: of its answer, as the tasks of `tasks.py` name them.
        answers: of several answers: leaf -> kind.
        named: what recipes name instead of `build`, with its arguments; reasons are held against what `build` makes.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Input, ...]
    kind: str = "classes"
    answers: Mapping[str | int, str] | None = None
    named: tuple[str, Mapping[str, Any]] | None = None


def image(size: int, channels: int = CHANNELS) -> tuple[Input, ...]:
    """An image."""
    return (Input("image", (channels, size, size)),)


def tokens(length: int = 16) -> tuple[Input, ...]:
    """Token ids."""
    return (Input("input_ids", (length,), "tokens"),)


def masked(length: int = 16) -> tuple[Input, ...]:
    """Token ids and which of them count."""
    return (Input("input_ids", (length,), "tokens"), Input("attention_mask", (length,), "ones"))


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
        return model

    return build


def _torchvision(place: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import importlib

        made: nn.Module = getattr(importlib.import_module(f"torchvision.models{place}"), name)(**options)
        return made

    return build


def _named(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A model that recipes name."""

    def build() -> nn.Module:
        from edgewright.models import registry

        return registry.build(name, options, Path.cwd())

    return build


def _transformers(config: str, model: str, leaf: str = "logits", **options: Any) -> Callable[[], nn.Module]:
    """A tiny random configuration; answers one leaf of the output, or a mapping of several, named with commas."""

    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(**options))
        return modules.Leaves(made, leaf.split(","))

    return build


_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "num_labels": CLASSES,
}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

_TIMM = {
    "edgenext_xx_small": 64,
    "mobilevit_xxs": 64,
    "mobilevitv2_050": 64,
    "mobilenetv4_conv_small": 64,
    "efficientformer_l1": 224,
    "fastvit_t8": 64,
    "repvit_m1": 64,
    "ghostnet_100": 64,
    "tinynet_e": 64,
    "mobileone_s0": 64,
    "levit_128s": 224,
    "poolformer_s12": 64,
    "convnextv2_atto": 64,
    "hgnetv2_b0": 64,
    "efficientvit_b0": 64,
    "tiny_vit_5m_224": 224,
    "deit_tiny_patch16_224": 224,
    "resnet18d": 64,
    "regnetx_002": 64,
    "skresnet18": 64,
    "selecsls42b": 64,
    "coat_lite_tiny": 224,
    "xcit_nano_12_p8_224": 224,
    "gmlp_ti16_224": 224,
    "cait_xxs24_224": 224,
}

_NO_WEIGHTS = {"weights": None, "weights_backbone": None}

TABLE: dict[str, Architecture] = {
    **{f"timm:{name}": Architecture(_timm(name), image(size)) for name, size in _TIMM.items()},
    "torchvision:lraspp_mobilenet_v3_large": Architecture(
        _torchvision(".segmentation", "lraspp_mobilenet_v3_large", num_classes=CLASSES, **_NO_WEIGHTS),
        image(64),
        answers={"out": "class_map"},
    ),
    "torchvision:deeplabv3_mobilenet_v3_large": Architecture(
        _torchvision(".segmentation", "deeplabv3_mobilenet_v3_large", num_classes=CLASSES, **_NO_WEIGHTS),
        image(64),
        answers={"out": "class_map"},
    ),
    "torchvision:fcn_resnet50": Architecture(
        _torchvision(".segmentation", "fcn_resnet50", num_classes=CLASSES, **_NO_WEIGHTS),
        image(64),
        answers={"out": "class_map"},
    ),
    "torchvision:ssdlite320_mobilenet_v3_large": Architecture(
        _named("torchvision:ssdlite320_mobilenet_v3_large", classes=CLASSES), image(320), "boxes"
    ),
    "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn": Architecture(
        modules.two_stage,
        image(64),
        "values",
        named=("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", {"classes": CLASSES}),
    ),
    "torchvision:r3d_18": Architecture(
        _torchvision(".video", "r3d_18", num_classes=CLASSES, weights=None), (Input("clip", (3, 4, 32, 32)),)
    ),
    "torchvision:mc3_18": Architecture(
        _torchvision(".video", "mc3_18", num_classes=CLASSES, weights=None), (Input("clip", (3, 4, 32, 32)),)
    ),
    "own:c2f_classifier": Architecture(lambda: modules.C2fClassifier(CLASSES), image(64)),
    "own:c2f_detector": Architecture(lambda: modules.C2fDetector(CLASSES), image(64), "values"),
    "hf:bert_sequences": Architecture(_transformers("BertConfig", "BertForSequenceClassification", **_BERT), masked()),
    "hf:bert_tokens": Architecture(
        _transformers("BertConfig", "BertForTokenClassification", **_BERT), masked(), "tokens"
    ),
    "hf:bert_answers": Architecture(
        _transformers(
            "BertConfig", "BertForQuestionAnswering", "start_logits,end_logits", **{**_BERT, "num_labels": 2}
        ),
        masked(),
        answers={"start_logits": "values", "end_logits": "values"},
    ),
    "hf:distilbert": Architecture(
        _transformers(
            "DistilBertConfig",
            "DistilBertForSequenceClassification",
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=3,
            n_heads=2,
            hidden_dim=64,
            max_position_embeddings=32,
            num_labels=CLASSES,
        ),
        masked(),
    ),
    "hf:modernbert": Architecture(
        _transformers("ModernBertConfig", "ModernBertForSequenceClassification", **_BERT, pad_token_id=0), masked()
    ),
    "hf:minilm_headless": Architecture(
        _transformers("BertConfig", "BertModel", "last_hidden_state", **_BERT), masked(), "values"
    ),
    "hf:vit": Architecture(
        _transformers(
            "ViTConfig",
            "ViTForImageClassification",
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_labels=CLASSES,
        ),
        image(32),
    ),
    "hf:mobilevit": Architecture(
        _transformers(
            "MobileViTConfig",
            "MobileViTForImageClassification",
            image_size=64,
            hidden_sizes=[24, 32, 40],
            neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64],
            num_labels=CLASSES,
        ),
        image(64),
    ),
    "hf:segformer_classes": Architecture(
        _transformers(
            "SegformerConfig",
            "SegformerForImageClassification",
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            num_labels=CLASSES,
        ),
        image(64),
    ),
    "hf:segformer_maps": Architecture(
        _transformers(
            "SegformerConfig",
            "SegformerForSemanticSegmentation",
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            decoder_hidden_size=32,
            num_labels=CLASSES,
        ),
        image(64),
        "class_map",
    ),
    "hf:wav2vec2": Architecture(
        _transformers(
            "Wav2Vec2Config",
            "Wav2Vec2ForSequenceClassification",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            conv_dim=(16, 16, 16),
            conv_kernel=(10, 3, 2),
            conv_stride=(5, 2, 2),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            classifier_proj_size=32,
            num_labels=CLASSES,
            mask_time_prob=0.0,
        ),
        (Input("input_values", (1600,)),),
    ),
    "hf:whisper": Architecture(
        modules.whisper,
        (Input("input_features", (80, 64)), Input("decoder_input_ids", (8,), "tokens")),
        "tokens",
    ),
    "hf:t5": Architecture(modules.t5, (*tokens(), Input("decoder_input_ids", (8,), "tokens")), "tokens"),
    "hf:gpt2": Architecture(
        _transformers(
            "GPT2Config", "GPT2LMHeadModel", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32
        ),
        tokens(),
        "tokens",
    ),
    "hf:llama": Architecture(_transformers("LlamaConfig", "LlamaForCausalLM", **_DECODER), tokens(), "tokens"),
    "hf:qwen3": Architecture(
        _transformers("Qwen3Config", "Qwen3ForCausalLM", **_DECODER, head_dim=8), tokens(), "tokens"
    ),
    "hf:gemma3": Architecture(
        _transformers("Gemma3TextConfig", "Gemma3ForCausalLM", **_DECODER, head_dim=8, sliding_window=8),
        tokens(),
        "tokens",
    ),
    "hf:phi3": Architecture(_transformers("Phi3Config", "Phi3ForCausalLM", **_DECODER), tokens(), "tokens"),
    "hf:opt": Architecture(
        _transformers(
            "OPTConfig",
            "OPTForCausalLM",
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=64,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        ),
        tokens(),
        "tokens",
    ),
    "hf:mixtral": Architecture(
        _transformers("MixtralConfig", "MixtralForCausalLM", **_DECODER, num_local_experts=4, num_experts_per_tok=2),
        tokens(),
        "tokens",
    ),
    "hf:qwen3_moe": Architecture(
        _transformers(
            "Qwen3MoeConfig",
            "Qwen3MoeForCausalLM",
            **_DECODER,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
        tokens(),
        "tokens",
    ),
    "hf:lfm2": Architecture(
        _transformers(
            "Lfm2Config",
            "Lfm2ForCausalLM",
            **_DECODER,
            layer_types=["conv", "full_attention"],
            block_multiple_of=8,
        ),
        tokens(),
        "tokens",
    ),
    "hf:mamba": Architecture(
        _transformers(
            "MambaConfig",
            "MambaForCausalLM",
            vocab_size=VOCABULARY,
            hidden_size=32,
            state_size=8,
            num_hidden_layers=2,
            use_mambapy=False,
        ),
        tokens(),
        "tokens",
    ),
    "own:uint8_input": Architecture(modules.BytesIn, (Input("image", (3, 32, 32), "bytes"),)),
    "own:fft": Architecture(modules.Fourier, (Input("signal", (64,)),)),
    "own:stft": Architecture(modules.Spectrogram, (Input("signal", (512,)),)),
    "own:scripted_function": Architecture(modules.ScriptedFunction, image(16)),
    "own:autograd_function": Architecture(modules.OwnGradient, image(16)),
    "own:spatial_transformer": Architecture(modules.SpatialTransformer, image(32)),
    "own:quantization_stubs": Architecture(modules.Stubs, image(16)),
    "own:text_cnn": Architecture(modules.TextCNN, tokens(32)),
    "own:soft_mixture": Architecture(modules.SoftMixture, (Input("x", (32,)),)),
    "own:graph_scatter": Architecture(modules.GraphScatter, (Input("nodes", (12, 16)),)),
    "own:transformer_encoder": Architecture(modules.Encoder, (Input("x", (12, 32)),)),
    "own:crnn": Architecture(modules.CRNN, (Input("image", (1, 32, 64)),), "tokens"),
    "own:lstm": Architecture(lambda: modules.Recurrent(nn.LSTM), (Input("x", (12, 16)),)),
    "own:gru": Architecture(lambda: modules.Recurrent(nn.GRU), (Input("x", (12, 16)),)),
    "own:tcn_weight_norm_old": Architecture(lambda: modules.TCN("old"), (Input("x", (8, 64)),)),
    "own:tcn_weight_norm": Architecture(lambda: modules.TCN("new"), (Input("x", (8, 64)),)),
    "own:spectral_norm": Architecture(modules.SpectralNorm, image(16)),
    "own:siamese": Architecture(modules.Siamese, (Input("left", (3, 16, 16)), Input("right", (3, 16, 16)))),
    "own:module_used_twice": Architecture(modules.UsedTwice, image(16)),
    "own:dlrm": Architecture(modules.DLRM, (Input("dense", (8,)), Input("sparse", (3, 4), "tokens"))),
    "own:deformable": Architecture(modules.Deformable, image(16)),
    "own:unet": Architecture(modules.UNet, image(32), "class_map"),
    "own:super_resolution": Architecture(modules.SuperResolution, image(16), "values"),
    "own:autoencoder": Architecture(modules.Autoencoder, image(16), "values"),
    "own:vae": Architecture(modules.VAE, image(16), "values"),
    "own:multi_task": Architecture(modules.MultiTask, image(16), answers={"kind": "classes", "depth": "values"}),
    "own:free_image_size": Architecture(modules.FreeSize, image(24)),
    "own:float16_weights": Architecture(lambda: modules.convolutional().half(), image(16)),
    "own:part_compiled": Architecture(modules.part_compiled, image(16)),
    "own:part_scripted": Architecture(modules.part_scripted, image(16)),
}
"""Name -> architecture, in the order of the table."""

QUICK = (
    "timm:edgenext_xx_small",
    "timm:ghostnet_100",
    "torchvision:lraspp_mobilenet_v3_large",
    "own:c2f_classifier",
    "hf:bert_sequences",
    "hf:llama",
    "own:lstm",
    "own:unet",
    "own:multi_task",
    "own:module_used_twice",
)
"""What `--quick` takes."""


def model(name: str) -> nn.Module:
    """The architecture called `name`; the function that recipes name.

    Batch norms have seen some rows: of some networks (MobileOne) fresh ones let numbers grow to 1e10.
    """
    torch.manual_seed(0)
    made = TABLE[name].build()
    norms = [module for module in made.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for module in norms:
                module.train()
            made(*(drawn(spec, _NORM_ROWS, generator) for spec in TABLE[name].inputs))
    return made.eval()


def drawn(spec: Input, rows: int, generator: torch.Generator) -> Tensor:
    """Values of one input."""
    shape = (rows, *spec.shape)
    if spec.values == "tokens":
        return torch.randint(3, VOCABULARY, shape, generator=generator)
    if spec.values == "ones":
        return torch.ones(shape, dtype=torch.int64)
    if spec.values == "bytes":
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator)
