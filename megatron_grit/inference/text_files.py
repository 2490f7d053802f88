"""Embeds the lines of a file or of standard input into a .npy file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.errors import DataError
from megatron_grit.store.files import check_output, replacing


def read_texts(path: str) -> list[str]:
    """One text from each line of a file, or of standard input where ``path`` is "-".

    Raises:
        DataError: a file that cannot be read, an empty line, or no lines.
    """
    name = "<stdin>" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        lines = data.decode("utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=name) from error
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8; convert it first", path=name, byte=error.start) from error
    if lines == [""]:
        raise DataError("holds no text; give one text a line", path=name)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError("an empty line has no embedding; remove it", path=name, line=number)
    return [line.removesuffix("\r") for line in lines]


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
