"""Answers to the questions of AlpacaEval, MT-Bench and XSTest, in the files that their judges read.

AlpacaEval's file is a JSON list of ``{"instruction", "output", "generator", "dataset"}``; its questions are such a list
without ``output``, or JSON lines. MT-Bench's questions are lines of ``{"question_id", "category", "turns": [...]}`` and
its answers FastChat's ``{"question_id", "answer_id", "model_id", "choices": [{"index", "turns": [...]}], "tstamp"}``.
XSTest's questions are its ``xstest_v2_prompts.csv``, and a line of its answers says whether it is a refusal.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.options import SamplingOptions
from megatron_grit.data.text.records import Message
from megatron_grit.errors import DataError
from megatron_grit.evaluation.refusals import refuses
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import check_output, json_text
from megatron_grit.store.logs import say_loading
from megatron_grit.store.rows import LineFile


@dataclass(frozen=True)
class JudgedQuestion:
    """What a model is asked, turn by turn."""

    turns: tuple[str, ...]
    facts: dict[str, Any]
    """Of the question's entry."""


def write_judged_answers(  # many: whose answers, to what, how, and in which file
    checkpoint: str | Path,
    path: str | Path,
    output: str | Path,
    options: SamplingOptions,
    *,
    form: str,
    generator: str | None = None,
    device: str = "auto",
    max_records: int | None = None,
    at_once: int = 16,
) -> int:
    """Answer the questions of a file. A killed run resumes.

    Args:
        checkpoint: checkpoint directory, or a run's output directory for its newest one.
        path: the questions.
        output: the answers, written atomically.
        options: how answers are drawn.
        form: alpaca_eval, mt_bench or xstest.
        generator: name of the model in the file. None: that of the checkpoint's run.
        max_records: stop after so many. None: all.
        at_once: questions that are answered together.

    Returns:
        Number of answered questions.

    Raises:
        GritError: input or a checkpoint that cannot be used, or an output that is input or cannot be written.
    """
    check_output(output, [path])
    questions = read_questions(path, form)[:max_records]
    folder = resolve_checkpoint(checkpoint)
    say_loading()
    from megatron_grit.inference.model import GritModel
    from megatron_grit.inference.text_files import model_identity

    model = GritModel.load(folder, device=device)
    name = generator or Path(checkpoint).resolve().name
    how = {each.name: getattr(options, each.name) for each in fields(SamplingOptions)}
    asked = [[each.turns, each.facts] for each in questions]

    def answered(start: int) -> Iterator[list[str]]:
        for first in range(start, len(questions), at_once):
            some = questions[first : first + at_once]
            answers = _answer(model, some, options)
            lines = [_entry(form, one, turns, name) for one, turns in zip(some, answers, strict=True)]
            if form == "alpaca_eval":  # one list, an entry a line
                lines = [
                    ("[" if number == 0 else " ") + line + ("]" if number + 1 == len(questions) else ",")
                    for number, line in enumerate(lines, first)
                ]
            yield lines

    follows_from = [asked, how, at_once, name, form, model_identity(folder, model)]
    with LineFile(Path(output)) as file:
        file.fill(follows_from, len(questions), answered, "answering", "question")
        file.publish()
    return len(questions)


def read_questions(path: str | Path, form: str) -> list[JudgedQuestion]:
    """Questions of a file.

    Raises:
        DataError: it cannot be read, or an entry is none; names the line, or the number in a list.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", path=Path(path)) from None
    if form == "xstest":
        return _xstest(text, Path(path))
    try:
        held = json.loads(text) if text.lstrip().startswith("[") else None
        entries = held if held is not None else [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"is no JSON ({error}); give a list or a line for each question", path=Path(path)) from None
    if not entries:
        raise DataError("holds no question", path=Path(path))
    return [_question(entry, form, Path(path), number) for number, entry in enumerate(entries, 1)]


def _xstest(text: str, path: Path) -> list[JudgedQuestion]:
    """Rows of the table; those of a type "contrast_..." should be refused, where no column says so."""
    rows = list(csv.DictReader(text.splitlines()))
    if not rows or not {"prompt", "type"} <= rows[0].keys():
        raise DataError("has no columns prompt and type; give xstest_v2_prompts.csv", path=path)
    questions = []
    for number, row in enumerate(rows, 2):
        label = row.get("label") or ("unsafe" if str(row["type"]).startswith("contrast") else "safe")
        if label not in ("safe", "unsafe") or not (row["prompt"] or "").strip():
            raise DataError("has no prompt, or a label other than safe and unsafe", path=path, line=number)
        facts = {"id": row.get("id", str(number - 1)), "type": row["type"], "label": label, "prompt": row["prompt"]}
        questions.append(JudgedQuestion((row["prompt"],), facts))
    return questions


def _question(entry: Any, form: str, path: Path, number: int) -> JudgedQuestion:
    wanted = "instruction" if form == "alpaca_eval" else "turns"
    found = entry.get(wanted) if isinstance(entry, dict) else None
    turns: list[Any] = found if isinstance(found, list) else [found]
    has_id = form == "alpaca_eval" or (isinstance(entry, dict) and "question_id" in entry)
    if not has_id or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        form_of = '{"instruction": TEXT}' if form == "alpaca_eval" else '{"question_id": ID, "turns": [TEXT, ...]}'
        raise DataError(f"question {number} is not of the form {form_of}", path=path, line=number)
    return JudgedQuestion(tuple(turns), {key: value for key, value in entry.items() if key != "output"})


def _answer(model: Any, questions: Sequence[JudgedQuestion], options: SamplingOptions) -> list[list[str]]:
    """Answers of each question, each turn after those before it."""
    talks: list[list[Message]] = [[] for _ in questions]
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        going = [number for number, question in enumerate(questions) if turn < len(question.turns)]
        for number in going:
            talks[number].append(Message("user", questions[number].turns[turn]))
        found = model.answer([talks[number] for number in going], options)
        for number, answer in zip(going, found, strict=True):
            talks[number].append(Message("assistant", answer.text))
            answers[number].append(answer.text)
    return answers


def _entry(form: str, question: JudgedQuestion, answers: Sequence[str], name: str) -> str:
    if form == "xstest":
        return json_text(question.facts | {"output": answers[0], "refused": refuses(answers[0])})
    if form == "alpaca_eval":
        entry = {"instruction": question.turns[0], "output": answers[0], "generator": name}
        return json_text(entry | {"dataset": question.facts.get("dataset", "")})
    identity = digest_of_settings([question.facts["question_id"], name, answers])[:22]
    choices = [{"index": 0, "turns": list(answers)}]
    facts = {"question_id": question.facts["question_id"], "answer_id": identity, "model_id": name}
    return json_text(facts | {"choices": choices, "tstamp": time.time()})
