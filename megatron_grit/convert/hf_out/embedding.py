"""The sentence-transformers modules of an exported model: bidirectional attention, pooling, linear layers, prompts.

config.json describes the causal decoder, for generation. sentence_bert_config.json holds the keys that differ for
embedding; sentence-transformers passes them to transformers' AutoConfig.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from megatron_grit.config.embedding_shape import head_widths
from megatron_grit.config.schema import EmbeddingConfig, RunConfig
from megatron_grit.convert.param_map import Family
from megatron_grit.data.text.templates import embedding_prefix, encode_embedding
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.store.files import write_json

POOLING = {
    "mean": "mean",
    "weightedmean_sgpt": "weightedmean",
    "max": "max",
    "cls": "cls",
    "lasttoken": "lasttoken",
}
"""Names of sentence-transformers."""
_OLD_NAMES = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}
_ACTIVATIONS = {
    "none": "torch.nn.modules.linear.Identity",
    "gelu": "torch.nn.modules.activation.GELU",
    "tanh": "torch.nn.modules.activation.Tanh",
}
_MODULES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.models.Pooling.Pooling",
    "Dense": "sentence_transformers.models.Dense",
    "Normalize": "sentence_transformers.models.Normalize",
}
"""Class of each module.

Transformer has its name since 5.4. sentence-transformers before that strips the newline of a prompt when it counts the
prompt's tokens, and would pool one of them. Pooling has a longer name than usual, which is imported as well: by the
usual ones vLLM takes the model for one that only embeds, causally and over the whole prompt.
"""
_FOLDERS = {"Pooling": "TextPooling"}
"""Folders that are not named as their module is: text-embeddings-inference reads 1_Pooling, whatever modules.json says,
and would pool the whole prompt of a causal pass."""
_STARTS = ("what", "A", "7", "(a)", "{", " two", "\u00e9t\u00e9", "\u6f22\u5b57", "- x", '"x"', "<a>", "_b")
"""Texts that begin in different ways."""
ALWAYS_CAUSAL = {"GPTNeoForCausalLM"}
"""Architectures whose attention in transformers is causal whatever the configuration says."""


def why_not_sentence_transformers(embedding: EmbeddingConfig, family: Family, tokenizer: Tokenizer) -> str | None:
    """Why sentence-transformers cannot reproduce the model's embeddings. None: it can."""
    if not embedding.causal and family.architecture in ALWAYS_CAUSAL:
        return f"{family.name} attends causally in transformers, and this model's embeddings do not"
    if embedding.pooling not in POOLING:
        return f"its Pooling has nothing like {embedding.pooling}"
    if embedding.asymmetric != "none":
        return "queries and passages pass through linear layers of their own"
    if embedding.brackets != "none" or embedding.side_tokens:
        return "it puts no ids around a text, as embedding.brackets and embedding.side_tokens do"
    if not _keeps_prompts_apart(tokenizer):
        return "this tokenizer merges the end of an instruction with the text, and it would pool other tokens"
    return None


def _keeps_prompts_apart(tokenizer: Tokenizer) -> bool:
    """Whether an instruction has as many tokens alone as in front of a text: sentence-transformers skips that many."""
    for instruction in ("", "Find the answer"):
        alone = len(encode_embedding(tokenizer, "", instruction)[0])
        for text in _STARTS:
            if len(encode_embedding(tokenizer, text, instruction)[0]) != alone:
                return False
    return True


def bidirectional_settings(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Keys of config.json that differ for bidirectional attention: no causal mask, no window."""
    settings: dict[str, Any] = {"is_causal": False}
    if hf_config.get("sliding_window") is not None:
        settings["sliding_window"] = None
    if hf_config.get("use_sliding_window"):
        settings["use_sliding_window"] = False
    if "sliding_attention" in (hf_config.get("layer_types") or ()):
        settings["layer_types"] = ["full_attention"] * len(hf_config["layer_types"])
    return settings


def prompts() -> dict[str, str]:
    """Prompts of a query and of a document without an instruction."""
    return dict.fromkeys(("query", "document"), embedding_prefix(""))


def is_affine(embedding: EmbeddingConfig) -> bool:
    """Whether linear layers and pooling commute, as an affine map does with an average or the choice of a position."""
    return embedding.linear_activation == "none" and embedding.pooling != "max"


def write_modules(folder: Path, config: RunConfig, hf_config: dict[str, Any], head: dict[str, Tensor]) -> None:
    """Write modules.json and the files of each module.

    Linear layers are applied after pooling wherever that gives the same result, else to each token state.

    Args:
        config: the run's.
        hf_config: config.json.
        head: the linear layers' tensors by their names in the model.
    """
    embedding, widths = config.embedding, head_widths(config)
    after = embedding.linear_place == "after_pooling" or is_affine(embedding)
    hidden = config.model.hidden_size
    dense = [("Dense", settings) for settings in _dense(embedding, hidden, widths, after)]
    method = POOLING[embedding.pooling]
    pooled = hidden if after else [hidden, *widths][-1]
    pooling: dict[str, Any] = {
        "word_embedding_dimension": pooled,
        **{f"pooling_mode_{name}": mode == method for mode, name in _OLD_NAMES.items()},
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    if method != "cls":  # the first state is that of BOS, with an instruction and without
        pooling["include_prompt"] = False
    chain: list[tuple[str, dict[str, Any]]] = [("Transformer", {})]
    chain += [("Pooling", pooling), *dense] if after else [*dense, ("Pooling", pooling)]
    chain += [("Normalize", {})] if embedding.normalize else []
    modules = []
    layer = 0
    for number, (kind, settings) in enumerate(chain):
        path = f"{number}_{_FOLDERS.get(kind, kind)}" if number else ""
        modules.append({"idx": number, "name": str(number), "path": path, "type": _MODULES[kind]})
        if settings:
            write_json(folder / path / "config.json", settings)
        if kind == "Dense":
            _write_dense(folder / path, head, layer, len(widths))
            layer += 1
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / "modules.json", modules)
    settings = {
        "max_seq_length": config.model.max_position_embeddings,
        "do_lower_case": False,
        "config_args": {} if embedding.causal else bidirectional_settings(hf_config),
    }
    if not embedding.causal:
        # The default of transformers 5. transformers 4, which would leave the mask causal, raises at this name.
        settings["model_args"] = {"experts_implementation": None}
    write_json(folder / "sentence_bert_config.json", settings)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": prompts(),
            "default_prompt_name": "document",
            "similarity_fn_name": "cosine" if embedding.normalize else "dot",
        },
    )


def _dense(embedding: EmbeddingConfig, hidden: int, widths: list[int], after: bool) -> list[dict[str, Any]]:
    settings = []
    for inputs, outputs in zip([hidden, *widths], widths, strict=False):
        layer: dict[str, Any] = {
            "in_features": inputs,
            "out_features": outputs,
            "bias": embedding.linear_bias,
            "activation_function": _ACTIVATIONS[embedding.linear_activation],
        }
        if not after:
            layer |= {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
        settings.append(layer)
    return settings


def _write_dense(folder: Path, head: dict[str, Tensor], layer: int, num_layers: int) -> None:
    prefix = "embedding_head." if num_layers == 1 else f"embedding_head.{layer}."
    tensors = {f"linear.{part}": head[prefix + part] for part in ("weight", "bias") if prefix + part in head}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
