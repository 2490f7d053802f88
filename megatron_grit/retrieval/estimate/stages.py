"""Time, disk and memory of each task of a build, by formula from measured rates.

docs/retro.md has the formulas as a table. Memory is that of the process that needs most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.retrieval.dedup.buckets import choose_bands
from megatron_grit.retrieval.estimate.rates import Rates, Spent, nprobe_of
from megatron_grit.retrieval.index.factory import MOST_BYTES, code_bytes, index_bytes, lists_of, width_of
from megatron_grit.retrieval.index.kmeans import ITERATIONS, POINTS_PER_LIST, SHARED_LISTS
from megatron_grit.retrieval.index.recall import RECALL_AT
from megatron_grit.retrieval.index.recall_queries import NUM_QUERIES
from megatron_grit.retrieval.index.sizing import MOST_COMPARED, NUM_TRIED
from megatron_grit.retrieval.stages.query_neighbors import AT_A_TIME

_MOST_FOR_CODES = 65_536
"""Vectors that a product quantiser or a rotation learns from, 256 for each of its centres."""
_TURNS = 50
"""Rounds of OPQ, in each of which codes are trained for a few iterations of 25."""
_HNSW_VISITS = 1500
"""Centres with which a vector is compared where an HNSW graph finds its lists."""
_NOTHING = Spent()
_TOKENS = 10
"""Bytes that a tokenizer holds for a byte of text: itself, and for about every fourth a number and where it is."""
_TEXT = 60
"""Bytes of a Python string beside its characters."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a build is of."""

    num_chunks: int
    num_places: int
    num_documents: int
    dim: int
    factory: str
    num_train: int
    num_processes: int
    stored: bool
    """Whether the vectors of chunks are on disk when the index is built: the task embed runs, or did."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one task takes."""

    task: str
    spent: Spent
    """By one process, as if nobody shared the work."""
    alone: Spent
    """The part of it that one process does while the others wait."""
    disk: int
    """Bytes that stay."""
    passing: int
    """Bytes of files that are removed at its end."""
    memory: int
    """Bytes of the process that needs most, the embedder's included, without pages of files that the system takes
    back."""

    def seconds(self, num_processes: int) -> float:
        """Time with so many processes of the speed that was measured."""
        return self.alone.wall + (self.spent.wall - self.alone.wall) / num_processes


class Estimate:
    """Costs of the tasks of a build.

    Args:
        config: of the database.
        sizes: what it is of.
        rates: measured.
    """

    def __init__(self, config: RetroDbConfig, sizes: Sizes, rates: Rates) -> None:
        self.config, self.sizes, self.rates = config, sizes, rates
        lists = lists_of(sizes.factory)
        self.lists = lists or 0
        self.codes, self.width = sizes.factory.split(",")[-1], width_of(sizes.factory, sizes.dim)
        self.code_bytes = code_bytes(sizes.factory, sizes.dim)
        self.index_bytes = index_bytes(sizes.factory, sizes.dim, sizes.num_chunks)
        self.num_files = config.num_shards or -(-self.index_bytes // MOST_BYTES)
        self.item = 2 if config.embedding_dtype == "float16" else 4

    @property
    def nprobe(self) -> int:
        """Lists that a query visits: as the configuration says, or by a guess."""
        return nprobe_of(self.config, self.lists)

    def of(self, task: str) -> StageCost | None:
        """The cost of a task; None where it is not known before it runs, as of what a later version gets."""
        found: dict[str, Callable[[], StageCost]] = {
            "db-build": self._db_build,
            "embed": self._embed,
            "index-train": self._index_train,
            "index-add": self._index_add,
            "query-neighbors": self._query_neighbors,
        }
        return found[task]() if task in found else None

    def _base(self, task: str, count: int) -> Spent:
        return self.rates.fixed[task] + self.rates.per_chunk[task].times(count)

    def _cost(
        self, task: str, spent: Spent, *, disk: float, memory: float, alone: Spent = _NOTHING, passing: float = 0
    ) -> StageCost:
        total = self.rates.memory + int(memory)
        return StageCost(
            task=task, spent=spent + alone, alone=alone, disk=int(disk), passing=int(passing), memory=total
        )

    def _db_build(self) -> StageCost:
        sizes, config = self.sizes, self.config
        is_near = config.duplicates == "near"
        block = 32 * sizes.num_places + 16 * sizes.num_documents
        number = 4 if sizes.num_places < 1 << 31 else 8
        keys, runs = (16 + number, 20) if config.duplicates != "keep" else (0, 0)
        if is_near:
            bands = choose_bands(config.near_threshold, config.minhash_permutations)
            block += 4 * config.minhash_permutations * sizes.num_places
            keys, runs = keys + (8 + number) * bands.count, runs + 12 * bands.count
        disk = block + keys * sizes.num_places + 20 * sizes.num_chunks + 24 * sizes.num_documents
        in_block = min(1.0, config.doc_block_size / max(1, sizes.num_documents))
        memory = 3 * in_block * block + sizes.num_places + 50 * min(sizes.num_places, 1 << 23)
        return self._cost(
            "db-build",
            self._base("db-build", sizes.num_chunks),
            disk=disk,
            memory=memory,
            passing=runs * sizes.num_places,
        )

    def _block_memory(self, num_vectors: int) -> float:
        """Of a block of vectors: its texts and their tokens, the vectors as they come and as they are kept, and the
        file's image; and a batch in the embedder."""
        count = min(self.config.block_size, num_vectors)
        return self.rates.batch + count * (
            _TEXT + _TOKENS * self.rates.text_bytes + self.sizes.dim * (8 + 2 * self.item)
        )

    def _embed(self) -> StageCost:
        count = self.sizes.num_chunks
        return self._cost(
            "embed",
            self.rates.embed.times(count),
            disk=self.item * self.sizes.dim * count,
            memory=self._block_memory(count),
        )

    def _index_train(self) -> StageCost:
        sizes, rates = self.sizes, self.rates
        sample = self.config.train_load_fraction * sizes.num_train
        for_codes = min(sample, _MOST_FOR_CODES) if self.codes.startswith(("PQ", "SQ")) else 0
        alone, spent, passing = rates.learn.times(for_codes), rates.fixed["index-train"], 0.0
        if "OPQ" in sizes.factory:
            alone += rates.learn.times(for_codes * _TURNS / 5)
        # What the codes find is tried on a part of the sample.
        alone += rates.compare.times(2.0 * min(sample, MOST_COMPARED) * NUM_TRIED * self.width)
        together = self.lists >= SHARED_LISTS
        held = float(sample)
        if together:
            held = min(sample, POINTS_PER_LIST * self.lists) / sizes.num_processes
            spent += rates.assign.times(held * sizes.num_processes * self.lists * self.width * ITERATIONS)
            passing += 3 * 4 * self.lists * self.width
        else:
            clustered = min(sample, POINTS_PER_LIST * self.lists)
            alone += rates.cluster.times(clustered * self.lists * self.width * ITERATIONS)
        if not sizes.stored:
            spent += rates.embed.times(sizes.num_train)
            passing += 4 * sizes.dim * sizes.num_train
        memory = 4 * sizes.dim * held + (4 * self.width * held if self.width != sizes.dim else 0)
        # Centres as they are gathered, and those before them; sums of this process's vectors and of its centres.
        memory += (12 * self.lists + 16 * min(held, self.lists)) * self.width if together else 0
        disk = 4 * self.lists * self.width + 28 * sizes.num_train
        memory = max(memory, 0 if sizes.stored else self._block_memory(sizes.num_train))
        return self._cost("index-train", spent, alone=alone, disk=disk, memory=memory, passing=passing)

    def _index_add(self) -> StageCost:
        sizes, rates, count = self.sizes, self.rates, self.sizes.num_chunks
        queries = min(NUM_QUERIES, count)
        spent = self._base("index-add", count) + rates.encode.times(count)
        spent += rates.compare.times(count * self._num_centres() * self.width)  # its list
        spent += rates.compare.times(float(count) * queries * sizes.dim)  # exact neighbors
        questions = 0 if self.config.recall_queries is None else NUM_QUERIES
        spent += rates.compare.times(float(count) * questions * sizes.dim)
        asked = questions + (queries if self.config.query_paths else 0)
        spent += rates.embed.times(asked + (0 if sizes.stored else count))
        # Of a quarter of the queries it is tried which nprobe finds enough, the others are then searched with it.
        tries = max(1.0, self.lists.bit_length()) / 4 + 0.75
        alone = self._search(queries + questions).times(tries if self.lists and self.config.nprobe is None else 1)
        codes = self.code_bytes + 2 if self.lists else self.code_bytes
        block = min(self.config.block_size, count)
        memory = max(block * (4 * 2 * sizes.dim + 3 * codes), self.index_bytes / self.num_files + 3 * block * codes)
        memory += 0 if sizes.stored and not asked else rates.batch
        passing = 0 if self.config.keep_embeddings else count * codes
        # Vectors of the queries, their texts as JSON, and their exact neighbors.
        asking = 4 * sizes.dim + rates.text_bytes + 24 + 8 * RECALL_AT
        disk = self.index_bytes + (queries + questions) * asking + (0 if passing else count * codes)
        return self._cost("index-add", spent, alone=alone, disk=disk, memory=memory, passing=passing)

    def _query_neighbors(self) -> StageCost:
        sizes, rates, config = self.sizes, self.rates, self.config
        places, k = sizes.num_places, config.num_neighbors_save
        asked = places - sizes.num_chunks if sizes.stored else places
        spent = self._base("query-neighbors", places) + rates.embed.times(max(0, asked))
        spent += self._search(places)
        table = places * k * (8 + 4 + 12) + 8 * sizes.num_documents
        block = min(config.block_size, places) * k * 24
        candidates = AT_A_TIME * (24 * config.num_neighbors_query + 4 * sizes.dim + rates.text_bytes + _TEXT)
        held = self.index_bytes if config.index_placement == "memory" else 0
        held += self.index_bytes // sizes.num_processes if config.index_placement == "spread" else 0
        held += int(rates.batch * min(1.0, max(0, asked) / AT_A_TIME))
        return self._cost("query-neighbors", spent, disk=2 * table, memory=3 * block + 2 * candidates + held)

    def _search(self, num_queries: int) -> Spent:
        """Of queries in the whole index."""
        rates, count = self.rates, float(self.sizes.num_chunks)
        if not self.lists:
            return rates.ask.times(num_queries) + rates.scan.times(num_queries * count)
        finding = rates.compare.times(num_queries * self._num_centres() * self.width)
        return rates.ask.times(num_queries) + rates.scan.times(num_queries * self.nprobe / self.lists * count) + finding

    def _num_centres(self) -> float:
        """Centres that a vector is compared with to find its lists."""
        return float(min(self.lists, _HNSW_VISITS) if "_HNSW" in self.sizes.factory else self.lists)
