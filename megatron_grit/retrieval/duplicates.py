"""Chunks that stand in a database more than once, or nearly so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_grit.config.retro_db import RetroDbConfig
from megatron_grit.data.block_files import Block, BlockFolder
from megatron_grit.errors import ConfigError

EQUAL, SIMILAR = 1, 2
HASHES_IN_MEMORY = 1 << 27
"""Chunk hashes that are compared at a time; with more chunks the comparison takes several passes over them."""
_NUM_EXAMPLES = 5

Example = tuple[tuple[int, np.ndarray], tuple[int, np.ndarray]]
"""Dataset and row of a chunk that is kept, and of one that is left out."""


@dataclass(kw_only=True)
class Duplicates:
    """Which valid chunks of all datasets, in their order, are duplicates of one before them."""

    state: np.ndarray
    """uint8 [chunks]: 0, EQUAL or SIMILAR."""
    examples: list[Example] = field(default_factory=list)
    """Near duplicates."""


def find_duplicates(config: RetroDbConfig, folders: list[BlockFolder]) -> Duplicates:
    """Find what ``duplicates`` says is to be left out.

    Args:
        config: of the database.
        folders: blocks of chunks, with ``hashes`` and, for near duplicates, ``minhashes``.

    Raises:
        ConfigError: near duplicates are wanted and datasketch is not installed.
    """
    num_chunks = sum(len(hashes) for _, _, _, hashes in _arrays(folders, "hashes"))
    found = Duplicates(state=np.zeros(num_chunks, dtype=np.uint8))
    if config.duplicates != "keep":
        _mark_equal(found.state, folders)
    if config.duplicates == "near":
        _mark_similar(found, folders, config.near_threshold)
    return found


def _arrays(folders: list[BlockFolder], name: str) -> Iterator[tuple[int, int, Block, np.ndarray]]:
    """An array of every block, with the number of chunks before it and that of its dataset."""
    place = 0
    for number, folder in enumerate(folders):
        for block in folder.blocks:
            array = folder.read(block, name)[name]
            yield place, number, block, array
            place += len(array)


def _mark_equal(state: np.ndarray, folders: list[BlockFolder]) -> None:
    passes = -(-len(state) // HASHES_IN_MEMORY)
    for number in range(passes):
        hashes, places = [], []
        for place, _, _, array in _arrays(folders, "hashes"):
            mine = np.flatnonzero(array[:, 0] % np.uint64(passes) == number)
            hashes.append(array[mine])
            places.append(mine + place)
        pairs, where = np.concatenate(hashes), np.concatenate(places)
        order = np.lexsort((where, pairs[:, 1], pairs[:, 0]))
        pairs, where = pairs[order], where[order]
        repeated = np.concatenate(([False], (pairs[1:] == pairs[:-1]).all(axis=1)))
        state[where[repeated]] = EQUAL


def _mark_similar(found: Duplicates, folders: list[BlockFolder], threshold: float) -> None:
    """Mark chunks whose signature is like that of one that is kept. Signatures and their index are held in memory."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise ConfigError("duplicates near needs datasketch: pip install 'megatron-grit[retro]'") from None
    index: Any = None
    blank: Any = None
    kept: dict[int, np.ndarray] = {}
    state = found.state
    with tqdm(total=len(state), unit="chunk", unit_scale=True, desc="near duplicates", disable=None) as bar:
        for place, number, block, signatures in _arrays(folders, "minhashes"):
            if index is None:
                # It makes no tables for thresholds near 1; those of a lower one find more, which are then compared.
                index = MinHashLSH(threshold=min(threshold, 0.9), num_perm=signatures.shape[1])
                blank = MinHash(num_perm=signatures.shape[1], seed=1)
            for row, signature in enumerate(signatures):
                if state[place + row]:
                    continue
                sketch = blank.copy()
                sketch.hashvalues = signature
                # The index finds candidates; their signatures decide.
                like = sorted(key for key in index.query(sketch) if (kept[key] == signature).mean() >= threshold)
                if not like:
                    index.insert(place + row, sketch)
                    kept[place + row] = signature.copy()
                    continue
                state[place + row] = SIMILAR
                if len(found.examples) < _NUM_EXAMPLES:
                    rows = folders[number].read(block, "chunks_valid")["chunks_valid"]
                    found.examples.append((_row_of(folders, like[0]), (number, rows[row])))
            bar.update(len(signatures))


def _row_of(folders: list[BlockFolder], chunk: int) -> tuple[int, np.ndarray]:
    for place, number, _, rows in _arrays(folders, "chunks_valid"):
        if chunk < place + len(rows):
            return number, rows[chunk - place]
    raise IndexError(f"chunk {chunk}")
