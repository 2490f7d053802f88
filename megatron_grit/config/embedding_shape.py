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


SCALAR: dict[str, object] = {
    "pooling": "lasttoken",
    "causal": True,
    "normalize": False,
    "projection_dim": 1,
    "linear_place": "after_pooling",
    "linear_bias": False,
}
"""Fields of :class:`~megatron_grit.config.schema.EmbeddingConfig` of a model that gives a text one number, a linear
function of the state of its last token: transformers' sequence classification with one label. The layer is applied
after pooling, in fp32; before it the number would be rounded as the states are."""
_AS_BY_DEFAULT = ("linear_activation", "asymmetric", "brackets", "side_tokens")


def scalar_problem(embedding: EmbeddingConfig) -> str | None:
    """What keeps a model from giving a text one number, and what to set. None: it does."""
    wanted = SCALAR | {name: getattr(EmbeddingConfig(), name) for name in _AS_BY_DEFAULT}
    if embedding.num_linear_layers not in (None, 1):
        wanted["num_linear_layers"] = 1
    wrong = {name: value for name, value in wanted.items() if getattr(embedding, name) != value}
    if not wrong:
        return None
    shown = ", ".join(f"{name}: {str(value).lower()}" for name, value in wrong.items())
    return f"set embedding to {{{shown}}}"
