"""Parameters of a model and of one process, counted from a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_grit.config.embedding_shape import num_head_parameters
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.config.shape import (
    attention_widths,
    dense_layers,
    expert_width,
    has_attention_output_bias,
    has_mlp_bias,
    has_qkv_bias,
    head_channels,
    padded_vocabulary,
    stage_layers,
)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters of a model, padding of the vocabulary included."""

    total: int
    """Of the whole model, each counted once."""
    active: int
    """That a token passes through: all but the experts that it does not visit."""
    rank_dense: int
    """On a process, experts left out."""
    rank_expert: int
    """Of the experts on a process."""

    @property
    def rank(self) -> int:
        """On a process."""
        return self.rank_dense + self.rank_expert


def expert_tensor_size(config: RunConfig) -> int:
    """Tensor parallel size of the experts."""
    return config.parallel.expert_tensor or config.parallel.tensor


def count_parameters(config: RunConfig, vocab_size: int, stage: int = 0) -> Parameters:
    """Parameters of the model and of one process.

    Args:
        config: the run.
        vocab_size: of the model before padding.
        stage: pipeline stage of the process.
    """
    model, parallel = config.model, config.parallel
    whole = [_layer(model, layer, 1, 1, 1) for layer in range(model.num_layers)]
    ends = _ends(config, vocab_size, 1)
    head = 0 if model.tie_embeddings else ends["output"]
    experts = sum(expert for _, expert in whole)
    total = sum(dense for dense, _ in whole) + experts + ends["input"] + ends["norm"] + ends["output bias"] + head
    num_experts = model.num_experts or 1
    unvisited = experts * (num_experts - min(model.moe_top_k, num_experts)) // num_experts
    mine = [
        _layer(model, layer, parallel.tensor, parallel.expert, expert_tensor_size(config))
        for layer in stage_layers(config, stage)
    ]
    ends = _ends(config, vocab_size, parallel.tensor)
    first, last = stage == 0, stage == parallel.pipeline - 1
    rank = sum(dense for dense, _ in mine) + first * ends["input"] + last * (ends["norm"] + ends["output bias"])
    if last and not (model.tie_embeddings and first):  # a tied matrix has a copy on the last stage
        rank += ends["output"]
    return Parameters(
        total=total, active=total - unvisited, rank_dense=rank, rank_expert=sum(expert for _, expert in mine)
    )


def _layer(model: ModelConfig, layer: int, tensor: int, expert: int, expert_tensor: int) -> tuple[int, int]:
    """Parameters of a layer on a rank: those of its experts apart from all others."""
    width = model.hidden_size
    queries, keys = attention_widths(model)
    qkv = (queries + 2 * keys) // tensor
    dense = width * qkv + has_qkv_bias(model) * qkv
    dense += width * queries // tensor + has_attention_output_bias(model) * width
    norm = 1 if model.normalization == "rmsnorm" else 2
    dense += norm * width * (1 if model.parallel_residual == "one_norm" else 2)
    dense += norm * 2 * head_channels(model) * model.qk_norm
    if layer in dense_layers(model):
        return dense + _mlp(model, model.ffn_hidden_size, tensor), 0
    dense += width * (model.num_experts or 0)
    if model.moe_shared_ffn_hidden_size:
        dense += _mlp(model, model.moe_shared_ffn_hidden_size, tensor) + model.moe_shared_expert_gate * width
    return dense, (model.num_experts or 0) // expert * _mlp(model, expert_width(model), expert_tensor)


def _mlp(model: ModelConfig, ffn_width: int, tensor: int) -> int:
    width, bias = model.hidden_size, has_mlp_bias(model)
    inner = ffn_width * (2 if model.activation == "swiglu" else 1) // tensor
    return width * inner + bias * inner + width * ffn_width // tensor + bias * width


def _ends(config: RunConfig, vocab_size: int, tensor: int) -> dict[str, int]:
    """Parameters outside the layers on a rank: input embedding, final norm with the embedding head, output layer."""
    model = config.model
    # Padded for the run's tensor parallel size, whoever asks.
    rows = padded_vocabulary(vocab_size, model.vocab_multiple, config.parallel.tensor) // tensor
    positions = model.max_position_embeddings if model.position_embedding == "learned_absolute" else 0
    return {
        "input": (rows + positions) * model.hidden_size,
        "norm": model.hidden_size * (1 if model.normalization == "rmsnorm" else 2) + num_head_parameters(config),
        "output": rows * model.hidden_size,
        "output bias": rows * model.add_output_bias,
    }
