"""Scores of answers to a file of questions, each with the passages that it finds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.options import SamplingOptions
from megatron_grit.data.qa.items import ANSWER_KEYS, read_items
from megatron_grit.errors import DataError
from megatron_grit.evaluation.bootstrap import bootstrap_mean
from megatron_grit.evaluation.qa.options import RagEvaluation
from megatron_grit.evaluation.qa.scores import SCORERS, matches
from megatron_grit.evaluation.tasks.task import Figures, write_summary
from megatron_grit.store.digest import sha256_of_file
from megatron_grit.store.files import check_output, json_text
from megatron_grit.store.logs import say_loading
from megatron_grit.store.rows import LineFile

if TYPE_CHECKING:
    from megatron_grit.retrieval.rag.answer import Context, RagModel

SCORES = ("em", "match", "f1")
_BATCH = 64
"""Questions that are searched at a time."""


def evaluate_rag(options: RagEvaluation) -> dict[str, Any]:
    """Answer and score. A killed run resumes.

    Returns:
        Figures: em, match and f1 of the answers, by the words of SQuAD; ``found``, whether a passage holds an answer;
        with their 95 % bootstrap intervals.

    Raises:
        GritError: a file that cannot be read or written, a question without an answer, a checkpoint or a database that
            cannot be used.
    """
    check_output(options.output, [options.input])
    questions = _questions(options)
    path = resolve_checkpoint(options.checkpoint)
    say_loading()
    from megatron_grit.inference.model import GritModel
    from megatron_grit.inference.text_files import model_identity
    from megatron_grit.retrieval.rag.answer import RagModel

    model = GritModel.load(path, device=options.device)
    rag, sampling = RagModel(model, path, options), SamplingOptions(max_new_tokens=options.max_new_tokens)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "device", "project_dir")}
    identity = [sha256_of_file(options.input), settings, model_identity(path, model), _identity(rag)]

    def answered(start: int) -> Iterator[list[str]]:
        for first in range(start, len(questions), _BATCH):
            batch = questions[first : first + _BATCH]
            found = rag.search([question for question, _ in batch])
            for (question, answers), contexts in zip(batch, found, strict=True):
                yield [json_text(_answered(rag, question, answers, contexts, sampling))]

    with LineFile(Path(options.output)) as file:
        file.fill(identity, len(questions), answered, "answering", "question")
        lines = [json.loads(line) for line in file.lines()]
        file.publish()
    return _summarised(options, lines)


def _identity(rag: RagModel) -> list[Any]:
    return [rag.retriever.version, rag.retriever.embedder.fingerprint]


def _questions(options: RagEvaluation) -> list[tuple[str, list[str]]]:
    questions = []
    for item in read_items(options.input):
        question = item.text(item.field("question"), '"question"')
        answers = [answer for answer in item.texts(item.field(*ANSWER_KEYS), "an answer") if answer.strip()]
        if not answers:
            raise item.error("has no answer; give answers, or leave it out")
        if not question.strip():
            raise item.error("has an empty question")
        questions.append((question, answers))
    if not questions:
        raise DataError("holds no question", path=Path(options.input))
    return questions[: options.limit]


def _answered(
    rag: RagModel, question: str, answers: Sequence[str], contexts: Sequence[Context], sampling: SamplingOptions
) -> dict[str, Any]:
    began = time.perf_counter()
    prediction = rag.answer(question, contexts, sampling).strip()
    score = SCORERS["squad1"].score(prediction, answers)
    assert score is not None, "every question has an answer"
    return {
        "question": question,
        "answers": list(answers),
        "prediction": prediction,
        "em": score.em,
        "match": matches(prediction, answers),
        "f1": score.f1,
        "found": max((matches(context.text, answers) for context in contexts), default=0.0),
        "seconds": round(time.perf_counter() - began, 4),
        "contexts": [context.contents() for context in contexts],
    }


def _summarised(options: RagEvaluation, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = [*SCORES, *(["found"] if options.num_contexts else [])]
    intervals = {name: bootstrap_mean(np.array([line[name] for line in lines])) for name in names}
    others = {
        "num_questions": len(lines),
        "num_contexts": options.num_contexts,
        "median_seconds": float(np.median([line["seconds"] for line in lines])),
    }
    figures = Figures(intervals=intervals, others=others)
    write_summary(options.output, figures)
    return figures.contents()
