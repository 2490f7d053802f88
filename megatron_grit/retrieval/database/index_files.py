"""The files of a database's index: where they are, what they follow from, and how they are filled."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.order.permutation import derive_keys, permute
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.database.vectors import chunks_fingerprint
from megatron_grit.retrieval.index.factory import (
    MOST_BYTES,
    choose_factory,
    index_bytes,
    lists_of,
    num_training_vectors,
)
from megatron_grit.retrieval.index.faiss_index import VectorIndex, new_index
from megatron_grit.retrieval.index.manifest import IndexManifest, is_whole, read_manifest
from megatron_grit.retrieval.index.recall_queries import RecallQueries
from megatron_grit.store.blocks import BlockFolder
from megatron_grit.store.digest import digest_of_settings


def check_index(config: RetroDbConfig, dim: int, num_chunks: int, *, at_most: bool = False) -> tuple[str, int]:
    """The factory string of a database's index, and how many chunks it is trained on.

    Args:
        config: of the database.
        dim: channels of a vector.
        num_chunks: of the database.
        at_most: they may be fewer, so that only what is wrong with any such number is refused; index auto then stays
            auto.

    Raises:
        ConfigError: an index that cannot be made of such a database.
    """
    factory = config.index
    there = f"{'at most ' if at_most else ''}{num_chunks:,} chunks of the database"
    if config.ntrain is not None and config.ntrain > num_chunks:
        raise ConfigError(f"ntrain {config.ntrain:,} is above the {there}; lower it")
    if config.num_shards is not None and config.num_shards > num_chunks:
        raise ConfigError(f"num_shards {config.num_shards} is above the {there}; lower it")
    if factory == "auto":
        if at_most:
            return factory, 0
        factory = choose_factory(num_chunks, dim, config.index_memory_gb * 2**30)
    new_index(factory, config.metric, dim)
    num_train = num_training_vectors(factory, num_chunks) if config.ntrain is None else config.ntrain
    lists = lists_of(factory)
    if lists is None and config.add_load_fraction < 1:
        raise ConfigError(f"index {factory} holds no ids; set add_load_fraction to 1, or give one with lists (IVF...)")
    if lists is not None and num_train * config.train_load_fraction < lists:
        raise ConfigError(
            f"ntrain {num_train:,} x train_load_fraction {config.train_load_fraction} is below the {lists} lists of "
            f"index {factory}; raise ntrain or take fewer lists"
        )
    return factory, num_train


class IndexFiles:
    """Where the index of a project is, and what it follows from.

    Args:
        project: the database.
        db: its chunks.
        embedder: fingerprint of what embeds them.
        dim: channels of a vector.

    Raises:
        ConfigError: an index that cannot be made of this database.
    """

    def __init__(self, project: Project, db: ChunkDb, embedder: str, dim: int) -> None:
        config = project.config
        self.config, self.embedder = config, embedder
        self.chunks = chunks_fingerprint(project, db.infos)
        factory, self.num_train = check_index(config, dim, len(db))
        self.factory = factory
        self.root = project.folder / "index"
        self.folder = self.root / "faiss-par-add" / factory.replace("/", "_")
        self.trained = self.folder / f"empty_{config.train_load_fraction:.3f}.faissindex"
        name = f"added_{config.train_load_fraction:.3f}_{config.add_load_fraction:.3f}"
        count = config.num_shards or -(-index_bytes(factory, dim, len(db)) // MOST_BYTES)
        self.added = [
            self.folder / (f"{name}.faissindex" if count == 1 else f"{name}_{shard:03d}of{count:03d}.faissindex")
            for shard in range(count)
        ]
        self.search = self.folder / "search.json"
        self.queries = RecallQueries(project, self.chunks, embedder)
        self.exact = self.folder / "exact_neighbors.hdf5"
        self.training = digest_of_settings(
            {
                "chunks": self.chunks,
                "embedder": embedder,
                "dtype": config.embedding_dtype,
                "factory": factory,
                "metric": config.metric,
                "ntrain": self.num_train,
                "train_load_fraction": config.train_load_fraction,
                "seed": config.seed,
            }
        )
        """Of all that the trained index follows from."""

    def sample(self, num_chunks: int) -> np.ndarray:
        """Ids of the chunks that the index is trained on, at random, ascending: int64 [num_train]."""
        return np.sort(permute(np.arange(self.num_train), num_chunks, derive_keys(0, self.config.seed)))

    def adding(self) -> str:
        """Of all that the filled index follows from.

        Raises:
            DataError: there is no trained index.
        """
        # The file alone does not tell embedders apart: an index that needs no training is the same for all.
        trained, fraction = read_manifest(self.trained).sha256, self.config.add_load_fraction
        settings = {"trained": trained, "training": self.training, "fraction": fraction}
        return digest_of_settings(settings | {"chunks": self.chunks, "shards": len(self.added)})

    def manifest(self, index: VectorIndex, num_trained: int, signature: str) -> IndexManifest:
        """Of an index that is about to be saved."""
        return IndexManifest(
            factory=self.factory,
            metric=index.metric,
            dim=index.dim,
            embedder=self.embedder,
            chunks=self.chunks,
            num_trained=num_trained,
            num_vectors=len(index),
            signature=signature,
        )


def is_finished(path: Path, signature: str) -> bool:
    """Whether an index file is whole and of these settings."""
    try:
        manifest = read_manifest(path)
    except DataError:
        return False
    return manifest.signature == signature and is_whole(path, manifest)


def fill(
    trained: Path,
    codes: BlockFolder,
    first: int,
    last: int,
    id_of_first: int = 0,
    report: Callable[[int], object] = int,
) -> VectorIndex:
    """A trained index filled with codes, in the order of the chunks.

    Args:
        trained: the index without vectors.
        codes: blocks of ``codes``, item by item or the first ones of each block.
        first: item.
        last: item after the last.
        id_of_first: id of item 0.
        report: called with the number of items of each block that was added.
    """
    index, size = VectorIndex.load(trained), codes.block_size
    for block in codes.blocks[first // size : -(-last // size)]:
        begin, end = max(first, block.start) - block.start, min(last, block.stop) - block.start
        rows = codes.read(block)["codes"][begin:end]
        index.add_codes(rows, np.arange(len(rows)) + id_of_first + block.start + begin)
        report(end - begin)
    return index


def num_added(fraction: float, num_chunks: int) -> int:
    """Chunks of a block that are added to the index: the first ones."""
    return math.ceil(fraction * num_chunks)
