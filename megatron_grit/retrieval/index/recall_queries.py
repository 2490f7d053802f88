"""The queries that choose how an index is searched and measure what it finds: of the kind that will be asked.

Where a recall was measured on chunks of the database, questions of people find less of their nearest neighbors than
was promised. So the queries are drawn from what will be searched for: ``recall_queries`` if it is given, else
``query_paths``, else the chunks of the database.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.neighbor_table import chunk_at, write_starts
from megatron_grit.data.chunks.project import Project, fingerprint
from megatron_grit.data.chunks.versions import shares_documents, source_of
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.order.permutation import derive_keys, permute
from megatron_grit.data.text.lines import read_lines
from megatron_grit.errors import DataError
from megatron_grit.retrieval.database.vectors import ChunkVectors, find_chunks
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


class RecallQueries:
    """Texts and their vectors as queries, in a folder of their own.

    Args:
        project: the database.
        chunks: fingerprint of its chunks.
        embedder: fingerprint of what embeds them.
    """

    def __init__(self, project: Project, chunks: str, embedder: str) -> None:
        self._project, self._config = project, project.config
        self._settings = {"chunks": chunks, "embedder": embedder, "seed": self._config.seed, "count": NUM_QUERIES}
        self.folder = project.folder / "index" / "recall_queries"
        self._file = self.folder / "queries.json"
        self._datasets: dict[str, int | None] = {}

    def source(self) -> tuple[str, str]:
        """What the settings say that the queries are, in words, and the signature of it.

        Raises:
            DataError: one of the files is missing.
        """
        config, settings = self._config, self._settings | {"query_instruction": self._config.query_instruction}
        if config.recall_queries is not None:
            name, settings["texts"] = f"texts of {config.recall_queries}", sha256_of_file(self._text_file())
        elif self._asks_others():
            name = "chunks of query_paths"
            settings["query_paths"] = [fingerprint(self._project.resolve(prefix)) for prefix in config.query_paths]
        else:
            name = "chunks of the database"
        return name, digest_of_settings(settings)

    def prepare(self, vectors: ChunkVectors, worker: Worker) -> None:
        """Draw the texts and embed them, unless that is done. All processes call it.

        Raises:
            DataError: there is no text.
        """
        if worker.is_first:
            name, signature = self.source()
            if not self._file.is_file() or self._read_file().signature != signature:
                ids, texts = self._draw(vectors.db)
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
        texts, own = self.drawn.texts, np.array(self.drawn.ids, dtype=np.int64)
        embedder, all_chunks = vectors.embedder, bool((own >= 0).all())

        def compute(block: Block) -> Arrays:
            if all_chunks and embedder.sides_alike:
                return {"data": vectors.of(own[block.start : block.stop])}
            return {"data": embedder.embed(texts[block.start : block.stop], "query")}

        compute_blocks(self._blocks(), compute, worker, "queries that measure the recall", "query")

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
        blocks = self._blocks()
        vectors = [blocks.read(block)["data"] for block in blocks.blocks]
        return np.array(self.drawn.ids, dtype=np.int64), np.concatenate(vectors)

    def _read_file(self) -> DrawnQueries:
        try:
            return DrawnQueries(**read_sealed(self._file))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"cannot be read ({error}); delete it and run --tasks index-add --overwrite index-add", path=self._file
            ) from None

    def _blocks(self) -> BlockFolder:
        signature = {"task": "recall_queries", "queries": self.drawn.signature}
        return BlockFolder(
            self.folder, len(self.drawn.texts), self._config.block_size, signature, "run --tasks index-add"
        )

    def _asks_others(self) -> bool:
        """Whether something else than the documents of the database gets neighbors."""
        return any(self._dataset(prefix) is None for prefix in self._config.query_paths)

    def _text_file(self) -> Path:
        assert self._config.recall_queries is not None
        for path in (self._project.folder / self._config.recall_queries, Path(self._config.recall_queries)):
            if path.is_file():
                return path
        raise DataError("no such file; recall_queries is a text file with a query in each line", path=path)

    def _draw(self, db: ChunkDb) -> tuple[list[int], list[str]]:
        if self._config.recall_queries is not None:
            return self._draw_lines(self._text_file())
        if self._asks_others():
            return self._draw_from_paths(db)
        ids = query_ids(len(db), self._config.seed)
        return ids.tolist(), db.texts(ids)

    def _draw_lines(self, path: Path) -> tuple[list[int], list[str]]:
        lines = list(dict.fromkeys(filter(None, (line.text().strip() for line in read_lines(path)))))
        texts = [lines[place] for place in _some(len(lines), self._config.seed)]
        return [-1] * len(texts), texts

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
