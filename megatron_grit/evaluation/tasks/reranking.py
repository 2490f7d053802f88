"""Reranking: nDCG and the like of the first documents of a ranking, in the order of a model's answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_grit.evaluation.ranking.collection import Collection, read_beir
from megatron_grit.evaluation.ranking.first_stage import rank_by_words, read_ranking
from megatron_grit.evaluation.ranking.options import RerankingOptions
from megatron_grit.evaluation.ranking.rerank import score_passages
from megatron_grit.evaluation.ranking.search import Ranking, rank_by_embeddings, ranked
from megatron_grit.evaluation.tasks.retrieval import collection_figures
from megatron_grit.evaluation.tasks.task import Figures, Lengths
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import json_text
from megatron_grit.store.progress import Progress
from megatron_grit.store.rows import LineFile

if TYPE_CHECKING:
    from megatron_grit.inference.model import GritModel

_SHOWN = ("ndcg_at_10", "map_at_10", "recall_at_10", "mrr_at_10")
"""Figures of the ranking that was given."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What is reranked, and how."""

    collection: Collection
    ranking: Ranking | None
    """None: by the model's own embeddings."""
    options: RerankingOptions
    output: Path | None = None
    """JSONL for the scores of each query, from which a killed run resumes. None: they are not kept."""
    weights: str = ""
    """Digest of the model, by which a run knows what an earlier one has left."""


def read(
    path: str | Path,
    options: RerankingOptions | None = None,
    *,
    split: str | None = None,
    output: str | Path | None = None,
    weights: str = "",
) -> Candidates:
    """Read a folder of BEIR's and rank it.

    Args:
        path: the folder.
        options: what is reranked, and how. None: the defaults.
        split: as of :func:`~megatron_grit.evaluation.ranking.collection.read_beir`.
        output: see :class:`Candidates`.
        weights: likewise.

    Raises:
        ConfigError: bm25s is not installed.
        DataError: a file that is missing or cannot be read.
    """
    options = options or RerankingOptions()
    collection = read_beir(path, split)
    if options.ranking == "bm25":
        ranking = rank_by_words(collection, options.top_k)
    elif options.ranking == "embeddings":
        ranking = None
    else:
        ranking = read_ranking(options.ranking, collection, options.top_k)
    target = None if output is None else Path(output)
    return Candidates(collection=collection, ranking=ranking, options=options, output=target, weights=weights)


def run(model: GritModel, task: Candidates, lengths: Lengths) -> Figures:
    """Measures of the reranked documents, and of the same documents in the order that was given, as ``first_...``."""
    collection, ranking = task.collection, task.ranking
    if ranking is None:
        ranking = rank_by_embeddings(model, collection, lengths, task.options.top_k)
    scores = [np.array(each, dtype=np.float64) for each in _scores(model, task, ranking, lengths)]
    reranked = ranked(collection, ranking.documents, scores)
    found = collection_figures(collection, reranked.documents)
    first = collection_figures(collection, ranking.documents).intervals
    return Figures(
        intervals=found.intervals | {f"first_{name}": first[name] for name in _SHOWN},
        others=found.others | {"num_reranked": sum(map(len, ranking.documents))},
    )


def _scores(model: GritModel, task: Candidates, ranking: Ranking, lengths: Lengths) -> list[list[float]]:
    """Of each query those of its documents, computed or of an earlier run that was killed."""
    ids, count = task.collection.document_ids, len(ranking.documents)
    computed = _computed(model, task, ranking, lengths)
    if task.output is None:
        with Progress(count, "reranking", "query") as progress:
            return [each for each in _counted(computed(0), progress)]

    def lines(first: int) -> Iterator[list[str]]:
        for query, values in enumerate(computed(first), first):
            names = [ids[place] for place in ranking.documents[query].tolist()]
            line = {"query": task.collection.query_ids[query], "scores": dict(zip(names, values, strict=True))}
            yield [json_text(line)]

    with LineFile(task.output) as file:
        file.fill(_identity(task, ranking, lengths), count, lines, "reranking", "query")
        found = [list(json.loads(line)["scores"].values()) for line in file.lines()]
        file.publish()
    return found


def _computed(model: GritModel, task: Candidates, ranking: Ranking, lengths: Lengths) -> Any:
    texts = task.collection.documents

    def scores(start: int) -> Iterator[list[float]]:
        for query, documents in list(zip(task.collection.queries, ranking.documents, strict=True))[start:]:
            passages = [texts[place] for place in documents.tolist()]
            yield score_passages(model, query, passages, task.options, lengths).tolist() if passages else []

    return scores


def _counted(scores: Iterator[list[float]], progress: Progress) -> Iterator[list[float]]:
    for each in scores:
        yield each
        progress.update(1)


def _identity(task: Candidates, ranking: Ranking, lengths: Lengths) -> list[Any]:
    """What scores follow from."""
    how = {each.name: getattr(task.options, each.name) for each in fields(RerankingOptions)}
    ranks = digest_of_settings([each.tolist() for each in ranking.documents])
    texts = digest_of_settings([task.collection.queries, task.collection.documents])
    return [task.weights, how | {"asked": task.options.asked}, lengths.max_length, ranks, texts]
