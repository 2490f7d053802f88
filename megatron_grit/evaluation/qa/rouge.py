"""ROUGE-1, ROUGE-2 and ROUGE-L of answers, computed by the package rouge-score."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from megatron_grit.compat import needed

_NAMES = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
"""Names of the package, and ours."""


def import_rouge() -> ModuleType:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    with needed("--rouge needs", "rouge-score", "eval"):
        from rouge_score import rouge_scorer
    return rouge_scorer


def rouge_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """F-measures of each answer with the best of its references, without stemming.

    Words are of ASCII letters and digits; a text in another alphabet has none.

    Args:
        predictions: n answers.
        references: for each its references, at least one.

    Returns:
        rouge_1 and rouge_2 (shared words and pairs of words), rouge_l (longest common subsequence): float [n].

    Raises:
        ConfigError: the package is not installed.

    Source: Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004.
    """
    scorer = import_rouge().RougeScorer(list(_NAMES))
    scores: dict[str, list[float]] = {name: [] for name in _NAMES.values()}
    for prediction, answers in zip(predictions, references, strict=True):
        found = [scorer.score(answer, prediction) for answer in answers]
        for given, name in _NAMES.items():
            scores[name].append(max(score[given].fmeasure for score in found))
    return {name: np.array(values) for name, values in scores.items()}
