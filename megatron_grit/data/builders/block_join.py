"""Joins the pieces of a build: their documents without duplicates, and the list of their rejected lines."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.builders.build_folder import PLACE_DTYPE, BuildFolder
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.indexed.writer import TokenBlock
from megatron_grit.errors import DataError
from megatron_grit.store.files import json_text

DUPLICATE = "duplicate"
"""Reason of a record that repeats an earlier one, in the list of rejected lines."""

_COPIED_SEQUENCES = 1 << 16
_COPIED_TOKENS = 1 << 22


def find_duplicates(pieces: Sequence[BuildFolder]) -> np.ndarray:
    """Documents that repeat an earlier one. Needs about 40 bytes of memory a document.

    Returns:
        int64 [num_duplicates, 2]: number of the document among those of all pieces, ascending, and of the first that
        is equal to it.
    """
    fingerprints = np.concatenate([piece.places()["fingerprint"] for piece in pieces])
    words = fingerprints.view("<u8").reshape(-1, 2)
    order = np.lexsort((words[:, 0], words[:, 1]))  # stable: among equal ones the first document comes first
    if not len(order):
        return np.empty((0, 2), dtype=np.int64)
    words = words[order]
    repeats = np.concatenate(([False], (words[1:] == words[:-1]).all(axis=1)))
    del words
    firsts = order[np.maximum.accumulate(np.where(repeats, 0, np.arange(len(order))))]
    pairs = np.stack([order[repeats], firsts[repeats]], axis=1)
    return pairs[pairs[:, 0].argsort()]


def join_pieces(
    final: BuildFolder,
    targets: Sequence[Mapping[str, Path]],
    pieces: Sequence[BuildFolder],
    duplicates: np.ndarray | None,
) -> None:
    """Append the documents of all pieces to the streams of ``final``.

    Args:
        final: has nothing yet.
        targets: of each piece, prefix of each stream as an indexed file.
        pieces: finished.
        duplicates: what :func:`find_duplicates` found, to leave it out.
    """
    first = 0  # document of this piece among all
    for prefixes, piece in zip(targets, pieces, strict=True):
        for name, count in piece.num_documents.items():
            if not count:
                continue
            with closing(IndexedFile(prefixes[name])) as source:
                if duplicates is None:
                    final.extend(name, source)
                    continue
                kept = np.ones(count, dtype=bool)
                repeated = duplicates[:, 0]
                kept[repeated[(repeated >= first) & (repeated < first + count)] - first] = False
                for start, block in _document_blocks(source):
                    final.append({name: block.select(kept[start : start + len(block.documents)])}, [], None)
        first += max(piece.num_documents.values())


def _document_blocks(source: IndexedFile) -> Iterator[tuple[int, TokenBlock]]:
    """All documents, some at a time, and the number of the first of each lot."""
    source.check_index()
    starts = source.documents
    start = 0
    while start < source.num_documents:
        begin = int(starts[start])
        # As many documents as stay within both limits, but one at least.
        lengths = source.lengths[begin : begin + _COPIED_SEQUENCES]
        room = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), _COPIED_TOKENS, side="right"))
        window = starts[start + 1 : start + 1 + _COPIED_SEQUENCES]
        stop = start + max(1, int(np.searchsorted(window, begin + room, side="right")))
        end = int(starts[stop])
        yield (
            start,
            TokenBlock(
                tokens=source.read(begin, end),
                lengths=np.array(source.lengths[begin:end]),
                documents=np.diff(starts[start : stop + 1]).astype(np.int32),
                modes=None if source.modes is None else np.array(source.modes[begin:end]),
            ),
        )
        start = stop


def merge_rejected(
    paths: Sequence[Path],
    pieces: Sequence[BuildFolder],
    first_line: Callable[[int, int], int],
    duplicates: np.ndarray | None,
) -> Iterator[dict[str, Any]]:
    """The rejected lines of all pieces, duplicates among them, in the order of the input.

    Args:
        paths: of the input files.
        pieces: finished or complete.
        first_line: lines of a file before the part that a piece has, from the numbers of piece and file.
        duplicates: what :func:`find_duplicates` found.
    """
    first_line = cache(first_line)

    def entry(piece: int, file: int, line: int, reason: str, message: str) -> tuple[int, int, dict[str, Any]]:
        line += first_line(piece, file) + 1
        text = str(DataError(message, path=paths[file], line=line))
        return file, line, {"path": str(paths[file]), "line": line, "reason": reason, "message": text}

    places = [piece.places() if duplicates is not None else np.empty(0, dtype=PLACE_DTYPE) for piece in pieces]
    ends = np.cumsum([len(of_piece) for of_piece in places])

    def locate(document: int) -> tuple[int, int, int]:
        piece = int(np.searchsorted(ends, document, side="right"))
        place = places[piece][document - int(ends[piece])]  # negative: counted from the end of the piece
        return piece, int(place["file"]), int(place["line"])

    def repeated(low: int, high: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        if duplicates is None:
            return
        bounds = np.searchsorted(duplicates[:, 0], (low, high))
        for document, original in duplicates[bounds[0] : bounds[1]].tolist():
            piece, file, line = locate(original)
            line += first_line(piece, file) + 1
            yield entry(*locate(document), DUPLICATE, f"the same as {paths[file]}:{line}")

    for number, piece in enumerate(pieces):
        low, high = int(ends[number]) - len(places[number]), int(ends[number])
        lines = (
            entry(number, item["file"], item["line"], item["reason"], item["message"]) for item in piece.rejected()
        )
        for _, _, found in heapq.merge(lines, repeated(low, high), key=lambda item: item[:2]):
            yield found


def write_rejected(path: Path, rejected: Iterator[dict[str, Any]], folder: Path) -> None:
    """Write one JSON object a line, in ``folder`` first. Where there are none, the file of an earlier build goes."""
    found = next(rejected, None)
    if found is None:
        path.unlink(missing_ok=True)
        return
    temporary = folder / "rejected.jsonl"
    with temporary.open("w", encoding="utf-8") as file:
        while found is not None:
            file.write(json_text(found) + "\n")
            found = next(rejected, None)
    os.replace(temporary, path)
