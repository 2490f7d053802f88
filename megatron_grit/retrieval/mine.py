"""Hard negatives: passages that a model takes for relevant to a query and that are most likely not.

The passages nearest to a query are the best negatives and, where judgements are few, often positives that nobody
marked. What is left out here:

* known positives of the query, in any record with the same query, and passages with the text of one or of the query;
* ranks outside a window, counted without these;
* passages whose score is too near that of the query's positives: by a margin or a share of the worst one (NV-Retriever,
  arXiv 2407.15831, TopK-MarginPos and TopK-PercPos);
* passages that a better model, the teacher, takes for relevant as well: whose teacher's score is not at least a gap
  below that of the worst positive;
* passages that a cross-encoder does not score a margin below the worst positive (SGPT, arXiv 2202.08904: 3.0).

Scores are cosines. Embeddings and results are kept in blocks beside the output until it is whole, so the same command
goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_grit.data.block_files import Arrays, Block, BlockFolder
from megatron_grit.data.chunk_db import map_dataset
from megatron_grit.data.records import BadLine, Record, TextPair, read_records
from megatron_grit.data.roles import RowKind
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.files import replacing, write_json
from megatron_grit.parallel.logs import get_logger
from megatron_grit.retrieval.cross_encoder import PairScorer, load_scorer
from megatron_grit.retrieval.embed import Embedder, load_embedder
from megatron_grit.retrieval.faiss_index import VectorIndex, choose_factory, num_training_vectors
from megatron_grit.retrieval.work import Worker, compute_blocks

log = get_logger(__name__)

REASONS = ("known_positive", "equal_text", "outside_ranks", "near_positive", "teacher", "cross_encoder", "no_score")
"""Why candidates were left out, in the order of the tests."""


@dataclass(kw_only=True)
class MineOptions:
    """What is mined and how."""

    input: list[Path]
    """JSONL of embedding records, or patterns of files."""
    output: Path
    """JSONL to write."""
    embedder: str
    """The student: directory of a Hugging Face encoder or of one of our checkpoints."""
    corpus: list[Path] = field(default_factory=list)
    """JSONL with passages: plain texts ({"text": ...}) or embedding records. Empty: the passages of the input."""
    num_negatives: int = 7
    """Negatives of a record, at most."""
    min_negatives: int = 1
    """Records that end up with fewer are left out."""
    ranks: tuple[int, int] = (10, 100)
    """First and last rank of candidates, from 1 on."""
    margin: float | None = None
    """A negative's score is at least so much below that of the worst positive."""
    max_fraction: float | None = None
    """A negative's score is at most this share of the worst positive's (0.95 in NV-Retriever)."""
    teacher: str | None = None
    """Directory of a better embedder."""
    teacher_gap: float = 0.05
    """A negative's score by the teacher is at least so much below that of the worst positive."""
    cross_encoder: Path | None = None
    """Directory of a Hugging Face cross-encoder, or a JSONL of "query", "passage" and "score"."""
    cross_margin: float = 3.0
    """A negative's score by the cross-encoder is at least so much below that of the worst positive."""
    sampling: Literal["random", "top"] = "random"
    """Which of the candidates that are left: any, or the nearest."""
    keep_negatives: bool = False
    """Keep the negatives that records have, in front."""
    seed: int = 0
    """Of the sampling."""
    query_instruction: str = ""
    """What the embedders embed queries for. Instructions in records are kept and not read."""
    max_length: int = 256
    """Tokens of an embedder to which texts are cut."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the embedders' matrix products."""
    batch_tokens: int = 8192
    """Tokens of a forward pass."""
    index: str = "auto"
    """A faiss factory string. auto: chosen from the number of passages and index_memory_gb."""
    index_memory_gb: float = 16.0
    """With index auto: memory for the index."""
    block_size: int = 10_000
    """Passages and records of a block."""


def mine_negatives(options: MineOptions, worker: Worker | None = None) -> dict[str, Any]:
    """Write records with mined negatives. All processes of a job call it.

    Args:
        options: what is mined.
        worker: this process. None: it is alone.

    Returns:
        The report, which is also in OUTPUT.report.json.

    Raises:
        ConfigError: options that cannot be.
        DataError: input that cannot be read, or is no embedding record.
    """
    worker = worker or Worker()
    _check(options)
    miner = Miner(options)
    miner.embed_passages(worker)
    compute_blocks(miner.blocks, miner.compute, worker, "negatives", "query")
    report: dict[str, Any] = worker.from_first(miner.write)
    return report


def _check(options: MineOptions) -> None:
    first, last = options.ranks
    problems = {
        "ranks": not 1 <= first <= last,
        "num_negatives": options.num_negatives < 1,
        "min_negatives": not 0 <= options.min_negatives <= options.num_negatives,
        "max_fraction": options.max_fraction is not None and not 0 < options.max_fraction <= 1,
        "block_size": options.block_size < 1,
    }
    for name, wrong in problems.items():
        if wrong:
            raise ConfigError(f"{name} cannot be {getattr(options, name)}")


@dataclass
class Passage:
    """A text of the corpus."""

    instruction: str | None
    text: str
    has_instruction: bool


def _key(text: str) -> bytes:
    """Equal for texts that differ in white space and case alone."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()


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


def read_passages(paths: Sequence[Path], records: Sequence[Record]) -> list[Passage]:
    """Different passages of a corpus, in order; those of the records where no corpus is given.

    Raises:
        DataError: a line without a passage; names it.
    """
    found: dict[bytes, Passage] = {}

    def add(pair: TextPair, has_instruction: bool) -> None:
        if pair.text.strip():
            found.setdefault(_key(pair.text), Passage(pair.instruction, pair.text, has_instruction))

    for path in paths:
        for record in read_records(path):
            if isinstance(record, BadLine):
                raise record.error
            if record.text is None and not record.pairs:
                raise DataError('has neither "text" nor passages', path=record.path, line=record.line)
            if record.text is not None:
                add(TextPair(None, record.text), False)
            for pair in record.pairs[1:]:
                add(pair, True)
    if not paths:
        for record in records:
            for pair in record.pairs[1:]:
                add(pair, True)
    return list(found.values())


class Vectors:
    """Unit vectors of all passages by one embedder, on disk."""

    def __init__(self, embedder: Embedder, folder: Path, texts: Sequence[str], corpus: str, block_size: int) -> None:
        self.embedder, self.texts = embedder, texts
        signature = {"task": "passages", "corpus": corpus, "embedder": embedder.fingerprint}
        self.blocks = BlockFolder(folder, len(texts), block_size, signature)

    def compute(self, block: Block) -> Arrays:
        """Embed a block of passages."""
        return {"data": unit(self.embedder.embed(self.texts[block.start : block.stop]))}

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Vectors of passages, float32 [n, dim]."""
        out = np.empty((len(ids), self.embedder.dim), dtype=np.float32)
        numbers = ids // self.blocks.block_size
        for number in np.unique(numbers).tolist():
            block = self.blocks.blocks[number]
            here = numbers == number
            out[here] = map_dataset(block.path, "data")[ids[here] - block.start]
        return out


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1, float32; of length 0 where they were."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)


class Miner:
    """One run.

    Args:
        options: of it.
    """

    def __init__(self, options: MineOptions) -> None:
        self.options = options
        self.records = read_embedding_records(options.input)
        self.passages = read_passages(options.corpus, self.records)
        if not self.records or not self.passages:
            raise DataError("holds no record" if not self.records else "holds no passage", path=options.input[0])
        self.texts = [passage.text for passage in self.passages]
        self.numbers = {_key(text): number for number, text in enumerate(self.texts)}
        self.known: dict[bytes, set[bytes]] = {}
        for record in self.records:
            assert record.query is not None
            keys = {_key(pair.text) for pair in record.positives}
            self.known.setdefault(_key(record.query.text), set()).update(keys)
        self.folder = options.output.with_name(f".{options.output.name}.work")
        self.student = self._vectors(options.embedder, "student")
        self.teacher = self._vectors(options.teacher, "teacher") if options.teacher else None
        self.scorer: PairScorer | None = load_scorer(options.cross_encoder) if options.cross_encoder else None
        self.blocks = self._blocks()
        self._index: VectorIndex | None = None

    def _vectors(self, path: str, name: str) -> Vectors:
        options = self.options
        embedder = load_embedder(
            path,
            max_length=options.max_length,
            batch_tokens=options.batch_tokens,
            precision=options.precision,
            query_instruction=options.query_instruction,
        )
        corpus = _digest(self.texts)
        return Vectors(embedder, self.folder / name, self.texts, corpus, options.block_size)

    def _blocks(self) -> BlockFolder:
        signature = {name: value for name, value in dataclasses.asdict(self.options).items() if name not in _ELSEWHERE}
        signature["ranks"] = list(self.options.ranks)
        signature["records"] = _digest([json.dumps([record.pairs]) for record in self.records])
        signature["student"] = self.student.blocks.signature
        signature["teacher"] = self.teacher.blocks.signature if self.teacher else None
        signature["scorer"] = self.scorer.fingerprint if self.scorer else None
        return BlockFolder(self.folder / "mined", len(self.records), self.options.block_size, signature)

    def embed_passages(self, worker: Worker) -> None:
        """Embed the corpus with each embedder. All processes call it."""
        for vectors in filter(None, (self.student, self.teacher)):
            compute_blocks(
                vectors.blocks, vectors.compute, worker, f"passages ({vectors.blocks.folder.name})", "passage"
            )

    @property
    def index(self) -> VectorIndex:
        """Over the student's vectors."""
        if self._index is None:
            count, dim, options = len(self.texts), self.student.embedder.dim, self.options
            factory = options.index
            if factory == "auto":
                factory = choose_factory(count, dim, options.index_memory_gb * 2**30)
            sample = np.random.default_rng(options.seed).permutation(count)[: num_training_vectors(factory, count)]
            trained = self.student.of(np.sort(sample)) if len(sample) else np.empty((0, dim), np.float32)
            index = VectorIndex.train(factory, "inner_product", trained)
            for block in self.student.blocks.blocks:
                index.add_codes(
                    index.encode(self.student.blocks.read(block)["data"]), np.arange(block.start, block.stop)
                )
            self._index = index
        return self._index

    def compute(self, block: Block) -> Arrays:
        """Negatives of a block of records: their numbers, int64 [n, num_negatives], -1 for none; and counts."""
        records = self.records[block.start : block.stop]
        queries = [_query(record).text for record in records]
        candidates, dropped = self._candidates(records, queries)
        dropped["near_positive"] += self._keep_below(self.student, records, queries, candidates, self._limit)
        if self.teacher is not None:
            gap = self.options.teacher_gap
            dropped["teacher"] += self._keep_below(
                self.teacher, records, queries, candidates, lambda worst: worst - gap
            )
        if self.scorer is not None:
            self._keep_scored(records, queries, candidates, dropped)
        out = np.full((len(records), self.options.num_negatives), -1, dtype=np.int64)
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
        excluded = []
        for query in queries:
            positives = {self.numbers[key] for key in self.known[_key(query)] if key in self.numbers}
            equal = {self.numbers[_key(query)]} if _key(query) in self.numbers else set()
            excluded.append((positives, equal - positives))
        most = last + max(len(positives) + len(own) for positives, own in excluded)
        vectors = unit(self.student.embedder.embed(queries, "query"))
        _, ids = self.index.search(vectors, min(most, len(self.texts)))
        dropped = dict.fromkeys(REASONS, 0)
        found = []
        for row, (positives, own) in zip(ids, excluded, strict=True):
            row = row[row >= 0]
            is_positive, is_equal = np.isin(row, list(positives)), np.isin(row, list(own))
            left = row[~is_positive & ~is_equal]
            dropped["known_positive"] += int(is_positive.sum())
            dropped["equal_text"] += int(is_equal.sum())
            dropped["outside_ranks"] += min(first - 1, len(left))
            found.append(left[first - 1 : last])
        return found, dropped

    def _limit(self, worst: float) -> float:
        """The highest score of a negative, given that of the worst positive."""
        limits = [np.inf]
        if self.options.margin is not None:
            limits.append(worst - self.options.margin)
        if self.options.max_fraction is not None:
            # A share of a score below 0 would be above it.
            limits.append(worst - (1 - self.options.max_fraction) * abs(worst))
        return float(min(limits))

    def _keep_below(
        self,
        vectors: Vectors,
        records: Sequence[Record],
        queries: Sequence[str],
        candidates: list[np.ndarray],
        limit: Callable[[float], float],
    ) -> int:
        """Keep candidates whose score is not above a limit that follows from the worst positive's; counts the rest."""
        if limit(0.0) == np.inf:
            return 0
        query_vectors = unit(vectors.embedder.embed(queries, "query"))
        texts = [pair.text for record in records for pair in record.positives]
        positive_vectors = unit(vectors.embedder.embed(texts))
        dropped = place = 0
        for row, record in enumerate(records):
            positives = positive_vectors[place : place + len(record.positives)]
            place += len(record.positives)
            worst = float((positives @ query_vectors[row]).min())
            keep = vectors.of(candidates[row]) @ query_vectors[row] <= limit(worst)
            dropped += int((~keep).sum())
            candidates[row] = candidates[row][keep]
        return dropped

    def _keep_scored(
        self, records: Sequence[Record], queries: Sequence[str], candidates: list[np.ndarray], dropped: dict[str, int]
    ) -> None:
        """Keep candidates that the cross-encoder scores well below the worst positive."""
        assert self.scorer is not None
        pairs: list[tuple[str, str]] = []
        for record, query, found in zip(records, queries, candidates, strict=True):
            pairs += [(query, pair.text) for pair in record.positives]
            pairs += [(query, self.texts[number]) for number in found]
        scores, place = self.scorer.score(pairs), 0
        for row, record in enumerate(records):
            middle = place + len(record.positives)
            positives, mine = scores[place:middle], scores[middle : middle + len(candidates[row])]
            place = middle + len(candidates[row])
            unknown = np.isnan(mine) | np.isnan(positives).any()
            keep = ~unknown & (mine <= positives.min() - self.options.cross_margin)
            dropped["no_score"] += int(unknown.sum())
            dropped["cross_encoder"] += int((~keep & ~unknown).sum())
            candidates[row] = candidates[row][keep]

    def write(self) -> dict[str, Any]:
        """Write the records and the report, and remove the blocks. In one process."""
        options = self.options
        dropped, num_written, num_mined, num_few = np.zeros(len(REASONS), dtype=np.int64), 0, 0, 0
        with replacing(options.output) as file:
            for block in self.blocks.blocks:
                arrays = self.blocks.read(block)
                dropped += arrays["dropped"]
                for record, row in zip(self.records[block.start : block.stop], arrays["negatives"], strict=True):
                    mined = [self.passages[number] for number in row[row >= 0]]
                    if len(mined) < options.min_negatives:
                        num_few += 1
                        continue
                    file.write(json.dumps(_with_negatives(record, mined, options), ensure_ascii=False) + "\n")
                    num_written, num_mined = num_written + 1, num_mined + len(mined)
        report = {
            "num_records": len(self.records),
            "num_passages": len(self.passages),
            "num_written": num_written,
            "num_negatives": num_mined,
            "num_records_with_too_few": num_few,
            "dropped_candidates": dict(zip(REASONS, dropped.tolist(), strict=True)),
            "options": {name: _plain(value) for name, value in dataclasses.asdict(options).items()},
        }
        write_json(options.output.with_suffix(".report.json"), report)
        shutil.rmtree(self.folder)
        return report


_ELSEWHERE = ("input", "output", "corpus", "embedder", "teacher", "cross_encoder", "min_negatives", "keep_negatives")
"""Options that blocks do not follow from, or by the content of files."""


def report_lines(report: dict[str, Any]) -> list[str]:
    """A report of :func:`mine_negatives` to read."""
    lines = [
        f"{report['num_written']:,} of {report['num_records']:,} records written, {report['num_negatives']:,} "
        f"negatives from {report['num_passages']:,} passages; {report['num_records_with_too_few']:,} had too few"
    ]
    dropped = report["dropped_candidates"]
    return lines + [f"  left out, {name}: {count:,}" for name, count in dropped.items() if count]


def _query(record: Record) -> TextPair:
    assert record.query is not None
    return record.query


def _with_negatives(record: Record, mined: Sequence[Passage], options: MineOptions) -> dict[str, Any]:
    instruction = record.positives[0].instruction
    negatives = list(record.negatives) if options.keep_negatives else []
    negatives += [TextPair(p.instruction if p.has_instruction else instruction, p.text) for p in mined]
    return {
        "query": _value(_query(record)),
        "pos": [_value(pair) for pair in record.positives],
        "neg": [_value(pair) for pair in negatives],
    }


def _value(pair: TextPair) -> str | list[str]:
    return pair.text if pair.instruction is None else [pair.instruction, pair.text]


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
