"""Duplicates that are looked for on disk: what is found, by how many processes, and after a kill."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.chunk_db import map_dataset
from megatron_grit.errors import DataError
from megatron_grit.retrieval.dedup import keys
from megatron_grit.retrieval.dedup.duplicates import EQUAL, SIMILAR, DuplicateSearch, KnownChunks
from megatron_grit.retrieval.dedup.keys import ChunkBlock, KeyedChunks
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.blocks import BlockFolder, write_arrays
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


def config_of(**settings: Any) -> RetroDbConfig:
    values = {"duplicates": "near", "near_threshold": 0.8, "minhash_permutations": NUM_PERMUTATIONS} | settings
    return RetroDbConfig(**values)


def search_in(
    folder: Path, blocks: list[ChunkBlock], earlier: Sequence[KnownChunks] = (), **settings: Any
) -> DuplicateSearch:
    return DuplicateSearch(config_of(**settings), folder, folder / "keys", blocks, earlier)


def state_of(
    folder: Path, blocks: list[ChunkBlock], earlier: Sequence[KnownChunks] = (), **settings: Any
) -> np.ndarray:
    search = search_in(folder, blocks, earlier, **settings)
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
    monkeypatch.setattr(keys, "ENTRIES_IN_MEMORY", most)
    few = slice(0, 400 if most > 1 else 15)  # there are two parts for each key that fits
    for size in (7, 400):
        cut = write_blocks(tmp_path / f"cut{size}", (chunks[0][few], chunks[1][few]), size)
        assert (state_of(tmp_path / f"found{size}", cut) == wanted[few]).all()


def test_most_chunks_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks of one key than are in memory at a time."""
    monkeypatch.setattr(keys, "ENTRIES_IN_MEMORY", 50)
    hashes, signatures = make_chunks(300, seed=1)
    hashes[20:280], signatures[20:280] = hashes[20], signatures[20]
    hashes[200:220, 1] += np.arange(20, dtype=np.uint64)  # alike, not equal
    state = state_of(tmp_path / "found", write_blocks(tmp_path, (hashes, signatures)))
    equal = first_of_equal(hashes)
    assert ((state == EQUAL) == equal).all()
    assert (state[200:220][~equal[200:220]] == SIMILAR).all()


@pytest.mark.parametrize(("entries", "steps"), [(10_000, [1]), (10_000, [5, 2]), (150, [3, 4, 2]), (30, [2, 6])])
def test_what_comes_later_is_compared_with_what_was_there(
    tmp_path: Path, blocks: list[ChunkBlock], entries: int, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if all were there at once, in parts of other sizes than those of the lists that are looked up."""
    whole = state_of(tmp_path / "whole", blocks)
    for mode in ("near", "exact"):
        config, earlier, found, first = config_of(duplicates=mode), [], [], 0
        for number, last in enumerate([*np.cumsum(steps).tolist(), len(blocks)]):
            monkeypatch.setattr(keys, "ENTRIES_IN_MEMORY", entries * (1 + number))
            folder = tmp_path / f"{mode}{number}"
            search = DuplicateSearch(config, folder / "between", folder / "keys", blocks[first:last], earlier)
            search.run(Worker())
            found.append(search.state())
            assert 0 < (found[-1] == EQUAL).sum() or not number
            earlier.append(KnownChunks(search.chunks))
            first = last
        state = np.concatenate(found)
        assert (state == whole).all() if mode == "near" else ((state == EQUAL) == (whole == EQUAL)).all()


def test_what_was_removed_leaves_nothing_out(tmp_path: Path, chunks: Chunks) -> None:
    """As if it had never been there; without the rest of the earlier chunks nothing is left out because of them."""
    old, new = (
        write_blocks(tmp_path / name, tuple(a[part] for a in chunks))
        for name, part in (("old", slice(200)), ("new", slice(200, None)))
    )
    live = np.random.default_rng(0).random(200) < 0.4
    kept = write_blocks(tmp_path / "live", tuple(a[:200][live] for a in chunks))
    wanted = state_of(tmp_path / "wanted", [*kept, *new])[live.sum() :]
    known = KeyedChunks(config_of(), tmp_path / "keys", old)
    found = state_of(tmp_path / "found", new, [KnownChunks(known, lambda rows: live[rows])])
    assert (found == wanted).all()
    assert (found != state_of(tmp_path / "all", new, [KnownChunks(known)])).any()


@pytest.mark.parametrize("num_workers", [2, 3])
def test_processes_share_the_work(
    tmp_path: Path, blocks: list[ChunkBlock], num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "ENTRIES_IN_MEMORY", 300)
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
    assert len(content(tmp_path / "alone")) == 1 + 3 * (1 + 2 * alone.chunks.bands.count) + 1


def test_a_search_that_was_killed_goes_on(
    tmp_path: Path, blocks: list[ChunkBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "ENTRIES_IN_MEMORY", 300)
    straight = search_in(tmp_path / "straight", blocks)
    straight.run(Worker())
    of_keys = [(KeyedChunks, name) for name in ("_make_run", "_list_hashes", "_list_band")]
    counts: list[str] = []
    for stop in (4, 13, 18, 40, 10_000):
        with monkeypatch.context() as patch:
            for owner, name in (*of_keys, (DuplicateSearch, "_find_similar")):
                whole = getattr(owner, name)

                def counting(self: Any, block: Any, whole: Any = whole, last: int = stop) -> Any:
                    counts.append(block.path.as_posix())
                    if len(counts) == last:
                        raise KeyboardInterrupt
                    return whole(self, block)

                patch.setattr(owner, name, counting)
            again = search_in(tmp_path / "killed", blocks)
            if stop < 10_000:
                with pytest.raises(KeyboardInterrupt):
                    again.run(Worker())
            else:
                again.run(Worker())
    assert len(counts) == len(set(counts)) + 4, "something was computed twice"
    assert content(tmp_path / "killed") == content(tmp_path / "straight")
    assert (again.state() == straight.state()).all()
    # Parts of another threshold are not gone on with, though these have the same bands and so the same keys.
    other = search_in(tmp_path / "killed", blocks, near_threshold=0.84)
    assert other.chunks.bands == straight.chunks.bands
    other.run(Worker())
    assert (other.state() == state_of(tmp_path / "other", blocks, near_threshold=0.84)).all()
    assert (other.state() != straight.state()).any()


def test_what_lists_are_made_of_goes_after_a_kill(
    tmp_path: Path, blocks: list[ChunkBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that came when they were made already."""
    for name in ("straight", "killed"):
        with monkeypatch.context() as patch:
            if name == "killed":
                patch.setattr(BlockFolder, "remove", lambda _: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    KeyedChunks(config_of(), tmp_path / name, blocks).make(Worker())
                assert (tmp_path / "killed" / "runs").is_dir() and (tmp_path / "killed" / "repeats.npy").is_file()
        KeyedChunks(config_of(), tmp_path / name, blocks).make(Worker())
    assert not (tmp_path / "killed" / "runs").exists()
    assert content(tmp_path / "killed") == content(tmp_path / "straight")


def test_lists_are_not_taken_for_those_they_were(
    tmp_path: Path, chunks: Chunks, blocks: list[ChunkBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of other chunks were being made in their place when the run was killed."""
    before = KeyedChunks(config_of(duplicates="exact"), tmp_path / "keys", blocks)
    before.make(Worker())
    whole = content(tmp_path / "keys")
    others = write_blocks(tmp_path / "others", make_chunks(400, seed=9))
    others = [replace(block, signature=f"others {number}") for number, block in enumerate(others)]
    with monkeypatch.context() as patch:
        patch.setattr("megatron_grit.retrieval.dedup.keys.write_arrays", lambda *_: 1 / 0)  # the seal
        with pytest.raises(ZeroDivisionError):
            KeyedChunks(config_of(duplicates="exact"), tmp_path / "keys", others).make(Worker())
    KeyedChunks(config_of(duplicates="exact"), tmp_path / "keys", blocks).make(Worker())
    assert content(tmp_path / "keys") == whole


def count_opens(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the arrays that are opened, by the folder that they lie in."""
    opened: Counter[str] = Counter()

    def counting(path: Path, name: str, *options: Any, **named: Any) -> np.ndarray:
        opened[path.parent.name] += 1
        return map_dataset(path, name, *options, **named)

    monkeypatch.setattr(keys, "map_dataset", counting)
    return opened


def test_opens_grow_as_the_chunks_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process opens each array of a block or a run once, however many parts there are, and each array of a part once,
    however many runs there are. With twice the chunks, so twice the blocks, runs and parts, there are twice as many."""
    monkeypatch.setattr(keys, "ENTRIES_IN_MEMORY", 200)
    opened, totals = count_opens(monkeypatch), []
    for number in (370, 740):
        blocks = write_blocks(tmp_path / f"chunks{number}", make_chunks(number))
        opened.clear()
        search = search_in(tmp_path / f"found{number}", blocks)
        search.run(Worker())
        num_parts, num_runs, num_bands = (
            search.chunks.num_parts,
            len(search.chunks._runs.blocks),
            search.chunks.bands.count,
        )
        assert (len(blocks), num_runs, num_parts) == (number // 37, number // 37, number // 100 + 1)
        assert opened == {
            f"chunks{number}": 2 * len(blocks),
            "runs": 2 * num_runs,
            "hashes": 2 * num_parts,
            "bands": 2 * num_bands * num_parts,
        }
        totals.append(opened.total())
    assert 1.9 < totals[1] / totals[0] < 2.1


def test_an_addition_reads_what_is_new_and_looks_up_the_rest(
    tmp_path: Path, chunks: Chunks, blocks: list[ChunkBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: entries of earlier lists, files of them, and chunks whose signatures are read. As a control, lists that
    were deleted: then all earlier chunks are read again."""
    old, new = blocks[:10], blocks[10:]
    num_old, num_new = 370, 30
    whole = state_of(tmp_path / "whole", blocks)
    opened, entries, gathered = count_opens(monkeypatch), Counter[int](), []
    look_up, gather = KeyedChunks.look_up, KeyedChunks.gather

    def looking_up(self: KeyedChunks, number: int, wanted: np.ndarray) -> Any:
        found = look_up(self, number, wanted)
        entries[number] += len(found.keys)
        return found

    def gathering(self: KeyedChunks, name: str, rows: np.ndarray) -> np.ndarray:
        gathered.extend((name, row) for row in rows.tolist() if self.num_chunks == num_old)
        return gather(self, name, rows)

    monkeypatch.setattr(KeyedChunks, "look_up", looking_up)
    monkeypatch.setattr(KeyedChunks, "gather", gathering)
    monkeypatch.setattr(keys, "ENTRIES_IN_MEMORY", 200)
    before = search_in(tmp_path / "before", old)
    before.run(Worker())
    bands, sources = before.chunks.bands, []
    halves = [chunks[0][:num_old, 0], chunks[0][num_old:, 0]]
    wanted = {0: int(np.isin(*halves).sum())}
    of_bands = [keys.band_keys(part, bands) for part in (chunks[1][:num_old], chunks[1][num_old:])]
    for kept in (True, False):
        for found in (entries, opened):
            found.clear()
        gathered.clear()
        if not kept:
            shutil.rmtree(tmp_path / "before" / "keys")
        earlier = KnownChunks(KeyedChunks(config_of(), tmp_path / "before" / "keys", old))
        search = search_in(tmp_path / f"after{kept}", new, [earlier])
        search.run(Worker())
        assert (search.state() == whole[num_old:]).all()
        sources.append(opened["chunks"] - 2 * len(new))
        if not kept:
            continue
        assert entries[0] == wanted[0] > 0
        unknown = ~np.isin(chunks[0][num_old:, 0], chunks[0][:num_old, 0])
        for band in range(bands.count):
            assert entries[1 + band] <= np.isin(of_bands[0][band], of_bands[1][band]).sum()
        assert 0 < entries.total() < 0.1 * (1 + bands.count) * num_old and unknown.any()
        assert {name for name, _ in gathered} == {"minhashes"} and len(set(gathered)) < 0.1 * num_old
        # A part of the new list meets all parts of the old one: three arrays of hashes, two of bands.
        assert opened["hashes"] <= 3 * (num_new + 2) and opened["bands"] <= bands.count * 2 * (num_new + 2)
    assert sources[0] <= len(old) < 2 * len(old) <= sources[1]


def test_a_damaged_list_is_not_read(tmp_path: Path, blocks: list[ChunkBlock]) -> None:
    """Neither one of a few kilobytes nor one whose digest is remembered; one that was deleted is made again."""
    state_of(tmp_path / "before", blocks[:8])
    whole = state_of(tmp_path / "whole", blocks)[37 * 8 :]
    (path,) = (tmp_path / "before" / "keys" / "hashes").glob("*.hdf5")
    image = bytearray(path.read_bytes())
    image[-9] ^= 4
    path.write_bytes(image)

    def state() -> np.ndarray:
        earlier = KnownChunks(KeyedChunks(config_of(), tmp_path / "before" / "keys", blocks[:8]))
        return state_of(tmp_path / "after", blocks[8:], [earlier])

    with pytest.raises(DataError, match=f"{path.name}: does not match its checksum; delete it"):
        state()
    with pytest.raises(DataError, match=f"{path.name}: does not match its checksum; delete it"):
        state_of(tmp_path / "before", blocks[:8])  # nor by those whose keys they are
    path.unlink()
    assert (state() == whole).all()
    (tmp_path / "before" / "keys" / "chunks.hdf5").write_bytes(b"")
    assert (state() == whole).all()


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
