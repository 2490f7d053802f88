"""Rankings that are reranked: by BM25, or of a file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_grit.compat import needed
from megatron_grit.data.text.lines import Line, filled_lines
from megatron_grit.errors import DataError
from megatron_grit.evaluation.ranking.collection import Collection
from megatron_grit.evaluation.ranking.search import Ranking, ranked


def rank_by_words(collection: Collection, depth: int) -> Ranking:
    """BM25 (Robertson and Zaragoza, 2009) by bm25s, with its defaults and without stop words.

    Args:
        collection: what is ranked.
        depth: documents of each query; fewer where fewer share a word with it.

    Raises:
        ConfigError: bm25s is not installed.
    """
    with needed("a ranking by words needs", "bm25s", "retro"):
        import bm25s
    index = bm25s.BM25(backend="numpy")
    index.index(bm25s.tokenize(collection.documents, stopwords=None, show_progress=False), show_progress=False)
    words = bm25s.tokenize(collection.queries, stopwords=None, show_progress=False, return_ids=False)
    documents, scores = [], []
    for query in words:
        known = index.get_tokens_ids(query)
        values = np.array(index.get_scores_from_ids(known)) if len(known) else np.zeros(len(collection.documents))
        best = np.argsort(-values, kind="stable")[: depth + 1]
        best = best[values[best] > 0]
        documents.append(best)
        scores.append(values[best])
    return ranked(collection, documents, scores, depth)


def read_ranking(path: str | Path, collection: Collection, depth: int) -> Ranking:
    """A ranking of a file.

    Args:
        path: of TREC's runs (query, Q0, document, rank, score, name), or, as .jsonl, of what a reranking has written.
        collection: what is ranked.
        depth: documents of each query.

    Raises:
        DataError: a line that cannot be read, a document that the collection lacks or that is ranked twice for a query,
            or no line of any of its queries.
    """
    path = Path(path)
    places = {name: place for place, name in enumerate(collection.document_ids)}
    found: dict[str, dict[int, float]] = {name: {} for name in collection.query_ids}
    for line, query, document, score in _objects(path) if ".jsonl" in path.suffixes else _columns(path):
        if query in found:  # others are of another split
            if document not in places:
                raise line.error(f"document {document} is not in the collection")
            if places[document] in found[query]:
                raise line.error(f"document {document} is ranked twice for query {query}")
            found[query][places[document]] = score
    if not any(found.values()):
        raise DataError("ranks nothing for any query of the collection", path=path)
    documents = [np.array(list(each), dtype=np.int64) for each in found.values()]
    scores = [np.array(list(each.values()), dtype=np.float64) for each in found.values()]
    return ranked(collection, documents, scores, depth)


def _columns(path: Path) -> Iterator[tuple[Line, str, str, float]]:
    for line in filled_lines(path):
        fields = line.text().split()
        try:
            query, _, document, _, text, *_ = fields
            score = float(text)
        except ValueError:
            raise line.error("must be query, Q0, document, rank, score and name") from None
        if not math.isfinite(score):
            raise line.error(f"the score {text} of {document} is no finite number")
        yield line, query, document, score


def _objects(path: Path) -> Iterator[tuple[Line, str, str, float]]:
    for line in filled_lines(path):
        value = line.value()
        if not isinstance(value, dict) or not isinstance(value.get("scores"), dict):
            raise line.error('must be {"query": ..., "scores": {DOCUMENT: SCORE}}')
        for document, score in value["scores"].items():
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise line.error(f"the score of {document} is no number")
            yield line, str(value.get("query")), document, float(score)
