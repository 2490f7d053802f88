"""What an embedding configuration amounts to: widths of its linear layers, and how many parameters they have."""

from __future__ import annotations

from megatron_grit.config.schema import EmbeddingConfig, RunConfig


def head_widths(config: RunConfig) -> list[int]:
    """Outputs of each linear layer on top of the decoder, first layer first. Empty: there are none."""
    embedding, hidden = config.embedding, config.model.hidden_size
    count = embedding.num_linear_layers
    if count is None:
        count = 0 if embedding.projection_dim is None else 1
    return [hidden] * (count - 1) + [embedding.projection_dim or hidden] * (count > 0)


def num_head_parameters(config: RunConfig) -> int:
    """Parameters that only embeddings pass through: linear layers, and the weights of learned pooling."""
    embedding, widths = config.embedding, head_widths(config)
    inputs = [config.model.hidden_size, *widths]
    linear = sum((inputs[place] + embedding.linear_bias) * width for place, width in enumerate(widths))
    learned = config.model.max_position_embeddings if embedding.pooling == "learnedmean" else 0
    return linear * (2 if embedding.asymmetric == "heads" else 1) + learned


def tells_sides_apart(embedding: EmbeddingConfig) -> bool:
    """Whether a text is embedded in one way as a query and in another as a passage."""
    return embedding.brackets != "none" or embedding.side_tokens or embedding.asymmetric == "heads"
