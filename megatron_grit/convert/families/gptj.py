"""GPT-J: layers side by side under one norm, neighbouring channels turned, a bias for each token of the vocabulary."""

from __future__ import annotations

from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import head_channels
from megatron_grit.convert.families.gpt_neox import linear, norm, read_activation
from megatron_grit.convert.families.keys import Keys, check_heads
from megatron_grit.convert.families.llama_like import LAYER, copied, has_output_layer, qkv
from megatron_grit.convert.param_map import Entry, Family, Form, VocabularyRows, ZeroVocabularyRows
from megatron_grit.errors import CheckpointError

HF_LAYER = "transformer.h.{layer}."
KEYS = Keys(
    defaults={
        "vocab_size": 50400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.02,
    },
    nullable={"n_inner": int},
    aliases={
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "embedding.word_embeddings.weight",
        (Form(VocabularyRows(), {"transformer.wte.weight": ("vocab", "hidden")}),),
    ),
    *norm(LAYER + "input_layernorm", HF_LAYER + "ln_1"),
    Entry(LAYER + "self_attention.linear_qkv.weight", (qkv("weight", HF_LAYER + "attn.", ("hidden",)),)),
    copied(LAYER + "self_attention.linear_proj.weight", HF_LAYER + "attn.out_proj.weight", ("hidden", "query")),
    *linear(LAYER + "mlp.linear_fc1", HF_LAYER + "mlp.fc_in", "ffn", "hidden"),
    *linear(LAYER + "mlp.linear_fc2", HF_LAYER + "mlp.fc_out", "hidden", "ffn"),
    *norm("decoder.final_layernorm", "transformer.ln_f"),
    Entry(
        "output_layer.weight",
        (Form(VocabularyRows(), {"lm_head.weight": ("vocab", "hidden")}),),
        only_if=has_output_layer,
    ),
    Entry(
        "output_layer.bias",
        (
            Form(VocabularyRows(), {"lm_head.bias": ("vocab",)}),
            Form(ZeroVocabularyRows(), {}, without=frozenset({"lm_head.weight"})),
        ),
    ),
)


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape from config.json.

    Raises:
        CheckpointError: an option that changes the arithmetic and is not supported.
    """
    hf = KEYS.read(hf)
    check_heads(hf["n_embd"], hf["n_head"])
    channels = hf["n_embd"] // hf["n_head"]
    if hf["rotary_dim"] > channels or hf["rotary_dim"] % 2:
        raise CheckpointError(f"rotary_dim is {hf['rotary_dim']}, and must be even and at most a head's {channels}")
    return ModelConfig(
        architecture="GPTJForCausalLM",
        num_layers=hf["n_layer"],
        hidden_size=hf["n_embd"],
        ffn_hidden_size=hf["n_inner"] or 4 * hf["n_embd"],
        num_attention_heads=hf["n_head"],
        num_query_groups=None,
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["n_positions"],
        normalization="layernorm",
        norm_epsilon=hf["layer_norm_epsilon"],
        activation=read_activation(hf["activation_function"]),
        parallel_residual="one_norm",
        rotary_percent=hf["rotary_dim"] / channels,
        rotary_interleaved=True,
        add_mlp_bias=True,
        add_output_bias=True,
        tie_embeddings=hf["tie_word_embeddings"],
        hidden_dropout=hf["resid_pdrop"],
        attention_dropout=hf["attn_pdrop"],
        init_std=hf["initializer_range"],
    )


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "vocab_size": model.vocab_size,
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "rotary_dim": round(model.rotary_percent * head_channels(model)),
        "activation_function": "gelu" if model.activation == "gelu" else "gelu_new",
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "resid_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
    }


FAMILY = Family(
    name="GPT-J",
    architecture="GPTJForCausalLM",
    model_type="gptj",
    entries=ENTRIES,
    ignored=(r".*\.attn\.(bias|masked_bias|embed_positions)",),
    model_config=model_config,
    hf_config=hf_config,
)
