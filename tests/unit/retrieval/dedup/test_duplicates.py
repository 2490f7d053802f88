"""Duplicates that are looked for on disk: what is found, by how many processes, and after a kill."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.chunk_db import map_dataset
from megatron_grit.errors import DataError
from megatron_grit.retrieval.dedup import duplicates
from megatron_grit.retrieval.dedup.duplicates import EQUAL, SIMILAR, ChunkBlock, DuplicateSearch
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.blocks import write_arrays
from tests.unit.retrieval.workers import run_together

NUM_PERMUTATIONS = 32
Chunks = tuple[np.ndarray, np.ndarray]


def make_chunks(num_chunks: int, seed: int = 0) -> Chunks:
    """Hashes and signatures; a third are copies of another chunk, some of them with changes."""
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 2**64, (num_chunks, 2), dtype=np.uint64)
    signatures = random.integers(0, 2**32, (num_chunks, NUM_PERMUTATIONS), dtype=np.uint32)
    for chunk in range(1, num_chunks):
        original, kind = random.integers(chunk), random.random()
        if kind < 0.15:
            hashes[chunk], signatures[chunk] = hashes[original], signatures[original]
        elif kind < 0.4:
            changed = random.random(NUM_PERMUTATIONS) < random.choice([0.03, 0.1, 0.3, 0.5])
            signatures[chunk] = np.where(changed, signatures[chunk], signatures[original])
    # Half of a hash is not the hash.
    hashes[-1, 0] = hashes[0, 0]
    return hashes, signatures


def write_blocks(folder: Path, chunks: Chunks, size: int = 37) -> list[ChunkBlock]:
    blocks = []
    for start in range(0, len(chunks[0]), size):
        hashes, signatures = (array[start : start + size] for array in chunks)
        path = folder / f"{start:08d}.hdf5"
        write_arrays(path, {"hashes": hashes, "minhashes": signatures}, "chunks")
        blocks.append(ChunkBlock(path, f"chunks {start}"))
    return blocks


def search_in(folder: Path, blocks: list[ChunkBlock], num_old_blocks: int = 0, **settings: Any) -> DuplicateSearch:
    values = {"duplicates": "near", "near_threshold": 0.8, "minhash_permutations": NUM_PERMUTATIONS} | settings
    return DuplicateSearch(RetroDbConfig(**values), folder, blocks, num_old_blocks)


def state_of(folder: Path, blocks: list[ChunkBlock], num_old_blocks: int = 0, **settings: Any) -> np.ndarray:
    search = search_in(folder, blocks, num_old_blocks, **settings)
    search.run(Worker())
    return search.state()


def similar_to_earlier(chunks: Chunks, equal: np.ndarray, threshold: float) -> np.ndarray:
    """Whether the signature of a chunk is like that of any chunk before it, by comparing all with all."""
    signatures = chunks[1]
    like = (signatures[:, None] == signatures[None]).mean(axis=2) >= threshold
    return np.asarray((np.tril(like, -1) & ~equal).any(axis=1) & ~equal)


def first_of_equal(hashes: np.ndarray) -> np.ndarray:
    seen: set[tuple[int, ...]] = set()
    return np.array([key in seen or seen.add(key) is not None for key in map(tuple, hashes.tolist())])


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def chunks() -> Chunks:
    return make_chunks(400)


@pytest.fixture
def blocks(tmp_path: Path, chunks: Chunks) -> list[ChunkBlock]:
    return write_blocks(tmp_path / "chunks", chunks)


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.95, 1.0])
def test_what_is_found(tmp_path: Path, chunks: Chunks, blocks: list[ChunkBlock], threshold: float) -> None:
    state = state_of(tmp_path / "found", blocks, near_threshold=threshold)
    equal = first_of_equal(chunks[0])
    assert equal.sum() > 20 and ((state == EQUAL) == equal).all(), "half a hash was taken for the whole, or one missed"
    similar = similar_to_earlier(chunks, equal, threshold)
    found = state == SIMILAR
    assert not (found & ~similar).any(), "found, and unlike all chunks before"
    assert found.sum() >= 0.9 * similar.sum() > 0
    assert not state[0]


def test_signatures_that_are_equal_are_always_found(tmp_path: Path) -> None:
    hashes, signatures = make_chunks(60, seed=3)
    signatures[30:] = signatures[:30]
    equal = first_of_equal(hashes)
    state = state_of(tmp_path / "found", write_blocks(tmp_path, (hashes, signatures)), near_threshold=1.0)
    assert (state[30:][~equal[30:]] == SIMILAR).all()


def test_only_what_is_asked_for(tmp_path: Path, chunks: Chunks, blocks: list[ChunkBlock]) -> None:
    exact = state_of(tmp_path / "exact", blocks, duplicates="exact")
    assert ((exact == EQUAL) == first_of_equal(chunks[0])).all() and not (exact == SIMILAR).any()
    assert not state_of(tmp_path / "keep", blocks, duplicates="keep").any() and not (tmp_path / "keep").exists()
    assert state_of(tmp_path / "none", []).shape == (0,)
    empty = write_blocks(tmp_path / "more", (chunks[0][:1], chunks[1][:1]))
    write_arrays(empty[0].path, {"hashes": chunks[0][:0], "minhashes": chunks[1][:0]}, "chunks")
    assert (state_of(tmp_path / "more_found", [*empty, *blocks, *empty]) == state_of(tmp_path / "found", blocks)).all()


@pytest.mark.parametrize("most", [1, 64, 10_000])
def test_neither_memory_nor_blocks_matter(
    tmp_path: Path, chunks: Chunks, blocks: list[ChunkBlock], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = state_of(tmp_path / "found", blocks)
    monkeypatch.setattr(duplicates, "ENTRIES_IN_MEMORY", most)
    few = slice(0, 400 if most > 1 else 15)  # there are two parts for each key that fits
    for size in (7, 400):
        cut = write_blocks(tmp_path / f"cut{size}", (chunks[0][few], chunks[1][few]), size)
        assert (state_of(tmp_path / f"found{size}", cut) == wanted[few]).all()


def test_most_chunks_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks of one key than are in memory at a time."""
    monkeypatch.setattr(duplicates, "ENTRIES_IN_MEMORY", 50)
    hashes, signatures = make_chunks(300, seed=1)
    hashes[20:280], signatures[20:280] = hashes[20], signatures[20]
    hashes[200:220, 1] += np.arange(20, dtype=np.uint64)  # alike, not equal
    state = state_of(tmp_path / "found", write_blocks(tmp_path, (hashes, signatures)))
    equal = first_of_equal(hashes)
    assert ((state == EQUAL) == equal).all()
    assert (state[200:220][~equal[200:220]] == SIMILAR).all()


@pytest.mark.parametrize("num_old", [37, 37 * 5])
def test_old_chunks_are_not_left_out(tmp_path: Path, blocks: list[ChunkBlock], num_old: int) -> None:
    whole = state_of(tmp_path / "whole", blocks)
    search = search_in(tmp_path / "found", blocks, num_old // 37)
    search.run(Worker())
    assert search.first_new == num_old
    state = search.state()
    assert (state[num_old:] == whole[num_old:]).all() and not state[:num_old].any() and whole[:num_old].any()


@pytest.mark.parametrize("num_workers", [2, 3])
def test_processes_share_the_work(
    tmp_path: Path, blocks: list[ChunkBlock], num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "ENTRIES_IN_MEMORY", 300)
    alone = search_in(tmp_path / "alone", blocks)
    alone.run(Worker())
    written: set[int] = set()
    find_similar = DuplicateSearch._find_similar

    def noticing(self: DuplicateSearch, block: Any) -> Any:
        written.add(threading.get_ident())
        return find_similar(self, block)

    monkeypatch.setattr(DuplicateSearch, "_find_similar", noticing)
    run_together(num_workers, lambda worker: search_in(tmp_path / "shared", blocks).run(worker))
    assert len(written) == num_workers
    assert content(tmp_path / "alone") == content(tmp_path / "shared")
    assert len(content(tmp_path / "alone")) == len(blocks) + 3 + 3 * alone.bands.count + 1


def test_a_search_that_was_killed_goes_on(
    tmp_path: Path, blocks: list[ChunkBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "ENTRIES_IN_MEMORY", 300)
    straight = search_in(tmp_path / "straight", blocks)
    straight.run(Worker())
    names = ("_make_keys", "_find_equal", "_find_similar")
    counts: list[str] = []
    for stop in (4, 13, 18, 10_000):
        with monkeypatch.context() as patch:
            for name in names:
                whole = getattr(DuplicateSearch, name)

                def counting(self: DuplicateSearch, block: Any, whole: Any = whole, last: int = stop) -> Any:
                    counts.append(block.path.as_posix())
                    if len(counts) == last:
                        raise KeyboardInterrupt
                    return whole(self, block)

                patch.setattr(DuplicateSearch, name, counting)
            again = search_in(tmp_path / "killed", blocks)
            if stop < 10_000:
                with pytest.raises(KeyboardInterrupt):
                    again.run(Worker())
            else:
                again.run(Worker())
    assert len(counts) == len(set(counts)) + 3, "something was computed twice"
    assert content(tmp_path / "killed") == content(tmp_path / "straight")
    assert (again.state() == straight.state()).all()
    # Parts of another threshold are not gone on with, though these have the same bands and so the same keys.
    other = search_in(tmp_path / "killed", blocks, near_threshold=0.84)
    assert other.bands == straight.bands
    other.run(Worker())
    assert (other.state() == state_of(tmp_path / "other", blocks, near_threshold=0.84)).all()
    assert (other.state() != straight.state()).any()


def test_a_process_opens_each_array_once(
    tmp_path: Path, blocks: list[ChunkBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts and bands there are."""
    monkeypatch.setattr(duplicates, "ENTRIES_IN_MEMORY", 100)
    opened: Counter[tuple[Path, str]] = Counter()

    def counting(path: Path, name: str, **options: Any) -> np.ndarray:
        opened[path, name] += 1
        return map_dataset(path, name, **options)

    monkeypatch.setattr(duplicates, "map_dataset", counting)
    search = search_in(tmp_path / "found", blocks)
    search.run(Worker())
    assert len(search._similar.blocks) > 20 and set(opened.values()) == {1}
    assert len(opened) == 4 * len(blocks), "hashes, signatures, keys and rows"


def test_examples(tmp_path: Path, chunks: Chunks, blocks: list[ChunkBlock]) -> None:
    search = search_in(tmp_path / "found", blocks)
    search.run(Worker())
    state = search.state()
    examples = search.examples(state, 4)
    assert len(examples) == 4 and [pair[1] for pair in examples] == sorted(pair[1] for pair in examples)
    for kept, left_out in examples:
        assert (state[kept], state[left_out]) == (0, SIMILAR) and kept < left_out
        assert (chunks[1][kept] == chunks[1][left_out]).mean() >= 0.8
        for chunk in (kept, left_out):
            number, row = search.place(chunk)
            assert (number, row) == divmod(chunk, 37)
    assert search.examples(np.ones_like(state), 4) == []


def test_damaged_chunks(tmp_path: Path, blocks: list[ChunkBlock]) -> None:
    with pytest.raises(DataError, match="has signatures of 32 numbers, but minhash_permutations is 64; set it to 32"):
        search_in(tmp_path / "found", blocks, minhash_permutations=64)
    path = blocks[3].path
    image = bytearray(path.read_bytes())
    image[-5] ^= 1
    path.write_bytes(image)
    with pytest.raises(DataError, match=f"{path.name}: does not match its checksum"):
        state_of(tmp_path / "found", blocks)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name}: is missing"):
        search_in(tmp_path / "found", blocks)
