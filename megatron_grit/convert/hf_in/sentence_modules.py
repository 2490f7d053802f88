"""The modules of a sentence-transformers directory: what is done with the states of its encoder, and its prompts.

They are read and computed here, so that the package is not needed; tests hold them to it.

Shape suffix legend: B = texts, T = tokens, D = channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_grit.errors import ConfigError, DataError

POOLING = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""Pooling modes of sentence-transformers."""
_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Their keys in directories of before 2026, in the order in which their vectors stand behind each other."""
_KWARGS = {"config": ("config_args", "config_kwargs"), "tokenizer": ("tokenizer_args", "processor_kwargs")}
_TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_STATES, _VECTOR = "token_embeddings", "sentence_embedding"


@dataclass
class Features:
    """What passes through the modules."""

    states_BTD: Tensor
    mask_BT: Tensor
    """bool: the tokens of a text, special tokens and prompt included."""
    num_prompt_tokens: int = 0
    vectors_BD: Tensor | None = None


@dataclass
class SentenceModules:
    """What a directory says."""

    encoder_folder: Path
    """Of the encoder's own config.json, weights and tokenizer."""
    folders: list[Path] = field(default_factory=list)
    """Of the other modules."""
    steps: list[nn.Module] = field(default_factory=list)
    """Applied in turn to :class:`Features`."""
    prompts: dict[str, str] = field(default_factory=lambda: {"query": "", "passage": ""})
    """In front of the texts of a side."""
    max_length: int | None = None
    lower_case: bool = False
    config_kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)


def read_modules(folder: Path) -> SentenceModules:
    """Read ``modules.json`` and what it names.

    Raises:
        ConfigError: a module, or a setting of one, that is not known here.
        DataError: a file that is missing or damaged.
    """
    path = folder / "modules.json"
    try:
        return _read_modules(folder, path)
    except (KeyError, TypeError, AttributeError) as error:
        message = f"it, or a file that it names, is not as sentence-transformers writes it ({error})"
        raise DataError(message, path=path) from None


def _read_modules(folder: Path, path: Path) -> SentenceModules:
    modules = SentenceModules(folder)
    kinds = []
    for entry in _read_json(path):
        package, _, kind = str(entry["type"]).rpartition(".")
        place = folder / str(entry.get("path", ""))
        if package.partition(".")[0] != "sentence_transformers" or kind not in ("Transformer", *_READERS):
            raise ConfigError(f"{path}: module {entry['type']} is not known here; known: {', '.join(_READERS)}")
        if kind == "Transformer":
            modules.encoder_folder = place
            _read_transformer(modules)
        else:
            modules.folders.append(place)
            modules.steps.append(_READERS[kind](place))
        kinds.append(kind)
    if kinds[:1] != ["Transformer"] or kinds.count("Transformer") > 1 or "Pooling" not in kinds:
        raise ConfigError(f"{path}: not one Transformer and then a Pooling, but {', '.join(kinds) or 'nothing'}")
    _read_prompts(folder, modules)
    return modules


def _read_transformer(modules: SentenceModules) -> None:
    folder = modules.encoder_folder
    path = next((folder / name for name in _TRANSFORMER_FILES if (folder / name).is_file()), None)
    if path is None:
        return
    settings = _read_json(path)
    if settings.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise ConfigError(f"{path}: transformer_task {settings['transformer_task']} is not known here")
    output = settings.get("modality_config", {}).get("text", {}).get("method_output_name", "last_hidden_state")
    if output != "last_hidden_state" or settings.get("module_output_name", _STATES) != _STATES:
        raise ConfigError(f"{path}: only last_hidden_state as {_STATES} is known here, not {output}")
    modules.max_length = settings.get("max_seq_length")
    modules.lower_case = bool(settings.get("do_lower_case", False))
    for what, target in (("config", modules.config_kwargs), ("tokenizer", modules.tokenizer_kwargs)):
        for key in _KWARGS[what]:
            target.update(settings.get(key, {}))
        # Code from a directory is not run.
        target.pop("trust_remote_code", None)
    modules.max_length = modules.tokenizer_kwargs.pop("model_max_length", modules.max_length)


def _read_prompts(folder: Path, modules: SentenceModules) -> None:
    """Prompts as encode_query and encode_document are documented to take them: by these names, in this order, and not
    the one of default_prompt_name."""
    path = folder / "config_sentence_transformers.json"
    prompts = (_read_json(path) if path.is_file() else {}).get("prompts") or {}
    for side, names in (("query", ("query",)), ("passage", ("document", "passage", "corpus"))):
        modules.prompts[side] = next((prompts[name] for name in names if prompts.get(name)), "")


class Pooling(nn.Module):
    """States of tokens to one vector, as sentence-transformers' module of this name.

    Args:
        modes: of :data:`POOLING`; their vectors stand behind each other.
        include_prompt: whether the prompt's tokens count.
    """

    def __init__(self, modes: Sequence[str] = ("mean",), include_prompt: bool = True) -> None:
        super().__init__()
        self.modes, self.include_prompt = tuple(modes), include_prompt

    def forward(self, features: Features) -> Features:
        states_BTD, mask_BT = features.states_BTD, features.mask_BT
        places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        if not self.include_prompt:
            mask_BT = mask_BT & (places_T >= features.num_prompt_tokens)
        features.vectors_BD = torch.cat([self._pool(mode, states_BTD, mask_BT, places_T) for mode in self.modes], 1)
        return features

    @staticmethod
    def _pool(mode: str, states_BTD: Tensor, mask_BT: Tensor, places_T: Tensor) -> Tensor:
        rows_B = torch.arange(len(mask_BT), device=mask_BT.device)
        if mode == "cls":
            return states_BTD[rows_B, mask_BT.int().argmax(1)]
        if mode == "lasttoken":
            return states_BTD[rows_B, torch.where(mask_BT, places_T, 0).amax(1)]
        if mode == "max":
            return states_BTD.masked_fill(~mask_BT[..., None], float("-inf")).amax(1)
        weights_BT = mask_BT * (places_T + 1) if mode == "weightedmean" else mask_BT
        weights_BT = weights_BT.to(states_BTD.dtype)
        sums_BD = torch.einsum("btd,bt->bd", states_BTD, weights_BT)
        totals_B1 = weights_BT.sum(1, keepdim=True).clamp(min=1e-9)
        return sums_BD / (totals_B1.sqrt() if mode == "mean_sqrt_len_tokens" else totals_B1)


class TextMean(nn.Module):
    """The mean over all tokens but the first and the last, [CLS] and [SEP], as Retro's BERT takes it (Megatron-LM,
    tools/bert_embedding); of a text without a token of its own the state of [CLS]."""

    def forward(self, features: Features) -> Features:
        mask_BT = features.mask_BT
        places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        inner_BT = mask_BT & (places_T > 0) & (places_T < mask_BT.sum(1, keepdim=True) - 1)
        inner_BT = torch.where(inner_BT.any(1, keepdim=True), inner_BT, places_T == 0)
        features.vectors_BD = Pooling._pool("mean", features.states_BTD, inner_BT, places_T)
        return features


class Normalize(nn.Module):
    """Vectors of length 1."""

    def forward(self, features: Features) -> Features:
        assert features.vectors_BD is not None
        features.vectors_BD = nn.functional.normalize(features.vectors_BD, dim=-1)
        return features


class OnVectors(nn.Module):
    """A layer of the vectors, or of the states of tokens."""

    def __init__(self, layer: nn.Module, of_states: bool = False) -> None:
        super().__init__()
        self.layer, self.of_states = layer, of_states

    def forward(self, features: Features) -> Features:
        if self.of_states:
            features.states_BTD = self.layer(features.states_BTD)
        else:
            features.vectors_BD = self.layer(features.vectors_BD)
        return features


def _read_pooling(folder: Path) -> Pooling:
    settings = _read_json(folder / "config.json")
    if "pooling_mode" in settings:
        modes = settings["pooling_mode"]
        modes = [modes] if isinstance(modes, str) else list(modes)
    else:
        modes = [mode for key, mode in _OLD_POOLING.items() if settings.get(key)] or ["mean"]
    unknown = [mode for mode in modes if mode not in POOLING]
    if unknown:
        raise ConfigError(f"{folder / 'config.json'}: pooling {unknown[0]} is not known; known: {', '.join(POOLING)}")
    return Pooling(modes, bool(settings.get("include_prompt", True)))


def _read_dense(folder: Path) -> OnVectors:
    path = folder / "config.json"
    settings = _read_json(path)
    place = settings.get("module_input_name", _VECTOR)
    if place not in (_VECTOR, _STATES) or settings.get("module_output_name") not in (None, place):
        raise ConfigError(f"{path}: Dense from {place} to {settings.get('module_output_name')} is not known here")
    if settings.get("use_residual"):
        raise ConfigError(f"{path}: use_residual is not known here")
    linear = nn.Linear(settings["in_features"], settings["out_features"], bias=settings.get("bias", True))
    _load_weights(linear, folder / "model.safetensors", "linear.")
    return OnVectors(nn.Sequential(linear, _activation(path, settings)), of_states=place == _STATES)


def _activation(path: Path, settings: Mapping[str, Any]) -> nn.Module:
    name = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    found = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"{path}: activation_function {name} is no module of torch.nn")
    return found()


def _read_layer_norm(folder: Path) -> OnVectors:
    norm = nn.LayerNorm(_read_json(folder / "config.json")["dimension"])
    _load_weights(norm, folder / "model.safetensors", "norm.")
    return OnVectors(norm)


def _load_weights(layer: nn.Module, path: Path, prefix: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise DataError("is missing; save the model with safe_serialization", path=path)
    try:
        tensors = load_file(path)
        layer.load_state_dict({name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()})
    except (SafetensorError, OSError, RuntimeError) as error:
        raise DataError(f"cannot be read ({' '.join(str(error).split())})", path=path) from None


def _read_normalize(folder: Path) -> Normalize:
    path = folder / "config.json"
    settings = _read_json(path) if path.is_file() else {}
    if settings.get("module_input_name", _VECTOR) != _VECTOR:
        raise ConfigError(f"{path}: Normalize of {settings['module_input_name']} is not known here")
    return Normalize()


_READERS = {
    "Pooling": _read_pooling,
    "Dense": _read_dense,
    "LayerNorm": _read_layer_norm,
    "Normalize": _read_normalize,
    "Dropout": lambda folder: nn.Identity(),  # none at inference
}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error})", path=path) from None
