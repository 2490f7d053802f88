"""GPT-NeoX (Pythia, too): LayerNorm and biases, a part of each head turned, layers side by side or not.

Its queries, keys and values are stacked head by head, which is megatron-core's order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import has_qkv_bias
from megatron_grit.convert.families.keys import Keys, check_heads
from megatron_grit.convert.families.llama_like import LAYER, copied, has_output_layer
from megatron_grit.convert.param_map import Entry, Family, Form, VocabularyRows
from megatron_grit.convert.rope_parameters import read_rope, write_rope
from megatron_grit.errors import CheckpointError

HF_LAYER = "gpt_neox.layers.{layer}."
KEYS = Keys(
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "max_position_embeddings": 2048,
        "rotary_emb_base": 10000.0,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "attention_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    }
)
APPROXIMATE_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def read_activation(name: str) -> Literal["gelu", "gelu_tanh"]:
    """Our name of an activation.

    Raises:
        CheckpointError: it is another than gelu.
    """
    if name != "gelu" and name not in APPROXIMATE_GELU:
        raise CheckpointError(f"activation {name} is not supported, only gelu, {', '.join(APPROXIMATE_GELU)}")
    return "gelu" if name == "gelu" else "gelu_tanh"


def norm(megatron: str, hf: str, **options: Any) -> tuple[Entry, Entry]:
    """Weight and bias of a layer norm."""
    return (
        copied(f"{megatron}.weight", f"{hf}.weight", ("hidden",), **options),
        copied(f"{megatron}.bias", f"{hf}.bias", ("hidden",), **options),
    )


def linear(megatron: str, hf: str, rows: str, columns: str, **options: Any) -> tuple[Entry, Entry]:
    """Weight and bias of a linear layer; the bias under a condition."""
    return (
        copied(f"{megatron}.weight", f"{hf}.weight", (rows, columns)),
        copied(f"{megatron}.bias", f"{hf}.bias", (rows,), **options),
    )


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "embedding.word_embeddings.weight",
        (Form(VocabularyRows(), {"gpt_neox.embed_in.weight": ("vocab", "hidden")}),),
    ),
    *norm(LAYER + "input_layernorm", HF_LAYER + "input_layernorm"),
    *linear(
        LAYER + "self_attention.linear_qkv",
        HF_LAYER + "attention.query_key_value",
        "qkv",
        "hidden",
        only_if=has_qkv_bias,
    ),
    *linear(
        LAYER + "self_attention.linear_proj", HF_LAYER + "attention.dense", "hidden", "query", only_if=has_qkv_bias
    ),
    *norm(LAYER + "pre_mlp_layernorm", HF_LAYER + "post_attention_layernorm"),
    *linear(LAYER + "mlp.linear_fc1", HF_LAYER + "mlp.dense_h_to_4h", "ffn", "hidden"),
    *linear(LAYER + "mlp.linear_fc2", HF_LAYER + "mlp.dense_4h_to_h", "hidden", "ffn"),
    *norm("decoder.final_layernorm", "gpt_neox.final_layer_norm"),
    Entry(
        "output_layer.weight",
        (Form(VocabularyRows(), {"embed_out.weight": ("vocab", "hidden")}),),
        only_if=has_output_layer,
    ),
)


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape from config.json.

    Raises:
        CheckpointError: an option that changes the arithmetic and is not supported.
    """
    hf = KEYS.read(hf)
    check_heads(hf["hidden_size"], hf["num_attention_heads"])
    bias = hf["attention_bias"]
    shape = ModelConfig(
        architecture="GPTNeoXForCausalLM",
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=None,
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        normalization="layernorm",
        norm_epsilon=hf["layer_norm_eps"],
        activation=read_activation(hf["hidden_act"]),
        parallel_residual="two_norms" if hf["use_parallel_residual"] else "none",
        add_qkv_bias=bias,
        add_attention_output_bias=bias,
        add_mlp_bias=True,
        tie_embeddings=hf["tie_word_embeddings"],
        hidden_dropout=hf["hidden_dropout"],
        attention_dropout=hf["attention_dropout"],
        init_std=hf["initializer_range"],
    )
    # Beside rope_parameters transformers' code of this family reads these names alone.
    beside = {"rope_theta": hf["rotary_emb_base"], "partial_rotary_factor": hf["rotary_pct"]}
    return replace(shape, **read_rope(hf | beside))


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """config.json, readable by transformers 4 and 5."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": "gelu" if model.activation == "gelu" else "gelu_new",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_std,
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.parallel_residual != "none",
        "attention_bias": has_qkv_bias(model),
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "rotary_emb_base": model.rotary_base,
        "rotary_pct": model.rotary_percent,
        "partial_rotary_factor": model.rotary_percent,
        **write_rope(model),
    }


FAMILY = Family(
    name="GPT-NeoX",
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    entries=ENTRIES,
    ignored=(r".*\.rotary_emb\.inv_freq", r".*\.attention\.(bias|masked_bias)"),
    model_config=model_config,
    hf_config=hf_config,
)
