"""Queries with their passages. Their options are older than sections by kind and stand in other sections."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import MeshError

SECTION = None
"""Dataclass of the section of RunConfig that has the kind's name; None: there is none."""
DATA, WEIGHT, BATCH = "data.embedding", "loss.loss_emb_factor", "training.embedding_batch_size"
"""Keys of its sources, of the weight of its loss, and of how many of its samples a step takes."""
LOSS = "contrastive"
"""File of its loss in losses/."""
METRICS = ("loss_emb", "accuracy_emb")
"""Names of what a step says about it; the first is its loss."""
EMBEDS = True
"""Whether its rows are embedded; if not, their next tokens are predicted."""


def problems(config: RunConfig, multiple: int) -> Iterator[Problem]:
    """What contradicts itself in the options of a run that trains it.

    Args:
        config: the run.
        multiple: the rows of a step are a multiple of it, so a step needs as many segments.
    """
    training = config.training
    texts = training.embedding_batch_size * (1 + config.data.train_group_size)
    if texts < multiple:
        yield Problem(
            BATCH,
            f"{BATCH} {training.embedding_batch_size} gives {texts} texts, fewer than the {multiple} rows of a step",
            MeshError,
        )
    if training.embedding_batch_size % config.loss.num_blocks:
        yield Problem(
            "loss.num_blocks",
            f"{BATCH} {training.embedding_batch_size} cannot be cut into {config.loss.num_blocks} blocks of equal size "
            "(loss.num_blocks)",
        )
