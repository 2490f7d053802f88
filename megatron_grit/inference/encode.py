"""Texts to embeddings: packed into rows, without padding to the longest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from megatron_grit.data.batch import PackedRow
from megatron_grit.data.packing import pack
from megatron_grit.data.roles import RowKind
from megatron_grit.models.gpt import GritGPTModel, Output

# Rows are packed for this many texts at a time, so that memory does not grow with the corpus.
_WINDOW = 8192
_PROGRESS_FROM = 256


@torch.no_grad()
def encode_tokens(
    model: GritGPTModel,
    texts: Sequence[tuple[list[int], list[int]]],
    *,
    batch_tokens: int,
    progress: bool = True,
    is_query: bool | None = None,
) -> np.ndarray:
    """Embed tokenised texts.

    Args:
        model: one process's whole model (no pipeline parallelism).
        texts: for each text its instruction's tokens, attended and not pooled, and its own.
        batch_tokens: token budget of one forward pass; raised to the longest text.
        progress: show a bar from 256 texts on.
        is_query: whether they are queries or passages, for a model whose linear layers differ between the two.

    Returns:
        float32 [len(texts), D].
    """
    model.eval()
    lengths = np.array([len(head) + len(tail) for head, tail in texts], dtype=np.int64)
    budget = max(batch_tokens, int(lengths.max()))
    embeddings: np.ndarray | None = None
    with tqdm(total=len(texts), unit="text", disable=not progress or len(texts) < _PROGRESS_FROM) as bar:
        for start in range(0, len(texts), _WINDOW):
            for members in pack(lengths[start : start + _WINDOW], budget):
                indices = members + start
                row = embedding_row([texts[i] for i in indices], is_query)
                output = model(row.to(model.context.device), Output.EMBEDDINGS).float().cpu().numpy()
                if embeddings is None:
                    embeddings = np.empty((len(texts), output.shape[1]), dtype=np.float32)
                embeddings[indices] = output
                bar.update(len(indices))
    assert embeddings is not None
    return embeddings


def embedding_row(texts: Sequence[tuple[list[int], list[int]]], is_query: bool | None = None) -> PackedRow:
    """A row of texts, each a segment: instruction tokens, then pooled tokens; no padding."""
    sizes = torch.tensor([len(head) + len(tail) for head, tail in texts])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    total = int(bounds[-1])
    segment_ids = torch.repeat_interleave(torch.arange(len(texts)), sizes)
    positions = torch.arange(total) - bounds[segment_ids]
    heads = torch.tensor([len(head) for head, _ in texts])
    tokens = torch.tensor([token for head, tail in texts for token in (*head, *tail)])
    return PackedRow(
        kind=RowKind.EMBEDDING,
        tokens_1T=tokens[None],
        positions_1T=positions[None],
        cu_seqlens=bounds.to(torch.int32),
        max_seqlen=int(sizes.max()),
        padding_mask_1T=torch.zeros(1, total, dtype=torch.bool),
        segment_ids_T=segment_ids,
        pool_mask_T=(positions >= heads[segment_ids]).float(),
        slots_S=torch.arange(len(texts)),
        is_query_S=None if is_query is None else torch.full((len(texts),), is_query),
    )
