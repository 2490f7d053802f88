"""The vector index: the only place that knows faiss.

An index is trained on a sample, then filled with codes that several processes may have made, each with the id of its
chunk. Training and filling are deterministic: the same vectors give the same file, with the same number of threads.

A file is opened only when its SHA-256 is that of its manifest: faiss reads what it is given without looking whether it
makes sense.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.errors import ConfigError, DataError
from megatron_grit.files import replacing_path, write_json

MIN_POINTS_PER_LIST = 39
"""Training vectors that k-means wants for each list (faiss's own default, below which it warns)."""
_LARGEST_PART = 1 << 40
"""Bytes that any part of an index file may say it has."""


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError("the index needs faiss: pip install faiss-cpu") from None
    return faiss


@dataclass(kw_only=True)
class IndexManifest:
    """What is known of an index file, in the ``.json`` beside it."""

    factory: str
    metric: str
    dim: int
    embedder: str
    """Fingerprint of what made the vectors."""
    chunks: str
    """Fingerprint of the chunks that they are of."""
    num_trained: int
    num_vectors: int
    first_id: int = 0
    """Id of the first vector, in an index that holds no ids."""
    bytes: int = 0
    sha256: str = ""


def choose_factory(num_vectors: int, dim: int, memory_bytes: float) -> str:
    """A factory string for a corpus: exact search where that is fast, else lists, stored as precisely as fits.

    Args:
        num_vectors: of the whole database.
        dim: channels.
        memory_bytes: what the searched index may take.

    Raises:
        ConfigError: not even 8 bytes a vector fit.
    """
    if num_vectors <= 50_000 and 4 * dim * num_vectors <= memory_bytes:
        return "Flat"
    # Between 4 and 16 times the root, within what k-means can be trained with.
    lists = 2 ** round(math.log2(8 * math.sqrt(num_vectors)))
    lists = max(16, min(lists, 2 ** int(math.log2(max(num_vectors / MIN_POINTS_PER_LIST, 16)))))
    coarse = f"IVF{lists}_HNSW32" if lists >= 16384 else f"IVF{lists}"
    # Beside the code a list holds its id, and lists have some room to grow.
    budget = (0.9 * memory_bytes - 4.0 * lists * dim) / num_vectors - 8
    if budget >= 4 * dim:
        return f"{coarse},Flat"
    if budget >= dim:
        return f"{coarse},SQ8"
    sizes = [size for size in (128, 96, 64, 48, 32, 16, 8) if size <= budget and size <= dim]
    if not sizes:
        raise ConfigError(
            f"{num_vectors:,} vectors do not fit into {memory_bytes / 2**30:.1f} GiB at 8 bytes each; raise "
            "index_memory_gb, or use several shards"
        )
    # OPQ turns the vectors so that the parts of the product quantiser hold alike much.
    width = max(multiple for multiple in range(sizes[0], dim + 1, sizes[0]))
    return f"OPQ{sizes[0]}_{min(width, 4 * sizes[0])},{coarse},PQ{sizes[0]}"


def num_training_vectors(factory: str, num_vectors: int) -> int:
    """How many vectors an index is trained on where nobody says: 64 for each list, at least 65,536 for a quantiser."""
    lists = lists_of(factory)
    if lists is None and not any(part in factory for part in ("PQ", "SQ")):
        return 0
    return min(num_vectors, max(64 * (lists or 0), 65_536))


def lists_of(factory: str) -> int | None:
    """Lists of an inverted file; None where there is none."""
    import re

    found = re.search(r"IVF(\d+)(k?)", factory)
    return int(found[1]) * (1024 if found[2] else 1) if found else None


class VectorIndex:
    """An index in memory, or mapped.

    Args:
        index: faiss's.
        factory: the string it was made from.
        metric: l2 or inner_product.
        first_id: id of the first vector, where the index holds no ids.
    """

    def __init__(self, index: Any, factory: str, metric: str, first_id: int = 0) -> None:
        self.index, self.factory, self.metric, self.first_id = index, factory, metric, first_id
        faiss = _faiss()
        self._ivf = None if lists_of(factory) is None else faiss.extract_index_ivf(index)

    @staticmethod
    def train(factory: str, metric: str, vectors_ND: np.ndarray) -> VectorIndex:
        """A trained index without vectors.

        Raises:
            ConfigError: faiss does not know the string, or there are fewer vectors than lists.
        """
        faiss = _faiss()
        kind = {"l2": faiss.METRIC_L2, "inner_product": faiss.METRIC_INNER_PRODUCT}[metric]
        try:
            index = faiss.index_factory(vectors_ND.shape[1], factory, kind)
        except RuntimeError as error:
            raise ConfigError(f"index {factory!r}: faiss does not make one ({_reason(error)})") from None
        lists = lists_of(factory)
        if lists is not None and len(vectors_ND) < lists:
            raise ConfigError(f"index {factory!r} has {lists} lists, but ntrain is {len(vectors_ND)}; raise ntrain")
        made = VectorIndex(index, factory, metric)
        vectors = np.ascontiguousarray(vectors_ND, dtype=np.float32)
        if not index.is_trained:
            try:
                made._train_lists(vectors)
                index.train(vectors)
            except RuntimeError as error:
                raise ConfigError(f"index {factory!r} cannot be trained ({_reason(error)})") from None
        return made

    def _train_lists(self, vectors: np.ndarray) -> None:
        """Centres of the lists, before the rest is trained. The engine would put them into an HNSW graph from several
        threads at once, and the graph would be another one each time."""
        faiss = _faiss()
        if self._ivf is None or self._ivf.quantizer.is_trained and self._ivf.quantizer.ntotal:
            return
        if not isinstance(faiss.downcast_index(self._ivf.quantizer), (faiss.IndexFlat, faiss.IndexHNSW)):
            return
        chain = getattr(self.index, "chain", None)
        for number in range(0 if chain is None else chain.size()):
            transform = faiss.downcast_VectorTransform(chain.at(number))
            if not transform.is_trained:
                transform.train(vectors)
            vectors = transform.apply(vectors)
        dim = vectors.shape[1]
        flat = faiss.IndexFlat(dim, self._ivf.metric_type)
        if faiss.get_num_gpus():
            flat = faiss.index_cpu_to_all_gpus(flat)
        clustering = faiss.Clustering(dim, self._ivf.nlist, self._ivf.cp)
        clustering.train(vectors, flat)
        centres = faiss.vector_to_array(clustering.centroids).reshape(self._ivf.nlist, dim)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            self._ivf.quantizer.train(centres)
            self._ivf.quantizer.add(centres)
        finally:
            faiss.omp_set_num_threads(threads)

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        return int(self.index.d)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def holds_ids(self) -> bool:
        """Whether vectors carry ids of their own; else the id is the place in the order of adding."""
        return self._ivf is not None

    def encode(self, vectors_ND: np.ndarray) -> np.ndarray:
        """Codes to add, uint8 [N, bytes], of any process."""
        codes: np.ndarray = self.index.sa_encode(np.ascontiguousarray(vectors_ND, dtype=np.float32))
        return codes

    def add_codes(self, codes: np.ndarray, ids: np.ndarray) -> None:
        """Add vectors by their codes, with the ids of their chunks.

        Args:
            codes: of :meth:`encode`.
            ids: int64 [N], ascending; without lists the first ones set ``first_id`` and the others must go on there.

        Raises:
            ConfigError: ids with gaps where the index holds none.
        """
        if self._ivf is not None:
            self._ivf.add_sa_codes(codes, ids)
            self.index.ntotal = self._ivf.ntotal
            return
        if not len(self) and len(ids):
            self.first_id = int(ids[0])
        start = self.first_id + len(self)
        if not (ids == np.arange(start, start + len(ids))).all():
            raise ConfigError(f"index {self.factory!r} holds no ids; set add_load_fraction to 1")
        self.index.add_sa_codes(codes)

    def set_search(self, nprobe: int | None, ef_search: int | None) -> None:
        """How thoroughly lists and an HNSW graph are searched. None: leave it."""
        faiss = _faiss()
        space = faiss.ParameterSpace()
        if nprobe is not None and self._ivf is not None:
            self._ivf.nprobe = min(nprobe, self._ivf.nlist)
        if ef_search is None:
            return
        if self._ivf is not None and "HNSW" in self.factory:
            space.set_index_parameter(self.index, "quantizer_efSearch", ef_search)
        elif "HNSW" in self.factory:
            space.set_index_parameter(self.index, "efSearch", ef_search)

    @property
    def num_lists(self) -> int:
        """Lists of the inverted file; 1 without one."""
        return 1 if self._ivf is None else int(self._ivf.nlist)

    def search(self, vectors_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Nearest vectors: distances or products, float32 [N, k], and ids, int64 [N, k], -1 where there are fewer."""
        if vectors_ND.shape[1] != self.dim:
            raise DataError(f"queries have {vectors_ND.shape[1]} channels, the index {self.dim}")
        scores, ids = self.index.search(np.ascontiguousarray(vectors_ND, dtype=np.float32), k)
        return scores, np.where(ids < 0, -1, ids + self.first_id)

    def save(self, path: Path, manifest: IndexManifest) -> None:
        """Write the index and its manifest, whole or not at all."""
        faiss = _faiss()
        with replacing_path(path) as temporary:
            faiss.write_index(self.index, str(temporary))
            manifest.first_id = self.first_id
            manifest.bytes, manifest.sha256 = temporary.stat().st_size, _sha256(temporary)
        write_json(path.with_suffix(".json"), asdict(manifest))

    @staticmethod
    def load(
        path: Path, *, mapped: bool = False, embedder: str | None = None, chunks: str | None = None
    ) -> VectorIndex:
        """Open an index whose file is what its manifest says.

        Args:
            path: the index.
            mapped: leave it on disk; the system reads what a search touches.
            embedder: fingerprint of what makes the queries; compared with the manifest's.
            chunks: fingerprint of the chunks; likewise.

        Raises:
            DataError: a file is missing or damaged, or is of another embedder or other chunks.
        """
        faiss = _faiss()
        manifest = read_manifest(path)
        for what, wanted, found in (("embedder", embedder, manifest.embedder), ("chunks", chunks, manifest.chunks)):
            if wanted is not None and wanted != found:
                raise DataError(f"was built of another {what.rstrip('s')}; build the index again", path=path)
        if not path.is_file():
            raise DataError("is missing; run the task that makes it", path=path)
        size = path.stat().st_size
        if size != manifest.bytes or _sha256(path) != manifest.sha256:
            raise DataError("does not match its checksum and is not opened; build the index again", path=path)
        faiss.set_deserialization_vector_byte_limit(min(_LARGEST_PART, max(size, 1 << 20)))
        faiss.set_deserialization_loop_limit(max(manifest.num_vectors, 1 << 24))
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except RuntimeError as error:
            raise DataError(f"faiss cannot read it ({_reason(error)}); build the index again", path=path) from None
        return VectorIndex(index, manifest.factory, manifest.metric, manifest.first_id)


class ShardedIndex:
    """Several indexes that share out the ids, searched one after the other; their best are merged.

    Args:
        shards: at least one, of one factory string.
    """

    def __init__(self, shards: list[VectorIndex]) -> None:
        self.shards = shards
        self.factory, self.metric, self.num_lists = shards[0].factory, shards[0].metric, shards[0].num_lists
        self.dim = shards[0].dim

    @staticmethod
    def load(paths: list[Path], **options: Any) -> ShardedIndex:
        """Open shards; options as of :meth:`VectorIndex.load`."""
        return ShardedIndex([VectorIndex.load(path, **options) for path in paths])

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def set_search(self, nprobe: int | None, ef_search: int | None) -> None:
        """As :meth:`VectorIndex.set_search`."""
        for shard in self.shards:
            shard.set_search(nprobe, ef_search)

    def search(self, vectors_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`VectorIndex.search`."""
        if len(self.shards) == 1:
            return self.shards[0].search(vectors_ND, k)
        return merge_nearest([shard.search(vectors_ND, k) for shard in self.shards], k, self.metric)


def read_manifest(path: Path) -> IndexManifest:
    """The manifest of an index file.

    Raises:
        DataError: it is missing or cannot be read.
    """
    file = path.with_suffix(".json")
    if not file.is_file():
        raise DataError("is missing; run the task that makes the index", path=file)
    try:
        return IndexManifest(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"cannot be read ({error}); build the index again", path=file) from None


def exact_search(queries_QD: np.ndarray, vectors_ND: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Nearest vectors by comparing all: scores, float32 [Q, min(k, N)], and places among ``vectors_ND``."""
    faiss = _faiss()
    kind = {"l2": faiss.METRIC_L2, "inner_product": faiss.METRIC_INNER_PRODUCT}[metric]
    k = min(k, len(vectors_ND))
    scores, ids = faiss.knn(
        np.ascontiguousarray(queries_QD, np.float32), np.ascontiguousarray(vectors_ND, np.float32), k, metric=kind
    )
    return scores, ids


def merge_nearest(parts: list[tuple[np.ndarray, np.ndarray]], k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several searches of the same queries: scores and ids, [Q, k], -1 where there are fewer."""
    scores = np.concatenate([part[0] for part in parts], axis=1)
    ids = np.concatenate([part[1] for part in parts], axis=1)
    worst = np.inf if metric == "l2" else -np.inf
    scores = np.where(ids < 0, worst, scores)
    # Equal scores in the order of ids, so that the order of the parts does not matter.
    order = np.lexsort((ids, scores if metric == "l2" else -scores), axis=1)[:, :k]
    best = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    missing = k - best[0].shape[1]
    if missing <= 0:
        return best
    return (
        np.pad(best[0], ((0, 0), (0, missing)), constant_values=worst),
        np.pad(best[1], ((0, 0), (0, missing)), constant_values=-1),
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[-1] if text else type(error).__name__)[:200]
