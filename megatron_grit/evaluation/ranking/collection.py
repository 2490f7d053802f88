"""Judged collections: queries, documents, and how relevant these are to those; BEIR's folders of them.

A folder of BEIR's holds ``corpus.jsonl`` (``_id``, ``title``, ``text``), ``queries.jsonl`` (``_id``, ``text``) and
``qrels/SPLIT.tsv`` (query, document and grade, below a line of headings); ``.gz`` and ``.zst`` are read.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.text.lines import Line, filled_lines
from megatron_grit.errors import DataError
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_PACKED = ("", ".gz", ".zst")


@dataclass(frozen=True, kw_only=True)
class UnfinishedRanking:
    """Where a killed run finds what it has ranked."""

    path: Path
    model: list[Any]
    """What vectors follow from besides texts and lengths."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Documents, and queries with judgements."""

    query_ids: list[str]
    queries: list[str]
    document_ids: list[str]
    documents: list[str]
    """Title and text."""
    judgements: list[dict[int, int]]
    """Of each query the grades of its judged documents, by their place; those that are not there by numbers below 0."""
    query_instruction: str | None = ""
    """What queries are embedded for. "": the template without instruction. None: no template."""
    document_instruction: str | None = ""
    unfinished: UnfinishedRanking | None = None
    """None: a killed run begins again."""

    def id_places(self) -> np.ndarray:
        """Place of each document's id among all ids in lexical order: int64 [documents]."""
        places = np.empty(len(self.document_ids), dtype=np.int64)
        places[sorted(range(len(places)), key=self.document_ids.__getitem__)] = np.arange(len(places))
        return places


def read_beir(
    folder: str | Path,
    split: str | None = None,
    *,
    query_instruction: str | None = "",
    document_instruction: str | None = "",
) -> Collection:
    """A folder of BEIR's.

    Args:
        folder: with corpus.jsonl, queries.jsonl and qrels/.
        split: whose judgements, and so whose queries. None: test, or the only one.
        query_instruction: see :class:`Collection`.
        document_instruction: likewise.

    Raises:
        DataError: a file that is missing, a line that cannot be read, a judgement of a query that is not there, or two
            judgements that contradict each other; with the line.
    """
    folder = Path(folder)
    documents = dict(_texts(_file(folder, "corpus.jsonl")))
    queries = dict(_texts(_file(folder, "queries.jsonl")))
    path = _qrels(folder, split)
    places = {name: place for place, name in enumerate(documents)}
    judged: dict[str, dict[str, int]] = {}
    for line, query, document, grade in _judgements(path, queries, places):
        if query not in queries:
            raise line.error(f"query {query} is not in queries.jsonl")
        before = judged.setdefault(query, {}).setdefault(document, grade)
        if before != grade:
            raise line.error(f"document {document} is judged {grade} for query {query}, and {before} in a line before")
    if not judged:
        raise DataError("holds no judgement", path=path)
    total = sum(map(len, judged.values()))
    missing = sum(name not in places for grades in judged.values() for name in grades)
    if missing == total:
        raise DataError(f"none of its {missing} documents is in corpus.jsonl", path=path)
    # A collection may be smaller than what was judged; trec_eval counts what it lacks as not found.
    if missing:
        log.info(f"{path}: of {total:,} judged documents {missing:,} are not in corpus.jsonl; they count as not found")
    return Collection(
        query_ids=list(judged),
        queries=[queries[query] for query in judged],
        document_ids=list(documents),
        documents=list(documents.values()),
        judgements=[
            {places.get(name, -1 - number): grade for number, (name, grade) in enumerate(grades.items())}
            for grades in judged.values()
        ],
        query_instruction=query_instruction,
        document_instruction=document_instruction,
    )


def _file(folder: Path, name: str) -> Path:
    for ending in _PACKED:
        if (path := folder / f"{name}{ending}").is_file():
            return path
    raise DataError(f"has no {name}; a folder of BEIR's holds corpus.jsonl, queries.jsonl and qrels/", path=folder)


def _qrels(folder: Path, split: str | None) -> Path:
    paths = sorted(path for ending in _PACKED for path in (folder / "qrels").glob(f"*.tsv{ending}"))
    found = {path.name.partition(".tsv")[0]: path for path in paths}
    if not found:
        raise DataError("has no qrels/SPLIT.tsv", path=folder)
    wanted = split or ("test" if len(found) > 1 else next(iter(found)))
    if wanted not in found:
        raise DataError(f"has no qrels/{wanted}.tsv; its splits are {', '.join(found)}", path=folder)
    return found[wanted]


def _texts(path: Path) -> Iterable[tuple[str, str]]:
    """Ids and texts of the lines of corpus.jsonl or queries.jsonl."""
    seen: set[str] = set()
    for line in filled_lines(path):
        record = line.value()
        name, text, title = _fields(line, record)
        if name in seen:
            raise line.error(f"_id {name} is there twice")
        seen.add(name)
        yield name, f"{title} {text}".strip()


def _fields(line: Line, record: Any) -> tuple[str, str, str]:
    if not isinstance(record, dict) or "_id" not in record or not isinstance(record.get("text"), str):
        raise line.error('must be {"_id": ..., "text": ...}')
    title = record.get("title") or ""
    if not isinstance(title, str):
        raise line.error("title must be a text")
    return str(record["_id"]), record["text"], title


def _judgements(path: Path, queries: Container[str], documents: Container[str]) -> Iterable[tuple[Line, str, str, int]]:
    """Query, document and grade of each line, in BEIR's three columns or TREC's four. Spaces around an id count only
    where the id that is known has them."""
    for line in filled_lines(path):
        fields = line.text().rstrip("\r\n").split("\t")
        fields = fields if len(fields) > 1 else fields[0].split()
        if len(fields) == 4:
            del fields[1]
        try:
            query, document, grade = _known(fields[0], queries), _known(fields[1], documents), int(fields[2])
        except (IndexError, ValueError):
            if line.number == 1 and _are_headings(fields, queries):
                continue
            raise line.error("must be a query, a document and a whole number, with tabs between them") from None
        yield line, query, document, grade


def _known(name: str, names: Container[str]) -> str:
    return name if name in names else name.strip()


def _are_headings(fields: list[str], queries: Container[str]) -> bool:
    """Whether a line that is no judgement names columns: it has no known query, and no number as its grade."""
    if len(fields) < 3 or _known(fields[0], queries) in queries:
        return False
    try:
        float(fields[2])
    except ValueError:
        return True
    return False
