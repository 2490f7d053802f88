"""Where hard negatives come from: passages of JSONL files, or the chunks of a retrieval database."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig, load_project_config
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import VersionedDb, read_version
from megatron_grit.data.text.records import BadLine, Record, TextPair, read_records
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.vectors import rows_of
from megatron_grit.retrieval.database.versions import (
    check_embedder,
    nearest_chunks,
    open_index,
    search_of,
    version_vectors,
)
from megatron_grit.retrieval.index.factory import choose_factory, lists_of, num_training_vectors
from megatron_grit.retrieval.index.faiss_index import VectorIndex, exact_search, new_index
from megatron_grit.retrieval.index.recall import RECALL_AT, choose_search, without_own
from megatron_grit.retrieval.index.search import Found, ShardedIndex, merge_in_turn
from megatron_grit.retrieval.mining.likeness import normalized
from megatron_grit.retrieval.stages.embed import project_embedder
from megatron_grit.retrieval.work import Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_NUM_PROBING = 1000
"""Queries that choose how the index of passages is searched."""


@dataclass
class Passage:
    """A text of a corpus."""

    instruction: str | None
    text: str
    has_instruction: bool


class Corpus(Protocol):
    """Passages, their vectors, and a search."""

    embedder: Embedder
    """The student."""
    signature: str
    """Of the passages, their vectors and the search."""

    def __len__(self) -> int: ...

    def prepare(self, worker: Worker, queries: Sequence[str]) -> None:
        """Make what a search needs. All processes call it.

        Args:
            worker: this process.
            queries: of the kind that will be asked.
        """
        ...

    def passage(self, number: int) -> Passage:
        """A passage."""
        ...

    def normalized(self, number: int) -> str:
        """Text of a passage, white space and case aside."""
        ...

    def search(self, vectors_QD: np.ndarray, k: int) -> np.ndarray:
        """Numbers of the nearest passages.

        Args:
            vectors_QD: of queries, as the embedder gives them.
            k: passages.

        Returns:
            int64 [Q, k], nearest first; -1 where there are fewer.
        """
        ...

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        """Unit vectors of passages by the student, float32 [n, D]."""
        ...


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1, float32; of length 0 where they were."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)


def digest_of_texts(texts: Sequence[str]) -> str:
    """SHA-256 of texts."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def read_passages(paths: Sequence[Path], records: Sequence[Record]) -> list[Passage]:
    """Different passages of a corpus, in order; those of the records where no corpus is given.

    Raises:
        DataError: a line without a passage; names it.
    """
    found: dict[str, Passage] = {}

    def add(pair: TextPair, has_instruction: bool) -> None:
        if pair.text.strip():
            key = hashlib.blake2b(normalized(pair.text).encode(), digest_size=16).hexdigest()
            found.setdefault(key, Passage(pair.instruction, pair.text, has_instruction))

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


class StoredVectors:
    """Unit vectors of texts by one embedder, in blocks on disk."""

    def __init__(self, embedder: Embedder, folder: Path, texts: Sequence[str], block_size: int) -> None:
        self.embedder, self.texts = embedder, texts
        signature = {"task": "passages", "corpus": digest_of_texts(texts), "embedder": embedder.fingerprint}
        self.blocks = BlockFolder(folder, len(texts), block_size, signature)

    def prepare(self, worker: Worker) -> None:
        """Embed the texts. All processes call it."""
        compute_blocks(self.blocks, self._compute, worker, f"passages ({self.blocks.folder.name})", "passage")

    def _compute(self, block: Block) -> Arrays:
        return {"data": unit(self.embedder.embed(self.texts[block.start : block.stop]))}

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Vectors of texts, float32 [n, D]."""
        return rows_of(self.blocks, ids, self.embedder.dim)


class PassageFiles:
    """Passages of JSONL files, in memory; their vectors on disk; searched by cosine.

    Args:
        passages: of :func:`read_passages`.
        embedder: the student.
        folder: for the vectors.
        index: a faiss factory string, or auto.
        memory_bytes: with auto, what the index may take.
        block_size: passages of a block.
        seed: of the index's training sample.

    Raises:
        ConfigError: an index that cannot be made of these passages.
    """

    def __init__(
        self,
        passages: list[Passage],
        embedder: Embedder,
        folder: Path,
        *,
        index: str = "auto",
        memory_bytes: float = 2.0**34,
        block_size: int = 10_000,
        seed: int = 0,
    ) -> None:
        self.passages, self.embedder, self._seed = passages, embedder, seed
        texts = [passage.text for passage in passages]
        self._normalized = [normalized(text) for text in texts]
        self.stored = StoredVectors(embedder, folder / "student", texts, block_size)
        count = len(passages)
        self._factory = choose_factory(count, embedder.dim, memory_bytes) if index == "auto" else index
        new_index(self._factory, "inner_product", embedder.dim)
        if (lists_of(self._factory) or 0) > count:
            raise ConfigError(f"index {self._factory} has more lists than there are passages, {count:,}; give fewer")
        settings = {"vectors": self.stored.blocks.signature, "index": self._factory, "seed": seed}
        self.signature = digest_of_settings(settings)
        self._index: ShardedIndex | None = None
        self._queries: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.passages)

    def prepare(self, worker: Worker, queries: Sequence[str]) -> None:
        self.stored.prepare(worker)
        self._queries = queries

    def passage(self, number: int) -> Passage:
        return self.passages[number]

    def normalized(self, number: int) -> str:
        return self._normalized[number]

    def search(self, vectors_QD: np.ndarray, k: int) -> np.ndarray:
        if self._index is None:
            self._index = self._build()
        return self._index.search(unit(vectors_QD), k)[1]

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        return self.stored.of(numbers)

    def _build(self) -> ShardedIndex:
        count, dim = len(self.passages), self.embedder.dim
        sample = np.random.default_rng(self._seed).permutation(count)[: num_training_vectors(self._factory, count)]
        trained = self.stored.of(np.sort(sample)) if len(sample) else np.empty((0, dim), np.float32)
        made = VectorIndex.train(
            self._factory, "inner_product", trained, remedy="give a smaller index, or more passages"
        )
        chosen = np.random.default_rng(self._seed).permutation(len(self._queries))[:_NUM_PROBING]
        queries = unit(self.embedder.embed([self._queries[number] for number in np.sort(chosen)], "query"))

        def nearest_in_turn() -> Iterator[Found]:
            for block in self.stored.blocks.blocks:
                vectors = self.stored.blocks.read(block)["data"]
                made.add_codes(made.encode(vectors), np.arange(block.start, block.stop))
                scores, rows = exact_search(queries, vectors, RECALL_AT, "inner_product")
                yield scores, rows + block.start

        nearest = merge_in_turn(nearest_in_turn(), RECALL_AT, "inner_product")[1]
        index = ShardedIndex([made])
        if index.num_lists > 1:
            none = np.full(len(queries), -1, dtype=np.int64)
            exact = without_own(nearest, none, RECALL_AT)
            settings = choose_search(index, RetroDbConfig(seed=self._seed), queries, none, exact)
            index.set_search(settings.nprobe, settings.ef_search)
            log.info(
                f"index {self._factory} of {count:,} passages: nprobe {settings.nprobe} finds {settings.recall:.3f} of "
                "the nearest for these queries"
            )
        return index


class DatabaseChunks:
    """The chunks of a retrieval database, searched in its index; nothing is embedded anew but queries and candidates.

    Args:
        folder: the project directory.
        version: which state of it. None: the configured one, or the newest.

    Raises:
        DataError: there is no database, or its index is of another embedder than its configuration's.
    """

    def __init__(self, folder: Path, version: int | None = None) -> None:
        config = load_project_config(folder)
        if config is None:
            raise DataError("is no project directory: it has no config.json", path=folder)
        self._project = Project(folder, config)
        self._version = read_version(folder, config.version if version is None else version)
        self._db = VersionedDb(self._project, self._version)
        self.embedder = project_embedder(config, alone=True)
        check_embedder(self._db, self.embedder)
        self._index = open_index(self._project, self._version, population="questions")
        tombstones, search = self._version.tombstones, search_of(self._project, self._version, "questions")
        self.signature = digest_of_settings(
            {
                "chunks": self._version.chunks,
                "embedder": self._version.embedder,
                "index": [file.sha256 for segment in self._version.segments for file in segment.index],
                "tombstones": tombstones.sha256 if tombstones else None,
                "search": [search.nprobe, search.ef_search],
                "query_instruction": config.query_instruction,
            }
        )
        self._vectors_of: Callable[[np.ndarray], np.ndarray] = self._embedded

    def __len__(self) -> int:
        return len(self._db)

    def prepare(self, worker: Worker, queries: Sequence[str]) -> None:
        vectors = version_vectors(self._db, worker, self.embedder)
        if vectors.stored:
            self._vectors_of = vectors.of

    def passage(self, number: int) -> Passage:
        return Passage(None, self._db.texts([number])[0], False)

    def normalized(self, number: int) -> str:
        return normalized(self._db.texts([number])[0])

    def search(self, vectors_QD: np.ndarray, k: int) -> np.ndarray:
        """As :class:`Corpus` says; removed documents are left out."""
        return nearest_chunks(self._db, self._index, vectors_QD, k)[1]

    def vectors(self, numbers: np.ndarray) -> np.ndarray:
        return unit(self._vectors_of(numbers))

    def _embedded(self, numbers: np.ndarray) -> np.ndarray:
        return self.embedder.embed(self._db.texts(numbers))
