"""What other readers make of an export's embeddings: arguments for vLLM, and the card's paragraphs.

config.json has one attention, that of generation; what embedding changes is read by sentence-transformers alone. A
reader that goes by modules.json or 1_Pooling without it embeds causally and over the whole prompt, without an error. So
these have names that only sentence-transformers follows (:mod:`megatron_grit.convert.hf_out.embedding`), and others
generate or refuse. ``benchmarks/vllm_export.py`` runs vLLM on exports.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_grit.config.embedding_shape import head_widths
from megatron_grit.config.schema import RunConfig
from megatron_grit.convert.hf_out.embedding import is_affine
from megatron_grit.convert.hf_out.exported import Exported
from megatron_grit.data.text.templates import embedding_prefix

VLLM_VERSION = "0.32"
"""That ``benchmarks/vllm_export.py`` was run with."""
VLLM_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Whose own code in vLLM asks ``is_causal``."""


def vllm_settings(config: RunConfig, architecture: str, overrides: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments of vllm.LLM for embeddings. None: its attention or its pooling is another.

    Args:
        config: the run's.
        architecture: as in config.json.
        overrides: keys of config.json that have other values for embedding.
    """
    pooler = _vllm_pooler(config)
    if pooler is None or (overrides and architecture not in VLLM_ARCHITECTURES):
        return None
    return {"runner": "pooling", "convert": "embed", "hf_overrides": overrides, "pooler_config": pooler}


def _vllm_pooler(config: RunConfig) -> dict[str, Any] | None:
    """Fields of its PoolerConfig. Its own mean takes in the instruction, so those states are pooled outside."""
    embedding = config.embedding
    by_token = embedding.pooling in ("mean", "max")
    if not by_token and embedding.pooling not in ("cls", "lasttoken"):
        return None
    if head_widths(config) and not is_affine(embedding):
        return None
    return {"task": "token_embed" if by_token else "embed", "use_activation": embedding.normalize and not by_token}


def vllm_paragraphs(exported: Exported, overrides: dict[str, Any], hf_config: dict[str, Any], prompt: str) -> list[str]:
    """The card's section on vLLM.

    Args:
        overrides: as for :func:`vllm_settings`.
        hf_config: config.json.
        prompt: with an instruction, for the example.
    """
    config, architecture = exported.source.config, exported.family.architecture
    settings = vllm_settings(config, architecture, overrides)
    says = [f"`vllm.LLM(PATH)` and `vllm serve PATH` generate and refuse to embed ({VLLM_VERSION})."]
    if len(set(hf_config.get("layer_types", ()))) > 1:  # a window in some layers
        says = ["vLLM does not generate with this model: it would need one window for all layers, and says so."]
        if architecture == "Qwen2MoeForCausalLM":
            says = ["Do not generate with vLLM: it gives every layer the sliding window, without an error."]
    if overrides or config.embedding.pooling != "lasttoken":
        says.append('`runner="pooling"` alone takes the last state of causal attention, without an error.')
    if settings is None:
        pooling = _vllm_pooler(config) is None
        why = "It has no pooling like this model's" if pooling else "It attends causally whatever it is told"
        return ["## vLLM", " ".join([*says, f"{why}; do not embed with it."])]
    if exported.dtype == torch.float32:
        says.append('It rounds fp32 weights to 16 bits unless `dtype="float32"` is given.')
    note = " ".join([*says, "With these arguments it embeds:"])
    code = [
        "    import json",
        "",
        "    from vllm import LLM",
        "    from vllm.config import PoolerConfig",
        "",
        '    settings = json.load(open(f"{PATH}/vllm_embed.json"))',
        '    settings["pooler_config"] = PoolerConfig(**settings["pooler_config"])',
        "    model = LLM(PATH, **settings)",
        f"    prompt = {prompt!r}",
        '    text = "which function parses JSON?"',
    ]
    if settings["pooler_config"]["task"] == "embed":
        code += ["    embedding = model.embed([prompt + text])[0].outputs.embedding"]
        return ["## vLLM", note, "\n".join(code)]
    reduce = "amax" if config.embedding.pooling == "max" else "mean"
    code += [
        '    states = model.encode([prompt + text], pooling_task="token_embed")[0].outputs.data.float()',
        "    skipped = len(model.get_tokenizer()(prompt).input_ids)",
        f"    embedding = states[skipped:].{reduce}(0)",
    ]
    if config.embedding.normalize:
        code.append("    embedding /= embedding.norm()")
    return ["## vLLM", note, "\n".join(code)]


def other_readers(exported: Exported, overrides: dict[str, Any]) -> list[str]:
    """The card's section on readers of sentence-transformers' folders."""
    plain = embedding_prefix("")
    lines = [
        "- LangChain's HuggingFaceEmbeddings (1.2, run) embeds through sentence-transformers, after it has written a "
        "space for each newline of a text.",
        "- LlamaIndex's HuggingFaceEmbedding (0.8, run) has prompts of its own in place of the model's. Give it "
        f"`text_instruction={plain!r}` and as `query_instruction` a prompt as above; else it embeds without the "
        "template.",
    ]
    if overrides or exported.source.config.embedding.pooling not in ("cls", "lasttoken"):
        lines.append(
            "- text-embeddings-inference refuses the model without `--pooling`, and has no pooling that is right. "
            "SGLang, llama.cpp, Ollama and FlagEmbedding attend causally, and Infinity pools the whole prompt: do not "
            "embed with them. Read in their sources, not run."
        )
    return ["## Other readers", "\n".join(lines)]
