"""Losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_grit.config.knob import knob
from megatron_grit.config.schema.teacher import TeacherConfig


@dataclass(kw_only=True)
class RoleWeightsConfig:
    """Weights of the tokens of each role as labels, in place of those that ``loss.labels`` gives. null: as it gives."""

    text: float | None = knob(None, at_least=0)
    """Plain texts."""
    system: float | None = knob(None, at_least=0)
    """System messages."""
    user: float | None = knob(None, at_least=0)
    """User turns and prompts: prompt loss weight (arXiv 2401.13586, 2507.07817) is a number between 0 and 1."""
    assistant: float | None = knob(None, at_least=0)
    """Assistant turns."""
    template: float | None = knob(None, at_least=0)
    """What the template puts around the turns."""
    assistant_eos: float | None = knob(None, at_least=0)
    """Tokens that end an assistant turn. null: as the rest of the turn. With a number here or in template_eos each rank
    reads the tokens of the whole global batch to count its labels, not only those of its own rows."""
    template_eos: float | None = knob(None, at_least=0)
    """The same tokens where the template puts them after other turns. null: as the rest of the template."""


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
    labels: Literal["it", "im", "im_release", "lm"] = "it"
    """Which tokens of a conversation are labels of the next-token loss. it: assistant turns. im: all but the template's
    (Instruction Modelling, arXiv 2405.14394, equation 4). im_release: all but what stands before the first turn, as the
    code released with that paper behaves under tokenizers with a BOS token. lm: all. Plain texts are labels always."""
    role_weights: RoleWeightsConfig = field(default_factory=RoleWeightsConfig)
    """Weights by role, where 0 and 1 will not do."""
    loss_gen_type: Literal["token", "mixed", "sequence", "microbatch_mean", "sum"] = "token"
    """token: mean over the labels of the global batch. mixed: mean over rows of each row's mean (GritLM's mixed).
    sequence: sum over labels divided by the number of sequences (GritLM's token). microbatch_mean: mean over groups of
    microbatch_sequences sequences of each group's mean, as trainers compute that average over micro-batches and ranks;
    with groups of one, each sequence counts the same. sum: sum over labels divided by the number of such groups. A mean
    over labels is by their weights."""
    microbatch_sequences: int = knob(1, at_least=1)
    """Sequences of a group, which follow each other in the step: what a device of the trainer to be reproduced took at
    once. The mesh does not matter to it; rows do only with data.packing window, where they say what follows what."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """A frozen model that is learned from, or kept near to, beside the labels."""
    emb_grad_scale: Literal["exact", "grit"] = "exact"
    """exact: the gradient of the global contrastive loss. grit: divided by grit_world_size, as data parallel averaging
    did in GritLM; use it to reproduce its published ratio of the two losses."""
    grit_world_size: int | None = knob(None, at_least=1)
    """Number of GPUs whose ratio emb_grad_scale=grit reproduces. null: the data parallel size."""
