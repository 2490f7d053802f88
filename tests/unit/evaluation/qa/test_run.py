"""Files of answers and references to figures, and what is refused."""

from __future__ import annotations

import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.cli import main as cli
from megatron_grit.evaluation.bootstrap import bootstrap_mean
from megatron_grit.evaluation.qa.files import read_predictions, read_references
from megatron_grit.evaluation.qa.run import evaluate_answers
from megatron_grit.evaluation.qa.scores import SCORERS, ScorerName
from tests.unit.evaluation.qa.oracle import ORACLES

XQUAD = Path(__file__).parents[5] / "shared" / "data" / "xquad_en_part1.json"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def perturbed(text: str, draw: random.Random) -> str:
    words = text.split()
    return draw.choice(
        [
            text,
            text.upper(),
            f"The {text}.",
            " ".join(words[:-1]),
            " ".join(draw.sample(words, len(words))),
            f"{text}, {text}",
            text.replace("-", " "),
            f"Answer: {text}",
            f"{text} or so",
            "",
        ]
    )


@pytest.mark.skipif(not XQUAD.exists(), reason="the shared data is not here")
@pytest.mark.parametrize("name", SCORERS)
def test_perturbed_answers_of_xquad(place: Path, name: ScorerName) -> None:
    """As lines and as JSON lines, against the definition; a tenth of the questions has no answer."""
    draw = random.Random(0)
    articles = json.loads(XQUAD.read_text(encoding="utf-8"))["data"]
    questions = [one for article in articles for paragraph in article["paragraphs"] for one in paragraph["qas"]]
    references = [[answer["text"] for answer in one["answers"]] for one in questions]
    answers = [perturbed(texts[0], draw) for texts in references]
    if name != "squad1":
        references = [[] if number % 10 == 0 else texts for number, texts in enumerate(references)]
    items = [{"answers": [{"text": text} for text in texts]} for texts in references]
    Path("right.json").write_text(json.dumps(items, indent=1), encoding="utf-8")
    Path("answers.txt").write_text("".join(f"{answer}\n" for answer in answers), encoding="utf-8")
    Path("answers.jsonl").write_text("".join(json.dumps({"pred": answer}) + "\n" for answer in answers))
    figures = evaluate_answers("answers.txt", "right.json", scorer=name)
    other = evaluate_answers("answers.jsonl", "right.json", scorer=name)
    assert other | {"predictions": "answers.txt"} == figures
    pairs = [ORACLES[name](answer, texts) for answer, texts in zip(answers, references, strict=True)]
    scored = [pair for pair in pairs if pair is not None]
    assert figures["num_questions"] == len(questions) > 500
    assert figures["em"] == pytest.approx(np.mean([exact for exact, _ in scored]), abs=1e-12)
    assert figures["f1"] == pytest.approx(float(sum(f1 for _, f1 in scored) / len(scored)), abs=1e-12)
    assert 0.2 < figures["em"] < figures["f1"] < 0.9
    assert len(scored) == len(questions) - figures["num_unanswerable"] * (name == "retro")


FORMS: dict[str, Any] = {
    "texts": {"answers": ["one", "two"]},
    "a text": {"answer": "one", "question": "q"},
    "a list under answer": {"answer": ["one"]},
    "answers before answer": {"answers": ["one"], "answer": "two"},
    "SQuAD's": {"answers": [{"text": "one", "answer_start": 3}]},
    "Hugging Face's": {"answers": {"text": ["one"], "answer_start": [3]}},
    "none": {"answers": []},
    "null": {"answer": None},
    "an empty text": {"answer": ""},
}


@pytest.mark.parametrize("form", ["list", "indented list", "lines"])
def test_forms_of_references(place: Path, form: str) -> None:
    items = list(FORMS.values())
    texts = {"list": json.dumps(items), "indented list": "\ufeff\n" + json.dumps(items, indent=2)}
    Path("right").write_text(texts.get(form, "\n".join(map(json.dumps, items)) + "\n\n"), encoding="utf-8")
    assert read_references("right") == [["one", "two"], *[["one"]] * 5, [], [], [""]]


def test_an_empty_line_is_an_empty_answer(place: Path) -> None:
    Path("answers.txt").write_text("one\n\n  \nfour")
    assert read_predictions("answers.txt") == ["one", "", "  ", "four"]
    Path("answers.jsonl").write_text('{"pred": ""}\n\n{"pred": "two\\nlines"}\n')
    assert read_predictions("answers.jsonl") == ["", "two\nlines"]


def test_figures_and_their_intervals(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("answers.txt").write_text("Paris\nnot known\nthe red cat\n\n")
    right = [{"answers": ["Paris"]}, {"answers": []}, {"answer": "a cat"}, {"answer": "x"}]
    Path("right.json").write_text(json.dumps(right))
    arguments = [
        "answers.txt",
        "right.json",
        "--no-answer",
        "Unanswerable",
        "Not known.",
        "--output",
        "out/scores.json",
    ]
    assert cli.main(["evaluate", "qa", *arguments]) == 0
    figures = json.loads(Path("out/scores.json").read_text())
    assert (figures["num_questions"], figures["num_unanswerable"], figures["scorer"]) == (4, 1, "squad2")
    f1 = [1, 1, 2 / 3, 0]
    assert figures["em"] == 0.5 and figures["f1"] == pytest.approx(np.mean(f1))
    assert (figures["em_answerable"], figures["em_unanswerable"]) == (pytest.approx(1 / 3), 1)
    assert figures["f1_answerable"] == pytest.approx(5 / 9) and figures["f1_unanswerable"] == 1
    interval = bootstrap_mean(np.array(f1))
    assert figures["intervals"]["f1"] == pytest.approx([interval.low, interval.high])
    printed = capsys.readouterr().out
    assert printed.startswith("4 questions, 1 of them without an answer; scorer squad2\nem ")
    assert f"95 % interval {interval.low:.3f} to {interval.high:.3f}" in printed


def test_the_tool_of_the_old_name(
    place: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("answers.txt").write_text("Paris\n")
    Path("right.json").write_text('[{"answer": "paris"}]')
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "answers.txt", "right.json", "--output", "scores.json"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(repository / "tools/retro/text_generation/evaluate.py"), run_name="__main__")
    assert end.value.code == 0 and capsys.readouterr().out.startswith("1 questions")
    assert json.loads(Path("scores.json").read_text())["em"] == 1


BAD = {
    "fewer predictions": (
        "a\n",
        "right.json",
        '[{"answer": "a"}, {"answer": "b"}]',
        "answers.txt: 1 predictions for 2",
    ),
    "more predictions": ("a\n\n", "right.json", '[{"answer": "a"}]', "2 predictions for 1 references in right.json"),
    "no predictions": ("", "right.json", '[{"answer": "a"}]', "answers.txt: 0 predictions for 1 references"),
    "no references": ("a\n", "right.json", "", "right.json: holds no question"),
    "an empty list": ("a\n", "right.json", " [ ]", "right.json: holds no question"),
    "no answers in a list": (
        "a\n",
        "right.json",
        '[{"answer": "a"}, {}]',
        'right.json: item 2: has no "answers" or "answer"',
    ),
    "no answers in a line": (
        "a\n",
        "right.jsonl",
        '\n{"question": "q"}',
        'right.jsonl:2: has no "answers" or "answer"',
    ),
    "a text for an object": ("a\n", "right.json", '["a"]', "item 1: must be an object with"),
    "a number": ("a\n", "right.json", '[{"answers": ["1", 1]}]', "item 1: an answer must be a text, not 1"),
    "an object without text": (
        "a\n",
        "right.json",
        '[{"answers": [{"start": 1}]}]',
        "an answer must be a text, not null",
    ),
    "SQuAD's file without articles": ("a\n", "right.json", '{"data": []}', "right.json: holds no question"),
    "JSON that is broken in a line": (
        "a\n",
        "right.jsonl",
        '{"answer": "a"}\n{"answer"}',
        "right.jsonl:2: malformed JSON",
    ),
    "JSON that is broken in a list": (
        "a\n",
        "right.json",
        '[\n{"answer": "a"},\n{"answer"}]',
        "JSON: Expecting ':' delimiter at line 3",
    ),
    "a list that does not end": ("a\n", "right.json", '[{"answer": "a"}', "right.json: malformed JSON"),
    "no UTF-8 in a list": ("a\n", "right.json", '[\n"\udcff"]', "right.json:2: not UTF-8"),
    "a prediction without pred": ('{"text": "a"}', "right.json", '[{"answer": "a"}]', 'answers.jsonl:1: has no "pred"'),
    "a prediction that is no text": (
        '{"pred": 1}',
        "right.json",
        '[{"answer": "a"}]',
        "answers.jsonl:1: pred must be a text",
    ),
    "a prediction that is no JSON": ("{", "right.json", '[{"answer": "a"}]', "answers.jsonl:1: malformed JSON"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_files_are_refused_in_one_line(place: Path, mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers, name, right, message = BAD[mistake]
    predictions = f"answers.{'jsonl' if answers.startswith('{') else 'txt'}"
    Path(predictions).write_text(answers)
    Path(name).write_text(right, errors="surrogateescape")
    refused([predictions, name, "--output", "scores.json"], message, capsys)
    assert not Path("scores.json").exists()


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "qa", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err, err


def test_other_mistakes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("answers.txt").write_text("a\n")
    Path("right.json").write_text('[{"answers": []}]')
    for arguments, message in (
        (["answers.txt"], "REFERENCES must be given"),
        (["answers.txt", "."], ".: not a regular file"),
        ([".", "right.json"], ".: not a regular file"),
        (["answers.txt", "none.json"], "none.json: no such input file"),
        (
            ["answers.txt", "right.json", "--scorer", "squad"],
            "--scorer must be one of squad2, squad1, retro, not 'squad'",
        ),
        (["answers.txt", "right.json", "--scorer", "squad1"], "right.json: question 1 has no answer, and SQuAD 1.1"),
        (["answers.txt", "right.json", "--scorer", "retro"], "right.json: no question has an answer"),
        (["answers.txt", "right.json", "--output", "."], "'.' is a folder"),
        (["answers.txt", "right.json", "--output", "right.json"], "would take the place of"),
    ):
        refused(arguments, message, capsys)
