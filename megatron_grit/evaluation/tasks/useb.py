"""USEB: AskUbuntu, CQADupStack, SciDocs and paraphrases of tweets, in the files of its data-eval.

Which of the four a folder holds is told by its files:

==============  ===========================================================================================
askubuntu       ``text_tokenized.txt``, ``dev.txt``, ``test.txt``: reranking of BM25's candidates by titles; MAP
cqadupstack     ``corpus.json``, ``retrieval_split.json``: duplicates within each forum; MAP at 100
scidocs         ``data.json``: reranking by titles in four relations; MAP
twitterpara     ``Twitter_URL_Corpus_test.txt``, ``test.data``: pairs of tweets; average precision
==============  ===========================================================================================

The score of a task is the mean over its parts (forums, relations, data sets).

Source: Wang, Reimers and Gurevych, TSDAE (arXiv 2104.06979), whose benchmark it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_grit.data.text.lines import Line, filled_lines, read_json
from megatron_grit.errors import DataError
from megatron_grit.evaluation.bootstrap import Interval, bootstrap_statistic
from megatron_grit.evaluation.tasks.sts import spearman
from megatron_grit.evaluation.tasks.task import Figures, Lengths

if TYPE_CHECKING:
    from megatron_grit.evaluation.encoder import TextEncoder

_NEUTRAL = 3
"""Of annotators who call a pair a paraphrase, 0 to 6: neither a paraphrase nor none."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A text, what is ranked for it, and which of that is right."""

    text: str
    candidates: Sequence[str]
    relevant: np.ndarray
    """bool [candidates]."""
    num_relevant: int | None = None
    """What the average precision is divided by. None: the relevant ones that the cutoff leaves."""


@dataclass(frozen=True, kw_only=True)
class Tweets:
    """Pairs, and how many of the annotators call them paraphrases."""

    first: list[str]
    second: list[str]
    votes: np.ndarray
    """int64 [n]."""


@dataclass(frozen=True, kw_only=True)
class UsebTask:
    """One of the four."""

    name: str
    parts: Mapping[str, list[Question] | Tweets]
    cutoff: int | None = None
    """Candidates of which the average precision is taken. None: all."""
    instruction: str | None = ""


def is_useb(folder: str | Path) -> bool:
    """Whether a folder is one of the four."""
    return _kind(Path(folder)) is not None


def _kind(folder: Path) -> str | None:
    for name, (files, _) in _READERS.items():
        if all((folder / each).is_file() for each in files):
            return name
    return None


def read(folder: str | Path, split: str | None = None, instruction: str | None = "") -> UsebTask:
    """Read a folder.

    Args:
        folder: one of the four.
        split: valid or test. None: test.
        instruction: what all texts are embedded for. "": the template without instruction. None: no template.

    Raises:
        DataError: it is none of them, has no such split, or a line or a value that cannot be used.
    """
    folder, split = Path(folder), split or "test"
    name = _kind(folder)
    if name is None:
        raise DataError("holds none of USEB's tasks", path=folder)
    if split not in ("valid", "test"):
        raise DataError(f"has the splits valid and test, not {split}", path=folder)
    try:
        parts = _READERS[name][1](folder, split)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"is not laid out as USEB's {name} ({type(error).__name__}: {error})", path=folder) from error
    if not all(len(part.votes if isinstance(part, Tweets) else part) for part in parts.values()):
        raise DataError(f"a part of {name} has nothing to score", path=folder)
    cutoff = 100 if name == "cqadupstack" else None
    return UsebTask(name=name, parts=parts, cutoff=cutoff, instruction=instruction)


def _fields(path: Path, count: int) -> Iterator[tuple[Line, list[str]]]:
    for line in filled_lines(path):
        fields = line.text().split("\t")
        if len(fields) < count:
            raise line.error(f"must have {count} fields with tabs between them, not {len(fields)}")
        yield line, fields


def _askubuntu(folder: Path, split: str) -> dict[str, list[Question] | Tweets]:
    titles = {fields[0].strip(): fields[1].strip() for _, fields in _fields(folder / "text_tokenized.txt", 2)}
    questions = []
    for line, (name, similar, found, *_) in _fields(folder / ("dev.txt" if split == "valid" else "test.txt"), 3):
        right, candidates = set(similar.split()), found.split()
        if unknown := [each for each in (name, *candidates) if each not in titles]:
            raise line.error(f"question {unknown[0]} is not in text_tokenized.txt")
        if right:
            relevant = np.array([each in right for each in candidates])
            texts = [titles[each] for each in candidates]
            questions.append(Question(text=titles[name], candidates=texts, relevant=relevant))
    return {"askubuntu": questions}


def _cqadupstack(folder: Path, split: str) -> dict[str, list[Question] | Tweets]:
    corpus, splits = read_json(folder / "corpus.json"), read_json(folder / "retrieval_split.json")[split]
    parts: dict[str, list[Question] | Tweets] = {}
    for forum, judged in splits.items():
        pool = {name: text for name, text in corpus[forum].items() if name not in judged}
        texts, place_of = list(pool.values()), {name: place for place, name in enumerate(pool)}
        questions = []
        for name, duplicates in judged.items():
            relevant = np.zeros(len(texts), dtype=bool)
            relevant[[place_of[each] for each in duplicates if each in place_of]] = True
            questions.append(Question(text=corpus[forum][name], candidates=texts, relevant=relevant))
        parts[forum] = questions
    return parts


def _scidocs(folder: Path, split: str) -> dict[str, list[Question] | Tweets]:
    data = read_json(folder / "data.json")
    titles = {name: entry["title"] or "" for name, entry in data["corpus"].items()}
    parts: dict[str, list[Question] | Tweets] = {}
    for relation, judged in data[split].items():
        questions = []
        for name, grades in judged.items():
            kept = sorted((each for each in grades if titles.get(each)), reverse=True)  # trec_eval's order of ties
            if titles.get(name) and kept:
                relevant = np.array([int(grades[each]) > 0 for each in kept])
                texts = [titles[each] for each in kept]
                right = sum(int(grade) > 0 for grade in grades.values())
                questions.append(Question(text=titles[name], candidates=texts, relevant=relevant, num_relevant=right))
        parts[relation] = questions
    return parts


def _twitterpara(folder: Path, split: str) -> dict[str, list[Question] | Tweets]:
    """Both data sets have one split."""
    urls = [
        (fields[0], fields[1], fields[2].strip().lstrip("(").partition(",")[0])
        for _, fields in _fields(folder / "Twitter_URL_Corpus_test.txt", 3)
    ]
    pit = [(fields[2], fields[3], fields[4]) for _, fields in _fields(folder / "test.data", 5)]
    return {
        name: Tweets(
            first=[row[0] for row in rows],
            second=[row[1] for row in rows],
            votes=np.array([int(row[2]) for row in rows]),
        )
        for name, rows in (("twitterurl", urls), ("pit", pit))
    }


_READERS: dict[str, tuple[tuple[str, ...], Callable[[Path, str], dict[str, list[Question] | Tweets]]]] = {
    "askubuntu": (("text_tokenized.txt", "test.txt"), _askubuntu),
    "cqadupstack": (("corpus.json", "retrieval_split.json"), _cqadupstack),
    "scidocs": (("data.json",), _scidocs),
    "twitterpara": (("Twitter_URL_Corpus_test.txt", "test.data"), _twitterpara),
}


def run(model: TextEncoder, task: UsebTask, lengths: Lengths) -> Figures:
    """(Mean) average precision of each part by cosine, and its mean over parts, with intervals over questions or pairs;
    of pairs also Spearman's correlation."""
    intervals: dict[str, Interval] = {}
    parts: list[tuple[Callable[[np.ndarray], float], int]] = []
    main = "ap" if task.name == "twitterpara" else "map"
    for name, part in task.parts.items():
        texts = _texts_of(part)
        how: dict[str, Any] = {"side": "query", **vars(lengths)}
        vectors = model.encode(texts, task.instruction, **how)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        row_of = {text: row for row, text in enumerate(texts)}
        if isinstance(part, Tweets):
            first, second = (vectors[[row_of[text] for text in side]] for side in (part.first, part.second))
            cosines, told = (first * second).sum(1), part.votes != _NEUTRAL
            parts.append((_pair_precision(cosines[told], part.votes[told] > _NEUTRAL), int(told.sum())))
            both = np.stack([cosines, part.votes])
            intervals[f"spearman_{name}"] = bootstrap_statistic(_correlation(both), len(cosines))
        else:
            values = np.array(list(_of_questions(vectors, row_of, part, task.cutoff)))
            parts.append((_mean_of(values), len(values)))
        intervals[f"{main}_{name}"] = bootstrap_statistic(*parts[-1])
    if len(parts) > 1:
        intervals[f"{main}_mean"] = bootstrap_statistic(_mean_of_parts(parts), sum(count for _, count in parts))
    return Figures(intervals=intervals, others={"num_items": sum(count for _, count in parts)})


def _texts_of(part: list[Question] | Tweets) -> list[str]:
    if isinstance(part, Tweets):
        return list(dict.fromkeys([*part.first, *part.second]))
    found = dict.fromkeys(each.text for each in part)
    for candidates in {id(each.candidates): each.candidates for each in part}.values():
        found |= dict.fromkeys(candidates)
    return list(found)


def _of_questions(
    vectors: np.ndarray, row_of: Mapping[str, int], questions: Sequence[Question], cutoff: int | None
) -> Iterator[float]:
    """Average precision of each question."""
    pool: Sequence[str] | None = None
    for question in questions:
        if question.candidates is not pool:  # those of a forum have one pool
            pool = question.candidates
            held = vectors[[row_of[text] for text in pool]]
        order = np.argsort(-(held @ vectors[row_of[question.text]]), kind="stable")[:cutoff]
        yield average_precision(question.relevant[order], question.num_relevant)


def average_precision(hits: np.ndarray, num_relevant: int | None = None) -> float:
    """Sum of the precisions at the hits of a ranking, bool [n], divided by the number of relevant ones. None: of hits.
    Without a hit 0."""
    if not hits.any():
        return 0.0
    precisions = (np.cumsum(hits) / (np.arange(len(hits)) + 1))[hits]
    return float(precisions.sum() / (num_relevant or len(precisions)))


def _pair_precision(cosines: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda items: average_precision(labels[items][np.argsort(-cosines[items], kind="stable")])


def _mean_of(values: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda items: float(values[items].mean())


def _correlation(both: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda items: spearman(*both[:, items])


def _mean_of_parts(parts: Sequence[tuple[Callable[[np.ndarray], float], int]]) -> Callable[[np.ndarray], float]:
    """Of items of all parts, which are numbered one part after another; a part of which none is drawn is left out."""
    ends = np.cumsum([count for _, count in parts])

    def mean(items: np.ndarray) -> float:
        part_of = np.searchsorted(ends, items, side="right")
        drawn = [
            (statistic, items[part_of == part] - (ends[part] - count)) for part, (statistic, count) in enumerate(parts)
        ]
        return float(np.mean([statistic(own) for statistic, own in drawn if len(own)]))

    return mean
