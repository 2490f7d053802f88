from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.text.line_blocks import (
    FilePart,
    InputFile,
    count_lines,
    find_inputs,
    iterate_blocks,
    partition_files,
)
from megatron_grit.errors import DataError

TEXT = b"one\ntwo\n\nthree is a longer line than the block\nfour\r\nfive"


def read_all(paths: list[Path], partitions: int = 1, **options: object) -> list[list[bytes]]:
    """Lines by partition."""
    inputs = find_inputs(paths)
    return [
        [line for ref in iterate_blocks(inputs, segments, **options) for line in ref.read().lines()]  # type: ignore
        for segments in partition_files(inputs, partitions)
    ]


def compress(path: Path, text: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text[:20]) + gzip.compress(text[20:]))  # two members, as by cat
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(zstandard.compress(text[:20]) + zstandard.compress(text[20:]))
    else:
        path.write_bytes(text)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
def test_blocks_hold_whole_lines_in_order(tmp_path, suffix, block_bytes):
    path = compress(tmp_path / f"a.jsonl{suffix}", TEXT)
    assert read_all([path], block_bytes=block_bytes) == [TEXT.split(b"\n")]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_byte_order_mark_is_dropped_at_the_begin_of_a_file_only(tmp_path, suffix):
    bom = b"\xef\xbb\xbf"
    path = compress(tmp_path / f"a.jsonl{suffix}", bom + b"one\n" + bom + b"two\n")
    assert read_all([path], block_bytes=1) == [[b"one", bom + b"two"]]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_an_iteration_goes_on_where_another_stopped(tmp_path, suffix):
    first, second = tmp_path / "a.jsonl", compress(tmp_path / f"b.jsonl{suffix}", TEXT)
    first.write_bytes(b"zero\n")
    inputs = find_inputs([first, second])
    segments = partition_files(inputs, 1)[0]
    refs = list(iterate_blocks(inputs, segments, block_bytes=4))
    assert len(refs) >= 3
    for stopped in range(len(refs)):
        place = (refs[stopped].file, refs[stopped].stop)
        rest = list(iterate_blocks(inputs, segments, block_bytes=4, skip_to=place))
        assert b"".join(ref.read().data for ref in rest) == b"".join(ref.read().data for ref in refs[stopped + 1 :])


def plain(text: bytes) -> bytes:
    """Without what makes a file one that is refused."""
    return text.replace(b"\xef", b"\n").translate(None, b"\r\xfe\xff")


@given(
    texts=st.lists(st.binary(max_size=40).map(plain), min_size=1, max_size=4),
    partitions=st.integers(1, 6),
    block_bytes=st.integers(1, 50),
)
def test_partitions_hold_every_line_once(tmp_path_factory, texts, partitions, block_bytes):
    folder = tmp_path_factory.mktemp("partitions")
    paths = []
    for number, text in enumerate(texts):
        paths.append(folder / f"{number}.txt")
        paths[-1].write_bytes(text)
    found = read_all(paths, partitions, block_bytes=block_bytes)
    expected = [line for text in texts for line in (text.removesuffix(b"\n").split(b"\n") if text else [])]
    assert [line for lines in found for line in lines] == expected


def test_partitions_are_of_about_equal_size(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789\n" * 1000)
    sizes = [len(lines) for lines in read_all([path], 3)]
    assert sum(sizes) == 1000
    assert max(sizes) - min(sizes) <= 1


def test_a_cut_at_the_begin_of_a_line_is_left_where_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\ncd\n")
    assert partition_files(find_inputs([path]), 2) == [[FilePart(0, 0, 3)], [FilePart(0, 3, 6)]]


def test_a_compressed_file_belongs_to_the_partition_it_starts_in(tmp_path):
    paths = [compress(tmp_path / f"{name}.gz", name.encode() * 50) for name in "abcd"]
    inputs = find_inputs(paths)
    ranges = partition_files(inputs, 2)
    assert ranges == [[FilePart(0, 0, None), FilePart(1, 0, None)], [FilePart(2, 0, None), FilePart(3, 0, None)]]
    assert sum(len(segments) for segments in partition_files(inputs, 9)) == 4


def test_progress_adds_up_to_the_size_on_disk(tmp_path):
    paths = [compress(tmp_path / f"a{suffix}", os.urandom(300_000) + TEXT * 300) for suffix in ("", ".gz", ".zst")]
    for path in paths:
        inputs = find_inputs([path])
        refs = list(iterate_blocks(inputs, partition_files(inputs, 1)[0], block_bytes=1000))
        assert len(refs) > 5
        assert sum(ref.num_disk_bytes for ref in refs) == path.stat().st_size


def test_globs_are_sorted_and_names_keep_their_order(tmp_path):
    for name in ("b2", "a", "b1", "[x]"):
        (tmp_path / name).write_text(name)
    found = find_inputs([tmp_path / "b?", tmp_path / "a", tmp_path / "[x]"])
    assert [file.path.name for file in found] == ["b1", "b2", "a", "[x]"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["missing"], "no such input file"),
        (["*.nothing"], "no file matches"),
        (["folder"], "not a regular file"),
        (["a", "?"], "is given twice"),
        (["empty.gz"], "is empty"),
        ([], "no input files"),
    ],
)
def test_inputs_that_cannot_be_read_are_named(tmp_path, names, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").write_text("a")
    (tmp_path / "empty.gz").touch()
    with pytest.raises(DataError, match=message):
        find_inputs([tmp_path / name for name in names])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_every_truncation_of_a_compressed_file_is_an_error(tmp_path, suffix):
    whole = compress(tmp_path / f"whole{suffix}", TEXT).read_bytes()
    members = len(gzip.compress(TEXT[:20])) if suffix == ".gz" else whole.index(whole[:4], 1)
    for size in range(1, len(whole)):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(whole[:size])
        if size == members:  # what is left is a whole file
            assert read_all([path]) == [TEXT[:20].split(b"\n")]
            continue
        with pytest.raises(DataError, match="not a") as caught:
            read_all([path])
        assert caught.value.path == path


def test_a_plain_text_under_a_compressed_name_is_an_error(tmp_path):
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(TEXT)
        with pytest.raises(DataError, match="not a"):
            read_all([path])


def test_a_file_that_changes_is_noticed(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(TEXT)
    inputs = find_inputs([path])
    ref = next(iterate_blocks(inputs, partition_files(inputs, 1)[0]))
    path.write_bytes(TEXT[:-1])
    with pytest.raises(DataError, match="became shorter"):
        ref.read()
    with pytest.raises(DataError, match="changed"):
        inputs[0].check_unchanged()
    path.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        inputs[0].check_unchanged()


def test_lines_are_counted_up_to_an_offset(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(TEXT)
    assert [count_lines(path, stop) for stop in (0, 3, 4, 9, 1000)] == [0, 0, 1, 3, 5]
    assert not InputFile(path, 1, 1).compressed
