"""What an index of faiss's learns: how vectors are turned, centres of lists, and codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_grit.errors import ConfigError
from megatron_grit.retrieval.index.factory import MIN_POINTS_PER_LIST
from megatron_grit.retrieval.index.threads import in_parts, num_threads
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Training:
    """Trains an index.

    Args:
        faiss: the module.
        factory: the string that the index was made from.
        index: faiss's.
        inner: without what turns vectors.
        lists: its inverted file; None where it has none.
        transforms: what turns vectors, in their order.
        is_graph: whether it is an HNSW graph.
    """

    faiss: Any
    factory: str
    index: Any
    inner: Any
    lists: Any
    transforms: list[Any]
    is_graph: bool

    def check_number(self, num_vectors: int, remedy: str) -> None:
        """Refuse too few vectors to learn from, and say once of few what faiss would print for each clustering.

        Raises:
            ConfigError: there are fewer than centres.
        """
        codes = self.faiss.downcast_index(self.inner.storage) if self.is_graph else self.inner
        product = getattr(codes, "pq", None)
        centres = max(0 if self.lists is None else self.lists.nlist, 0 if product is None else product.ksub)
        if any(isinstance(transform, self.faiss.OPQMatrix) for transform in self.transforms):
            centres = max(centres, 256)
        if num_vectors < max(centres, not self.index.is_trained):
            raise ConfigError(
                f"index {self.factory!r} needs {max(centres, 1):,} vectors at least to be trained on, and there are "
                f"{num_vectors:,}; {remedy}"
            )
        if num_vectors < MIN_POINTS_PER_LIST * centres:
            log.warning(
                f"index {self.factory}: {num_vectors:,} vectors to train {centres:,} centres on; "
                f"{MIN_POINTS_PER_LIST * centres:,} would be better: {remedy}"
            )
        for part in filter(None, (self.lists, product)):
            part.cp.min_points_per_centroid = 1
        if hasattr(codes, "do_polysemous_training"):
            # It orders centres for a filter of codes that is not used here, and takes a second a byte of the code.
            codes.do_polysemous_training = False

    def train_transforms(self, vectors_ND: np.ndarray) -> np.ndarray:
        """Train what turns vectors before they are stored, and apply it. In one thread: with more, the last bits of
        OPQ's matrix depend on their number."""
        faiss, vectors = self.faiss, vectors_ND
        for transform in self.transforms:
            if not transform.is_trained:
                if isinstance(transform, faiss.OPQMatrix):
                    # Its own, but for the warnings of each of its 200 clusterings where there are few vectors.
                    transform.pq = quantizer = faiss.ProductQuantizer(transform.d_out, transform.M, 8)
                    quantizer.cp.min_points_per_centroid = 1
                with num_threads(faiss, 1):
                    transform.train(vectors)
                if isinstance(transform, faiss.OPQMatrix):
                    transform.pq = None
            vectors = np.concatenate(in_parts(faiss, transform.apply, vectors))
        return vectors

    def train_lists(self, vectors_ND: np.ndarray) -> None:
        """Centres of the lists, before the rest is trained."""
        faiss = self.faiss
        if self.lists is None or self.lists.quantizer.is_trained and self.lists.quantizer.ntotal:
            return
        if not isinstance(faiss.downcast_index(self.lists.quantizer), (faiss.IndexFlat, faiss.IndexHNSW)):
            return
        dim = vectors_ND.shape[1]
        flat = faiss.IndexFlat(dim, self.lists.metric_type)
        if faiss.get_num_gpus():
            flat = faiss.index_cpu_to_all_gpus(flat)
        clustering = faiss.Clustering(dim, self.lists.nlist, self.lists.cp)
        clustering.train(vectors_ND, flat)
        self.set_centres(faiss.vector_to_array(clustering.centroids).reshape(self.lists.nlist, dim))

    def set_centres(self, centres_KD: np.ndarray) -> None:
        """Give the lists their centres. The engine would put them into an HNSW graph from several threads at once, and
        the graph would be another one each time."""
        with num_threads(self.faiss, 1):
            self.lists.quantizer.train(centres_KD)
            self.lists.quantizer.add(centres_KD)

    def train_codes(self, vectors_ND: np.ndarray) -> None:
        """All that is left to learn, of vectors that were turned."""
        self.inner.train(vectors_ND)
        self.index.is_trained = True
