"""Who takes a passage for relevant to a query: an embedder by cosine, or a model that reads both texts.

The scores of a query's known positives say how high a negative's score may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_grit.data.text.records import Record, TextPair
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.mining.corpus import Corpus, unit
from megatron_grit.retrieval.mining.cross_encoder import PairScorer

NO_SCORE = "no_score"
"""Why a candidate is left out that a rule has no score for."""
Scored = tuple[np.ndarray, np.ndarray]
"""Scores of a record's positives and of its candidates; NaN where there is none."""


class Judge(Protocol):
    """Scores of passages for queries."""

    def judge(self, records: Sequence[Record], candidates: Sequence[np.ndarray]) -> Iterator[Scored]:
        """Scores for each record.

        Args:
            records: with query and positives.
            candidates: numbers of passages for each record.
        """
        ...


@dataclass(frozen=True)
class CosineJudge:
    """An embedder."""

    embedder: Embedder
    vectors: Callable[[np.ndarray], np.ndarray]
    """Unit vectors of passages by the embedder, float32 [n, D] of numbers int64 [n]."""

    def judge(self, records: Sequence[Record], candidates: Sequence[np.ndarray]) -> Iterator[Scored]:
        queries = unit(self.embedder.embed([query_of(record).text for record in records], "query"))
        positives = unit(self.embedder.embed([pair.text for record in records for pair in record.positives]))
        first = 0
        for record, query, numbers in zip(records, queries, candidates, strict=True):
            own = positives[first : first + len(record.positives)]
            first += len(record.positives)
            yield own @ query, self.vectors(numbers) @ query


@dataclass(frozen=True)
class PairJudge:
    """A model that reads query and passage at once."""

    scorer: PairScorer
    corpus: Corpus

    def judge(self, records: Sequence[Record], candidates: Sequence[np.ndarray]) -> Iterator[Scored]:
        pairs: list[tuple[str, str]] = []
        for record, numbers in zip(records, candidates, strict=True):
            query = query_of(record).text
            pairs += [(query, pair.text) for pair in record.positives]
            pairs += [(query, self.corpus.passage(number).text) for number in numbers.tolist()]
        scores, first = self.scorer.score(pairs), 0
        for record, numbers in zip(records, candidates, strict=True):
            middle, last = first + len(record.positives), first + len(record.positives) + len(numbers)
            yield scores[first:middle], scores[middle:last]
            first = last


@dataclass(frozen=True)
class Rule:
    """Which candidates a judge leaves out."""

    reason: str
    judge: Judge
    limit: Callable[[float], float]
    """The highest score of a negative, given that of the worst positive."""

    def apply(self, records: Sequence[Record], candidates: list[np.ndarray], dropped: dict[str, int]) -> None:
        """Keep the candidates below the limit, in ``candidates``; count the others in ``dropped``."""
        for row, (positives, scores) in enumerate(self.judge.judge(records, list(candidates))):
            unknown = np.isnan(scores) | np.isnan(positives).any()
            keep = ~unknown & (scores <= self.limit(float(positives.min())))
            dropped[NO_SCORE] += int(unknown.sum())
            dropped[self.reason] += int((~keep & ~unknown).sum())
            candidates[row] = candidates[row][keep]


def query_of(record: Record) -> TextPair:
    """The query of an embedding record."""
    assert record.query is not None
    return record.query
