"""The shape of a model from the arguments that Megatron-LM keeps in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.errors import CheckpointError

_REFUSED: dict[str, tuple[Any, ...]] = {
    "apply_residual_connection_post_layernorm": (None, False),
    "num_experts": (None,),
    "squared_relu": (None, False),
    "pipeline_model_parallel_size": (None, 1),
    "position_embedding_type": (None, "learned_absolute", "absolute", "rope"),
    "normalization": (None, "LayerNorm", "RMSNorm"),
    "rotary_interleaved": (None, False),
}
"""Arguments and the values that are read; None is that of a version without the argument."""
_REMEDY = {
    "num_experts": "experts are read from torch_dist checkpoints: save it with --ckpt-format torch_dist and give that "
    "as checkpoint.load",
    "pipeline_model_parallel_size": "convert the checkpoint with Megatron-LM's tools/checkpoint to one pipeline stage",
}


def model_of_arguments(arguments: Mapping[str, Any], vocab_size: int) -> ModelConfig:
    """The shape that arguments describe.

    Args:
        arguments: of Megatron-LM, by name. Those that its version did not have are absent.
        vocab_size: tokens, without padding.

    Raises:
        CheckpointError: one is missing, or makes a model that no decoder here is.
    """
    for name, possible in _REFUSED.items():
        if arguments.get(name) not in possible:
            values = " or ".join(str(each) for each in possible if each is not None) or "none"
            remedy = _REMEDY.get(name, f"only checkpoints with {values} can be converted")
            raise CheckpointError(f"args.{name} is {arguments[name]!r}, which is not read in this layout; {remedy}")

    def given(name: str) -> Any:
        if arguments.get(name) is None:
            raise CheckpointError(f"args has no {name}; give a checkpoint with the arguments of its run")
        return arguments[name]

    heads, with_bias = given("num_attention_heads"), bool(arguments.get("add_bias_linear", True))
    rotates = arguments.get("use_rotary_position_embeddings") or arguments.get("position_embedding_type") == "rope"
    has_positions = arguments.get("add_position_embedding", True)
    factor = float(arguments.get("rotary_seq_len_interpolation_factor") or 1)
    epsilon = arguments.get("norm_epsilon") or arguments.get("layernorm_epsilon")  # its name in older versions
    groups = arguments.get("num_query_groups") if arguments.get("group_query_attention") else None
    return ModelConfig(
        num_layers=given("num_layers"),
        hidden_size=given("hidden_size"),
        ffn_hidden_size=given("ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=arguments.get("kv_channels"),
        vocab_size=vocab_size,
        max_position_embeddings=given("max_position_embeddings"),
        normalization="rmsnorm" if arguments.get("normalization") == "RMSNorm" else "layernorm",
        layernorm_zero_centered_gamma=bool(arguments.get("apply_layernorm_1p")),
        norm_epsilon=float(epsilon or 1e-5),
        activation=_activation(arguments, with_bias),
        position_embedding="rope" if rotates else "learned_absolute" if has_positions else "none",
        rotary_base=float(arguments.get("rotary_base") or 10000),
        rotary_percent=float(arguments.get("rotary_percent") or 1),
        rope_type="linear" if factor != 1 else "default",
        rope_factor=factor,
        add_bias_linear=with_bias,
        tie_embeddings=not arguments.get("untie_embeddings_and_output_weights"),
        retro=_retro(arguments),
    )


def _activation(arguments: Mapping[str, Any], with_bias: bool) -> Any:
    if arguments.get("swiglu"):
        return "swiglu"
    # The kernel that fuses a bias with gelu computes the approximation.
    fused = with_bias and arguments.get("bias_gelu_fusion", True)
    return "gelu_tanh" if fused or arguments.get("openai_gelu") else "gelu"


def _retro(arguments: Mapping[str, Any]) -> RetroConfig:
    if not arguments.get("retro_add_retriever"):
        return RetroConfig()

    def first(default: int, *names: str) -> int:
        return next((int(arguments[name]) for name in names if arguments.get(name) is not None), default)

    gate = arguments.get("retro_attention_gate")
    return RetroConfig(
        num_neighbors=first(2, "retro_num_neighbors"),
        chunk_length=first(64, "retro_chunk_length", "retro_gpt_chunk_length"),
        retrieved_chunks=first(2, "retro_num_retrieved_chunks"),
        encoder_layers=first(2, "retro_encoder_layers", "retro_encoder_num_layers"),
        encoder_rope=False,
        gate=1.0 if gate is None else float(gate),
    )
