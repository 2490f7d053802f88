"""Text files cut into blocks of whole lines: what the workers of a build are given.

Plain files are cut by looking for one newline a block; the worker reads the block itself. ``.gz`` and ``.zst`` files
are decompressed here, in a stream, and their blocks carry the bytes. Nothing holds more than a block.
"""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_grit.compat import needed
from megatron_grit.errors import DataError

BLOCK_BYTES = 1 << 20
"""Size of a block. The last line of a block is never cut, so a long line makes a longer block."""

LONGEST_LINE = 1 << 28
"""Bytes. A longer line, as of a file without newlines, is not read, and is refused as a line."""

_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {"UTF-16": (b"\xff\xfe", b"\xfe\xff"), "UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff")}
_SEARCH_BYTES = 1 << 16  # read at a time when looking for the end of a line
_COMPRESSED_BYTES = 1 << 14  # fed to a decompressor at a time: bounds what comes out at a time


@dataclass(frozen=True)
class InputFile:
    """One input as it was when the build began."""

    path: Path
    size: int
    """Bytes on disk."""
    mtime_ns: int

    @property
    def compressed(self) -> bool:
        """Whether the file is decompressed in a stream: it cannot be entered in the middle."""
        return self.path.suffix in _OPENERS

    def check_unchanged(self) -> None:
        """Raise unless the file still has the size and time it had.

        Raises:
            DataError: it changed or is gone.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise DataError(f"cannot be read any more: {error.strerror}", path=self.path) from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError("changed while it was being read; start again when it is complete", path=self.path)


class TooLong(bytes):
    """Stands for a line that is longer than :data:`LONGEST_LINE`."""


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of a file."""

    path: Path
    data: bytes
    cut: bool = False
    """Whether the last line is longer than :data:`LONGEST_LINE`, and not all there."""

    def lines(self) -> list[bytes]:
        """The lines without their newlines. Blank ones are included; ``\\r`` before the newline stays."""
        lines = self.data.split(b"\n")
        if self.cut:
            lines[-1] = TooLong(b"...")
        elif not lines[-1]:
            lines.pop()
        if len(self.data) > LONGEST_LINE:
            lines = [TooLong(b"...") if len(line) > LONGEST_LINE else line for line in lines]
        return lines


@dataclass(frozen=True)
class BlockRef:
    """A block before its bytes are read. Small for a plain file."""

    file: int
    """Number of the file among the inputs."""
    path: Path
    start: int
    """Offset of the first byte; within the decompressed text where the file is compressed."""
    stop: int
    num_disk_bytes: int
    """Bytes of the file on disk that were passed: progress."""
    data: bytes | None = None
    """The bytes of a compressed file."""
    cut: bool = False
    """Whether ``data`` lacks the end of its last line."""

    def read(self) -> LineBlock:
        """The block's lines, without a byte-order mark at the begin of the file.

        Raises:
            DataError: the file became shorter, or is no UTF-8 text with lines.
        """
        data, cut = self.data, self.cut
        if data is None:
            size = self.stop - self.start
            # All but the last line of a block are shorter than a block.
            cut = size > LONGEST_LINE + BLOCK_BYTES
            data = _read_exactly(self.path, self.start, LONGEST_LINE + BLOCK_BYTES if cut else size)
        return LineBlock(self.path, data if self.start else without_mark(data, self.path), cut)


@dataclass(frozen=True)
class FilePart:
    """The part of a file that belongs to one partition: lines that start within ``[start, stop)``."""

    file: int
    start: int
    stop: int | None
    """None: to the end of a compressed file."""


def without_mark(data: bytes, path: Path) -> bytes:
    """The begin of a file without its byte-order mark.

    Raises:
        DataError: the mark is of another encoding, or lines end with ``\\r`` alone.
    """
    for encoding in reversed(_OTHER_BOMS):
        if data.startswith(_OTHER_BOMS[encoding]):
            raise DataError(f"is {encoding}; convert it: iconv -f {encoding} -t UTF-8", path=path)
    if b"\r" in data and b"\n" not in data and b"\r" in data.rstrip():
        raise DataError("its lines end with \\r alone; convert it: tr '\\r' '\\n'", path=path)
    return data.removeprefix(_BOM)


def find_inputs(patterns: Sequence[str | os.PathLike[str]]) -> list[InputFile]:
    """The files that names and glob patterns stand for: in the order given, the matches of a pattern sorted.

    Raises:
        DataError: no such file, a pattern without a match, something that is not a plain file, or a file given twice.
    """
    paths: list[Path] = []
    for given in patterns:
        pattern = os.fspath(given)
        if os.path.exists(pattern) or not glob.has_magic(pattern):
            paths.append(Path(pattern))
            continue
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError("no file matches this pattern", path=pattern)
        paths += map(Path, matches)
    if not paths:
        raise DataError("no input files")
    inputs = []
    seen = set()
    for path in paths:
        if not path.is_file():
            raise DataError("not a regular file" if path.exists() else "no such input file", path=path)
        status = path.stat()
        if (status.st_dev, status.st_ino) in seen:
            raise DataError("is given twice; to see data more than once, set its epochs in the blend", path=path)
        if not status.st_size and path.suffix in _OPENERS:
            raise DataError("is empty: not a compressed file", path=path)
        seen.add((status.st_dev, status.st_ino))
        inputs.append(InputFile(path, status.st_size, status.st_mtime_ns))
        if inputs[-1].compressed and not status.st_size:
            raise DataError("is empty; even an empty text is compressed to some bytes", path=path, byte=0)
    return inputs


def partition_files(inputs: Sequence[InputFile], partitions: int) -> list[list[FilePart]]:
    """Cut the inputs into ranges of about equal size on disk, at the begin of a line.

    A line belongs to the partition in which it starts; a compressed file to the one in which the file starts.
    """
    total = sum(file.size for file in inputs)
    cuts = [total * index // partitions for index in range(partitions + 1)]
    ranges: list[list[FilePart]] = [[] for _ in range(partitions)]
    begin = 0  # of the file, in the concatenation of all
    for number, file in enumerate(inputs):
        for index, (low, high) in enumerate(zip(cuts, cuts[1:], strict=False)):
            if file.compressed:
                if low <= begin < high:
                    ranges[index].append(FilePart(number, 0, None))
                continue
            if low >= begin + file.size or high <= begin:
                continue
            start, stop = (_next_line_start(file, cut - begin) for cut in (low, high))
            if start < stop:
                ranges[index].append(FilePart(number, start, stop))
        begin += file.size
    return ranges


def iterate_blocks(
    inputs: Sequence[InputFile],
    segments: Sequence[FilePart],
    *,
    skip_to: tuple[int, int] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[BlockRef]:
    """Blocks of the segments in order.

    Args:
        inputs: all inputs.
        segments: what to read.
        skip_to: number of a file and offset at which an earlier iteration stopped: everything before is left out.
        block_bytes: approximate size of a block.

    Raises:
        DataError: a file that cannot be read or decompressed.
    """
    for segment in segments:
        start = segment.start
        if skip_to is not None:
            if segment.file < skip_to[0]:
                continue
            if segment.file == skip_to[0]:
                start = max(start, skip_to[1])
        file = inputs[segment.file]
        if segment.stop is None:
            yield from _compressed_blocks(file, segment.file, start, block_bytes)
        else:
            yield from _plain_blocks(file, segment.file, start, segment.stop, block_bytes)


def count_lines(path: Path, stop: int) -> int:
    """Newlines among the first ``stop`` bytes of a plain file."""
    count = 0
    with path.open("rb") as file:
        while stop > 0:
            piece = file.read(min(stop, 1 << 22))
            if not piece:
                break
            count += piece.count(b"\n")
            stop -= len(piece)
    return count


def _plain_blocks(file: InputFile, number: int, start: int, stop: int, block_bytes: int) -> Iterator[BlockRef]:
    while start < stop:
        end = min(_next_line_start(file, start + block_bytes), stop)
        yield BlockRef(number, file.path, start, end, end - start)
        start = end


def _compressed_blocks(file: InputFile, number: int, skip: int, block_bytes: int) -> Iterator[BlockRef]:
    """Blocks from the offset ``skip`` of the decompressed text on. What comes before is decompressed and dropped."""
    pending: list[bytes] = []
    offset = size = 0  # of ``pending`` in the text; of the text from there on
    held = 0  # bytes of ``pending``: fewer than ``size`` where a line is too long
    reported = 0
    with file.path.open("rb") as raw:
        for piece in _OPENERS[file.path.suffix](raw, file.path):
            if offset < skip:
                dropped = min(skip - offset, len(piece))
                offset += dropped
                piece = piece[dropped:]
                if not piece:
                    continue
            while piece:
                # The newline is looked for in the new piece only: a long line does not cost its square. Of one that is
                # too long, only its end is looked for.
                too_long = held < size
                end = 0
                if too_long or size + len(piece) >= block_bytes:
                    end = (piece.find(b"\n") if too_long else piece.rfind(b"\n")) + 1
                if not end:
                    if size + len(piece) <= LONGEST_LINE + block_bytes:
                        pending.append(piece)
                        held += len(piece)
                    size += len(piece)
                    break
                position, stop = raw.tell(), offset + size + end
                data = b"".join(pending if too_long else [*pending, piece[:end]])
                yield BlockRef(number, file.path, offset, stop, position - reported, data, too_long)
                pending, size, held = [], 0, 0
                reported, offset, piece = position, stop, piece[end:]
    if offset < skip:
        raise DataError(f"holds {offset} bytes of text, {skip} were read from it before", path=file.path)
    if size:
        data = b"".join(pending)
        yield BlockRef(number, file.path, offset, offset + size, file.size - reported, data, held < size)


def _next_line_start(file: InputFile, offset: int) -> int:
    """Offset of the first line that starts at ``offset`` or after it; the size of the file where there is none."""
    if offset <= 0:
        return 0
    if offset >= file.size:
        return file.size
    position = offset - 1
    with file.path.open("rb", buffering=0) as raw:
        raw.seek(position)
        while piece := raw.read(_SEARCH_BYTES):
            found = piece.find(b"\n")
            if found >= 0:
                return min(position + found + 1, file.size)
            position += len(piece)
    return file.size


def _read_exactly(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise DataError("became shorter while it was being read", path=path, byte=start + len(data))
    return data


def _gunzip(raw: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
            while piece := stream.read(_SEARCH_BYTES):
                yield piece
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"not a whole gzip file: {error}", path=path, byte=raw.tell()) from error


def _unzstd(raw: IO[bytes], path: Path) -> Iterator[bytes]:
    with needed(f"{path}: .zst files need", "zstandard", "data"):
        import zstandard
    # One object a frame, because only that tells a file that ends within a frame from one that ends after it.
    frame: Any = None
    try:
        while piece := raw.read(_COMPRESSED_BYTES):
            while piece:
                if frame is None:
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                text = frame.decompress(piece)
                if text:
                    yield text
                piece = b""
                if frame.eof:
                    piece, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise DataError(f"not a zstd file: {error}", path=path, byte=raw.tell()) from error
    if frame is not None:
        raise DataError("not a whole zstd file: it ends within a frame", path=path, byte=raw.tell())


_OPENERS: dict[str, Callable[[IO[bytes], Path], Iterator[bytes]]] = {".gz": _gunzip, ".zst": _unzstd}
