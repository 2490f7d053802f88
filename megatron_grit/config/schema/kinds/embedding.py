"""Queries with their passages. Their options are older than sections by kind and stand in other sections."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.workload import SIMILARITIES_AT_ONCE, LossCost, RowWorkload, TextLengths, rows_of_tokens
from megatron_grit.errors import MeshError

SECTION = None
"""Dataclass of the section of RunConfig that has the kind's name; None: there is none."""
DATA, WEIGHT, BATCH = "data.embedding", "loss.loss_emb_factor", "training.embedding_batch_size"
"""Keys of its sources, of the weight of its loss, and of how many of its samples a step takes."""
MADE_BY = "megatron-grit build-grit"
"""Command that makes its sources."""
LOSS = "contrastive"
"""Name of its loss."""
METRICS = ("loss_emb", "accuracy_emb")
"""Names of what a step says about it; the first is its loss."""
EMBEDS = True
"""Whether its rows are embedded; if not, their next tokens are predicted."""
COMPARES_ROWS = True
"""Of a kind whose rows are embedded: whether its loss compares texts of all rows of a step, so that rows pass through
the model twice where a rank has several."""


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
    elif training.embedding_batch_size == config.loss.num_blocks and config.data.train_group_size < 2:
        yield Problem(
            BATCH,
            f"{BATCH} {training.embedding_batch_size} with loss.num_blocks {config.loss.num_blocks} and "
            f"data.train_group_size {config.data.train_group_size} leaves no negative for a query, so that its loss is "
            "always 0; raise the batch or the group",
        )


def plan_rows(config: RunConfig, data_size: int, lengths: TextLengths) -> RowWorkload:
    """The rows of a step as a configuration leads to them.

    Args:
        config: the run.
        data_size: data parallel size.
        lengths: of the data; no text is longer than a row.
    """
    text_tokens, num_queries = (
        min(lengths.text_tokens, config.data.tokens_per_row),
        config.training.embedding_batch_size,
    )
    num_texts = num_queries * (1 + config.data.train_group_size)
    rows, row_tokens = rows_of_tokens(config, data_size, num_texts * text_tokens, text_tokens)
    return RowWorkload(
        kind="embedding",
        embeds=EMBEDS,
        causal=config.embedding.causal,
        tokens=num_texts * text_tokens,
        rows=rows,
        samples=num_queries,
        segments=num_texts,
        segment_tokens=text_tokens,
        row_tokens=row_tokens,
    )


def loss_cost(config: RunConfig, rows: RowWorkload, data_size: int) -> LossCost:
    """What the loss takes besides the rows' passes through the model.

    Memory: embeddings of the global batch, their gradients, and one chunk of similarities. Operations: similarities,
    and two products for the gradient; replicas share them, and tensor parallel ranks repeat them.

    Args:
        config: the run.
        rows: of the global batch.
        data_size: data parallel size.
    """
    loss, width = config.loss, config.embedding.projection_dim or config.model.hidden_size
    passages = rows.segments - rows.samples
    candidates = passages + (rows.samples if loss.same_side_negatives else 0)
    if loss.negatives == "hard":
        chunk = rows.samples * config.data.train_group_size
    else:
        anchors = ceil(rows.samples / (data_size * config.parallel.context))
        chunk = min(max(SIMILARITIES_AT_ONCE, candidates), anchors * candidates)
    masked = loss.mask_equal_texts or loss.same_side_negatives or loss.false_negative_margin is not None
    # Similarities, which become their gradient where they are, and which of them are left out.
    similarities = chunk * (4 + (2 if masked else 0))
    # Gathered, in order, gradient of the loss, that times the incoming gradient; this rank's, joined, and gradient.
    everyone = 4 * rows.segments * (1 + len(loss.matryoshka_dims) / 2)
    memory = similarities + int(everyone + 3 * ceil(rows.segments / data_size)) * width * 4
    products = 2.0 * rows.samples * passages * width * (3 if loss.negatives == "batch" else 1)
    return LossCost(memory=memory, operations=products * config.parallel.tensor)
