"""Answers the prompts of conversations that have an answer already, and measures how alike the two are.

On conversations that were trained on this is how much of them a model repeats: Instruction Modelling repeats less than
training on answers alone (arXiv 2405.14394, figure 4).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby, islice
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_grit.compat import needed
from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.options import SamplingOptions
from megatron_grit.data.text.records import BadLine, Record, read_records
from megatron_grit.errors import DataError
from megatron_grit.evaluation.tasks.task import Figures, write_summary
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import check_output, json_text
from megatron_grit.store.logs import say_loading
from megatron_grit.store.rows import LineFile


@dataclass(frozen=True)
class AnswersReport:
    """What was found."""

    num_answers: int
    bleu: float
    """BLEU-4 of the corpus, 0 to 100."""
    signature: str
    """How sacrebleu computed it."""
    num_equal: int
    """Answers that are the given ones, but for white space around them."""


def import_bleu() -> ModuleType:
    """The package sacrebleu.

    Raises:
        ConfigError: it is not installed.
    """
    with needed("evaluate answers needs", "sacrebleu", "eval"):
        import sacrebleu
    return sacrebleu


def write_answers(
    checkpoint: str | Path,
    path: str | Path,
    output: str | Path,
    options: SamplingOptions,
    *,
    device: str = "auto",
    max_records: int | None = None,
    at_once: int = 16,
) -> AnswersReport:
    """Generate the last answer of each conversation from what stands before it, and write a line of JSON for each.

    How alike they are is written beside them (:func:`~megatron_grit.evaluation.tasks.task.write_summary`).
    A line has ``line`` (1-based, of the input), ``pred`` (the model's) and ``answer`` (the conversation's), so that the
    file is predictions and references for ``megatron-grit evaluate qa`` too. A killed run resumes.

    Args:
        checkpoint: checkpoint directory, or a run's output directory for its newest one.
        path: JSONL of conversations, as ``megatron-grit build-sft`` reads them.
        output: JSONL file, written atomically; compressed where it ends in ``.gz``.
        options: how answers are drawn.
        max_records: stop after so many. None: all.
        at_once: conversations that are answered together.

    Returns:
        How alike the answers are.

    Raises:
        GritError: input or a checkpoint that cannot be used, a record that is no conversation, or an output that is
            input or cannot be written.
    """
    check_output(output, [path])
    bleu = import_bleu()
    records = list(islice(_conversations(path), max_records))  # before the model: a bad line is found at once
    if not records:
        raise DataError("there is no conversation to answer", path=Path(path))
    folder = resolve_checkpoint(checkpoint)
    say_loading()
    from megatron_grit.inference.model import GritModel
    from megatron_grit.inference.text_files import model_identity

    model = GritModel.load(folder, device=device)
    asked = digest_of_settings([[each.line, each.messages, each.tools] for each in records])
    how = {each.name: getattr(options, each.name) for each in fields(SamplingOptions)}
    follows_from = [asked, how, at_once, model_identity(folder, model)]

    def answered(first: int) -> Iterator[list[str]]:
        for some in _batches(records[first:], at_once):  # those on disk were written whole, so these are alike
            found = model.answer([each.messages[:-1] for each in some], options, tools=some[0].tools)
            yield [_line(record, answer.text) for record, answer in zip(some, found, strict=True)]

    with LineFile(Path(output)) as file:
        file.fill(follows_from, len(records), answered, "answering", "conversation")
        given = [json.loads(line)["pred"].strip() for line in file.lines()]
        file.publish()
    expected = [record.messages[-1].content.strip() for record in records]
    metric = bleu.BLEU()
    score = metric.corpus_score(given, [expected])
    num_equal = sum(one == other for one, other in zip(given, expected, strict=True))
    report = AnswersReport(len(given), float(score.score), str(metric.get_signature()), num_equal)
    write_summary(output, Figures(intervals={}, others={"checkpoint": str(checkpoint), **vars(report)}))
    return report


def _line(record: Record, answer: str) -> str:
    return json_text({"line": record.line, "pred": answer, "answer": record.messages[-1].content})


def _conversations(path: str | Path) -> Iterator[Record]:
    """Records of a file.

    Raises:
        DataError: a line that is none, or holds no conversation.
    """
    for record in read_records(path):
        if isinstance(record, BadLine):
            raise record.error
        if not record.messages:  # a prompt and its completion are trained without a template, and are not asked so
            raise DataError("is no conversation; give messages", path=record.path, line=record.line)
        yield record


def _batches(records: Sequence[Record], at_once: int) -> Iterator[list[Record]]:
    """Consecutive conversations with the same tools."""

    def tools(record: Record) -> Any:
        return json_text(record.tools)

    for _, same in groupby(records, tools):
        while some := list(islice(same, at_once)):
            yield some
