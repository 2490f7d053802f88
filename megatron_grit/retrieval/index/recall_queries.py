"""The queries that choose how an index is searched and measure what it finds: of the kind that will be asked.

Where a recall was measured on chunks, questions of people find less of their nearest neighbors than was promised. So
there are two populations: ``chunks``, of ``query_paths`` or else of the database, for the table that training reads;
and ``questions``, the texts of ``recall_queries``, for what people ask.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.neighbor_table import chunk_at, write_starts
from megatron_grit.data.chunks.project import Project, fingerprint
from megatron_grit.data.chunks.versions import shares_documents, source_of
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.order.permutation import derive_keys, permute
from megatron_grit.data.text.lines import Line, filled_lines
from megatron_grit.data.text.records import check_text
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.vectors import ChunkVectors, find_chunks
from megatron_grit.retrieval.index.recall import Population
from megatron_grit.retrieval.work import Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder
from megatron_grit.store.digest import digest_of_settings, sha256_of_file
from megatron_grit.store.sealed import read_sealed, write_sealed

NUM_QUERIES = 4000


def query_ids(num_chunks: int, seed: int) -> np.ndarray:
    """Ids of the chunks that measure the recall: the last of a random order, in that order. None of them is in the
    sample that the index is trained on, the first of the same order, where others are enough: the centres of the lists
    lie too well for those that they were trained on."""
    count = min(NUM_QUERIES, num_chunks)
    return permute(np.arange(num_chunks - count, num_chunks), num_chunks, derive_keys(0, seed))


def _some(count: int, seed: int) -> np.ndarray:
    """NUM_QUERIES of 0 to ``count - 1`` at random, or all of them."""
    return permute(np.arange(min(NUM_QUERIES, count)), max(count, 1), derive_keys(0, seed))


@dataclass(frozen=True, kw_only=True)
class DrawnQueries:
    """``queries.json``."""

    signature: str
    """Of all that the texts and their vectors follow from."""
    source: str
    """What they are, in words."""
    query_instruction: str
    """With which they were embedded."""
    ids: list[int]
    """Of the texts in the database; -1 for one that is no chunk of it."""
    texts: list[str]

    @property
    def population(self) -> Population:
        """Of which kind they are."""
        return "questions" if self.source.startswith("texts of ") else "chunks"


class _Queries:
    """Texts and their vectors as queries, in a folder of their own.

    Args:
        project: the database.
        folder: of them.
        task: that makes them.
    """

    def __init__(self, project: Project, folder: Path, task: str) -> None:
        self._project, self._config, self._task = project, project.config, task
        self.folder, self._file = folder, folder / "queries.json"

    def source(self) -> tuple[str, str]:
        """What the settings say that the queries are, in words, and the signature of it.

        Raises:
            DataError: one of the files is missing.
        """
        raise NotImplementedError

    def _prepare(
        self,
        worker: Worker,
        draw: Callable[[], tuple[list[int], list[str]]],
        embed: Callable[[np.ndarray, list[str]], np.ndarray],
    ) -> None:
        """Draw the texts, with their ids, and embed them, unless that is done. All processes call it."""
        if worker.is_first:
            name, signature = self.source()
            if not self._file.is_file() or self._read_file().signature != signature:
                ids, texts = draw()
                if not texts:
                    raise DataError("has no text to measure the recall with", path=f"{self._project.folder}: {name}")
                drawn = DrawnQueries(
                    signature=signature,
                    source=name,
                    query_instruction=self._config.query_instruction,
                    ids=ids,
                    texts=texts,
                )
                write_sealed(self._file, asdict(drawn))
        worker.barrier()
        self.__dict__.pop("drawn", None)  # of before
        texts, own = self.drawn.texts, np.array(self.drawn.ids, dtype=np.int64)

        def compute(block: Block) -> Arrays:
            return {"data": embed(own[block.start : block.stop], texts[block.start : block.stop])}

        compute_blocks(self.blocks, compute, worker, "queries that measure the recall", "query")

    @functools.cached_property
    def drawn(self) -> DrawnQueries:
        """Those that were drawn; settings may have changed since.

        Raises:
            DataError: they are missing or damaged.
        """
        return self._read_file()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids, int64 [Q], and vectors, float32 [Q, D].

        Raises:
            DataError: they are missing or damaged.
        """
        blocks = self.blocks
        vectors = [blocks.read(block)["data"] for block in blocks.blocks]
        return np.array(self.drawn.ids, dtype=np.int64), np.concatenate(vectors)

    @property
    def is_drawn(self) -> bool:
        """Whether texts were drawn, of whatever settings."""
        return self._file.is_file()

    def _read_file(self) -> DrawnQueries:
        try:
            return DrawnQueries(**read_sealed(self._file))
        except (OSError, ValueError, TypeError) as error:
            again = "--tasks recall" if self._task == "recall" else f"--tasks {self._task} --overwrite {self._task}"
            raise DataError(f"cannot be read ({error}); delete it and run {again}", path=self._file) from None

    @property
    def blocks(self) -> BlockFolder:
        """Of their vectors: ``data``, float32 [n, dim]."""
        signature = {"task": "recall_queries", "queries": self.drawn.signature}
        return BlockFolder(
            self.folder, len(self.drawn.texts), self._config.block_size, signature, f"run --tasks {self._task}"
        )


class RecallQueries(_Queries):
    """Chunks that choose how an index is searched and measure its recall. A database of an earlier release may hold the
    texts of ``recall_queries`` in their place.

    Args:
        project: the database.
        chunks: fingerprint of its chunks.
        embedder: fingerprint of what embeds them.
    """

    def __init__(self, project: Project, chunks: str, embedder: str) -> None:
        super().__init__(project, project.folder / "index" / "recall_queries", "index-add")
        self._settings = {"chunks": chunks, "embedder": embedder, "seed": self._config.seed, "count": NUM_QUERIES}
        self._datasets: dict[str, int | None] = {}

    def source(self) -> tuple[str, str]:
        """As :class:`_Queries` says."""
        config, settings = self._config, self._settings | {"query_instruction": self._config.query_instruction}
        name = "chunks of the database"
        if self._asks_others():
            name = "chunks of query_paths"
            settings["query_paths"] = [fingerprint(self._project.resolve(prefix)) for prefix in config.query_paths]
        return name, digest_of_settings(settings)

    def prepare(self, vectors: ChunkVectors, worker: Worker) -> None:
        """Draw the texts and embed them, unless that is done. All processes call it.

        Raises:
            DataError: there is no text.
        """
        embedder = vectors.embedder

        def embed(own: np.ndarray, texts: list[str]) -> np.ndarray:
            if embedder.sides_alike and min(self.drawn.ids) >= 0:
                return vectors.of(own)
            return embedder.embed(texts, "query")

        self._prepare(worker, lambda: self._draw(vectors.db), embed)

    def _asks_others(self) -> bool:
        """Whether something else than the documents of the database gets neighbors."""
        return any(self._dataset(prefix) is None for prefix in self._config.query_paths)

    def _draw(self, db: ChunkDb) -> tuple[list[int], list[str]]:
        if self._asks_others():
            return self._draw_from_paths(db)
        ids = query_ids(len(db), self._config.seed)
        return ids.tolist(), db.texts(ids)

    def _draw_from_paths(self, db: ChunkDb) -> tuple[list[int], list[str]]:
        """Chunks of all files that get neighbors, each as likely as any other."""
        project, config = self._project, self._config
        tokenizer = project.tokenizer
        files = [IndexedFile(project.resolve(prefix)) for prefix in config.query_paths]
        ids: list[int] = []
        texts: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            starts = []
            for number, file in enumerate(files):
                path = Path(folder) / f"{number}.npy"
                write_starts(path, file, config.chunk_length, tokenizer.eos_id)
                starts.append(np.load(path, mmap_mode="r"))
            ends = np.cumsum([int(places[-1]) for places in starts])
            total = int(ends[-1])
            for place in _some(total, config.seed).tolist():
                number = int(np.searchsorted(ends, place, side="right"))
                place -= int(ends[number]) - int(starts[number][-1])
                document, offset, tokens = chunk_at(
                    files[number], starts[number], place, config.chunk_length, tokenizer.eos_id
                )
                text = tokenizer.decode(tokens.tolist())
                if text.strip():
                    dataset = self._dataset(config.query_paths[number])
                    where = (np.array([document]), np.array([offset]))
                    ids.append(-1 if dataset is None else int(find_chunks(db.rows, dataset, *where)[0]))
                    texts.append(text)
        return ids, texts

    def _dataset(self, prefix: str) -> int | None:
        """Number that a file of ``query_paths`` has in the database."""
        if prefix not in self._datasets:
            path, owns = self._project.resolve(prefix), map(self._project.resolve, self._config.data_paths)
            same = (  # a source is looked at only where the path does not tell
                number
                for number, own in enumerate(owns)
                if own.resolve() == path.resolve() or shares_documents(path, own, source_of(str(own), own))
            )
            self._datasets[prefix] = next(same, None)
        return self._datasets[prefix]


class RecallQuestions(_Queries):
    """The texts of ``recall_queries``, which do not follow from the chunks.

    Args:
        project: the database.
        embedder: fingerprint of what embeds them.

    Raises:
        ConfigError: ``recall_queries`` is null.
        DataError: there is no such file.
    """

    def __init__(self, project: Project, embedder: str) -> None:
        super().__init__(project, project.folder / "index" / "recall_queries" / "questions", "recall")
        given = self._config.recall_queries
        if given is None:
            raise ConfigError(
                "recall_queries is null; give --recall_queries FILE, a text file with a question in each line or JSONL"
            )
        self._embedder = embedder
        self.path = project.folder / given if (project.folder / given).is_file() else Path(given)
        if not self.path.is_file():
            what = "is a folder" if self.path.is_dir() or (project.folder / given).is_dir() else "no such file"
            raise DataError(
                f"{what}; recall_queries is a text file with a question in each line, or JSONL", path=self.path
            )
        self.sha256 = sha256_of_file(self.path)

    def source(self) -> tuple[str, str]:
        """As :class:`_Queries` says."""
        settings = {"texts": self.sha256, "embedder": self._embedder, "seed": self._config.seed, "count": NUM_QUERIES}
        settings["query_instruction"] = self._config.query_instruction
        return f"texts of {self._config.recall_queries}", digest_of_settings(settings)

    def texts(self) -> list[str]:
        """All of them, each once.

        Raises:
            DataError: a line that is no question.
        """
        is_json = {".jsonl", ".json"} & set(self.path.suffixes)
        read = _question_of if is_json else Line.text
        return list(dict.fromkeys(filter(None, (read(line).strip() for line in filled_lines(self.path)))))

    def prepare(self, embedder: Embedder, worker: Worker) -> None:
        """Draw some of them and embed them, unless that is done. All processes call it.

        Raises:
            DataError: there is no text, or a line that is no question.
        """

        def draw() -> tuple[list[int], list[str]]:
            texts = self.texts()
            drawn = [texts[place] for place in _some(len(texts), self._config.seed)]
            return [-1] * len(drawn), drawn

        self._prepare(worker, draw, lambda _, texts: embedder.embed(texts, "query"))

    def embedded(self, embedder: Embedder, block: Block) -> Arrays:
        """The vectors of a block, computed now."""
        return {"data": embedder.embed(self.drawn.texts[block.start : block.stop], "query")}


_KEYS = ("query", "question", "prompt", "text")
"""Of a JSON object, the first that it has is the question."""


def _question_of(line: Line) -> str:
    """The question of a line of JSON: a string, or that of an object; of a query with an instruction its text."""
    value: Any = line.value()
    try:
        if isinstance(value, dict):
            key = next((key for key in _KEYS if key in value), None)
            if key is None:
                raise DataError(f"holds none of the keys {', '.join(_KEYS)}")
            value = value[key]
            if key == "query" and isinstance(value, list) and len(value) == 2:
                value = value[1]
        return check_text(value, "a question")
    except DataError as error:
        raise line.error(str(error)) from None
