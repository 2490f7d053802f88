"""Writes all files of an exported model except its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_grit.convert.hf_out.card import model_card
from megatron_grit.convert.hf_out.downstream import vllm_settings
from megatron_grit.convert.hf_out.embedding import (
    bidirectional_settings,
    why_not_sentence_transformers,
    write_modules,
)
from megatron_grit.convert.hf_out.exported import Exported
from megatron_grit.convert.hf_out.scorer import write_scorer
from megatron_grit.convert.hf_out.tokenizer import misread_by_transformers
from megatron_grit.convert.hf_out.words import write_words
from megatron_grit.store.files import replacing, write_json
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_TORCH_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def write_files(folder: Path, exported: Exported) -> None:
    """Write configuration, tokenizer, chat template, sentence-transformers' modules and the model card.

    Raises:
        CheckpointError: the tokenizer's files would give other ids.
    """
    source, family = exported.source, exported.family
    config, tokenizer = source.config, source.tokenizer
    write_index(folder, exported.weight_map, exported.num_bytes)
    settings = hf_config(exported)
    if source.scores:
        write_scorer(folder, exported, settings)
        return
    write_json(folder / "config.json", settings)
    remarks = write_words(folder, source)
    if source.model.retro.num_neighbors:
        without = "without what reads neighbors: it generates as with model.retro.gate 0"
        log.warning(f"the decoder is exported {without}")
        remarks.append(f"The decoder {without}.")
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


def write_index(folder: Path, weight_map: dict[str, str], num_bytes: int) -> None:
    """Write model.safetensors.index.json if there are several weight files."""
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
