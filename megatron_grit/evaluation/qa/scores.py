"""Exact match and F1 of an answer, by the definitions of SQuAD 1.1, of SQuAD 2.0, and of Retro's tools.

They agree in what they compare, lower-case words without ASCII punctuation and articles, and differ at the edges:

========  =====================================  ================================  ==============================
scorer    punctuation                            no answer among the references    words of both empty: F1
========  =====================================  ================================  ==============================
squad2    deleted: "e-mail" is "email"           right is the empty answer         1 where both are, else 0
squad1    deleted                                there is no such question         0
retro     deleted for EM, a space for F1         the question is left out          0
========  =====================================  ================================  ==============================

Sources: Rajpurkar et al., arXiv 1606.05250 section 6.1 and 1806.03822 section 6, and the scorers published with them;
Wang et al., arXiv 2310.07713, and the tools published with it, which compare F1 with the first reference only. Here the
best reference counts everywhere.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DELETED = dict.fromkeys(map(ord, string.punctuation))
_SPACED = dict.fromkeys(map(ord, string.punctuation), " ")
_MARKS = re.compile(r"\s*(Answer:|A:)")
_END = "<|endoftext|>"
ScorerName = Literal["squad2", "squad1", "retro"]


class AnswerScore(NamedTuple):
    """Of one answer, each from 0 to 1 and with the reference for which it is best."""

    em: float
    """1 where the normalised answer is a normalised reference."""
    f1: float
    """2 p r / (p + r)."""
    precision: float
    """p: share of the answer's words that the reference has, each as often as it has it."""
    recall: float
    """r: share of the reference's words that the answer has. p and r are with the reference of the best F1."""


def normalize_squad(text: str) -> str:
    """Lower-case words without ASCII punctuation and without articles, a space between two."""
    return _normalized(text, _DELETED)


def matches(prediction: str, references: Sequence[str]) -> float:
    """1 where the words of a reference stand in those of an answer, one after another, else 0; both as
    :func:`normalize_squad` makes them. A reference without a word matches nothing."""
    words = f" {normalize_squad(prediction)} "
    wanted = (normalize_squad(reference) for reference in references)
    return float(any(f" {reference} " in words for reference in wanted if reference))


def normalize_retro_f1(text: str) -> str:
    """As :func:`normalize_squad`, where punctuation parts words."""
    return _normalized(text, _SPACED)


def strip_generated(text: str) -> str:
    """An answer as it was generated, without ``Answer:`` or ``A:`` before it and without the end of the text."""
    text = text.replace(_END, "")
    while mark := _MARKS.match(text):
        text = text[mark.end() :]
    return text.strip()


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A definition of EM and F1."""

    normalize_f1: Callable[[str], str] = normalize_squad
    """What words F1 compares. EM compares those of :func:`normalize_squad`."""
    unanswerable: Literal["empty", "refuse", "skip"]
    """What is right where no reference is an answer. empty: the empty answer. refuse: there is no such question. skip:
    the question is left out."""
    no_answers: tuple[str, ...] = ("",)
    """References that say that there is no answer."""
    generated: bool = False
    """Whether answers are freed of what models write around them (:func:`strip_generated`) for EM, and of the end of
    the text for F1."""

    def answers_among(self, references: Sequence[str]) -> list[str]:
        """References that are an answer; none: the question has none."""
        return [reference for reference in references if reference.strip() not in self.no_answers]

    def compared(self, references: Sequence[str]) -> list[str]:
        """References that an answer is compared with; none: the question has no score."""
        if self.unanswerable == "empty":
            return [reference for reference in references if normalize_squad(reference)] or [""]
        return list(references) if self.unanswerable == "refuse" else self.answers_among(references)

    def score(self, prediction: str, references: Sequence[str]) -> AnswerScore | None:
        """Score of an answer with the best of its references. None: it is compared with none."""
        references = self.compared(references)
        if not references:
            return None
        exact = normalize_squad(strip_generated(prediction) if self.generated else prediction)
        words = self.normalize_f1(prediction.replace(_END, "") if self.generated else prediction).split()
        overlaps = [self._overlap(words, self.normalize_f1(reference).split()) for reference in references]
        f1, precision, recall = max(overlaps, key=lambda overlap: overlap[0])
        em = float(any(exact == normalize_squad(reference) for reference in references))
        return AnswerScore(em, f1, precision, recall)

    def _overlap(self, words: list[str], reference: list[str]) -> tuple[float, float, float]:
        """F1, precision and recall of words."""
        if not words and not reference:
            return (float(self.unanswerable == "empty"),) * 3
        num_shared = (Counter(words) & Counter(reference)).total()
        if not num_shared:
            return 0.0, 0.0, 0.0
        precision, recall = num_shared / len(words), num_shared / len(reference)
        return 2 * precision * recall / (precision + recall), precision, recall


SCORERS: dict[ScorerName, Scorer] = {
    "squad2": Scorer(unanswerable="empty"),
    "squad1": Scorer(unanswerable="refuse"),
    "retro": Scorer(
        unanswerable="skip", no_answers=("", "no_passages_used"), normalize_f1=normalize_retro_f1, generated=True
    ),
}


def _normalized(text: str, punctuation: dict[int, str] | dict[int, None]) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(punctuation)).split())
