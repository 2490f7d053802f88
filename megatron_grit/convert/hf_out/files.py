"""All files of an exported model but its weights."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_grit.config.blend import read_blend
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.convert.hf_out.card import VLLM_ARCHITECTURES, model_card, vllm_settings
from megatron_grit.convert.hf_out.chat import chat_template
from megatron_grit.convert.hf_out.embedding import (
    bidirectional_settings,
    why_not_sentence_transformers,
    write_modules,
)
from megatron_grit.convert.hf_out.tokenizer import misread_by_transformers, write_tokenizer
from megatron_grit.convert.param_map import Family
from megatron_grit.data.text.chat_templates import TEMPLATES
from megatron_grit.data.text.jinja_template import template_source
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import CheckpointError, GritError
from megatron_grit.store.files import replacing, write_json
from megatron_grit.store.logs import get_logger
from megatron_grit.training.checkpoint import read_config, read_state, tokenizer_path

log = get_logger(__name__)

_TORCH_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
DEFAULT_TEMPLATE = "gritlm"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that is exported."""

    path: Path
    state: dict[str, Any]
    """state.json."""
    config: RunConfig
    model: ModelConfig
    """Its shape, with the size of the vocabulary."""
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, without padding."""
        assert self.model.vocab_size is not None
        return self.model.vocab_size

    @property
    def run(self) -> Path:
        """The run's output directory, where the checkpoint still lies in it."""
        return self.path.parent.parent


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written of a model so far."""

    source: Source
    family: Family
    dtype: torch.dtype
    num_bytes: int
    """Of all weights."""
    num_parameters: int
    weight_map: dict[str, str]
    """The file of each tensor."""
    head: dict[str, Tensor]
    """fp32 tensors of the embedding head; empty where there is none."""


def read_source(path: Path, tokenizer: str | Path | None) -> Source:
    """Read what a checkpoint says of itself.

    Args:
        path: the checkpoint.
        tokenizer: the tokenizer that it was trained with. None: where the run found it, or the checkpoint's own copy.

    Raises:
        CheckpointError: no tokenizer, or another one than the model was trained with.
    """
    state, config = read_state(path), read_config(path)
    model = replace(config.model, vocab_size=int(state["vocab_size"]))
    return Source(
        path=path, state=state, config=config, model=model, tokenizer=_tokenizer(path, state, config, tokenizer)
    )


def _tokenizer(path: Path, state: dict[str, Any], config: RunConfig, given: str | Path | None) -> Tokenizer:
    fingerprint = state.get("tokenizer_fingerprint")
    if given is not None:
        found = load_tokenizer(given)
        if fingerprint not in (None, found.fingerprint):
            raise CheckpointError(f"{found.path}: is not the tokenizer that {path} was trained with; give that one")
        return found
    if config.data.tokenizer is not None and Path(config.data.tokenizer).exists():
        # Beside the run's own file lie the names of its special tokens, and its chat template.
        with suppress(GritError):  # it was replaced, or damaged, since
            found = load_tokenizer(config.data.tokenizer)
            if found.fingerprint == fingerprint:
                return found
    copy = tokenizer_path(path)
    if copy is None:
        raise CheckpointError(f"{path}: holds no tokenizer.model or tokenizer.json; give --tokenizer")
    return load_tokenizer(copy)


def write_files(folder: Path, exported: Exported) -> None:
    """Write configuration, tokenizer, chat template, sentence-transformers' modules and the model card.

    Raises:
        CheckpointError: the tokenizer's files would give other ids.
    """
    source, family = exported.source, exported.family
    config, tokenizer = source.config, source.tokenizer
    write_index(folder, exported.weight_map, exported.num_bytes)
    settings = hf_config(exported)
    write_json(folder / "config.json", settings)
    template_name, template = _chat_template(source)
    write_json(folder / "generation_config.json", _generation_config(tokenizer, template_name))
    remarks = write_tokenizer(folder, tokenizer, source.model.max_position_embeddings, template)
    if template is None:
        remarks.append(f"Its chat template {template_name} is not written: the template's file is not known.")
    misread = misread_by_transformers(folder, tokenizer)
    missing = misread or why_not_sentence_transformers(config.embedding, family, tokenizer)
    remarks += [] if misread is None else [f"{misread[0].upper()}{misread[1:]}."]
    overrides = {} if config.embedding.causal else bidirectional_settings(settings)
    if missing is None:
        write_modules(folder, config, settings, exported.head)
        vllm = vllm_settings(config, overrides)
        if vllm is not None and (not overrides or family.architecture in VLLM_ARCHITECTURES):
            write_json(folder / "vllm_embed.json", vllm)
    else:
        log.warning(f"no modules for sentence-transformers are written: {missing}")
    with replacing(folder / "README.md") as file:
        file.write(model_card(exported, overrides, missing, remarks))


def hf_config(exported: Exported) -> dict[str, Any]:
    """config.json, for transformers 4 and 5."""
    tokenizer = exported.source.tokenizer
    settings = exported.family.hf_config(exported.source.model) | {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        # Transformers takes an override of a key that is here, and of no other.
        "is_causal": True,
        "torch_dtype": _TORCH_NAMES[exported.dtype],
        "use_cache": True,
    }
    if tokenizer.pad_id != tokenizer.eos_id:
        settings["pad_token_id"] = tokenizer.pad_id
    return settings


def _generation_config(tokenizer: Tokenizer, template: str) -> dict[str, Any]:
    """Where generation begins and ends."""
    ends = [tokenizer.eos_id]
    if template in TEMPLATES:
        answer_end = TEMPLATES[template].answer.rpartition("{content}")[2].strip()
        ends += [index for name, index in tokenizer.special_tokens.items() if name == answer_end]
    ends = list(dict.fromkeys(ends))
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": tokenizer.pad_id,
    }


def _chat_template(source: Source) -> tuple[str, str | None]:
    """Name and Jinja of the template that the generative data were built with, as far as they are still there."""
    names = set()
    for entry in _entries(source.config.data.generative):
        try:
            names.add(str(json.loads(Path(f"{entry}.json").read_bytes())["template"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if len(names) == 1:
        (name,) = names
        return name, chat_template(name, source.tokenizer)
    own = template_source(source.tokenizer) if not source.config.data.generative else None
    if own is not None:
        return "tokenizer", own
    return DEFAULT_TEMPLATE, chat_template(DEFAULT_TEMPLATE, source.tokenizer)


def _entries(items: list[str]) -> list[str]:
    try:
        return [entry.path for entry in read_blend(items, "data.generative")]
    except GritError:
        return []


def write_index(folder: Path, weight_map: dict[str, str], num_bytes: int) -> None:
    """model.safetensors.index.json, where there are several files."""
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
