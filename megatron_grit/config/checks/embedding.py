"""Options of the embedding that contradict each other, or that have nothing to act on."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.embedding_shape import head_widths
from megatron_grit.config.schema import EmbeddingConfig, RunConfig

_OF_LINEAR_LAYERS = ("linear_place", "linear_activation", "linear_bias", "asymmetric")


def embedding_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems of the section ``embedding``."""
    embedding = config.embedding
    if embedding.num_linear_layers == 0 and embedding.projection_dim is not None:
        yield Problem(
            "embedding.num_linear_layers",
            f"embedding.projection_dim {embedding.projection_dim} is the width of the last linear layer, and "
            "embedding.num_linear_layers is 0; leave one of the two out",
        )
    if not head_widths(config):
        standard = EmbeddingConfig()
        for name in _OF_LINEAR_LAYERS:
            value = getattr(embedding, name)
            if value != getattr(standard, name):
                value = str(value).lower() if isinstance(value, bool) else value
                yield Problem(
                    f"embedding.{name}",
                    f"embedding.{name} {value} is about linear layers, and there are none; set "
                    "embedding.num_linear_layers to 1 or more",
                )
