"""EM and F1 against SQuAD's definitions, on the edges where normalisers differ."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import cache

import pytest

from megatron_grit.evaluation.qa import scores
from megatron_grit.evaluation.qa.scores import SCORERS, AnswerScore, Scorer, ScorerName
from tests.unit.evaluation.qa.oracle import ORACLES, Pair

PARTS = [
    *("the", "The", "a", "AN", "an", "then", "theatre", "cat", "Cat", "cats", "cat cat", "dog", "a.", "(the)", "t.h.e"),
    *(
        "e-mail",
        "email",
        "e mail",
        "U.S.",
        "US",
        "don't",
        "dont",
        "1,000",
        "1000",
        "1 000",
        "3.5%",
        "35",
        "$5",
        "_",
        "a_b",
    ),
    *("café", "cafe\u0301", "the\u0301", "İstanbul", "istanbul", "STRASSE", "straße", "“the”", "‘cat’", "—", "the—cat"),
    *(
        "東京",
        "½",
        "²",
        "a²",
        "x\xa0y",
        "x y",
        "\u2003",
        "\u200b",
        "\t",
        "\r",
        ".",
        "?!",
        "'",
        "A:",
        "Answer:",
        "answer:",
    ),
    *("<|endoftext|>", "no_passages_used", "DNA: x", ""),
]
Case = tuple[str, list[str]]


def cases() -> list[Case]:
    """Every two parts as an answer and its reference, and longer ones with several references or none."""
    draw = random.Random(0)

    def text() -> str:
        return draw.choice(["", " ", "  "]).join(draw.choices(PARTS, k=draw.randint(0, 5)))

    drawn = [(text(), [text() for _ in range(draw.randint(0, 4))]) for _ in range(1500)]
    near = [
        (text, [" ".join(draw.sample(words, len(words))), *rest]) for text, rest in drawn if (words := text.split())
    ]
    return [(one, [other]) for one in PARTS for other in PARTS] + drawn + near


CASES = cases()


@cache
def defined(name: ScorerName) -> list[tuple[Case, Pair | None]]:
    """Each case with its scores by the definition."""
    return [(case, ORACLES[name](*case)) for case in CASES if case[1] or name != "squad1"]


def disagreements(name: ScorerName, scorer: Scorer) -> Iterator[tuple[Case, AnswerScore | None, Pair | None]]:
    """Cases that a scorer and the definition score differently."""
    for case, expected in defined(name):
        score = scorer.score(*case)
        if score is None or expected is None:
            agree = score is None and expected is None
        else:
            agree = score.em == expected[0] and abs(score.f1 - expected[1]) < 1e-12
        if not agree:
            yield case, score, expected


def differs(name: ScorerName, scorer: Scorer) -> bool:
    return next(disagreements(name, scorer), None) is not None


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_those_of_the_definition(name: ScorerName) -> None:
    assert list(disagreements(name, SCORERS[name])) == []
    outcomes = {expected for _, expected in defined(name)}
    assert (None in outcomes) == (name == "retro")
    assert {(0, Fraction(0)), (1, Fraction(1)), (0, Fraction(1))} <= outcomes, "the cases are one-sided"


def broken(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "articles stay":
        monkeypatch.setattr(scores, "_ARTICLES", re.compile("(?!)"))
    elif fault == "articles within words go":
        monkeypatch.setattr(scores, "_ARTICLES", re.compile("(a|an|the)"))
    elif fault == "articles between ASCII letters only":
        monkeypatch.setattr(scores, "_ARTICLES", re.compile(scores._ARTICLES.pattern, re.ASCII))
    elif fault == "punctuation is swapped":
        monkeypatch.setattr(scores, "_DELETED", scores._SPACED)
        monkeypatch.setattr(scores, "_SPACED", dict.fromkeys(scores._SPACED))
    elif fault == "a mark is left":
        monkeypatch.delitem(scores._DELETED, ord("_"))
        monkeypatch.delitem(scores._SPACED, ord("_"))
    elif fault == "words count once":
        monkeypatch.setattr(scores, "Counter", lambda words: Counter(set(words)))
    elif fault == "the first reference counts":
        compared = Scorer.compared
        monkeypatch.setattr(Scorer, "compared", lambda self, references: compared(self, references)[:1])


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize(
    "fault",
    [
        "articles stay",
        "articles within words go",
        "articles between ASCII letters only",
        "punctuation is swapped",
        "a mark is left",
        "words count once",
        "the first reference counts",
    ],
)
def test_a_fault_would_be_found(monkeypatch: pytest.MonkeyPatch, name: ScorerName, fault: str) -> None:
    broken(monkeypatch, fault)
    assert differs(name, SCORERS[name])


@pytest.mark.parametrize("name", SCORERS)
def test_no_scorer_passes_for_another(name: ScorerName) -> None:
    assert all(differs(name, SCORERS[other]) for other in SCORERS if other != name)


@pytest.mark.parametrize(
    ("name", "prediction", "references", "expected"),
    [
        ("squad1", "The Cat!", ["a cat"], (1, 1)),
        ("squad1", "the", ["an"], (1, 0)),
        ("squad2", "the", ["an"], (1, 1)),
        ("squad2", "", [], (1, 1)),
        ("squad2", "something", [], (0, 0)),
        ("squad2", "...", [""], (1, 1)),
        ("squad2", "Denver Broncos", ["Broncos", "the Denver Broncos"], (1, 1)),
        ("squad2", "in Denver Broncos", ["Broncos", "the Denver Broncos"], (0, 0.8)),
        ("squad2", "e-mail", ["e mail"], (0, 0)),
        ("retro", "e-mail", ["e mail"], (0, 1)),
        ("retro", "Answer: A: Paris <|endoftext|>", ["London", "Paris"], (1, 2 / 3)),
        ("retro", "DNA: x", ["DNA x"], (1, 1)),
        ("retro", "Paris", ["no_passages_used", " "], None),
    ],
)
def test_known_scores(
    name: ScorerName, prediction: str, references: list[str], expected: tuple[float, ...] | None
) -> None:
    score = SCORERS[name].score(prediction, references)
    assert (None if score is None else (score.em, score.f1)) == (expected and pytest.approx(expected))


def test_precision_and_recall_are_of_the_best_reference() -> None:
    score = SCORERS["squad2"].score("red cat sat", ["red", "red cat sat on mats here"])
    assert score == pytest.approx(AnswerScore(em=0, f1=2 / 3, precision=1, recall=0.5))
