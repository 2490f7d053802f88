"""Scores a file of answers with a file of references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.errors import DataError
from megatron_grit.evaluation.bootstrap import Interval, bootstrap_mean
from megatron_grit.evaluation.qa.files import read_predictions, read_references
from megatron_grit.evaluation.qa.rouge import import_rouge, rouge_scores
from megatron_grit.evaluation.qa.scores import SCORERS, AnswerScore, Scorer, ScorerName, normalize_squad
from megatron_grit.evaluation.tasks.task import Figures, format_figures
from megatron_grit.store.files import check_output, write_json


def evaluate_answers(  # many: two files in, one out, and how
    predictions: str | Path,
    references: str | Path,
    *,
    output: str | Path | None = None,
    scorer: ScorerName = "squad2",
    no_answer: Sequence[str] = (),
    rouge: bool = False,
) -> dict[str, Any]:
    """EM, F1 and ROUGE of answers, from 0 to 1, each with its 95 % bootstrap interval over questions.

    Args:
        predictions: see :func:`~megatron_grit.evaluation.qa.files.read_predictions`.
        references: see :func:`~megatron_grit.evaluation.qa.files.read_references`; as many, in the same order.
        output: JSON file, written atomically. None: none is.
        scorer: see :mod:`~megatron_grit.evaluation.qa.scores`.
        no_answer: texts with which an answer says that there is none; such an answer counts as empty.
        rouge: also ROUGE over the questions that have an answer. Its geometric mean is that of the three means.

    Returns:
        What is written: num_questions, num_unanswerable, em, f1, and so on; where questions of both sorts are scored,
        em and f1 of each sort as well.

    Raises:
        GritError: a file that cannot be read or written, other numbers of answers than of references, a question
            without any reference for squad1 (an empty text is one), nothing to score, or a package that is missing.
    """
    if output is not None:
        check_output(output, [predictions, references])
    if rouge:
        import_rouge()
    right, given = read_references(references), read_predictions(predictions)
    if len(given) != len(right):
        raise DataError(
            f"{len(given)} predictions for {len(right)} references in {references}; give one for each, in their order",
            path=predictions,
        )
    silent = {normalize_squad(text) for text in no_answer}
    given = ["" if normalize_squad(text) in silent else text for text in given]
    scores = _score(SCORERS[scorer], given, right, Path(references))
    answerable = np.array([bool(SCORERS[scorer].answers_among(texts)) for texts in right])
    intervals = _intervals(scores, answerable)
    others: dict[str, Any] = {
        "predictions": str(predictions),
        "references": str(references),
        "scorer": scorer,
        "num_questions": len(right),
        "num_unanswerable": int((~answerable).sum()),
    }
    if rouge and answerable.any():
        rows = np.flatnonzero(answerable)
        found = rouge_scores([given[row] for row in rows], [right[row] for row in rows])
        intervals |= {name: bootstrap_mean(values) for name, values in found.items()}
        others["rouge_geometric_mean"] = float(
            np.prod([values.mean() for values in found.values()]) ** (1 / len(found))
        )
    figures = Figures(intervals=intervals, others=others).contents()
    if output is not None:
        write_json(output, figures)
    return figures


def format_scores(figures: dict[str, Any]) -> str:
    """Lines for a terminal: what was scored, and each figure with its interval."""
    counts = f"{figures['num_questions']} questions, {figures['num_unanswerable']} of them without an answer"
    lines = [f"{counts}; scorer {figures['scorer']}", format_figures(figures)]
    if "rouge_geometric_mean" in figures:
        lines.append(f"geometric mean of ROUGE-1, -2 and -L: {figures['rouge_geometric_mean']:.3f}")
    return "\n".join(lines)


def _score(
    scorer: Scorer, given: Sequence[str], right: Sequence[Sequence[str]], path: Path
) -> list[AnswerScore | None]:
    """A score for each question; None where it is left out.

    Raises:
        DataError: a question has no reference and the scorer knows no such, or no question is scored.
    """
    scores = [scorer.score(text, texts) for text, texts in zip(given, right, strict=True)]
    if scorer.unanswerable == "refuse" and None in scores:
        raise DataError(
            f"question {scores.index(None) + 1} has no answer, and SQuAD 1.1 has no such questions; score with squad2",
            path=path,
        )
    if all(score is None for score in scores):
        raise DataError("no question has an answer, and this scorer leaves them out; score with squad2", path=path)
    return scores


def _intervals(scores: Sequence[AnswerScore | None], answerable: np.ndarray) -> dict[str, Interval]:
    """Means over all scored questions and, where there are both sorts of them, EM and F1 of each sort."""
    scored = np.array([score is not None for score in scores])
    values = np.array([score for score in scores if score is not None])  # [scored, fields of AnswerScore]
    with_answer = answerable[scored]
    intervals = {name: bootstrap_mean(values[:, column]) for column, name in enumerate(AnswerScore._fields)}
    if with_answer.any() and not with_answer.all():
        for sort, rows in {"answerable": with_answer, "unanswerable": ~with_answer}.items():
            for column, name in enumerate(("em", "f1")):
                intervals[f"{name}_{sort}"] = bootstrap_mean(values[rows, column])
    return intervals
