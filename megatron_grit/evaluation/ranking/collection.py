"""Judged collections: queries, documents, and how relevant these are to those; BEIR's folders of them.

A folder of BEIR's holds ``corpus.jsonl`` (``_id``, ``title``, ``text``), ``queries.jsonl`` (``_id``, ``text``) and
``qrels/SPLIT.tsv`` (query, document and grade, below a line of headings); ``.gz`` and ``.zst`` are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.text.lines import Line, filled_lines
from megatron_grit.errors import DataError

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
    """Of each query the grades of its judged documents, by their place."""
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
        DataError: a file that is missing, a line that cannot be read, or a judgement of what is not there; with the
            line.
    """
    folder = Path(folder)
    documents = dict(_texts(_file(folder, "corpus.jsonl")))
    queries = dict(_texts(_file(folder, "queries.jsonl")))
    path = _qrels(folder, split)
    places = {name: place for place, name in enumerate(documents)}
    judged: dict[str, dict[int, int]] = {}
    for line, query, document, grade in _judgements(path):
        if query not in queries:
            raise line.error(f"query {query} is not in queries.jsonl")
        # A collection may be smaller than what was judged; trec_eval counts what it lacks as not found.
        judged.setdefault(query, {})[places.get(document, -1 - len(judged.get(query, {})))] = grade
    if not judged:
        raise DataError("holds no judgement", path=path)
    missing = sum(place < 0 for grades in judged.values() for place in grades)
    if missing == sum(map(len, judged.values())):
        raise DataError(f"none of its {missing} documents is in corpus.jsonl", path=path)
    return Collection(
        query_ids=list(judged),
        queries=[queries[query] for query in judged],
        document_ids=list(documents),
        documents=list(documents.values()),
        judgements=list(judged.values()),
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


def _judgements(path: Path) -> Iterable[tuple[Line, str, str, int]]:
    """Query, document and grade of each line, in BEIR's three columns or TREC's four."""
    for line in filled_lines(path):
        fields = line.text().rstrip("\r\n").split("\t")
        fields = fields if len(fields) > 1 else fields[0].split()
        if len(fields) == 4:
            del fields[1]
        try:
            query, document, grade = fields[0], fields[1], int(fields[2])
        except (IndexError, ValueError):
            if line.number == 1:
                continue  # headings
            raise line.error("must be a query, a document and a whole number, with tabs between them") from None
        yield line, query, document, grade
