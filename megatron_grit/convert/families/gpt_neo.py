"""GPT-Neo: learned positions, unscaled products of queries and keys, a sliding window in every other layer."""

from __future__ import annotations

from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import window_of_layer
from megatron_grit.convert.families.gpt_neox import linear, norm, read_activation
from megatron_grit.convert.families.keys import Keys, check_heads
from megatron_grit.convert.families.llama_like import LAYER, copied, has_output_layer, qkv
from megatron_grit.convert.param_map import Entry, Family, Form, VocabularyRows
from megatron_grit.errors import CheckpointError

HF_LAYER = "transformer.h.{layer}."
KEYS = Keys(
    defaults={
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
        "hidden_size": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "window_size": 256,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    },
    nullable={"intermediate_size": int, "attention_types": list},
    only_given={"attention_layers": list},
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
)

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "embedding.word_embeddings.weight",
        (Form(VocabularyRows(), {"transformer.wte.weight": ("vocab", "hidden")}),),
    ),
    copied("embedding.position_embeddings.weight", "transformer.wpe.weight", ("positions", "hidden")),
    *norm(LAYER + "input_layernorm", HF_LAYER + "ln_1"),
    Entry(LAYER + "self_attention.linear_qkv.weight", (qkv("weight", HF_LAYER + "attn.attention.", ("hidden",)),)),
    *linear(LAYER + "self_attention.linear_proj", HF_LAYER + "attn.attention.out_proj", "hidden", "query"),
    *norm(LAYER + "pre_mlp_layernorm", HF_LAYER + "ln_2"),
    *linear(LAYER + "mlp.linear_fc1", HF_LAYER + "mlp.c_fc", "ffn", "hidden"),
    *linear(LAYER + "mlp.linear_fc2", HF_LAYER + "mlp.c_proj", "hidden", "ffn"),
    *norm("decoder.final_layernorm", "transformer.ln_f"),
    Entry(
        "output_layer.weight",
        (Form(VocabularyRows(), {"lm_head.weight": ("vocab", "hidden")}),),
        only_if=has_output_layer,
    ),
)


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape from config.json.

    Raises:
        CheckpointError: an option that changes the arithmetic and is not supported.
    """
    hf = KEYS.read(hf)
    check_heads(hf["hidden_size"], hf["num_heads"])
    kinds = _kinds(hf)
    windowed = [layer for layer, kind in enumerate(kinds) if kind == "local"]
    return ModelConfig(
        architecture="GPTNeoForCausalLM",
        num_layers=hf["num_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"] or 4 * hf["hidden_size"],
        num_attention_heads=hf["num_heads"],
        num_query_groups=None,
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        normalization="layernorm",
        norm_epsilon=hf["layer_norm_epsilon"],
        activation=read_activation(hf["activation_function"]),
        position_embedding="learned_absolute",
        add_attention_output_bias=True,
        add_mlp_bias=True,
        attention_scale=1.0,
        tie_embeddings=hf["tie_word_embeddings"],
        sliding_window=hf["window_size"] if windowed else None,
        window_layers=windowed if 0 < len(windowed) < len(kinds) else None,
        hidden_dropout=hf["resid_dropout"],
        attention_dropout=hf["attention_dropout"],
        init_std=hf["initializer_range"],
    )


def _kinds(hf: dict[str, Any]) -> list[str]:
    """ "global" or "local" for each layer: ``attention_layers``, which transformers writes as well, or the patterns of
    ``attention_types``, each as many times as it says."""
    patterns = hf["attention_types"] or [[["global", "local"], 12]]
    try:
        kinds: list[str] = [kind for names, times in patterns for kind in times * list(names)]
    except (TypeError, ValueError):
        raise CheckpointError(f'attention_types is {patterns}, and must be like [[["global", "local"], 12]]') from None
    kinds = hf.get("attention_layers", kinds)
    if len(kinds) != hf["num_layers"] or any(kind not in ("global", "local") for kind in kinds):
        told = ", ".join(map(str, kinds[:4]))
        raise CheckpointError(
            f"attention_types, or attention_layers, has {len(kinds)} layers, {told} ...; expected global or local for "
            f"each of the {hf['num_layers']}"
        )
    return kinds


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """config.json."""
    has_window = [window_of_layer(model, layer) is not None for layer in range(model.num_layers)]
    return {
        "architectures": ["GPTNeoForCausalLM"],
        "model_type": "gpt_neo",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_layers": model.num_layers,
        "num_heads": model.num_attention_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "activation_function": "gelu" if model.activation == "gelu" else "gelu_new",
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_std,
        "window_size": model.sliding_window or KEYS.defaults["window_size"],
        "attention_types": [[["local" if windowed else "global"], 1] for windowed in has_window],
        "tie_word_embeddings": model.tie_embeddings,
        "resid_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
    }


FAMILY = Family(
    name="GPT-Neo",
    architecture="GPTNeoForCausalLM",
    model_type="gpt_neo",
    entries=ENTRIES,
    ignored=(r".*\.attn\.attention\.(bias|masked_bias)",),
    model_config=model_config,
    hf_config=hf_config,
)
