"""Near duplicates: what is found, how fast, in how much memory, against datasketch's MinHashLSH in one run.

Signatures are random numbers. A share of the chunks are copies of an earlier one in which each number is kept with a
probability that differs from copy to copy, so what is similar to what is known, and so is how often two signatures with
m of k equal numbers, anywhere, are equal in one of b bands of r: sum over j of (-1)^(j+1) (b over j) (k-jr over m-jr) /
(k over m). "curve" is 1 - (1 - s^r)^b with s = m / k, which takes columns to be independent and lies below.

datasketch gets the same bands, and adds and asks for one chunk after the other, as its users do; it is run up to --peer
chunks. Memory is what is added at the peak to a process, without pages of mapped files. Blocks are written to a
temporary folder. Linux only.

Example:
    python -m benchmarks.near_duplicates --chunks 200000 2000000
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.retrieval.dedup.buckets import Bands, choose_bands
from megatron_grit.retrieval.dedup.duplicates import SIMILAR, DuplicateSearch
from megatron_grit.retrieval.dedup.keys import ChunkBlock
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.blocks import write_arrays

_PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    """Parse the command line and measure. Status 1 where something similar was not found as often as it should be."""
    parser = harness.parser(__doc__)
    parser.add_argument("--chunks", type=int, nargs="+", default=[200_000], help="sizes to measure (default: 200000)")
    parser.add_argument("--block", type=int, default=250_000, help="chunks of a block (default: 250000)")
    parser.add_argument("--peer", type=int, default=200_000, help="most chunks for datasketch (default: 200000)")
    parser.add_argument("--copies", type=float, default=0.1, help="share of the chunks that are copies (default: 0.1)")
    parser.add_argument("--threshold", type=float, default=0.8, help="near_threshold (default: 0.8)")
    parser.add_argument("--permutations", type=int, default=128, help="minhash_permutations (default: 128)")
    options = parser.parse_args()

    def measured(folder: Path) -> tuple[list[dict[str, Any]], bool]:
        results = [measure(num_chunks, options) for num_chunks in options.chunks]
        return results, all(result["is_as_expected"] for result in results)

    return harness.run("near_duplicates", options, measured)


def measure(num_chunks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Make signatures, look for duplicates, and print what came out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copies = make_blocks(folder, num_chunks, options)
        state, ours = in_process(find, folder, num_chunks, options)
        made = [path for name in ("found", "keys") for path in (folder / name).rglob("*") if path.is_file()]
        num_bytes = sum(path.stat().st_size for path in made)
        result = {"chunks": num_chunks, "chunks_per_s": num_chunks / ours["seconds"], **ours}
        result["bytes_on_disk_per_chunk"] = num_bytes / num_chunks
        result |= compare_with_curve(copies, state, options)
        if num_chunks <= options.peer:
            _, peer = in_process(find_with_datasketch, folder, num_chunks, options)
            result |= {f"datasketch_{name}": value for name, value in peer.items()}
            result["times_datasketch"] = peer["seconds"] / ours["seconds"]
    print("; ".join(f"{name} {value:,.4g}" for name, value in result.items()))
    return result


def make_blocks(folder: Path, num_chunks: int, options: argparse.Namespace) -> np.ndarray:
    """Write blocks of signatures. Returns float [copies, 2]: chunk, and share of its numbers that the original has."""
    copies = []
    for start in range(0, num_chunks, options.block):
        count = min(options.block, num_chunks - start)
        random = np.random.default_rng([1, start])
        signatures = random.integers(0, 2**32, (count, options.permutations), dtype=np.uint32)
        # Of the first half, copied into the second: each original once.
        chosen = random.permutation(count // 2)[: int(options.copies * count)]
        places = count - 1 - random.permutation(count // 2)[: len(chosen)]
        kept = random.random((len(chosen), options.permutations)) < random.uniform(0.5, 1, (len(chosen), 1))
        signatures[places] = np.where(kept, signatures[chosen], signatures[places])
        copies.append(np.stack([start + places, kept.mean(axis=1)], axis=1))
        arrays = {"hashes": random.integers(0, 2**64, (count, 2), dtype=np.uint64), "minhashes": signatures}
        write_arrays(folder / f"{start:012d}.hdf5", arrays, str(start))
    return np.concatenate(copies)


def find(folder: Path, options: argparse.Namespace) -> np.ndarray:
    """States of all chunks, by this package."""
    search = search_of(folder, options)
    search.run(Worker())
    return search.state()


def search_of(folder: Path, options: argparse.Namespace) -> DuplicateSearch:
    """The search over the blocks in a folder."""
    config = RetroDbConfig(
        duplicates="near", near_threshold=options.threshold, minhash_permutations=options.permutations
    )
    blocks = [ChunkBlock(path, path.stem) for path in sorted(folder.glob("*.hdf5"))]
    return DuplicateSearch(config, folder / "found", folder / "keys", blocks)


def find_with_datasketch(folder: Path, options: argparse.Namespace) -> np.ndarray:
    """The same by datasketch's index, with the same bands: what is like an earlier chunk that was kept is left out."""
    import h5py
    from datasketch import MinHash, MinHashLSH

    bands = choose_bands(options.threshold, options.permutations)
    index = MinHashLSH(num_perm=options.permutations, params=(bands.count, bands.width))
    blank, kept, state = MinHash(num_perm=options.permutations, seed=1), {}, []
    for path in sorted(folder.glob("*.hdf5")):
        with h5py.File(path) as file:
            signatures = file["minhashes"][()]
        for signature in signatures:
            sketch = blank.copy()
            sketch.hashvalues = signature
            like = any((kept[key] == signature).mean() >= options.threshold for key in index.query(sketch))
            if not like:
                index.insert(len(state), sketch)
                kept[len(state)] = signature
            state.append(SIMILAR if like else 0)
    return np.array(state, dtype=np.uint8)


def compare_with_curve(copies: np.ndarray, state: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    """How many of the copies that are similar enough were found, and how many should be."""
    bands, similarity = choose_bands(options.threshold, options.permutations), copies[:, 1]
    similar = similarity >= options.threshold
    chunks, num_equal = copies[similar, 0].astype(np.int64), np.rint(copies[similar, 1] * options.permutations)
    exact = np.array([share_found(bands, options.permutations, m) for m in range(options.permutations + 1)])
    expected, found = exact[num_equal.astype(np.int64)], state[chunks] == SIMILAR
    deviation = np.sqrt((expected * (1 - expected)).sum()) / max(len(found), 1)
    wrong = int((state > 0).sum() - found.sum())
    return {
        "copies": int(similar.sum()),
        "found": float(found.mean()),
        "expected": float(expected.mean()),
        "curve": float(np.mean(bands.share_found(similarity[similar]))),
        "wrong": wrong,
        "is_as_expected": bool(abs(found.mean() - expected.mean()) <= 4 * deviation) and not wrong,
    }


def share_found(bands: Bands, num_columns: int, num_equal: int) -> float:
    """Probability that two rows of which so many columns are equal, anywhere, are equal in a whole band."""
    total = 0
    for count in range(1, min(bands.count, num_equal // bands.width) + 1):
        columns = count * bands.width
        ways = math.comb(bands.count, count) * math.comb(num_columns - columns, num_equal - columns)
        total += ways if count % 2 else -ways
    return float(Fraction(total, math.comb(num_columns, num_equal)))


def in_process(
    function: Callable[..., np.ndarray], folder: Path, num_chunks: int, options: argparse.Namespace
) -> tuple[np.ndarray, dict[str, float]]:
    """What a function returns in a process of its own, its seconds, and the memory it added, in MB."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.SimpleQueue()
    process = context.Process(target=_call, args=(function, folder, options, queue))
    process.start()
    while process.is_alive() and queue.empty():
        time.sleep(0.01)
    if queue.empty():
        raise RuntimeError(f"{function.__name__} ended with status {process.exitcode}")
    state, numbers = queue.get()
    process.join()
    assert len(state) == num_chunks
    return state, numbers


def _call(function: Callable[..., np.ndarray], folder: Path, options: argparse.Namespace, queue: Any) -> None:
    import datasketch  # noqa: F401  # what its import takes is not counted
    import h5py  # noqa: F401

    states: list[np.ndarray] = []
    began = time.perf_counter()
    (peak,) = harness.growth(lambda: states.append(function(folder, options)), lambda: [_own_bytes()])
    queue.put((states[0], {"seconds": time.perf_counter() - began, "peak_mb": peak / 1e6}))


def _own_bytes() -> int:
    """Memory of this process, without pages of mapped files, which the system takes back when it needs them."""
    _, resident, shared, *_ = (int(number) for number in Path("/proc/self/statm").read_text().split())
    return (resident - shared) * _PAGE


if __name__ == "__main__":
    sys.exit(main())
