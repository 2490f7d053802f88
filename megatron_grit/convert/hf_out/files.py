"""Writes all files of an exported model except its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_grit.config.blend import read_blend
from megatron_grit.config.kinds import kind_names, kind_options, kind_sources
from megatron_grit.convert.hf_out.card import model_card
from megatron_grit.convert.hf_out.chat import chat_template
from megatron_grit.convert.hf_out.downstream import vllm_settings
from megatron_grit.convert.hf_out.embedding import (
    bidirectional_settings,
    why_not_sentence_transformers,
    write_modules,
)
from megatron_grit.convert.hf_out.exported import Checkpoint, Exported
from megatron_grit.convert.hf_out.tokenizer import misread_by_transformers, write_tokenizer
from megatron_grit.data.text.chat_templates import TEMPLATES
from megatron_grit.data.text.jinja_template import template_source
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import GritError
from megatron_grit.store.files import replacing, write_json
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_TORCH_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
DEFAULT_TEMPLATE = "gritlm"


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
        vllm = vllm_settings(config, family.architecture, overrides)
        if vllm is not None:
            write_json(folder / "vllm_embed.json", vllm)
    else:
        log.warning(f"no modules for sentence-transformers are written: {missing}")
    with replacing(folder / "README.md") as file:
        file.write(model_card(exported, settings, overrides, missing, remarks))


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
    """generation_config.json: BOS, EOS and padding."""
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


def _chat_template(source: Checkpoint) -> tuple[str, str | None]:
    """Name and Jinja source of the template of the generative data, if it is still available."""
    names, kinds = set(), [kind for kind in kind_names() if not kind_options(kind).EMBEDS]
    given = {kind: kind_sources(source.config, kind) for kind in kinds}
    for entry in [entry for kind, items in given.items() for entry in _entries(items, kind_options(kind).DATA)]:
        try:
            names.add(str(json.loads(Path(f"{entry}.json").read_bytes())["template"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if len(names) == 1:
        (name,) = names
        return name, chat_template(name, source.tokenizer)
    own = template_source(source.tokenizer) if not any(given.values()) else None
    if own is not None:
        return "tokenizer", own
    return DEFAULT_TEMPLATE, chat_template(DEFAULT_TEMPLATE, source.tokenizer)


def _entries(items: list[str], key: str) -> list[str]:
    try:
        return [entry.path for entry in read_blend(items, key)]
    except GritError:
        return []


def write_index(folder: Path, weight_map: dict[str, str], num_bytes: int) -> None:
    """Write model.safetensors.index.json if there are several weight files."""
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
