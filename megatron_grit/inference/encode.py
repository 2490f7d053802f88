"""Embeds texts at any layout, packed into rows without padding to the longest.

The rows of a window of texts go through the engine's pipeline schedule; the replicas of a model-parallel group
(:mod:`model_group`) share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.packing import pack
from megatron_grit.inference.model_group import ModelGroup
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.parallel.collectives import from_last_stage, gather_in_order
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.store.progress import Progress

# Rows are packed for this many texts at a time, so that memory does not grow with the corpus.
_WINDOW = 8192
_PROGRESS_FROM = 256


@torch.no_grad()
def encode_tokens(
    model: GritDecoder,
    texts: Sequence[tuple[list[int], list[int]]],
    *,
    group: ModelGroup,
    batch_tokens: int,
    progress: bool = True,
    is_query: bool | None = None,
    before_pass: Callable[[], object] | None = None,
) -> np.ndarray:
    """Embed tokenised texts. All processes of a model-parallel group call it with the same texts; groups are
    independent of each other.

    Args:
        model: this process's pipeline stage of the model, or all of it.
        texts: for each text its instruction's tokens, attended and not pooled, and its own.
        batch_tokens: token budget of one forward pass, on each replica; raised to the longest text.
        progress: show a bar from 256 texts on, in the process that leads the group.
        is_query: whether they are queries or passages, for a model whose linear layers differ between the two.
        before_pass: called before each forward pass; what it raises ends the call.

    Returns:
        float32 [len(texts), D], on every process.
    """
    model.eval()
    lengths = np.array([len(head) + len(tail) for head, tail in texts], dtype=np.int64)
    budget = max(batch_tokens, int(lengths.max()))
    embeddings = np.empty((len(texts), embedding_width(model)), dtype=np.float32)
    shows = progress and group.leads and len(texts) >= _PROGRESS_FROM
    with Progress(len(texts), "embedding", "text", enabled=shows) as bar:
        for start in range(0, len(texts), _WINDOW):
            window = slice(start, min(start + _WINDOW, len(texts)))
            batches = share_out(lengths[window], budget, group.num_replicas)
            row_length = _row_length(model.context, [int(lengths[window][batch].sum()) for batch in batches])
            row_of = partial(_row_of, texts[window], is_query, row_length, before_pass)
            vectors_ND = _encode_batches(model, group, batches, row_of, row_length, bar.update)
            embeddings[window] = vectors_ND.cpu().numpy()
    return embeddings


def _row_of(
    texts: Sequence[tuple[list[int], list[int]]],
    is_query: bool | None,
    row_length: int | None,
    before_pass: Callable[[], object] | None,
    members: np.ndarray,
) -> PackedRow:
    if before_pass is not None:
        before_pass()
    return embedding_row([texts[member] for member in members.tolist()], is_query, row_length)


def share_out(lengths: np.ndarray, budget: int, num_replicas: int) -> list[np.ndarray]:
    """Batches of texts; if there are enough texts, their number is a multiple of the replicas.

    Args:
        lengths: int [N], tokens of each text.
        budget: tokens of a batch.
        num_replicas: they take batches in turn.

    Returns:
        The texts of each batch: int64, together 0 to N - 1.
    """
    batches = pack(lengths, budget)
    if len(batches) % num_replicas and -(-len(batches) // num_replicas) * num_replicas <= len(lengths):
        return pack(lengths, budget, num_replicas)
    return batches


def _encode_batches(
    model: GritDecoder,
    group: ModelGroup,
    batches: list[np.ndarray],
    row_of: Callable[[np.ndarray], PackedRow],
    row_length: int | None,
    advance: Callable[[int], Any],
) -> Tensor:
    """Embeddings of all batches' texts, on every process of the group: [N, D]."""
    context, num_replicas = model.context, group.num_replicas
    rounds = [batches[first : first + num_replicas] for first in range(0, len(batches), num_replicas)]

    def forward_step(iterator: Iterator[list[np.ndarray]], stage: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        several = next(iterator)
        # In the last round there may be fewer batches than replicas. All compute: experts wait for all of them.
        row = row_of(several[min(group.replica, len(several) - 1)])
        output = stage(row.to(context.device), Output.EMBEDDINGS)
        advance(sum(map(len, several)))
        return output, lambda output: (output.new_zeros(()), {"output": output})

    reported = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(rounds),
        model=model,
        num_microbatches=len(rounds),
        seq_length=row_length,
        micro_batch_size=1,
        forward_only=True,
    )
    places = [_joined(batches[replica::num_replicas]) for replica in range(num_replicas)]
    if context.is_last_stage:
        # A replica without a batch repeated another one's, which comes last and is cut off.
        own_LD = torch.cat([entry["output"] for entry in reported])[: len(places[group.replica])]
        vectors_ND = gather_in_order(own_LD, places, group.replica_group or context.data_group)
    else:
        vectors_ND = torch.empty(sum(map(len, places)), embedding_width(model), device=context.device)
    return from_last_stage(vectors_ND, context)


def _joined(batches: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *batches]))


def embedding_width(model: GritDecoder) -> int:
    """Channels of an embedding, on every stage."""
    return model.embedding_config.projection_dim or model.config.hidden_size


def _row_length(context: ParallelContext, lengths: list[int]) -> int | None:
    """Length to which all rows are padded: stages exchange tensors of one shape, and the ranks of a tensor or context
    parallel group hold equal parts. None: no padding needed."""
    if context.tensor_size * context.context_size * context.pipeline_size == 1:
        return None
    multiple = context.row_multiple if context.tensor_size * context.context_size > 1 else 1
    return -(-max(lengths) // multiple) * multiple


def embedding_row(
    texts: Sequence[tuple[list[int], list[int]]], is_query: bool | None = None, row_length: int | None = None
) -> PackedRow:
    """A row of texts, each a segment: instruction tokens, then pooled tokens.

    Args:
        texts: for each text its instruction's tokens and its own.
        is_query: whether they are queries or passages. None: not known.
        row_length: length to pad the row to. None: no padding.
    """
    sizes = [len(head) + len(tail) for head, tail in texts]
    used = sum(sizes)
    padding = 0 if row_length is None else row_length - used
    bounds = torch.tensor([0, *sizes, padding] if padding else [0, *sizes]).cumsum(0)
    segment_ids = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    # Padding may be longer than the model has positions.
    positions = F.pad(torch.arange(used) - bounds[segment_ids[:used]], (0, padding))
    heads = torch.tensor([len(head) for head, _ in texts])
    pooled = positions[:used] >= heads[segment_ids[:used]]
    tokens = torch.tensor([token for head, tail in texts for token in (*head, *tail)])
    return PackedRow(
        embeds=True,
        tokens_1T=F.pad(tokens, (0, padding))[None],
        positions_1T=positions[None],
        cu_seqlens=bounds.to(torch.int32),
        max_seqlen=max(*sizes, padding),
        padding_mask_1T=(torch.arange(used + padding) >= used)[None],
        segment_ids_T=segment_ids,
        pool_mask_T=F.pad(pooled.float(), (0, padding)),
        slots_S=torch.arange(len(texts)),
        is_query_S=None if is_query is None else torch.full((len(texts),), is_query),
    )
