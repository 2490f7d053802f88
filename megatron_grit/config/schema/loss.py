"""Losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class LossConfig:
    """The two losses and how they are weighed."""

    temperature: float = knob(0.02, above=0)
    """Divides the similarities in the contrastive loss: 1 / the scale of sentence-transformers' ranking losses."""
    symmetric: bool = False
    """Also find the query of each positive among all queries; the loss is the mean of both directions."""
    negatives: Literal["batch", "hard"] = "batch"
    """batch: every passage of the global batch. hard: only the train_group_size - 1 of the query's own record."""
    num_blocks: int = knob(1, at_least=1)
    """Number of blocks of consecutive queries that the global batch is split into; negatives come from the query's own
    block. To reproduce GritLM without --negatives_cross_device: its GPUs x gradient accumulation steps. 1: negatives
    come from the whole batch."""
    same_side_negatives: bool = False
    """Other queries are negatives of a query too."""
    mask_equal_texts: bool = False
    """Leave out negatives whose text, instruction aside, is that of the positive or of the query itself."""
    false_negative_margin: float | None = knob(None, at_least=-2)
    """Leave out negatives that are more similar to the query than its positive is by more than this. Cosines are
    compared where embedding.normalize is set. null: none are."""
    matryoshka_dims: list[int] = knob([], at_least=1)
    """Also train the first n channels of the embedding, normalised again, for each n of this list."""
    gradient_sides: Literal["both", "queries", "passages"] = "both"
    """queries or passages: stop the gradient through the embeddings of the other side (GritLM's emb_q_only,
    emb_p_only)."""
    loss_emb_factor: float = knob(1.0, at_least=0)
    """Weight of the contrastive loss."""
    loss_gen_factor: float = knob(1.0, at_least=0)
    """Weight of the next-token loss."""
    loss_gen_type: Literal["token", "mixed", "sequence"] = "token"
    """token: mean over the supervised tokens of the global batch. mixed: mean over rows of each row's mean (GritLM's
    mixed). sequence: sum over tokens divided by the number of sequences (GritLM's token)."""
    emb_grad_scale: Literal["exact", "grit"] = "exact"
    """exact: the gradient of the global contrastive loss. grit: divided by grit_world_size, as data parallel averaging
    did in GritLM; use it to reproduce its published ratio of the two losses."""
    grit_world_size: int | None = knob(None, at_least=1)
    """Number of GPUs whose ratio emb_grad_scale=grit reproduces. null: the data parallel size."""
