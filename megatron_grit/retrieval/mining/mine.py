"""Hard negatives: passages that a model takes for relevant to a query and that are most likely not.

The passages nearest to a query are the best negatives and, where judgements are few, often positives that nobody
marked. What is left out here:

* known positives of the query, in any record with the same query, and passages with the text of one or of the query;
* passages that are such a positive over again: a part of it, a near copy, or it with more around it;
* negatives that the record has already, where these are kept;
* ranks outside a window, counted without these;
* passages whose score is too near that of the query's positives: by a margin or a share of the worst one (NV-Retriever,
  arXiv 2407.15831, TopK-MarginPos and TopK-PercPos);
* passages that a better model, the teacher, takes for relevant as well: whose teacher's score is not at least a gap
  below that of the worst positive;
* passages that a cross-encoder does not score a margin below the worst positive (SGPT, arXiv 2202.08904: 3.0).

Scores are cosines. Embeddings and results are kept in blocks beside the output until it is finished: after a kill the
same command resumes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.text.records import BadLine, Record, TextPair, read_records
from megatron_grit.errors import DataError
from megatron_grit.inference.encoders.load import load_embedder
from megatron_grit.inference.encoders.protocol import Embedder, EmbedderOptions
from megatron_grit.retrieval.index.search import MOST_TIMES_MORE
from megatron_grit.retrieval.mining.corpus import (
    Corpus,
    DatabaseChunks,
    PassageFiles,
    StoredVectors,
    digest_of_texts,
    read_passages,
    unit,
)
from megatron_grit.retrieval.mining.cross_encoder import load_scorer
from megatron_grit.retrieval.mining.judges import NO_SCORE, CosineJudge, PairJudge, Rule, query_of
from megatron_grit.retrieval.mining.likeness import normalized, repeats
from megatron_grit.retrieval.mining.options import MineOptions, check_options, most_negatives, report_path, work_folder
from megatron_grit.retrieval.mining.output import plain, with_negatives
from megatron_grit.retrieval.work import Worker, alone_in, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder
from megatron_grit.store.files import replacing, write_json
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_SPARE = 16
"""Candidates that are searched beyond the last rank, for positives among them."""
REASONS = (
    *("known_positive", "like_positive", "equal_text", "kept_negative", "outside_ranks"),
    *("near_positive", "teacher", "cross_encoder", NO_SCORE),
)
"""Why candidates were left out, in the order of the tests."""


_ELSEWHERE = (
    *("input", "output", "corpus", "embedder", "project_dir", "version", "teacher", "cross_encoder"),
    *("min_negatives", "index", "index_memory_gb"),
)
"""Options that blocks do not follow from, or by the content of files."""


def mine_negatives(options: MineOptions, worker: Worker | None = None) -> dict[str, Any]:
    """Write records with mined negatives. All processes of a job call it.

    Args:
        options: what is mined.
        worker: this process. None: it is alone.

    Returns:
        The report, which is also in a file beside the output: ``mined.report.json`` for ``mined.jsonl``.

    Raises:
        ConfigError: options that cannot be.
        DataError: input that cannot be read, or is no embedding record; or no record has negatives left.
    """
    worker = worker or Worker()
    check_options(options)
    with alone_in(work_folder(options), worker):
        miner = Miner(options)
        miner.prepare(worker)
        compute_blocks(miner.blocks, miner.compute, worker, "negatives", "query")
        report: dict[str, Any] = worker.from_first(miner.write)
        return report


def read_embedding_records(paths: Sequence[Path]) -> list[Record]:
    """Embedding records of JSONL files.

    Raises:
        DataError: a line that is none; names it.
    """
    records = []
    for path in paths:
        for record in read_records(path):
            if isinstance(record, BadLine):
                raise record.error
            if record.kind is not RowKind.EMBEDDING:
                raise DataError("is no embedding record: it has no query", path=record.path, line=record.line)
            records.append(record)
    return records


@dataclass
class _Unknown:
    """Passages nearest to a query, without those that are known to be relevant."""

    left: list[int] = field(default_factory=list)
    num_positives: int = 0
    num_like: int = 0
    num_equal: int = 0
    num_kept: int = 0


class Miner:
    """One run.

    Args:
        options: what to mine and where to write it.
    """

    def __init__(self, options: MineOptions) -> None:
        self.options = options
        self.records = read_embedding_records(options.input)
        if not self.records:
            raise DataError("holds no record", path=options.input[0])
        self.known: dict[str, list[str]] = {}
        for record in self.records:
            texts = self.known.setdefault(normalized(query_of(record).text), [])
            texts += [normalized(pair.text) for pair in record.positives]
        self.folder = work_folder(options)
        self.corpus = self._corpus()
        self._stored: StoredVectors | None = None
        """Vectors of the passages by the teacher."""
        self.rules, judges = self._rules()
        self.blocks = self._blocks(judges)

    def _corpus(self) -> Corpus:
        options = self.options
        if options.project_dir is not None:
            return DatabaseChunks(options.project_dir, options.version)
        passages = read_passages(options.corpus, self.records)
        if not passages:
            raise DataError("holds no passage", path=(options.corpus or options.input)[0])
        assert options.embedder is not None
        return PassageFiles(
            passages,
            self._embedder(options.embedder),
            self.folder,
            index=options.index,
            memory_bytes=options.index_memory_gb * 2**30,
            block_size=options.block_size,
            seed=options.seed,
        )

    def _embedder(self, path: str) -> Embedder:
        options = self.options
        return load_embedder(
            path,
            EmbedderOptions(
                max_length=options.max_length,
                batch_tokens=options.batch_tokens,
                precision=options.precision,
                query_instruction=options.query_instruction,
            ),
        )

    def _rules(self) -> tuple[list[Rule], dict[str, str | None]]:
        """In the order in which they are applied; and what the teacher and the cross-encoder are known by."""
        options, corpus, rules = self.options, self.corpus, list[Rule]()
        known: dict[str, str | None] = {"teacher": None, "scorer": None}
        if options.margin is not None or options.max_fraction is not None:
            rules.append(Rule("near_positive", CosineJudge(corpus.embedder, corpus.vectors), self._limit))
        if options.teacher is not None:
            teacher = self._teacher(options.teacher)
            known["teacher"] = teacher.embedder.fingerprint
            rules.append(Rule("teacher", teacher, lambda worst: worst - options.teacher_gap))
        if options.cross_encoder is not None:
            scorer = load_scorer(options.cross_encoder)
            known["scorer"] = scorer.fingerprint
            rules.append(Rule("cross_encoder", PairJudge(scorer, corpus), lambda worst: worst - options.cross_margin))
        return rules, known

    def _limit(self, worst: float) -> float:
        """The highest cosine of a negative, given that of the worst positive."""
        limits = [np.inf]
        if self.options.margin is not None:
            limits.append(worst - self.options.margin)
        if self.options.max_fraction is not None:
            # A share of a score below 0 would be above it.
            limits.append(worst - (1 - self.options.max_fraction) * abs(worst))
        return float(min(limits))

    def _teacher(self, path: str) -> CosineJudge:
        embedder, corpus = self._embedder(path), self.corpus
        if isinstance(corpus, PassageFiles):
            texts = [passage.text for passage in corpus.passages]
            self._stored = StoredVectors(embedder, self.folder / "teacher", texts, self.options.block_size)
            return CosineJudge(embedder, self._stored.of)

        def vectors(numbers: np.ndarray) -> np.ndarray:
            """Of a database only candidates are embedded."""
            return unit(embedder.embed([corpus.passage(number).text for number in numbers.tolist()]))

        return CosineJudge(embedder, vectors)

    def _blocks(self, judges: dict[str, str | None]) -> BlockFolder:
        signature = {name: value for name, value in dataclasses.asdict(self.options).items() if name not in _ELSEWHERE}
        signature["ranks"] = list(self.options.ranks)
        signature["records"] = digest_of_texts([json.dumps([record.pairs]) for record in self.records])
        signature["corpus"] = self.corpus.signature
        signature |= judges
        return BlockFolder(self.folder / "mined", len(self.records), self.options.block_size, signature)

    def prepare(self, worker: Worker) -> None:
        """Embed what is embedded beforehand. All processes call it."""
        self.corpus.prepare(worker, [query_of(record).text for record in self.records])
        if self._stored is not None:
            self._stored.prepare(worker)

    def compute(self, block: Block) -> Arrays:
        """Negatives of a block of records: their numbers, int64 [n, num_negatives], -1 for none; and counts."""
        records = self.records[block.start : block.stop]
        queries = [query_of(record).text for record in records]
        candidates, dropped = self._candidates(records, queries)
        for rule in self.rules:
            rule.apply(records, candidates, dropped)
        out = np.full((len(records), most_negatives(self.options)), -1, dtype=np.int64)
        for row, found in enumerate(candidates):
            chosen = found[: self.options.num_negatives]
            if self.options.sampling == "random" and len(found) > len(chosen):
                rng = np.random.default_rng([self.options.seed, block.start + row])
                chosen = found[np.sort(rng.choice(len(found), len(chosen), replace=False))]
            out[row, : len(chosen)] = chosen
        return {"negatives": out, "dropped": np.array([dropped[reason] for reason in REASONS], dtype=np.int64)}

    def _candidates(self, records: Sequence[Record], queries: Sequence[str]) -> tuple[list[np.ndarray], dict[str, int]]:
        """Passages within the ranks, nearest first, and how many of those before them were left out why."""
        first, last = self.options.ranks
        vectors = self.corpus.embedder.embed(queries, "query")
        found = [_Unknown()] * len(queries)
        kept = [[normalized(pair.text) for pair in self._kept(record)] for record in records]
        rows, most = np.arange(len(queries)), min(len(self.corpus), MOST_TIMES_MORE * (last + _SPARE))
        k = min(last + _SPARE, most)
        while len(rows):
            short = []
            for row, ids in zip(rows.tolist(), self.corpus.search(vectors[rows], k), strict=True):
                found[row] = self._without_known(ids[ids >= 0], queries[row], kept[row], last)
                if len(found[row].left) < last and ids[-1] >= 0:
                    short.append(row)
            # A database may hold a positive in many chunks.
            rows, k = np.array(short if k < most else [], dtype=np.int64), min(2 * k, most)
        dropped = dict.fromkeys(REASONS, 0)
        for unknown in found:
            dropped["known_positive"] += unknown.num_positives
            dropped["like_positive"] += unknown.num_like
            dropped["equal_text"] += unknown.num_equal
            dropped["kept_negative"] += unknown.num_kept
            dropped["outside_ranks"] += min(first - 1, len(unknown.left))
        return [np.array(unknown.left[first - 1 :], dtype=np.int64) for unknown in found], dropped

    def _kept(self, record: Record) -> list[TextPair]:
        """The negatives of a record that stay: each once, none with the text of a positive of its query or of that."""
        own, out = normalized(query_of(record).text), dict[str, TextPair]()
        for pair in record.negatives if self.options.keep_negatives else []:
            text = normalized(pair.text)
            if text and text != own and text not in self.known[own]:
                out.setdefault(text, pair)
        return list(out.values())

    def _without_known(self, ids: np.ndarray, query: str, kept: Sequence[str], wanted: int) -> _Unknown:
        """The first passages that are neither a positive of the query, nor one over again, nor the query itself, nor a
        kept negative."""
        out, own, most = _Unknown(), normalized(query), self.options.max_overlap
        for number in ids.tolist():
            if len(out.left) == wanted:
                break
            text = self.corpus.normalized(number)
            if text in self.known[own]:
                out.num_positives += 1
            elif text == own:
                out.num_equal += 1
            elif text in kept:
                out.num_kept += 1
            elif most is not None and repeats(text, self.known[own], most):
                out.num_like += 1
            else:
                out.left.append(number)
        return out

    def write(self) -> dict[str, Any]:
        """Write the records and the report, and remove the blocks. In one process.

        Raises:
            DataError: nothing would be written; what is there stays.
        """
        options = self.options
        dropped, num_written, num_mined, num_few = np.zeros(len(REASONS), dtype=np.int64), 0, 0, 0
        num_had = num_kept = 0
        with replacing(options.output) as file:
            for block in self.blocks.blocks:
                arrays = self.blocks.read(block)
                dropped += arrays["dropped"]
                for record, row in zip(self.records[block.start : block.stop], arrays["negatives"], strict=True):
                    mined = [self.corpus.passage(number) for number in row[row >= 0].tolist()]
                    if len(mined) < options.min_negatives:
                        num_few += 1
                        continue
                    kept = self._kept(record)
                    file.write(json.dumps(with_negatives(record, kept, mined), ensure_ascii=False) + "\n")
                    num_written, num_mined = num_written + 1, num_mined + len(mined)
                    num_had, num_kept = num_had + len(record.negatives), num_kept + len(kept)
            if not num_written:
                reasons = ", ".join(f"{name} {count:,}" for name, count in zip(REASONS, dropped, strict=True) if count)
                raise DataError(
                    f"none of {len(self.records):,} records has {options.min_negatives} negatives left among "
                    f"{len(self.corpus):,} passages (left out: {reasons or 'none'}), so nothing is written; give other "
                    "ranks, more passages, or weaker filters",
                    path=options.input[0],
                )
        report = {
            "num_records": len(self.records),
            "num_passages": len(self.corpus),
            "num_written": num_written,
            "num_negatives": num_mined,
            "num_records_with_too_few": num_few,
            "num_kept_negatives": num_kept,
            "num_kept_negatives_left_out": num_had - num_kept if options.keep_negatives else 0,
            "dropped_candidates": dict(zip(REASONS, dropped.tolist(), strict=True)),
            "options": {name: plain(value) for name, value in dataclasses.asdict(options).items()},
        }
        write_json(report_path(options.output), report)
        shutil.rmtree(self.folder)
        return report
