"""Neighbors made by hand, for tests."""

from __future__ import annotations

import numpy as np
import torch

from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.neighbors import Neighbors, chunk_row
from tests.rows import VOCAB


def with_neighbors(  # many: what a row can read
    row: PackedRow,
    chunk_length: int,
    num_neighbors: int = 2,
    *,
    missing: float = 0.0,
    first_lengths: list[int] | None = None,
    full: bool = False,
    share: bool = False,
    seed: int = 0,
) -> PackedRow:
    """The row with neighbors of random tokens, up to twice as long as a chunk.

    Args:
        row: of training.
        chunk_length: of chunks.
        num_neighbors: k.
        missing: share of the neighbors that are not there.
        first_lengths: of the first chunk of each segment. None: a whole one.
        full: no neighbor is shorter.
        share: as of join_texts.
        seed: of the tokens.
    """
    random = np.random.default_rng(seed)
    bounds = row.cu_seqlens.tolist()[: len(row.record_ids) + 1]
    first_lengths = first_lengths or [chunk_length] * (len(bounds) - 1)
    chunk_bounds, segment_ends = chunk_row(bounds, first_lengths, chunk_length)

    def text() -> np.ndarray | None:
        length = 2 * chunk_length if full else int(random.integers(1, 2 * chunk_length + 1))
        tokens = random.integers(0, VOCAB, length)
        return None if random.random() < missing else tokens

    texts = [[text() for _ in range(num_neighbors)] for _ in chunk_bounds]
    text_of, lengths, tokens = join_texts(texts, share)
    return PackedRow(
        **vars(row)
        | {
            "neighbors": Neighbors(
                chunk_bounds_C2=chunk_bounds,
                segment_ends_C=segment_ends,
                text_of_Ck=text_of,
                lengths_U=lengths,
                tokens_1N=torch.from_numpy(tokens)[None],
            )
        }
    )


def join_texts(texts: list[list[np.ndarray | None]], share: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay the neighbors of all chunks one after another.

    Args:
        texts: for each chunk its neighbors' tokens; None where there is none.
        share: a text that comes again is kept once. Only where the encoder does not look at the reading chunk.

    Returns:
        ``text_of_Ck``, ``lengths_U`` and the tokens, int64 [N], of :class:`Neighbors`.
    """
    text_of = np.full((len(texts), max(map(len, texts), default=0)), -1, dtype=np.int64)
    kept: list[np.ndarray] = []
    seen: dict[bytes, int] = {}
    for chunk, neighbors in enumerate(texts):
        for place, tokens in enumerate(neighbors):
            if tokens is None or not len(tokens):
                continue
            known = seen.get(tokens.tobytes()) if share else None
            if known is None:
                known = len(kept)
                kept.append(tokens)
                if share:
                    seen[tokens.tobytes()] = known
            text_of[chunk, place] = known
    lengths = np.array([len(tokens) for tokens in kept], dtype=np.int64)
    joined = np.concatenate(kept).astype(np.int64) if kept else np.zeros(0, dtype=np.int64)
    return text_of, lengths, joined
