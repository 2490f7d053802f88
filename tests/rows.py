"""Rows and batches made by hand, and tiny configurations, for tests."""

from __future__ import annotations

import numpy as np
import torch

from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.kinds.embedding import EmbeddingCounts
from megatron_grit.data.kinds.generative import count_labels
from megatron_grit.data.rows.batch import BatchPart, PackedRow, StepBatch

VOCAB = 100
TWO_PASSES = (RowKind.EMBEDDING, RowKind.GENERATIVE)
"""Kinds of the bidirectional and of the causal pass."""


def tiny_config(*, experts: int | None = None, **model: object) -> RunConfig:
    """Four layers of width 64 in fp32."""
    shape = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "num_experts": experts,
        "moe_aux_loss_coeff": 0.01 if experts else 0.0,
        "max_position_embeddings": 512,
        "init_std": 0.05,
    }
    config = RunConfig(model=ModelConfig(**(shape | model)))  # type: ignore[arg-type]
    config.training.precision = "fp32"
    config.training.steps = 10
    config.optimizer.lr = 1e-3
    config.optimizer.warmup_ratio = 0.0
    config.loss.temperature = 0.1
    config.parallel.device = "cpu"
    return config


def make_row(
    kind: RowKind, lengths: list[int], row_length: int, slots: list[int] | None = None, seed: int = 0
) -> PackedRow:
    """A row of random tokens; every text token is pooled and every token but a segment's last predicts its next."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (1, row_length), generator=generator)
    used = sum(lengths)
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    if used < row_length:
        bounds.append(row_length)
    sizes = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    segment_ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    padding = torch.arange(row_length) >= used
    last = torch.zeros(row_length, dtype=torch.bool)
    last[torch.tensor(bounds[1:]) - 1] = True
    return PackedRow(
        kind=kind.value,
        embeds=kind is RowKind.EMBEDDING,
        tokens_1T=tokens,
        positions_1T=torch.cat([torch.arange(size) for size in sizes])[None],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(sizes),
        padding_mask_1T=padding[None],
        record_ids=[f"row{seed}#{i}" for i in range(len(lengths))],
        labels_1T=tokens.roll(-1, 1),
        loss_mask_1T=(~padding & ~last).float()[None],
        segment_ids_T=segment_ids,
        pool_mask_T=(~padding).float(),
        slots_S=torch.tensor(slots if slots is not None else range(len(lengths))),
    )


def make_batch(
    data_rank: int = 0, data_size: int = 1, *, objective: str = "unified", rows: int = 4, repeated: bool = False
) -> StepBatch:
    """``rows`` rows of each kind, three segments each, dealt to data parallel ranks in turn. Two passages a query.

    ``repeated``: one text stands in every embedding row.
    """
    row_length, num_queries = 48, rows
    order = torch.randperm(3 * rows, generator=torch.Generator().manual_seed(7)).tolist()
    embedding = [
        make_row(RowKind.EMBEDDING, [10 + i, 5, 20 - i], row_length, order[3 * i : 3 * i + 3], seed=i)
        for i in range(rows)
    ]
    for i, row in enumerate(embedding if repeated else []):
        row.tokens_1T[0, 10 + i : 15 + i] = torch.arange(5)
    generative = [make_row(RowKind.GENERATIVE, [9 + 2 * i, 5, 20], row_length, seed=100 + i) for i in range(rows)]
    embedding = embedding if objective != "generative" else []
    generative = generative if objective != "embedding" else []
    return grit_batch(embedding, generative, num_queries, data_rank=data_rank, data_size=data_size)


def grit_batch(
    embedding: list[PackedRow],
    generative: list[PackedRow],
    num_queries: int,
    group_size: int = 2,
    *,
    data_rank: int = 0,
    data_size: int = 1,
    microbatch_sequences: int = 1,
) -> StepBatch:
    """A data parallel rank's part of the global batch that has these rows; a kind without rows has no part.

    The segments of generative rows stand in the step as they stand in the rows.
    """
    every, mine = embedding + generative, slice(data_rank, None, data_size)
    parts = {}
    if embedding:
        slots = [row.slots_S for row in embedding if row.slots_S is not None]
        by_rank = [torch.cat(slots[rank::data_size]) for rank in range(data_size)]
        pairs = EmbeddingCounts(num_queries=num_queries, group_size=group_size, slots_by_rank=by_rank)
        parts["embedding"] = BatchPart(rows=embedding[mine], counts=pairs)
    if generative:
        weights: list[float] = []
        for row in generative:
            assert row.loss_mask_1T is not None
            sizes, mask_T = row.cu_seqlens.diff().tolist(), row.loss_mask_1T[0].double()
            row.slots_S = torch.arange(len(weights), len(weights) + len(row.record_ids))
            weights += [part.sum().item() for part in mask_T.split(sizes)[: len(row.record_ids)]]
        num_labels = sum(int(row.loss_mask_1T.count_nonzero()) for row in generative if row.loss_mask_1T is not None)
        counts = count_labels(np.array(weights), num_labels, len(generative), microbatch_sequences)
        parts["generative"] = BatchPart(rows=generative[mine], counts=counts)
    lengths = [row.tokens_1T.shape[1] for row in every]
    return StepBatch(
        step=0,
        parts=parts,
        row_length=max(lengths),
        num_tokens=sum(row.num_tokens for row in every),
        num_padded_tokens=sum(lengths),
    )
