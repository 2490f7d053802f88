"""A database as programs ask it: opened once, searched by many threads, always in its newest version."""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig, load_project_config
from megatron_grit.config.knob import Checked, knob, value_problem
from megatron_grit.config.values import shortened
from megatron_grit.data.chunks.chunk_db import DATASET, DOCUMENT, START, STOP
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import (
    VersionedDb,
    read_version,
    sorted_keys,
    version_numbers,
)
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError, GritError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.inference.messages import check_texts
from megatron_grit.retrieval.database.versions import check_embedder, nearest_chunks, open_index
from megatron_grit.retrieval.index.recall import Population
from megatron_grit.retrieval.index.search import Found, SearchableIndex
from megatron_grit.retrieval.lexical import LexicalIndex, fuse
from megatron_grit.retrieval.stages.embed import project_embedder
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

Mode = Literal["dense", "lexical", "hybrid"]
_FUSED = 100
"""Ranks of each search that a hybrid search fuses, at least."""


@dataclass(kw_only=True)
class _Wanted(Checked):
    """What a search gives for a query."""

    k: int = knob(10, at_least=1, at_most=1_000_000)
    mode: Mode = "dense"
    length: int | None = knob(None, at_least=1, at_most=1_000_000)


@dataclass(frozen=True)
class ChunkPlace:
    """Where a chunk is: tokens ``start`` to ``stop - 1`` of a document."""

    prefix: str
    """Of the indexed file."""
    dataset: int
    document: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Hits:
    """What was found for Q queries, the best first; a row ends where nothing more was found."""

    ids: np.ndarray
    """Chunks, int64 [Q, k]; -1 for none."""
    scores: np.ndarray
    """float32 [Q, k]: inner products or squared distances of a dense search (see :attr:`Retriever.metric`), BM25 of a
    lexical one, sums of reciprocal ranks of a hybrid one."""
    tokens: np.ndarray
    """int32 [Q, k, length]: each chunk with what follows it in its document."""
    mask: np.ndarray
    """bool [Q, k, length]: where a token is."""
    sources: list[list[ChunkPlace]]
    """Of the chunks of each query that were found."""
    texts: list[list[str]]
    """Of those chunks, without what follows."""
    version: int
    """Of the database."""


class Retriever:
    """Searches a database that was built by ``build-db``.

    >>> retriever = Retriever("db")
    >>> hits = retriever.search("who wrote it", k=3)
    >>> hits.texts[0][0], hits.sources[0][0].document

    Threads may search at once. A version that is written meanwhile, by ``add`` or ``tombstone``, is opened by the next
    search; searches that are under way end in the version that they began with.

    Args:
        folder: the project directory.
        embedder: what texts are embedded with. None: the one that config.json names.
        version: stay with this version. None: always the newest.
        population: what is asked for, for which the search was chosen as far as its recall was measured: people's
            questions, or chunks of text.

    Raises:
        DataError: there is no database or no index, or a file was changed.
        ConfigError: the embedder cannot be loaded, or a version that is none.
    """

    def __init__(
        self,
        folder: str | Path,
        embedder: Embedder | None = None,
        version: int | None = None,
        population: Population = "questions",
    ) -> None:
        if (problem := value_problem(RetroDbConfig, "version", version)) is not None:
            raise ConfigError(f"version {problem}")
        if population not in get_args(Population):
            raise ConfigError(
                f"population must be one of {', '.join(get_args(Population))}, not {shortened(population)}"
            )
        self._folder, self._pinned, self._population = Path(folder), version, population
        self._opening, self._embedding = threading.Lock(), threading.Lock()
        self._refused = 0
        self._opened = _Opened(self._folder, version, population)
        self.embedder = embedder or project_embedder(self._opened.db.project.config, alone=True)
        self._opened.check(self.embedder)

    @property
    def metric(self) -> str:
        """Of dense scores: l2, of which the smallest are best, or inner_product."""
        return str(self._opened.index.metric)

    @property
    def chunk_length(self) -> int:
        """Tokens of a chunk."""
        return self._opened.db.project.config.chunk_length

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the documents."""
        return self._opened.db.project.tokenizer

    @property
    def version(self) -> int:
        """The version that the last search was made in."""
        return self._opened.db.version.number

    def search(
        self,
        queries: str | Sequence[str] | np.ndarray,
        k: int = 10,
        *,
        exclude: Sequence[tuple[int, int]] = (),
        mode: Mode = "dense",
        length: int | None = None,
    ) -> Hits:
        """The chunks that are nearest to each query; removed documents are passed over.

        Args:
            queries: texts, or their vectors, float32 [Q, D].
            k: chunks of each query.
            exclude: (dataset, document) of documents that are not to be found, as :class:`ChunkPlace` numbers them.
            mode: by vectors, by words (BM25, needs bm25s), or both, fused by reciprocal rank.
            length: tokens of each chunk with what follows it. None: two chunks.

        Raises:
            ConfigError: an option that is out of its range, or vectors are given to a search by words.
            DataError: vectors of another width or that are not finite, or a text without a token.
        """
        _Wanted(k=k, mode=mode, length=length)
        given = queries if isinstance(queries, np.ndarray) else check_texts(queries, "query")
        if isinstance(given, np.ndarray) and mode != "dense":
            raise ConfigError(f"a {mode} search needs texts, and vectors were given")
        opened, most = self._newest(), max(k, _FUSED)
        excluded = sorted_keys(_documents(exclude))
        removed = np.union1d(opened.db.tombstones, excluded)
        if mode == "dense":
            found = self._by_vectors(opened, given, k, excluded)
        else:
            assert not isinstance(given, np.ndarray)
            by_words = opened.words.search(given, k if mode == "lexical" else most, opened.db.chunks_of(removed))
            found = by_words
            if mode == "hybrid":
                found = fuse([self._by_vectors(opened, given, most, excluded)[1], by_words[1]], k)
        return _hits(opened.db, found, length)

    def _by_vectors(self, opened: _Opened, queries: Sequence[str] | np.ndarray, k: int, excluded: np.ndarray) -> Found:
        if isinstance(queries, np.ndarray):
            if queries.dtype.kind not in "fiu" or not np.isfinite(queries).all():
                raise DataError("vectors to search for must be finite numbers")
            vectors = np.ascontiguousarray(queries, dtype=np.float32)
        else:
            with self._embedding:  # the model's buffers are of one thread
                vectors = self.embedder.embed(queries, "query")
        return nearest_chunks(opened.db, opened.index, vectors, k, excluded)

    def _newest(self) -> _Opened:
        newest = max(version_numbers(self._folder), default=0)
        if self._pinned is not None or newest <= max(self.version, self._refused):
            return self._opened
        with self._opening:
            if newest > max(self.version, self._refused):
                try:
                    opened = _Opened(self._folder, newest, self._population)
                    opened.check(self.embedder)
                    self._opened = opened
                except GritError as error:
                    self._refused = newest
                    log.warning(f"version {newest} is not searched, version {self.version} still is: {error}")
        return self._opened


def _documents(exclude: Any) -> list[tuple[int, int]]:
    """Documents that a search leaves out."""
    try:
        pairs = [(operator.index(dataset), operator.index(document)) for dataset, document in exclude]
    except (TypeError, ValueError):
        pairs = [(-1, -1)]
    if any(not 0 <= number < 1 << 31 for pair in pairs for number in pair):
        raise ConfigError(f"exclude must be pairs of the numbers of a dataset and a document, not {shortened(exclude)}")
    return pairs


class _Opened:
    """One version, open."""

    def __init__(self, folder: Path, version: int | None, population: Population) -> None:
        config = load_project_config(folder)
        if config is None:
            raise DataError("is no project directory: it has no config.json", path=folder)
        project = Project(folder, config)
        self.db = VersionedDb(project, read_version(folder, config.version if version is None else version))
        self.index: SearchableIndex = open_index(project, self.db.version, population=population)
        self._making = threading.Lock()

    def check(self, embedder: Embedder) -> None:
        """
        Raises:
            DataError: the index is of another embedder.
        """
        check_embedder(self.db, embedder)

    @property
    def words(self) -> LexicalIndex:
        """Made at the first search by words."""
        with self._making:
            return self._words

    @cached_property
    def _words(self) -> LexicalIndex:
        return LexicalIndex(self.db)


def _hits(db: VersionedDb, found: Found, length: int | None) -> Hits:
    scores, ids = found
    tokens, mask = db.read_tokens(ids, length)
    sources, texts = [], []
    for row in ids:
        there = row[row >= 0]
        places = db.rows[there].tolist()
        sources.append(
            [ChunkPlace(db.infos[p[DATASET]].prefix, p[DATASET], p[DOCUMENT], p[START], p[STOP]) for p in places]
        )
        texts.append(db.texts(there))
    return Hits(
        ids=ids, scores=scores, tokens=tokens, mask=mask, sources=sources, texts=texts, version=db.version.number
    )
