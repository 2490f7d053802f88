"""Parameters of adapters, and which of a model's are trained, counted from a configuration."""

from __future__ import annotations

from megatron_grit.config.checks.adapter import adapter_targets
from megatron_grit.config.embedding_shape import num_head_parameters
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import attention_widths, dense_layers, expert_width, padded_vocabulary, stage_layers
from megatron_grit.planning.parameters import Parameters, expert_tensor_size

_SPLIT_BY_INPUT = ("o_proj", "down_proj")


def count_adapters(config: RunConfig, stage: int) -> tuple[int, int]:
    """Parameters of a process's adapters: those of experts apart from all others.

    Args:
        config: the run.
        stage: pipeline stage of the process.
    """
    model, parallel = config.model, config.parallel
    queries, keys = attention_widths(model)
    width, tensor = model.hidden_size, parallel.tensor
    attention = _count(
        config,
        {"q_proj": (width, queries), "k_proj": (width, keys), "v_proj": (width, keys), "o_proj": (queries, width)},
        tensor,
    )
    dense = experts = 0
    for layer in stage_layers(config, stage):
        dense += attention
        if layer in dense_layers(model):
            dense += _feed_forward(config, model.ffn_hidden_size, tensor)
            continue
        if model.moe_shared_ffn_hidden_size:
            dense += _feed_forward(config, model.moe_shared_ffn_hidden_size, tensor)
        each = _feed_forward(config, expert_width(model), expert_tensor_size(config))
        experts += (model.num_experts or 0) // parallel.expert * each
    return dense, experts


def _feed_forward(config: RunConfig, inner: int, tensor: int) -> int:
    width = config.model.hidden_size
    return _count(config, {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}, tensor)


def _count(config: RunConfig, shapes: dict[str, tuple[int, int]], tensor: int) -> int:
    """``shapes``: input and output width of each projection."""
    adapter, total = config.adapter, 0
    for name in adapter_targets(config):
        if name in shapes:
            inputs, outputs = shapes[name]
            if name in _SPLIT_BY_INPUT:
                inputs //= tensor
            else:
                outputs //= tensor
            total += adapter.rank * (inputs + outputs) + (outputs if adapter.kind == "dora" else 0)
    return total


def count_trained(config: RunConfig, base: Parameters, vocab_size: int, stage: int) -> tuple[int, int]:
    """Parameters of a process that have gradients and optimizer states: those of experts apart from all others.

    Of ``training.trainable`` only embeddings and head are counted exactly: norms and biases, which are few, not at all;
    with other patterns, which may name anything, the whole base is. ``training.frozen`` is not looked at. So the count
    is too high rather than too low.

    Args:
        config: the run.
        base: parameters of the model without adapters.
        vocab_size: of the model before padding.
        stage: pipeline stage of the process.
    """
    dense, experts = count_adapters(config, stage)
    named = set(config.training.trainable)
    if (not named and config.adapter.kind == "none") or named - {"norms", "biases", "embeddings", "head"}:
        return base.rank_dense + dense, base.rank_expert + experts
    model, parallel = config.model, config.parallel
    rows = padded_vocabulary(vocab_size, model.vocab_multiple, parallel.tensor) // parallel.tensor
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    matrix = rows * model.hidden_size
    if "embeddings" in named and (is_first or is_last and model.tie_embeddings):
        positions = model.max_position_embeddings if model.position_embedding == "learned_absolute" else 0
        dense += matrix + is_first * positions * model.hidden_size
    if "head" in named and is_last:
        dense += matrix + rows * model.add_output_bias
    return dense + is_last * num_head_parameters(config), experts
