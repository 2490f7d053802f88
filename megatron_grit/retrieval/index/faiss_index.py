"""The vector index: the only file that imports faiss.

An index is trained on a sample, then filled with codes that several processes may have made, each with the id of its
chunk. Training and filling are deterministic: the same vectors give the same file, whatever the number of threads.

With the GPU build of faiss the lists are trained and vectors are compared on GPUs, and an index may be searched there;
with the CPU build, on the CPU. No GPU has run this file yet: what is said of GPUs follows faiss's sources.

A file is opened only when its SHA-256 is that of its manifest: faiss reads what it is given without looking whether it
makes sense.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.compat import needed
from megatron_grit.config.database.schema import MOST_ON_GPU
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.index.factory import GRAPHS, check_kind, lists_of
from megatron_grit.retrieval.index.id_ranges import NO_RANGES, count, drop_members, outside
from megatron_grit.retrieval.index.manifest import IndexManifest, is_whole, read_manifest, remedy_of, write_manifest
from megatron_grit.retrieval.index.pair_scores import scored_by_pairs
from megatron_grit.retrieval.index.threads import in_parts
from megatron_grit.retrieval.index.threads import num_threads as threads_of
from megatron_grit.retrieval.index.training import Training
from megatron_grit.store.blocks import cannot_write
from megatron_grit.store.environment import job_size, local_rank
from megatron_grit.store.files import replacing_path
from megatron_grit.store.logs import get_logger
from megatron_grit.store.progress import still_at_work

log = get_logger(__name__)

_LARGEST_PART = 1 << 40
"""Bytes that any part of an index file may say it has."""
RAISE_NTRAIN = "raise ntrain, or choose a smaller index"
_TABLES = (1 << 31) + 8
"""Bytes of the tables that faiss computes for a product quantiser when it opens a file, above the most that it makes.
They count as read, so the limit is never below them, however small the file."""


def _faiss() -> Any:
    with needed("the index needs", "faiss", "retro"):
        import faiss
    return faiss


@dataclass(frozen=True)
class Gpus:
    """The GPUs on which this process searches: one under a launcher, else all."""

    devices: list[int]
    resources: list[Any]
    """Streams and scratch memory of each, shared by all that runs there."""


def gpus_of_process() -> Gpus:
    """GPUs to search on.

    Raises:
        ConfigError: faiss is the CPU build, or finds no GPU.
    """
    devices = _devices()
    if not devices:
        raise ConfigError(
            "index_on_gpu: this faiss finds no GPU; install its GPU build (faiss-gpu) in place of faiss-cpu, or set "
            "index_on_gpu to false"
        )
    return Gpus(devices, [_gpu_resources(device) for device in devices])


def _devices() -> list[int]:
    count = _faiss().get_num_gpus()
    if count and job_size() > 1:
        return [local_rank() % count]
    return list(range(count))


@cache
def _gpu_resources(device: int) -> Any:
    """Made once: each takes 1.5 GB of its GPU as scratch memory."""
    return _faiss().StandardGpuResources()


def new_index(factory: str, metric: str, dim: int) -> Any:
    """An untrained index of faiss.

    Raises:
        ConfigError: faiss does not know the string, or it is not one that several processes can fill, with the same
            result whatever their number.
    """
    faiss = _faiss()
    kind = {"l2": faiss.METRIC_L2, "inner_product": faiss.METRIC_INNER_PRODUCT}[metric]
    try:
        index = faiss.index_factory(dim, factory, kind)
    except RuntimeError as error:
        raise ConfigError(f"index {factory!r}: faiss does not make one ({_reason(error)})") from None
    check_kind(faiss, index, factory)
    return index


class VectorIndex:
    """An index in memory, or mapped.

    Args:
        index: faiss's.
        factory: the string it was made from.
        metric: l2 or inner_product.
        first_id: id of the first vector, where the index holds no ids.

    Attributes:
        inner, is_graph: without what turns vectors; whether it is an HNSW graph, and not lists or codes alone.
    """

    def __init__(self, index: Any, factory: str, metric: str, first_id: int = 0) -> None:
        self.index, self.factory, self.metric, self.first_id = index, factory, metric, first_id
        faiss = _faiss()
        chain = getattr(index, "chain", None)
        self._transforms = []
        if chain is not None:
            self._transforms = [faiss.downcast_VectorTransform(chain.at(number)) for number in range(chain.size())]
        self.inner = index if chain is None else faiss.downcast_index(index.index)
        self._ivf = None if lists_of(factory) is None else self.inner
        self.is_graph = type(self.inner).__name__ in GRAPHS
        self._on_gpus: Any = None

    @staticmethod
    def train(
        factory: str,
        metric: str,
        vectors_ND: np.ndarray,
        *,
        num_threads: int | None = None,
        remedy: str = RAISE_NTRAIN,
    ) -> VectorIndex:
        """A trained index without vectors.

        Args:
            factory: faiss's factory string.
            metric: l2 or inner_product.
            vectors_ND: the sample.
            num_threads: None: as many as OpenMP says.
            remedy: what to do about too few vectors.

        Raises:
            ConfigError: faiss does not know the string, or there are too few vectors.
        """
        index = new_index(factory, metric, vectors_ND.shape[1])
        made = VectorIndex(index, factory, metric)
        made._training.check_number(len(vectors_ND), remedy)
        vectors = np.ascontiguousarray(vectors_ND, dtype=np.float32)
        if not index.is_trained:
            with made._learning(num_threads):
                vectors = made._training.train_transforms(vectors)
                made._training.train_lists(vectors)
                made._training.train_codes(vectors)
        return made

    @property
    def _training(self) -> Training:
        return Training(
            _faiss(), self.factory, self.index, self.inner, self._ivf, self._transforms, is_graph=self.is_graph
        )

    @staticmethod
    def with_transforms(factory: str, metric: str, vectors_ND: np.ndarray) -> VectorIndex:
        """An index that has learned from a sample how vectors are turned, and nothing else.

        Raises:
            ConfigError: faiss does not know the string, or there are too few vectors.
        """
        made = VectorIndex(new_index(factory, metric, vectors_ND.shape[1]), factory, metric)
        with made._learning(None):
            made._training.train_transforms(np.ascontiguousarray(vectors_ND, dtype=np.float32))
        return made

    def finish_training(
        self, vectors_ND: np.ndarray, centres_KD: np.ndarray, *, num_threads: int | None = None
    ) -> None:
        """Learn the rest.

        Args:
            vectors_ND: a sample that is large enough for codes; not turned.
            centres_KD: of the lists, of vectors that were turned.
            num_threads: None: as many as OpenMP says.

        Raises:
            ConfigError: faiss cannot train it.
        """
        with self._learning(num_threads):
            self._training.set_centres(centres_KD)
            self._training.train_codes(self.transformed(vectors_ND))

    def check_training(self, num_vectors: int, remedy: str = RAISE_NTRAIN) -> None:
        """Refuse too few vectors to be trained on, and warn of few.

        Raises:
            ConfigError: there are fewer than centres.
        """
        self._training.check_number(num_vectors, remedy)

    @contextmanager
    def _learning(self, threads: int | None) -> Iterator[None]:
        try:
            with threads_of(_faiss(), threads), still_at_work(f"training index {self.factory}"):
                yield
        except RuntimeError as error:
            raise ConfigError(f"index {self.factory!r} cannot be trained ({_reason(error)})") from None

    def to_bytes(self) -> np.ndarray:
        """As :meth:`of_bytes` reads it, uint8 [n]."""
        return np.asarray(_faiss().serialize_index(self.index))

    @staticmethod
    def of_bytes(content: np.ndarray, factory: str, metric: str) -> VectorIndex:
        """An index of bytes that were compared with their checksum."""
        return VectorIndex(_faiss().deserialize_index(content), factory, metric)

    def transformed(self, vectors_ND: np.ndarray) -> np.ndarray:
        """Vectors as they are before they are encoded."""
        vectors = np.ascontiguousarray(vectors_ND, dtype=np.float32)
        for transform in self._transforms:
            vectors = np.concatenate(in_parts(_faiss(), transform.apply, vectors))
        return vectors

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        return int(self.index.d)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def encode(self, vectors_ND: np.ndarray) -> np.ndarray:
        """Codes to add, uint8 [N, bytes], of any process; for a graph the vectors, float32 [N, D]."""
        if self.is_graph:
            return self.transformed(vectors_ND)
        return np.concatenate(in_parts(_faiss(), self.inner.sa_encode, self.transformed(vectors_ND)))

    def add_codes(self, codes: np.ndarray, ids: np.ndarray) -> None:
        """Add vectors by their codes, with the ids of their chunks.

        Args:
            codes: of :meth:`encode`.
            ids: int64 [N], ascending; without lists the first ones set ``first_id`` and the others must follow.

        Raises:
            ConfigError: ids with gaps where the index holds none.
        """
        if self._ivf is not None:
            self._ivf.add_sa_codes(codes, ids)
            self.index.ntotal = self._ivf.ntotal
            return
        if not len(ids):
            return
        if not len(self):
            self.first_id = int(ids[0])
        start = self.first_id + len(self)
        if not (ids == np.arange(start, start + len(ids))).all():
            raise ConfigError(f"index {self.factory!r} holds no ids; set add_load_fraction to 1")
        if self.is_graph:
            # From several threads at once the graph would be another one each time.
            with threads_of(_faiss(), 1):
                self.inner.add(codes)
        else:
            self.inner.add_sa_codes(codes)
        self.index.ntotal = self.inner.ntotal

    def append(self, other: VectorIndex) -> None:
        """Add the vectors of another index of the same training, with their ids, which follow those that are here. The
        other index is empty afterwards.

        Raises:
            ConfigError: ids with gaps where the index holds none.
        """
        if self._ivf is not None:
            self.inner.merge_from(other.inner, 0)
            self.index.ntotal = self.inner.ntotal
            return
        if self.is_graph:
            codes = other.inner.reconstruct_n(0, len(other))
        else:
            codes = _faiss().vector_to_array(other.inner.codes).reshape(len(other), self.inner.code_size)
        self.add_codes(codes, other.first_id + np.arange(len(other)))

    def to_gpus(self, gpus: Gpus) -> None:
        """Copy the index to GPUs, of several each gets a part. Searches run there from now on, but for those of more
        than :data:`MOST_ON_GPU` neighbors, for which the index stays in memory.

        An HNSW graph over the lists is searched on the CPU: faiss has none on GPUs.

        Raises:
            ConfigError: faiss cannot put this kind of index on a GPU, or it does not fit.
        """
        faiss = _faiss()
        options = faiss.GpuMultipleClonerOptions()
        options.shard = len(gpus.devices) > 1
        # cuVS, where faiss was built with it, would bring limits of its own.
        options.use_cuvs = False
        options.allowCpuCoarseQuantizer = True
        try:
            self._on_gpus = faiss.index_cpu_to_gpu_multiple_py(gpus.resources, self.inner, options, gpus.devices)
        except RuntimeError as error:
            raise ConfigError(
                f"index {self.factory!r} cannot be searched on GPU {gpus.devices[0]} ({_reason(error)}); set "
                "index_on_gpu to false, or shard it over more processes if it does not fit"
            ) from None

    def set_search(self, nprobe: int | None, ef_search: int | None) -> None:
        """How thoroughly lists and an HNSW graph are searched. None: leave it.

        Raises:
            ConfigError: more lists than are visited on a GPU.
        """
        if self._ivf is not None and nprobe is not None:
            nprobe = min(nprobe, int(self._ivf.nlist))
            if self._on_gpus is not None and nprobe > MOST_ON_GPU:
                raise ConfigError(
                    f"nprobe {nprobe:,} is above {MOST_ON_GPU:,}, the most lists that faiss visits on a GPU; lower it, "
                    "or set index_on_gpu to false"
                )
            self._set("nprobe", nprobe)
        if ef_search is not None and "HNSW" in self.factory:
            self._set("efSearch" if self._ivf is None else "quantizer_efSearch", ef_search)

    def _set(self, name: str, value: int) -> None:
        faiss = _faiss()
        faiss.ParameterSpace().set_index_parameter(self.inner, name, value)
        if self._on_gpus is not None:
            faiss.GpuParameterSpace().set_index_parameter(self._on_gpus, name, value)

    @property
    def num_lists(self) -> int:
        """Lists of the inverted file; 1 without one."""
        return 1 if self._ivf is None else int(self._ivf.nlist)

    def search(
        self, vectors_ND: np.ndarray, k: int, without: np.ndarray | None = None, times: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Nearest vectors. On the CPU where more than queries and k are given.

        Args:
            vectors_ND: queries.
            k: vectors of each.
            without: int64 [R, 2], ranges of ids that are passed over as if they were not there, the first and one after
                the last of each.
            times: so many times more lists are visited.

        Returns:
            Distances or products, float32 [N, k], and ids, int64 [N, k], -1 where there are fewer.

        Raises:
            DataError: queries of another width.
        """
        if vectors_ND.shape[1] != self.dim:
            raise DataError(f"queries have {vectors_ND.shape[1]} channels, the index {self.dim}")
        queries = self.transformed(vectors_ND)
        places = NO_RANGES if without is None else without - self.first_id
        if not len(places) and times == 1:
            searched = self.inner if self._on_gpus is None or k > MOST_ON_GPU else self._on_gpus
            scores, ids = searched.search(queries, k)
        elif isinstance(self.inner, _faiss().IndexPQ):  # which takes no selector
            scores, ids = self.inner.search(queries, k + min(count(places), len(self)))
            scores, ids = drop_members(scores, ids, places, k)
        else:
            scores, ids = self.inner.search(queries, k, params=self._parameters(k, places, times))
        if isinstance(self.inner, _faiss().IndexFlat) and self._on_gpus is None:
            scores, ids = scored_by_pairs(_faiss(), self.inner, queries, ids)
        return scores, np.where(ids < 0, -1, ids + self.first_id)

    def _parameters(self, k: int, without: np.ndarray, times: int) -> Any:
        """Of a search that passes over ranges of places."""
        faiss, selector = _faiss(), outside(_faiss(), without)
        if self._ivf is not None:
            return faiss.SearchParametersIVF(sel=selector, nprobe=min(times * self._ivf.nprobe, self.num_lists))
        if self.is_graph:
            # A walk that sees only what it may not keep would end with nothing.
            candidates = max(self.inner.hnsw.efSearch, k) + count(without)
            return faiss.SearchParametersHNSW(sel=selector, efSearch=min(candidates, len(self)))
        return faiss.SearchParameters(sel=selector)

    def save(self, path: Path, manifest: IndexManifest) -> None:
        """Write the index and its manifest, whole or not at all.

        Raises:
            DataError: the disk is full, or the folder cannot be written.
        """
        faiss = _faiss()
        try:
            with replacing_path(path) as temporary:
                faiss.write_index(self.index, str(temporary))
            manifest.first_id = self.first_id
            write_manifest(path, manifest)
        except (OSError, RuntimeError) as error:
            raise cannot_write(path, _reason(error)) from None

    @staticmethod
    def load(
        path: Path, *, mapped: bool = False, embedder: str | None = None, chunks: str | None = None
    ) -> VectorIndex:
        """Open an index whose file is what its manifest says.

        Args:
            path: the index.
            mapped: leave it on disk; the system reads what a search touches.
            embedder: fingerprint of what makes the queries; compared with the manifest's.
            chunks: fingerprint of the chunks; compared with the manifest's.

        Raises:
            DataError: a file is missing or damaged, or is of another embedder or other chunks.
        """
        faiss = _faiss()
        manifest = read_manifest(path)
        if embedder is not None and embedder != manifest.embedder:
            raise DataError(
                "was built with another embedder, or with other settings of it; set that one again, or build the index "
                "again with --overwrite index-train",
                path=path,
            )
        if chunks is not None and chunks != manifest.chunks:
            raise DataError("was built of other chunks; run --tasks index-build --overwrite index-train", path=path)
        if not path.is_file():
            raise DataError(f"is missing; {remedy_of(path)}", path=path)
        size = path.stat().st_size
        if not is_whole(path, manifest):
            raise DataError(f"does not match its checksum and is not opened; {remedy_of(path)}", path=path)
        faiss.set_deserialization_vector_byte_limit(min(_LARGEST_PART, max(size, _TABLES)))
        faiss.set_deserialization_loop_limit(max(manifest.num_vectors, 1 << 24))
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except RuntimeError as error:
            raise DataError(
                f"faiss cannot read it ({_reason(error)}); delete it and {remedy_of(path)}", path=path
            ) from None
        if int(index.d) != manifest.dim or int(index.ntotal) != manifest.num_vectors:
            raise DataError(
                f"holds {index.ntotal:,} vectors of {index.d} channels, its manifest says {manifest.num_vectors:,} of "
                f"{manifest.dim}; delete it and {remedy_of(path)}",
                path=path,
            )
        return VectorIndex(index, manifest.factory, manifest.metric, manifest.first_id)


def exact_search(queries_QD: np.ndarray, vectors_ND: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Nearest vectors by comparing all: scores, float32 [Q, min(k, N)], and rows of ``vectors_ND``."""
    faiss = _faiss()
    kind = {"l2": faiss.METRIC_L2, "inner_product": faiss.METRIC_INNER_PRODUCT}[metric]
    k = min(k, len(vectors_ND))
    queries, vectors = np.ascontiguousarray(queries_QD, np.float32), np.ascontiguousarray(vectors_ND, np.float32)
    if not k:
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    devices = _devices()
    if devices:
        resources = _gpu_resources(devices[0])
        scores, ids = faiss.knn_gpu(resources, queries, vectors, k, metric=kind, device=devices[0])
    else:
        scores, ids = faiss.knn(queries, vectors, k, metric=kind)
    return scores, ids


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    # faiss begins with a function of its own and the line where it gave up.
    return (re.sub(r"^Error in .* at \S+:\d+: ", "", text[-1]) if text else type(error).__name__)[:200]
