"""Rankings of a collection's documents by their embeddings, by exact search.

Shape suffix legend: Q = queries, W = documents of a window, D = embedding size, K = ranks.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from megatron_grit import compat
from megatron_grit.errors import NumericsError, OutputError
from megatron_grit.evaluation.encoder import TextEncoder, encode_filled
from megatron_grit.evaluation.ranking.collection import Collection
from megatron_grit.evaluation.ranking.measures import trec_order
from megatron_grit.evaluation.tasks.task import Lengths
from megatron_grit.store import cache
from megatron_grit.store.environment import job_rank
from megatron_grit.store.logs import get_logger
from megatron_grit.store.progress import Progress

log = get_logger(__name__)

_WINDOW = 1 << 13
"""Documents that are embedded and compared at a time, so that memory does not grow with the collection; a kill loses no
more."""
_CELLS = 1 << 26
_PROGRESS_FROM = 256


class Ranking(NamedTuple):
    """Documents of each query, best first in trec_eval's order."""

    documents: list[np.ndarray]
    """int64 [K] each, places of documents."""
    scores: list[np.ndarray]
    """float32 [K] each."""


def ranked(
    collection: Collection, documents: list[np.ndarray], scores: list[np.ndarray], depth: int | None = None
) -> Ranking:
    """Documents and their scores in trec_eval's order, without a document that is the query itself: of BEIR's
    collections some have their queries among the documents, under the same id."""
    places, place_of = collection.id_places(), {name: place for place, name in enumerate(collection.document_ids)}
    ordered = Ranking([], [])
    for name, found, values in zip(collection.query_ids, documents, scores, strict=True):
        others = found != place_of.get(name, -1)
        found, values = found[others], values[others].astype(np.float32)
        order = trec_order(values, places[found])[:depth]
        ordered.documents.append(found[order])
        ordered.scores.append(values[order])
    return ordered


def rank_by_embeddings(encoder: TextEncoder, collection: Collection, lengths: Lengths, depth: int) -> Ranking:
    """The nearest documents of each query by inner product.

    Args:
        encoder: the model.
        collection: what is ranked.
        lengths: how texts are given to it.
        depth: documents of each query.

    Raises:
        NumericsError: an embedding is not finite.
        OutputError: what is ranked so far cannot be written.
    """
    how = dict(vars(lengths))
    queries_QD = encode_filled(encoder, collection.queries, collection.query_instruction, side="query", **how)
    kept = None if collection.unfinished is None else _Kept(collection, lengths, depth)
    first, found_QK, scores_QK = _Kept.nothing(len(queries_QD)) if kept is None else kept.load()
    count, how["progress"] = len(collection.documents), False
    with Progress(count, "ranking", "document", enabled=job_rank() == 0 and count >= _PROGRESS_FROM) as bar:
        bar.skip(first)
        for start in range(first, count, _WINDOW):
            texts = collection.documents[start : start + _WINDOW]
            if any(text.strip() for text in texts):
                vectors_WD = encode_filled(encoder, texts, collection.document_instruction, side="passage", **how)
                if not (np.isfinite(queries_QD).all() and np.isfinite(vectors_WD).all()):
                    raise NumericsError("an embedding is not finite; was the training run stable?")
                found_QK, scores_QK = _nearest(queries_QD, vectors_WD, start, depth + 1, found_QK, scores_QK)
                if kept is not None:
                    kept.store(start + len(texts), found_QK, scores_QK)
            bar.update(len(texts))
    return ranked(collection, list(found_QK), list(scores_QK), depth)


class _Kept:
    """The best documents of those that were compared so far, in one file that is replaced after each window."""

    def __init__(self, collection: Collection, lengths: Lengths, depth: int) -> None:
        assert collection.unfinished is not None
        self._path, self._collection = collection.unfinished.path, collection
        texts = hashlib.sha256()
        for text in (*collection.queries, "", *collection.documents):
            texts.update(text.encode(errors="surrogatepass") + b"\0")
        self._key = {
            "model": collection.unfinished.model,
            "versions": compat.installed_versions(),
            "texts": texts.hexdigest(),
            "instructions": [collection.query_instruction, collection.document_instruction],
            "lengths": vars(lengths),
            "depth": depth,
            "window": _WINDOW,
        }

    @staticmethod
    def nothing(num_queries: int) -> tuple[int, np.ndarray, np.ndarray]:
        """As :meth:`load`, before the first document."""
        return 0, np.empty((num_queries, 0), dtype=np.int64), np.empty((num_queries, 0), dtype=np.float32)

    def load(self) -> tuple[int, np.ndarray, np.ndarray]:
        """How many documents were compared, and the best of them with their scores."""
        arrays = cache.load(self._path, self._key)
        if arrays is None:
            return self.nothing(len(self._collection.queries))
        first, count = int(arrays["compared"][0]), len(self._collection.documents)
        log.info(f"{self._path}: resumes after {first:,} of {count:,} documents")
        return first, arrays["found"], arrays["scores"]

    def store(self, compared: int, found_QK: np.ndarray, scores_QK: np.ndarray) -> None:
        """Keep them."""
        try:
            arrays = {"compared": np.array([compared]), "found": found_QK, "scores": scores_QK}
            cache.store(self._path, self._key, arrays)
        except OSError as error:
            raise OutputError(
                f"cannot be written ({error.strerror or error}); the same command resumes", path=self._path
            ) from error


def _nearest(
    queries_QD: np.ndarray, vectors_WD: np.ndarray, start: int, k: int, found_QK: np.ndarray, scores_QK: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of what was found before and of a window of documents, whose first is ``start``."""
    block = max(1, _CELLS // len(vectors_WD))
    parts = []
    for first in range(0, len(queries_QD), block):
        rows = slice(first, first + block)
        scores = np.concatenate([scores_QK[rows], queries_QD[rows] @ vectors_WD.T], axis=1)
        window = np.broadcast_to(np.arange(start, start + len(vectors_WD)), (len(scores), len(vectors_WD)))
        found = np.concatenate([found_QK[rows], window], axis=1)
        if scores.shape[1] > k:
            best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
            scores, found = np.take_along_axis(scores, best, 1), np.take_along_axis(found, best, 1)
        parts.append((found, scores))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
