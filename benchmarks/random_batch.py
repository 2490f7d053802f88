"""A batch of both kinds of random tokens, with lengths as instruction tuning has them, packed as the loader packs.

Lengths are log-normal and cut at the longest: queries with a median of 40 tokens and passages of 180, after an
instruction of 12; conversations with a median of 149 and, before they are cut, a mean of 671 tokens, which is what
GritLM's generative data has (arXiv 2402.09906); the second half of a conversation is supervised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_grit.data.indexed.label_weights import ANSWERS
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.kinds import embedding, generative
from megatron_grit.data.rows.batch import BatchPart, StepBatch
from megatron_grit.data.rows.packing import pack
from megatron_grit.data.rows.segments import Segment
from megatron_grit.data.rows.stream import PlannedRow

GROUP_SIZE = 2
_ROW_MULTIPLE = 8
"""Rows are padded to a multiple of this."""
_INSTRUCTION = 12
_QUERY, _PASSAGE, _CHAT = (40, 0.6), (180, 0.8), (149, 1.73)


class _RandomTokens:
    """In place of the sources of a run: every record is drawn from a generator of its own."""

    names = ["random"]

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size, self._seed = vocab_size, seed

    def __getitem__(self, source: int) -> _RandomTokens:
        return self

    def tokens(self, record: int, start: int, length: int) -> np.ndarray:
        draw = np.random.default_rng([self._seed, record])
        return draw.integers(0, self._vocab_size, start + length, dtype=np.int64)[start:]


def random_batch(
    step: int,
    *,
    num_queries: int,
    num_sequences: int,
    longest: int,
    tokens_per_row: int,
    vocab_size: int,
    seed: int = 1,
) -> StepBatch:
    """The batch of a step of one process, on the host.

    Args:
        step: batches of different steps differ.
        num_queries: each with :data:`GROUP_SIZE` passages.
        num_sequences: conversations.
        longest: no text is longer; at most ``tokens_per_row``.
        tokens_per_row: token budget of a row.
        vocab_size: tokens are below this.
        seed: of lengths and tokens.
    """
    sources: Any = _RandomTokens(vocab_size, seed * 1_000_003 + step)
    draw = np.random.default_rng([seed, step])

    def lengths(count: int, shape: tuple[int, float]) -> list[int]:
        drawn = draw.lognormal(np.log(shape[0]), shape[1], count)
        return np.clip(drawn, min(16, longest), longest).astype(int).tolist()

    def segment(record: int, length: int, roles: tuple[Role, Role], first: int) -> Segment:
        first = min(first, length // 2)
        spans, sizes = [int(role) for role in roles], [first, length - first]
        num_labels, label_weight = ANSWERS.total(spans, sizes, starts_record=True)
        return Segment(
            sources=sources,
            source=0,
            record=record,
            start=0,
            stop=length,
            roles=spans,
            lengths=sizes,
            num_labels=num_labels,
            label_weight=label_weight,
        )

    query, passage = (Role.QUERY_INSTRUCTION, Role.QUERY), (Role.POSITIVE_INSTRUCTION, Role.POSITIVE)
    texts = [segment(i, length, query, _INSTRUCTION) for i, length in enumerate(lengths(num_queries, _QUERY))]
    for length in lengths(num_queries * GROUP_SIZE, _PASSAGE):
        texts.append(segment(len(texts), length, passage, _INSTRUCTION))
    chats = [
        segment(len(texts) + i, length, (Role.USER, Role.ANSWER), length // 2)
        for i, length in enumerate(lengths(num_sequences, _CHAT))
    ]
    parts = {}
    for name, kind, segments in (("embedding", embedding, texts), ("generative", generative, chats)):
        planned = [
            PlannedRow(segments=[segments[slot] for slot in slots], slots=slots)
            for slots in pack(np.array([each.length for each in segments]), tokens_per_row)
        ]
        rows = [kind.make_row(row, -(-row.length // _ROW_MULTIPLE) * _ROW_MULTIPLE, 0) for row in planned]
        slots = [torch.from_numpy(np.concatenate([row.slots for row in planned]))]
        counts: Any = (
            embedding.EmbeddingCounts(num_queries=num_queries, group_size=GROUP_SIZE, slots_by_rank=slots)
            if kind is embedding
            else generative.count_labels(
                np.array([each.label_weight for each in segments]), sum(each.num_labels for each in segments), len(rows)
            )
        )
        parts[name] = BatchPart(rows=rows, counts=counts)
    lengths = [row.tokens_1T.shape[1] for part in parts.values() for row in part.rows]
    return StepBatch(
        step=step,
        parts=parts,
        row_length=max(lengths),
        num_tokens=sum(row.num_tokens for part in parts.values() for row in part.rows),
        num_padded_tokens=sum(lengths),
    )
