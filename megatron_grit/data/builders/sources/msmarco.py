"""MS MARCO with mined hard negatives to records that build_grit reads.

Of each system's negatives, in its order, the first few are taken that a cross-encoder scores at least ``margin`` below
the worst positive: others may be positives that nobody labelled. A passage that several systems found counts once.

Source: sentence-transformers' train_bi-encoder_mnrl.py, which SGPT (arXiv 2202.08904) trains with, and the format of
its file of hard negatives.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_grit.config.options import MsMarcoNegatives
from megatron_grit.data.builders.sources.allnli import write_record
from megatron_grit.data.text.line_blocks import count_lines, without_mark
from megatron_grit.data.text.lines import Line, decode, filled_lines, parse_json
from megatron_grit.errors import DataError
from megatron_grit.store.files import check_output, replacing
from megatron_grit.store.progress import Progress


@dataclass
class MsMarcoCounts:
    """What became of the lines of hard negatives."""

    kept: int = 0
    """Records written."""
    without_positives: int = 0
    without_negatives: int = 0
    """Queries all of whose negatives are too close to a positive."""
    negatives: int = 0
    """Of all records."""
    too_close: int = 0
    """Negatives left out for their score."""

    def summary(self) -> str:
        """One line for a terminal."""
        return (
            f"{self.kept} records with {self.negatives} negatives; {self.too_close} were too close to a positive; left "
            f"out {self.without_positives} queries without positives and {self.without_negatives} without negatives"
        )


class KeyedLines:
    """Lines of a plain file by the key that each begins with, read from disk when asked for.

    Args:
        path: a file with ``key<tab>text`` lines, or of JSON objects that have ``key`` for a key.
        key: None for the former.
        progress: show a bar on stderr.

    Raises:
        DataError: the file is missing, empty, compressed or holds another kind of line.
    """

    def __init__(self, path: str | Path, key: str | None = None, *, progress: bool = False) -> None:
        self.path = Path(path)
        if self.path.suffix in (".gz", ".zst"):
            raise DataError("is compressed, and its lines are looked up in no order; decompress it first", path=path)
        try:
            with self.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read: {error}", path=path) from error
        self._key, self._starts = key, {}
        head = self._data[: self._data.find(b"\n") + 1 or None]
        start = len(head) - len(without_mark(head, self.path))
        self._data.seek(start)
        with Progress(len(self._data), self.path.name, "B", enabled=progress) as bar:
            for number, line in enumerate(iter(self._data.readline, b""), 1):
                if line.strip():
                    self._starts[self._key_of(Line(self.path, number, line.removesuffix(b"\n")))] = start
                start += len(line)
                bar.update(len(line))

    def _key_of(self, line: Line) -> bytes:
        if self._key is None:
            found, tab, _ = line.content.partition(b"\t")
            if not tab:
                raise line.error("expected an id, a tab and a text")
            return found
        value = line.value()
        if not isinstance(value, dict) or self._key not in value:
            raise line.error(f'expected a JSON object with "{self._key}"')
        return str(value[self._key]).encode()

    def __contains__(self, key: str) -> bool:
        return key.encode() in self._starts

    def line(self, key: str) -> bytes:
        """The line of a key.

        Raises:
            DataError: there is none.
        """
        start = self._starts.get(key.encode())
        if start is None:
            raise DataError(f"has no line for {key}", path=self.path)
        end = self._data.find(b"\n", start)
        return self._data[start:] if end < 0 else self._data[start:end]

    def text(self, key: str) -> str:
        """What follows the tab, white space at its ends left out.

        Raises:
            DataError: there is no such line, or it is not UTF-8.
        """
        content = self.line(key)
        try:
            return decode(content).partition("\t")[2].strip()
        except DataError as error:
            number = count_lines(self.path, self._starts[key.encode()]) + 1
            raise Line(self.path, number, content).error(str(error)) from None


# many: the six files of MS MARCO, and how its negatives are chosen
def convert_msmarco(
    queries_path: str | Path,
    corpus_path: str | Path,
    negatives_path: str | Path,
    output_path: str | Path,
    *,
    scores_path: str | Path | None = None,
    qrels_path: str | Path | None = None,
    margin: float | None = 3.0,
    per_system: int = 5,
    systems: Sequence[str] = (),
    progress: bool = False,
) -> MsMarcoCounts:
    """Write JSONL with "query", "pos" and "neg".

    Args:
        queries_path: ``qid<tab>text`` lines; plain or compressed.
        corpus_path: ``pid<tab>text`` lines; plain.
        negatives_path: JSONL, ``{"qid": 1, "pos": [2], "neg": {"bm25": [3], ...}}``; plain or compressed. A passage is
            its id, or ``{"pid": 3, "ce-score": -1.5}``.
        output_path: written whole or not at all.
        scores_path: JSONL, ``{"qid": 1, "scores": {"2": 9.0, "3": -1.5}}``, for passages without a score of their own;
            plain.
        qrels_path: TREC's ``qid 0 pid relevance`` lines, positives beside those of "pos"; plain or compressed.
        margin: a negative's score is at most the worst positive's less this. None: scores are not looked at.
        per_system: negatives that are taken of each system.
        systems: whose negatives are taken. Empty: all.
        progress: show bars on stderr.

    Raises:
        DataError: a file that is not as described, a passage that is not in the corpus, or one without a score.
        ConfigError: options that make no sense, or the output is one of the inputs.
        OutputError: it cannot be written.
    """
    MsMarcoNegatives(margin=margin, per_system=per_system, systems=list(systems))
    given = (queries_path, corpus_path, negatives_path, scores_path, qrels_path)
    check_output(output_path, [path for path in given if path is not None])
    queries = {}
    for line in filled_lines(queries_path):
        qid, tab, text = line.text().partition("\t")
        if not tab:
            raise line.error("expected an id, a tab and a text")
        queries[qid] = text.strip()
    relevant = _read_qrels(Path(qrels_path)) if qrels_path is not None else {}
    corpus = KeyedLines(corpus_path, progress=progress)
    scores = None if scores_path is None else KeyedLines(scores_path, "qid", progress=progress)
    counts = MsMarcoCounts()
    with Progress(None, "convert_msmarco", "query", enabled=progress) as bar, replacing(output_path) as output:
        for line in filled_lines(negatives_path, lambda _, num_lines: bar.update(num_lines)):
            try:
                mined = _Mined(line.content, scores, relevant, need_scores=margin is not None)
                query = queries.get(mined.qid)
                if query is None:
                    raise DataError(f"query {mined.qid} is not in {queries_path}")
                chosen = mined.choose(margin, per_system, systems, counts)
            except DataError as error:
                raise error if error.path else line.error(str(error)) from None
            if chosen and mined.positives:
                write_record(output, query, *([corpus.text(pid) for pid in pids] for pids in (mined.positives, chosen)))
                counts.kept += 1
                counts.negatives += len(chosen)
        if not counts.kept:
            raise DataError("no query has a positive and a negative that may be taken", path=negatives_path)
    return counts


def _read_qrels(path: Path) -> dict[str, list[str]]:
    relevant: dict[str, list[str]] = {}
    for line in filled_lines(path):
        fields = line.text().split()
        if len(fields) != 4 or not fields[3].lstrip("-").isdigit():
            raise line.error("expected four fields: qid 0 pid relevance")
        if int(fields[3]) > 0:
            relevant.setdefault(fields[0], []).append(fields[2])
    return relevant


class _Mined:
    """A line of hard negatives."""

    def __init__(
        self, line: bytes, scores: KeyedLines | None, relevant: dict[str, list[str]], *, need_scores: bool
    ) -> None:
        value = parse_json(line)
        try:
            self.qid = str(value["qid"])
            own: dict[str, float] = {}
            positives = [_passage(entry, own) for entry in value["pos"]]
            self.systems = {name: [_passage(entry, own) for entry in entries] for name, entries in value["neg"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError('expected {"qid": id, "pos": [passage], "neg": {system: [passage]}}') from None
        self.positives = list(dict.fromkeys([*positives, *relevant.get(self.qid, [])]))
        self._scores: dict[str, float] = {}
        if need_scores and scores is not None and self.qid in scores:
            table: Any = parse_json(scores.line(self.qid)).get("scores")
            if not isinstance(table, dict):
                raise DataError(f'the line of query {self.qid} has no object "scores"', path=scores.path)
            self._scores = {str(pid): float(score) for pid, score in table.items()}
        self._scores |= own

    def choose(self, margin: float | None, per_system: int, systems: Sequence[str], counts: MsMarcoCounts) -> list[str]:
        """Negatives of all systems, each once."""
        if not self.positives:
            counts.without_positives += 1
            return []
        highest = None
        if margin is not None:
            highest = min(self._score(pid) for pid in self.positives) - margin
        chosen: dict[str, None] = {}
        for found in self._of(systems):
            added = 0
            for pid in found:
                if pid in chosen or pid in self.positives:
                    continue
                if highest is not None and self._score(pid) > highest:
                    counts.too_close += 1
                    continue
                chosen[pid] = None
                added += 1
                if added == per_system:
                    break
        counts.without_negatives += not chosen
        return list(chosen)

    def _of(self, systems: Sequence[str]) -> Iterator[list[str]]:
        yield from (self.systems[name] for name in systems or self.systems if name in self.systems)

    def _score(self, pid: str) -> float:
        if pid not in self._scores:
            raise DataError(
                f"passage {pid} of query {self.qid} has no cross-encoder score; give --scores with it, or --margin off"
            )
        return self._scores[pid]


def _passage(entry: Any, scores: dict[str, float]) -> str:
    if isinstance(entry, dict):
        pid = str(entry["pid"])
        scores[pid] = float(entry["ce-score"])
        return pid
    if isinstance(entry, (int, str)):
        return str(entry)
    raise TypeError
