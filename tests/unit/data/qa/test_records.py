"""What is read of each form of question, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.data.qa.records import QaRecord, read_records
from megatron_grit.errors import DataError

CTXS = [{"title": "Rome", "text": "Rome is old."}, {"text": "Paris is not."}]
FORMS: dict[str, tuple[dict[str, Any], tuple[str, list[str], list[str], bool]]] = {
    "retrieved contexts": (
        {"question": " who? ", "answers": ["he", "she"], "ctxs": CTXS, "sub-paragraphs": "own"},
        ("who?", ["he", "she"], ["title: Rome, source: Rome is old.", "Paris is not."], False),
    ),
    "own context, answer a text": (
        {"question": "who?", "answer": "he", "sub-paragraphs": "own"},
        ("who?", ["he"], ["own"], False),
    ),
    "own context with a title": (
        {"question": "who?", "answers": [{"text": "he"}], "sub-paragraphs": ["T", "own"]},
        ("who?", ["he"], ["title: T, source: own"], False),
    ),
    "NewsQA's key": ({"question": "who?", "answer": ["he"], "sub_paragraph": "own"}, ("who?", ["he"], ["own"], False)),
    "neighbors of pretraining": (
        {"question": "who?", "answers": [], "bert_pretrain_corpus_neighbours": ["a", "b"]},
        ("who?", [], ["a", "b"], False),
    ),
    "keys that a file has for all, of which some are empty": (
        {"question": "who?", "answers": [], "answer": "he", "multichoice_options": None},
        ("who?", ["he"], [], False),
    ),
    "no context": ({"question": "who?"}, ("who?", [], [], False)),
    "options": (
        {"question": "who?", "answer": "he", "qa_type": "multi_choice_qa", "multichoice_options": ["he", "she"]},
        ("who?\n(A) he\n(B) she", ["he"], [], False),
    ),
    "a dialogue as a text": (
        {"question": "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:", "answer": "d"},
        ("User: a\n\nAssistant: b\n\nUser: c", ["d"], [], True),
    ),
    "a dialogue as turns": (
        {"question": ["a", "b", "c"], "answer": "d"},
        ("User: a\n\nAssistant: b\n\nUser: c", ["d"], [], True),
    ),
    "a dialogue as messages": (
        {"question": [{"role": "user", "content": "a"}], "longform_answer": "long"},
        ("User: a", ["long"], [], True),
    ),
}


def read(path: Path, value: Any, **options: bool) -> list[QaRecord]:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return list(read_records(path, **options))


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, tmp_path: Path) -> None:
    given, expected = FORMS[name]
    (of_list,) = read(tmp_path / "a.json", [given])
    (of_line,) = read(tmp_path / "a.jsonl", json.dumps(given) + "\n")
    for record in (of_list, of_line):
        assert (record.question, record.answers, record.contexts, record.is_dialogue) == expected
    assert (of_list.item.line, of_line.item.line) == (None, 1)


def test_choices_between_answers_and_contexts(tmp_path: Path) -> None:
    given = {"question": "who?", "answer": "he", "longform_answer": "he did", "ctxs": CTXS, "sub-paragraphs": "own"}
    (record,) = read(tmp_path / "a.json", [given], retrieved=False, longform=True)
    assert (record.answers, record.contexts) == (["he did"], ["own"])
    (record,) = read(tmp_path / "a.json", [given | {"longform_answer": None}], longform=True)
    assert record.answers == ["he"]


def test_questions_that_say_where_their_data_are_from(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"question": f"q{k}", "answer": "a", "data": "nq"}) + "\n" for k in range(2))
    assert [record.question for record in read(tmp_path / "a.jsonl", lines)] == ["q0", "q1"]


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "several lines"])
def test_the_form_of_squad(indent: int | None, tmp_path: Path) -> None:
    paragraphs = [
        {"context": text, "qas": [{"question": f"{text}?", "answers": [{"text": text, "answer_start": 0}]}]}
        for text in ("x", "y")
    ]
    records = read(tmp_path / "a.json", json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}, indent=indent))
    assert [(each.question, each.answers, each.contexts) for each in records] == [
        ("x?", ["x"], ["title: T, source: x"]),
        ("y?", ["y"], ["title: T, source: y"]),
    ]


@pytest.mark.parametrize(
    "given, message",
    [
        ([{"answers": ["a"]}], 'item 1: has no "question"'),
        ([{"question": "who?"}, {"question": " "}], 'item 2: "question" is empty'),
        ([{"question": ["a", "b"]}], 'item 1: "question" must be turns of which the last is the user\'s'),
        ([{"question": [{"role": "bot", "content": "a"}]}], "item 1: turn 1 of \"question\" has the role 'bot'"),
        ([{"question": "who?", "multichoice_options": ["a"]}], 'item 1: "multichoice_options" must be 2 to 26 texts'),
        ([{"question": "who?", "ctxs": {"text": "a"}}], 'item 1: "ctxs" must be a list'),
        ([{"question": "who?", "ctxs": [{"title": "a"}]}], 'item 1: "text" of a context must be a text, not null'),
        ([{"question": "who?", "answers": [3]}], "item 1: an answer must be a text, not 3"),
        ({"data": 5}, 'a.json:1: "data" must be a list, not 5'),
        ({"data": [{"paragraphs": 5}]}, 'item 1: "paragraphs" must be a list, not 5'),
        ({"data": [{"paragraphs": [{"context": "a", "qas": 5}]}]}, 'item 1: "qas" must be a list, not 5'),
        (["who?"], 'item 1: must be an object with "question"'),
        ('{"question": "who?"}\n{"question": 3}\n', 'a.json:2: "question" must be a text, not 3'),
    ],
)
def test_what_is_refused(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.json", given)
    assert message in str(caught.value) and str(caught.value).startswith(str(tmp_path / "a.json"))
