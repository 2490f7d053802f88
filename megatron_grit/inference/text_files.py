"""Embeds the lines of a file or of standard input into a .npy file."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.text.lines import Line, read_lines
from megatron_grit.errors import DataError
from megatron_grit.store.files import check_output, replacing


def read_texts(path: str) -> list[str]:
    """One text from each line of a file, or of standard input where ``path`` is "-".

    Raises:
        DataError: a file that cannot be read, an empty line, or no lines.
    """
    if path == "-":
        with tempfile.NamedTemporaryFile() as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
            file.flush()
            return _texts(line._replace(path=Path("<stdin>")) for line in read_lines(file.name))
    return _texts(read_lines(path))


def _texts(lines: Iterable[Line]) -> list[str]:
    texts = []
    for line in lines:
        texts.append(line.text())
        if not texts[-1].strip():
            raise line.error("an empty line has no embedding; remove it")
    if not texts:
        raise DataError("the input holds no text; give one text a line")
    return texts


def save_embeddings(embeddings: np.ndarray, path: str | Path) -> None:
    """Write a .npy file, atomically.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        with replacing(path, "wb") as file:
            np.save(file, embeddings, allow_pickle=False)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror}", path=path) from error


def encode_file(
    checkpoint: str | Path, input_path: str, output_path: str | Path, *, device: str = "auto", **options: Any
) -> np.ndarray:
    """Embed each line of a file.

    Args:
        checkpoint: checkpoint directory, or a run's output directory for its newest one.
        input_path: UTF-8 file with one text a line, or "-" for standard input.
        output_path: .npy file, float32 [number of lines, embedding size].
        options: instruction, side, max_length, batch_tokens of :meth:`GritModel.encode`.

    Returns:
        The embeddings.

    Raises:
        GritError: input, instruction or checkpoint that cannot be used.
    """
    check_output(output_path, [] if input_path == "-" else [input_path])
    texts = read_texts(input_path)  # before the model: a bad line is found at once
    from megatron_grit.inference.model import GritModel

    embeddings = GritModel.load(checkpoint, device=device).encode(texts, **options)
    save_embeddings(embeddings, output_path)
    return embeddings
