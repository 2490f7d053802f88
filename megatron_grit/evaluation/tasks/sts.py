"""Semantic textual similarity: how well cosines of embeddings rank pairs of sentences as people did."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_grit.data.text.lines import Line, filled_lines
from megatron_grit.errors import DataError, NumericsError
from megatron_grit.evaluation.bootstrap import bootstrap_statistic
from megatron_grit.evaluation.tasks.task import Figures, Lengths

if TYPE_CHECKING:
    from megatron_grit.evaluation.encoder import TextEncoder

_COLUMNS = ("sentence1", "sentence2", "score")
_FORM = "must have two sentences and a score"


@dataclass(frozen=True, kw_only=True)
class SentencePairs:
    """Pairs of sentences with scores of people."""

    first: list[str]
    second: list[str]
    scores: np.ndarray
    """float64 [n], the more alike the higher, in any unit."""
    instruction: str | None = ""
    """What both sentences are embedded for. "": the template without instruction. None: no template."""


def read(path: str | Path, instruction: str | None = "") -> SentencePairs:
    """Read pairs of sentences.

    Args:
        path: .csv or .tsv with the columns sentence1, sentence2 and score, in this order where there are no headings;
            or .jsonl of objects with these keys. ``.gz`` and ``.zst`` are read.
        instruction: see :class:`SentencePairs`.

    Raises:
        DataError: a missing file, a line that is no pair with a finite score, an empty sentence, fewer than two pairs,
            or scores that are all the same; with the line.
    """
    path = Path(path)
    suffix = next((each for each in reversed(path.suffixes) if each not in (".gz", ".zst")), "")
    rows = list(_objects(path) if suffix in (".jsonl", ".json") else _table(path, suffix))
    pairs: list[tuple[str, str, float]] = []
    for line, values in rows:
        first, second, score = values
        if not (isinstance(first, str) and first.strip() and isinstance(second, str) and second.strip()):
            raise line.error("an empty sentence has no embedding; remove the pair")
        pairs.append((first, second, _number(score, line)))
    scores = np.array([score for _, _, score in pairs])
    if len(pairs) < 2 or (scores == scores[0]).all():
        raise DataError(f"holds {len(pairs)} pairs, and no two of different scores to rank", path=path)
    return SentencePairs(
        first=[each[0] for each in pairs], second=[each[1] for each in pairs], scores=scores, instruction=instruction
    )


def _number(score: Any, line: Line) -> float:
    """A score of a table or of an object.

    Raises:
        DataError: it is no finite number; names the line.
    """
    try:
        value = math.nan if isinstance(score, bool) else float(score)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise line.error(f"{_FORM}; {score!r} is no finite number")
    return value


def _objects(path: Path) -> Iterator[tuple[Line, list[Any]]]:
    for line in filled_lines(path):
        value = line.value()
        if not isinstance(value, dict) or not all(name in value for name in _COLUMNS):
            raise line.error(f"{_FORM}: {{{', '.join(_COLUMNS)}}}")
        yield line, [value[name] for name in _COLUMNS]


def _table(path: Path, suffix: str) -> Iterator[tuple[Line, list[str]]]:
    """Rows of a table, one a line. Fields of a .tsv are not quoted: sentences of STS-B begin with quotation marks that
    do not end."""
    columns: Sequence[int] = range(len(_COLUMNS))
    for count, line in enumerate(filled_lines(path)):
        text = line.text()
        try:
            fields = text.split("\t") if suffix == ".tsv" else next(csv.reader([text], strict=True))
        except csv.Error as error:
            raise line.error(f"cannot be read as a line of a table ({error})") from None
        if count == 0 and all(name in fields for name in _COLUMNS):
            columns = [fields.index(name) for name in _COLUMNS]
            continue
        if len(fields) <= max(columns):
            raise line.error(f"{_FORM}; it has {len(fields)} fields")
        yield line, [fields[column] for column in columns]


def run(model: TextEncoder, pairs: SentencePairs, lengths: Lengths) -> Figures:
    """Spearman's and Pearson's correlation of the pairs' cosines with their scores, with intervals over pairs.

    Raises:
        NumericsError: embeddings that are not finite, or all the same.
    """
    how = {"side": "query", "max_length": lengths.max_length, "batch_tokens": lengths.batch_tokens}
    texts = list(dict.fromkeys([*pairs.first, *pairs.second]))
    vectors = model.encode(texts, pairs.instruction, **how).astype(np.float64)  # type: ignore[arg-type]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    row_of = {text: row for row, text in enumerate(texts)}
    first, second = (vectors[[row_of[text] for text in side]] for side in (pairs.first, pairs.second))
    cosines = (first * second).sum(1)
    if not np.isfinite(cosines).all() or np.ptp(cosines) == 0:
        raise NumericsError("embeddings are not finite, or those of all pairs are equally far apart")
    both = np.stack([cosines, pairs.scores])
    intervals = {
        "spearman": bootstrap_statistic(lambda items: spearman(*both[:, items]), len(cosines)),
        "pearson": bootstrap_statistic(lambda items: pearson(*both[:, items]), len(cosines)),
    }
    return Figures(intervals=intervals, others={"num_pairs": len(cosines)})


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of two vectors; 0 where one of them has one value only."""
    first, second = first - first.mean(), second - second.mean()
    scale = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / scale) if scale else 0.0


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of ranks, where equal values share the mean of their ranks."""
    return pearson(_ranks(first), _ranks(second))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks
