"""Retrieval quality: recall@k and nDCG@10 of queries against all passages, by exact search.

Shape suffix legend: Q = queries, P = passages, D = embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_grit.data.text.markers import Side
from megatron_grit.data.text.records import BadLine, read_records
from megatron_grit.errors import DataError
from megatron_grit.evaluation.bootstrap import Interval, bootstrap_mean
from megatron_grit.evaluation.ranking.collection import Collection, read_beir
from megatron_grit.evaluation.ranking.measures import CUTOFFS, measure
from megatron_grit.evaluation.ranking.search import rank_by_embeddings
from megatron_grit.evaluation.tasks.task import Figures, Lengths

if TYPE_CHECKING:
    from megatron_grit.evaluation.encoder import TextEncoder

_QUERIES_PER_BLOCK = 1024
_CUTOFF = 10
_WITH_INTERVALS = (
    *("ndcg_at_1", "ndcg_at_10", "map_at_10", "map_at_100", "mrr_at_10"),
    *("recall_at_1", "recall_at_10", "recall_at_100", "precision_at_10"),
)
"""Measures of collections that are shown."""

Instructed = tuple[str | None, str]
"""(instruction, text). An instruction of None is a text without template, "" a template without instruction."""


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Means over queries with 95 % bootstrap intervals over queries."""

    recall_at_1: Interval
    recall_at_10: Interval
    ndcg_at_10: Interval
    chance_recall_at_1: float
    """Expected recall of a random order."""
    chance_recall_at_10: float
    num_queries: int
    num_passages: int


@dataclass(frozen=True, kw_only=True)
class RetrievalSet:
    """Queries, the passages they are searched in, and which of those answer them."""

    queries: list[Instructed]
    passages: list[Instructed]
    """Without repeats: a repeated passage would tie with itself."""
    relevant: list[list[int]]
    """Indices of the passages that answer each query."""


def ranks_of_relevant(query_embeddings_QD: np.ndarray, passage_embeddings_PD: np.ndarray, relevant: list) -> list:
    """For each query the sorted 0-based ranks of its relevant passages by inner product.

    A passage that ties with a relevant one counts as before it: a model that maps all texts to one point gets no
    credit for the order of the file.
    """
    ranks = []
    for start in range(0, len(relevant), _QUERIES_PER_BLOCK):
        block = relevant[start : start + _QUERIES_PER_BLOCK]
        scores = query_embeddings_QD[start : start + len(block)] @ passage_embeddings_PD.T
        for row, answers in zip(scores, block, strict=True):
            others = np.delete(row, answers)
            best_first = np.sort(row[answers])[::-1]
            ahead = (others[None, :] >= best_first[:, None]).sum(1)
            ranks.append(ahead + np.arange(len(answers)))
    return ranks


def evaluate_retrieval(
    query_embeddings_QD: np.ndarray,
    passage_embeddings_PD: np.ndarray,
    relevant: Sequence[Sequence[int]] | np.ndarray,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> RetrievalReport:
    """Recall@1, recall@10 and nDCG@10 by inner product.

    Recall@k of a query is the share of its relevant passages among the first k. Gains of nDCG are 0 or 1 (Jarvelin and
    Kekalainen, 2002, with discount 1 / log2(rank + 1)).

    Args:
        query_embeddings_QD: float [Q, D]; unit length for cosine similarity.
        passage_embeddings_PD: float [P, D].
        relevant: for each query the index of its passage, or a sequence of distinct indices.

    Raises:
        ValueError: shapes that do not fit, a query without a relevant passage, an index out of range, or an embedding
            that is not finite.
    """
    answers = [np.atleast_1d(np.asarray(indices, dtype=np.int64)) for indices in relevant]
    num_queries, num_passages = len(query_embeddings_QD), len(passage_embeddings_PD)
    if len(answers) != num_queries or num_queries == 0:
        raise ValueError(f"{num_queries} query embeddings for {len(answers)} lists of relevant passages")
    for i, indices in enumerate(answers):
        if not len(indices) or indices.min() < 0 or indices.max() >= num_passages or len(set(indices)) < len(indices):
            raise ValueError(f"query {i}: relevant passages {indices.tolist()} of {num_passages}")
    if not (np.isfinite(query_embeddings_QD).all() and np.isfinite(passage_embeddings_PD).all()):
        raise ValueError("an embedding is not finite")

    ranks = ranks_of_relevant(query_embeddings_QD, passage_embeddings_PD, answers)
    discounts = 1 / np.log2(np.arange(_CUTOFF) + 2)

    def recall(k: int) -> Interval:
        return bootstrap_mean(np.array([(r < k).mean() for r in ranks]), num_resamples=num_resamples, seed=seed)

    ndcg = np.array([discounts[r[r < _CUTOFF]].sum() / discounts[: len(r)].sum() for r in ranks])
    return RetrievalReport(
        recall_at_1=recall(1),
        recall_at_10=recall(10),
        ndcg_at_10=bootstrap_mean(ndcg, num_resamples=num_resamples, seed=seed),
        chance_recall_at_1=1 / num_passages,
        chance_recall_at_10=min(10, num_passages) / num_passages,
        num_queries=num_queries,
        num_passages=num_passages,
    )


def read(path: str | Path) -> RetrievalSet | Collection:
    """Read embedding records as a retrieval task, where every passage of the file is a candidate for every query, or a
    folder of BEIR's.

    Args:
        path: JSONL, see :mod:`megatron_grit.data.text.records`; ``pos`` answer the query, ``neg`` are candidates only.
            A folder: see :func:`~megatron_grit.evaluation.ranking.collection.read_beir`.

    Raises:
        DataError: a missing file, a malformed line, an empty text, or no records; with the line.
    """
    if Path(path).is_dir():
        return read_beir(path)
    queries, relevant = [], []
    index_of: dict[Instructed, int] = {}
    for record in read_records(path):
        if isinstance(record, BadLine):
            raise record.error
        if record.query is None:
            message = 'not an embedding record; retrieval needs {"query": ..., "pos": [...]}'
            raise DataError(message, path=path, line=record.line)
        for pair in (record.query, *record.positives, *record.negatives):
            if not pair.text.strip():
                raise DataError("an empty text has no embedding; remove the record", path=path, line=record.line)
        queries.append((record.query.instruction, record.query.text))
        keys = [(pair.instruction, pair.text) for pair in (*record.positives, *record.negatives)]
        indices = [index_of.setdefault(key, len(index_of)) for key in keys]
        relevant.append(sorted(set(indices[: len(record.positives)])))
    if not queries:
        raise DataError("holds no record", path=path)
    return RetrievalSet(queries=queries, passages=list(index_of), relevant=relevant)


def encode_instructed(texts: list[Instructed], encode: Callable[[list[str], str | None], np.ndarray]) -> np.ndarray:
    """Embed (instruction, text) pairs with an ``encode(texts, instruction)`` that takes one instruction a call.

    Returns:
        float32 [n, D] in the order of ``texts``.
    """
    rows_by_instruction: dict[str | None, list[int]] = {}
    for row, (instruction, _) in enumerate(texts):
        rows_by_instruction.setdefault(instruction, []).append(row)
    embeddings = None
    for instruction, rows in rows_by_instruction.items():
        part = encode([texts[row][1] for row in rows], instruction)
        if embeddings is None:
            embeddings = np.empty((len(texts), part.shape[1]), dtype=np.float32)
        embeddings[rows] = part
    if embeddings is None:
        raise ValueError("no texts")
    return embeddings


def run(model: TextEncoder, task: RetrievalSet | Collection, lengths: Lengths) -> Figures:
    """Recall and nDCG of a model's embeddings; of a collection all of
    :func:`~megatron_grit.evaluation.ranking.measures.measure`, by exact search."""
    if isinstance(task, Collection):
        ranking = rank_by_embeddings(model, task, lengths, max(CUTOFFS))
        return collection_figures(task, ranking.documents)

    def embed(given: list[Instructed], side: Side) -> np.ndarray:
        def encode(texts: list[str], instruction: str | None) -> np.ndarray:
            return model.encode(
                texts,
                instruction,
                side=side,
                max_length=lengths.max_length,
                batch_tokens=lengths.batch_tokens,
            )

        return encode_instructed(given, encode)

    report = evaluate_retrieval(embed(task.queries, "query"), embed(task.passages, "passage"), task.relevant)
    named = ("recall_at_1", "recall_at_10", "ndcg_at_10")
    others = ("chance_recall_at_1", "chance_recall_at_10", "num_queries", "num_passages")
    return Figures(
        intervals={name: getattr(report, name) for name in named},
        others={name: getattr(report, name) for name in others},
    )


def collection_figures(task: Collection, rankings: Sequence[np.ndarray]) -> Figures:
    """Means over the queries of a collection; those of :data:`_WITH_INTERVALS` with intervals over queries."""
    measures = measure(rankings, task.judgements)
    others: dict[str, float] = {"num_queries": len(task.queries), "num_passages": len(task.documents)}
    others |= {name: float(values.mean()) for name, values in measures.items() if name not in _WITH_INTERVALS}
    return Figures(intervals={name: bootstrap_mean(measures[name]) for name in _WITH_INTERVALS}, others=others)
