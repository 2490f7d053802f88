"""Folders of blocks: whole or not there, and known by what they were made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_grit.errors import DataError
from megatron_grit.store import blocks as block_files
from megatron_grit.store.blocks import Arrays, Block, BlockFolder, read_arrays, same_bits, shares, write_arrays


def folder_of(path: Path, num_items: int = 25, block_size: int = 10, **settings: object) -> BlockFolder:
    return BlockFolder(path, num_items, block_size, {"task": "test"} | settings)


def squares(block: Block) -> Arrays:
    return {"data": np.arange(block.start, block.stop, dtype=np.int64) ** 2, "none": np.empty((0, 4), np.uint32)}


def missing(folder: BlockFolder, *, thorough: bool = True) -> list[Block]:
    return [block for block in folder.blocks if folder.problem(block, thorough=thorough) is not None]


def fill(folder: BlockFolder) -> BlockFolder:
    for block in folder.blocks:
        folder.write(block, squares(block))
    return folder


def test_blocks_cover_all_items(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert [block.path.name for block in folder.blocks] == ["000-010.hdf5", "010-020.hdf5", "020-025.hdf5"]
    assert [len(block) for block in folder.blocks] == [10, 10, 5]
    assert [block.number for block in folder.blocks] == [0, 1, 2]
    assert folder_of(tmp_path, 0).blocks == []


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = fill(folder_of(tmp_path))
    assert missing(folder) == []
    for block in folder.blocks:
        stored = folder.read(block)
        assert all(same_bits(stored[name], array) for name, array in squares(block).items())
        assert list(folder.read(block, "data")) == ["data"]


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    fill(folder_of(tmp_path / "a")), fill(folder_of(tmp_path / "b"))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(np.int64(81).tobytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"not HDF5"), "cannot be read"),
        (_flip, "checksum"),
    ],
)
def test_a_damaged_block_is_found_and_refused(tmp_path: Path, damage: object, word: str) -> None:
    folder = fill(folder_of(tmp_path))
    damage(folder.blocks[0].path)  # type: ignore[operator]
    assert missing(folder) == [folder.blocks[0]]
    with pytest.raises(DataError, match=f"000-010.hdf5: .*{word}"):
        folder.read(folder.blocks[0])
    folder.write(folder.blocks[0], squares(folder.blocks[0]))
    assert missing(folder) == []


def test_blocks_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    fill(folder_of(tmp_path))
    other = folder_of(tmp_path, chunk_length=3)
    assert missing(other, thorough=False) == other.blocks
    with pytest.raises(DataError, match="other settings"):
        other.read(other.blocks[0])


def test_leftovers_go(tmp_path: Path) -> None:
    folder = fill(folder_of(tmp_path))
    (tmp_path / ".000-010.hdf5.123.abcd.tmp").write_text("half")
    (tmp_path / "000-020.hdf5").write_text("of other sizes")
    folder.clear_leftovers()
    assert sorted(tmp_path.iterdir()) == [block.path for block in folder.blocks]


def test_check_compares_bit_for_bit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    block = folder.blocks[0]
    folder.write(block, {"data": np.zeros(3, np.float32)})
    folder.check(block, {"data": np.zeros(3, np.float32)})
    for other in (np.array([0.0, -0.0, 0.0], np.float32), np.zeros(3, np.float64), np.zeros(4, np.float32)):
        with pytest.raises(DataError, match="data differs"):
            folder.check(block, {"data": other})
    with pytest.raises(DataError, match="more differs"):
        folder.check(block, {"data": np.zeros(3, np.float32), "more": np.zeros(1)})


def test_a_sample_of_blocks(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 1000, 1)
    chosen = folder.sample(0.1, seed=1)
    assert len({block.start for block in chosen}) == 100
    assert chosen == sorted(chosen, key=lambda block: block.start)
    assert chosen == folder.sample(0.1, seed=1) != folder.sample(0.1, seed=2)
    assert len(folder.sample(1e-9, seed=1)) == 1
    assert len(folder.sample(1.0, seed=1)) == 1000
    assert folder_of(tmp_path, 0).sample(0.5, seed=1) == []


def test_shares_part_the_blocks(tmp_path: Path) -> None:
    blocks = folder_of(tmp_path, 100, 7).blocks
    parts = [list(shares(blocks, rank, 4)) for rank in range(4)]
    assert sorted((block for part in parts for block in part), key=lambda block: block.start) == blocks


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(folder_of(tmp_path))
    before = folder.blocks[0].path.read_bytes()

    def fail(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(DataError, match="000-010.hdf5: cannot be written .*No space left.*; when there is room"):
        folder.write(folder.blocks[0], squares(folder.blocks[0]))
    monkeypatch.undo()
    assert folder.blocks[0].path.read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_files_that_are_no_blocks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing"):
        read_arrays(tmp_path / "a.hdf5")
    write_arrays(tmp_path / "a.hdf5", {"b": np.arange(3)}, "signature")
    assert read_arrays(tmp_path / "a.hdf5")["b"].tolist() == [0, 1, 2]
    assert block_files.signature_of(tmp_path / "a.hdf5") == "signature"
    assert block_files.signature_of(tmp_path / "none.hdf5") is None
