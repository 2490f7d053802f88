"""The decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_grit.config.knob import knob
from megatron_grit.config.schema.retro import RetroConfig


@dataclass(kw_only=True)
class ModelConfig:
    """Shape of the decoder. The defaults are Mistral-7B's."""

    architecture: str | None = knob(None, in_weights=False, may_change=True)
    """Architecture of transformers that exports are written as, such as LlamaForCausalLM. Converting sets it. null:
    the first that has such a shape."""
    pretrained: str | None = knob(None, in_files=False, in_weights=False, may_change=True, path=True)
    """Directory of a Hugging Face model to start from, or its name on the hub, organisation/name or
    organisation/name@revision. Its config.json fills the keys of this section, data.tokenizer is its own where none is
    given, and each rank reads its part of the weights. A larger vocab_size adds tokens. null: random weights, or those
    of checkpoint.load."""
    num_layers: int = knob(32, at_least=1)
    """Transformer layers."""
    hidden_size: int = knob(4096, at_least=1)
    """Width of the residual stream."""
    ffn_hidden_size: int = knob(14336, at_least=1)
    """Width of the feed-forward layer (of each expert in a mixture, unless moe_ffn_hidden_size is set)."""
    num_attention_heads: int = knob(32, at_least=1)
    """Query heads."""
    num_query_groups: int | None = knob(8, at_least=1)
    """Key-value heads (grouped-query attention). null: one for each query head."""
    kv_channels: int | None = knob(None, at_least=1)
    """Channels of one head. null: hidden_size / num_attention_heads."""
    vocab_size: int | None = knob(None, at_least=1)
    """Rows of the embedding before padding. null: the tokenizer's size."""
    vocab_multiple: int = knob(64, at_least=1, in_files=False, in_weights=False)
    """The embedding is padded to a multiple of this x tensor parallel size; the extra rows are never predicted."""
    max_position_embeddings: int = knob(32768, at_least=1)
    """Longest segment that the model may see."""
    normalization: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the feed-forward layer and at the end."""
    layernorm_zero_centered_gamma: bool = False
    """Norms multiply by 1 + weight, and weights start at 0 (layernorm-1p; --apply-layernorm-1p of Megatron-LM)."""
    norm_epsilon: float = knob(1e-5, above=0)
    """Added to the variance."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward activation; gelu_tanh is GPT-2's approximation of gelu."""
    parallel_residual: Literal["none", "two_norms", "one_norm"] = "none"
    """Attention and feed-forward layer side by side, x + attention(norm(x)) + feed_forward(norm(x)): with a norm each
    (GPT-NeoX) or one for both (GPT-J). none: one after the other."""
    position_embedding: Literal["rope", "learned_absolute", "none"] = "rope"
    """How positions enter. Positions restart in each packed segment."""
    rotary_base: float = knob(10000.0, above=0)
    """Base period of RoPE."""
    rotary_percent: float = knob(1.0, above=0, at_most=1)
    """Share of a head's channels that RoPE turns."""
    rotary_interleaved: bool = False
    """RoPE turns neighbouring channels (GPT-J). false: each channel of a half with its counterpart in the other."""
    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    """How RoPE is stretched beyond the length of pretraining, as in transformers' rope_parameters."""
    rope_factor: float = knob(1.0, above=0)
    """By how much it is stretched."""
    rope_original_length: int | None = knob(None, at_least=1)
    """Length of pretraining, original_max_position_embeddings. For llama3 and yarn."""
    rope_low_freq_factor: float = knob(1.0, above=0)
    """llama3: periods above rope_original_length / this are stretched."""
    rope_high_freq_factor: float = knob(4.0, above=0)
    """llama3: periods below rope_original_length / this are not."""
    rope_beta_fast: float = knob(32.0, above=0)
    """yarn: channels that turn more often than this over rope_original_length are not stretched."""
    rope_beta_slow: float = knob(1.0, above=0)
    """yarn: channels that turn less often than this are stretched whole."""
    rope_attention_factor: float | None = knob(None, above=0)
    """yarn: queries and keys are multiplied by this. null: 0.1 ln(rope_factor) + 1."""
    add_bias_linear: bool = False
    """Biases in all linear layers of attention and feed-forward layers."""
    add_qkv_bias: bool = False
    """Biases in the query-key-value projection."""
    add_attention_output_bias: bool = False
    """Biases in the output projection of attention."""
    add_mlp_bias: bool = False
    """Biases in the feed-forward layers."""
    add_output_bias: bool = False
    """A bias for each token of the vocabulary in the output layer (GPT-J)."""
    qk_norm: bool = False
    """Normalise the channels of each query and key head before RoPE (Qwen3)."""
    attention_scale: float | None = knob(None, above=0)
    """Multiplies the products of queries and keys. null: 1 / sqrt(kv_channels). GPT-Neo: 1."""
    tie_embeddings: bool = False
    """Use the input embedding as the output layer."""
    sliding_window: int | None = knob(None, at_least=1)
    """Causal attention sees this many positions back, its own included. The bidirectional pass has no window."""
    window_layers: list[int] | None = knob(None, at_least=0)
    """Layers, from 0, that the sliding window is for. null: all."""
    num_experts: int | None = knob(None, at_least=1)
    """Experts of a mixture layer. null: a dense model."""
    moe_top_k: int = knob(2, at_least=1)
    """Experts that each token visits."""
    moe_normalize_top_k: bool = True
    """The weights of the visited experts add up to 1. false, and with moe_top_k 1: they are the router's probabilities
    over all experts."""
    moe_ffn_hidden_size: int | None = knob(None, at_least=1)
    """Width of each expert. null: ffn_hidden_size."""
    moe_shared_ffn_hidden_size: int | None = knob(None, at_least=1)
    """Width of an expert that every token visits besides (Qwen2-MoE). null: none."""
    moe_shared_expert_gate: bool = False
    """Weigh the shared expert by a sigmoid of the token."""
    moe_dense_layers: list[int] | None = knob(None, at_least=0)
    """Layers, from 0, with one feed-forward layer of ffn_hidden_size in place of experts. null: none."""
    moe_aux_loss_coeff: float = knob(0.0, at_least=0, in_weights=False)
    """Weight of the load-balancing loss, counted on embedding and generative micro-batches."""
    moe_z_loss_coeff: float = knob(0.0, at_least=0, in_files=False, in_weights=False)
    """Weight of the router z-loss."""
    hidden_dropout: float = knob(0.0, at_least=0, below=1, in_files=False, in_weights=False)
    """Dropout after attention and feed-forward layers."""
    attention_dropout: float = knob(0.0, at_least=0, below=1, in_weights=False)
    """Dropout on attention probabilities."""
    init_std: float = knob(0.02, at_least=0, in_files=False, in_weights=False)
    """Standard deviation of the initial weights."""
    attention_backend: Literal["auto", "sdpa", "varlen", "te"] = knob(
        "auto", in_files=False, in_weights=False, may_change=True
    )
    """Core attention: torch SDPA (any device), torch variable-length flash attention (CUDA), TransformerEngine
    (CUDA). auto: te where it is installed, else varlen, on CUDA; sdpa on CPU."""
    retro: RetroConfig = field(default_factory=RetroConfig, metadata={"in_files": False})
    """Neighbors from a retrieval database."""
