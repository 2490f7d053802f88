"""SQuAD's definitions once more, without regular expressions and tables: a character and a word at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache

PUNCTUATION = "".join(
    chr(code) for low, high in ((33, 47), (58, 64), (91, 96), (123, 126)) for code in range(low, high + 1)
)
Pair = tuple[int, Fraction]
"""Exact match and F1."""


@cache
def words(text: str, punctuation: str = "") -> list[str]:
    """Lower-case words with each mark of ASCII punctuation replaced, then without articles."""
    characters = "".join(punctuation if one in PUNCTUATION else one for one in text.lower())
    kept, run = "", ""
    for one in characters + " ":  # a run of letters and digits that is an article parts words
        if one.isalnum() or one == "_":
            run += one
            continue
        kept += (" " if run in ("a", "an", "the") else run) + one
        run = ""
    found = [""]
    for one in kept:
        if not one.isspace():
            found[-1] += one
        elif found[-1]:
            found.append("")
    return found[:-1] if not found[-1] else found


def f1(prediction: list[str], reference: list[str]) -> Fraction:
    """2 p r / (p + r) = 2 shared / (words of both); 0 where nothing is shared."""
    left, shared = list(reference), 0
    for word in prediction:
        if word in left:
            left.remove(word)
            shared += 1
    return Fraction(2 * shared, max(len(prediction) + len(reference), 1))


def squad1(prediction: str, references: Sequence[str]) -> Pair:
    """The best exact match and the best F1."""
    exact = max(int(words(prediction) == words(reference)) for reference in references)
    return exact, max(f1(words(prediction), words(reference)) for reference in references)


def squad2(prediction: str, references: Sequence[str]) -> Pair:
    """References without words do not count; where none is left, right is an answer without words."""
    exact, best = 0, Fraction(0)
    golds = [words(reference) for reference in references if words(reference)]
    for gold in golds or [[]]:
        same = int(words(prediction) == gold)
        exact = max(exact, same)
        best = max(best, f1(words(prediction), gold) if gold and words(prediction) else Fraction(same))
    return exact, best


def retro(prediction: str, references: Sequence[str]) -> Pair | None:
    """As Retro's tools have it, with the best reference for the first."""
    golds = [reference for reference in references if reference.strip() and reference.strip() != "no_passages_used"]
    if not golds:
        return None
    answer = bare = prediction.replace("<|endoftext|>", "")
    while bare.lstrip().startswith(("Answer:", "A:")):
        bare = bare.lstrip()[bare.lstrip().index(":") + 1 :]
    exact = max(int(words(bare) == words(gold)) for gold in golds)
    return exact, max(f1(words(answer, " "), words(gold, " ")) for gold in golds)


ORACLES: dict[str, Callable[[str, Sequence[str]], Pair | None]] = {"squad1": squad1, "squad2": squad2, "retro": retro}
