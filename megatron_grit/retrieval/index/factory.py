"""Which kind of index a corpus gets, by the strings that faiss makes one from."""

from __future__ import annotations

import math
import re
from typing import Any

from megatron_grit.errors import ConfigError

MOST_BYTES = 1 << 37
"""Of one file of an index, where nobody says how many there are: one process holds it while it is filled."""
MIN_POINTS_PER_LIST = 39
"""Training vectors that k-means wants for each list (faiss's own default, below which it warns)."""
_KINDS = ("Flat", "PQ", "ScalarQuantizer", "RaBitQ")
"""Of faiss's classes Index... and IndexIVF... . Those of 4-bit codes in blocks (...FastScan) crash when codes are added
to their lists; additive quantisers, and LSH that turns vectors, learn something else with each number of threads."""
GRAPHS = ("IndexHNSWFlat", "IndexHNSWSQ", "IndexHNSWPQ")
"""Built by one process, which is given vectors in place of codes."""
_UNTRAINED = re.compile(r"(HNSW\d*_?)?(Flat|SQ(fp16|bf16|8_direct|8_direct_signed))|HNSW\d*|L2norm|Pad\d+")
"""Parts of a factory string that learn nothing from vectors."""


def choose_factory(num_vectors: int, dim: int, memory_bytes: float) -> str:
    """A factory string for a corpus: exact search where that is fast, else lists, stored as precisely as fits. The
    recall that it then has is measured when the index is there, and said.

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
    sizes = [size for size in (256, 192, 128, 96, 64, 48, 32, 24, 16, 8) if size <= budget and size <= dim]
    if not sizes:
        raise ConfigError(
            f"{num_vectors:,} vectors do not fit into {memory_bytes / 2**30:.3g} GiB at 8 bytes each; raise "
            "index_memory_gb, or give an index with shorter codes"
        )
    # OPQ turns the vectors so that the parts of the product quantiser hold alike much.
    width = max(multiple for multiple in range(sizes[0], dim + 1, sizes[0]))
    return f"OPQ{sizes[0]}_{min(width, 4 * sizes[0])},{coarse},PQ{sizes[0]}"


def num_training_vectors(factory: str, num_vectors: int) -> int:
    """How many vectors an index is trained on where nobody says: 64 for each list, and of more than a million lists as
    few as k-means wants; at least 65,536 for whatever learns from them, such as a quantiser or PCA."""
    if all(_UNTRAINED.fullmatch(part) for part in factory.split(",")):
        return 0
    lists = lists_of(factory) or 0
    return min(num_vectors, max(min(64 * lists, max(MIN_POINTS_PER_LIST * lists, 64 << 20)), 65_536))


def code_bytes(factory: str, dim: int) -> int:
    """Bytes that an index keeps of a vector beside its id, links of a graph included."""
    width, codes = width_of(factory, dim), factory.split(",")[-1]
    product = re.fullmatch(r"PQ(\d+)(?:x(\d+))?\w*", codes)
    if product:
        return -(-int(product[1]) * int(product[2] or 8) // 8)
    scalar = re.fullmatch(r"SQ(\d+|fp16|bf16)\w*", codes)
    if scalar:
        return -(-width * (16 if scalar[1] in ("fp16", "bf16") else int(scalar[1])) // 8)
    graph = re.fullmatch(r"HNSW(\d*).*", codes)
    return 4 * width + (8 * int(graph[1] or 32) + 16 if graph else 0)


def index_bytes(factory: str, dim: int, num_vectors: int) -> int:
    """Bytes of a filled index, about: codes, ids, centres and what turns vectors."""
    width, lists, codes = width_of(factory, dim), lists_of(factory) or 0, factory.split(",")[-1]
    links = re.search(r"IVF\d+k?_HNSW(\d+)", factory)
    graph = lists * (8 * int(links[1]) + 16) if links else 0
    learned = 4 * dim * dim if "PCA" in factory else 4 * dim * width if "OPQ" in factory else 0
    product = re.fullmatch(r"PQ\d+(?:x(\d+))?\w*", codes)
    learned += 4 * width * 2 ** int(product[1] or 8) if product else 0
    return num_vectors * (code_bytes(factory, dim) + (8 if lists else 0)) + 4 * lists * width + graph + learned


def width_of(factory: str, dim: int) -> int:
    """Channels that are compared, after OPQ or PCA."""
    turned = re.search(r"(?:OPQ\d+_|PCA\w*?)(\d+),", factory)
    return int(turned[1]) if turned else dim


def lists_of(factory: str) -> int | None:
    """Lists of an inverted file; None where there is none."""
    found = re.search(r"IVF(\d+)(k?)", factory)
    return int(found[1]) * (1024 if found[2] else 1) if found else None


def check_kind(faiss: Any, index: Any, factory: str) -> None:
    """Refuse an index that several processes cannot fill, with the same result whatever their number.

    Args:
        faiss: the module.
        index: one of its indexes.
        factory: the string that it was made from.

    Raises:
        ConfigError: it is such an index.
    """
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if lists_of(factory) == 0:
        raise ConfigError(f"index {factory!r} has no lists; give a number of them, as IVF1024")
    lists = "" if lists_of(factory) is None else "IVF"
    kind_of = type(inner).__name__
    if kind_of not in [f"Index{lists}{name}" for name in _KINDS] and kind_of not in GRAPHS:
        raise ConfigError(
            f"index {factory!r} ({kind_of}) is made of more than codes, or of codes that processes could not share "
            "out; give Flat, PQ, SQ or RaBitQ, after lists (IVF...,) and OPQ or PCA where wanted, or an HNSW graph"
        )
    coarse = faiss.downcast_index(inner.quantizer) if lists else None
    if lists and not isinstance(coarse, (faiss.IndexFlat, faiss.IndexHNSWFlat)):
        raise ConfigError(
            f"index {factory!r}: its lists are found by a {type(coarse).__name__}, which is not known here; give "
            "IVF<lists> or IVF<lists>_HNSW<links>"
        )
