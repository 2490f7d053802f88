"""Vectors in fewer bits, as ``sentence_transformers.util.quantize_embeddings`` makes them, and records of a corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from megatron_grit.config.values import shortened
from megatron_grit.errors import ConfigError, DataError

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def check_precision(precision: str) -> None:
    """
    Raises:
        ConfigError: it is none of :data:`PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, not {shortened(precision)}")


def quantize_vectors(vectors_ND: np.ndarray, precision: Precision, ranges_2D: np.ndarray | None = None) -> np.ndarray:
    """Vectors in another precision.

    Args:
        vectors_ND: float32.
        precision: int8, uint8: each dimension in 256 equal steps between its least and its largest value. binary,
            ubinary: a bit for each dimension, set where it is above 0, eight in a byte, the first one highest; binary
            is ubinary less 128.
        ranges_2D: for int8 and uint8, least and largest value of each dimension; vectors that are compared have to be
            made with the same. None: those of ``vectors_ND``.

    Returns:
        [N, D] of float32, int8 or uint8, or [N, ceil(D / 8)] of int8 (binary) or uint8 (ubinary).

    Raises:
        ConfigError: there is no such precision, or no range follows from one vector.
    """
    check_precision(precision)
    if precision == "float32":
        return vectors_ND.astype(np.float32, copy=False)
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors_ND > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    if ranges_2D is None:
        if len(vectors_ND) < 2:
            raise ConfigError(f"precision {precision} of one vector needs ranges, [2, dimensions]; give those of many")
        ranges_2D = np.stack((vectors_ND.min(0), vectors_ND.max(0)))
    least_D, largest_D = np.asarray(ranges_2D, dtype=np.float32)
    steps_D = (largest_D - least_D) / 255
    steps_D = np.where(steps_D == 0, 1, steps_D)
    levels = np.clip(np.floor((vectors_ND - least_D) / steps_D), 0, 255)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)


def corpus_texts(corpus: Any) -> Any:
    """Texts of a corpus whose records may be objects with "text" and perhaps "title", as in BEIR: title, a space, text.

    Raises:
        DataError: an object without text, or whose title or text is no string; names it.
    """
    if isinstance(corpus, Mapping):
        return _record_text(corpus, 0)
    if not isinstance(corpus, Sequence) or isinstance(corpus, str | bytes):
        return corpus
    return [
        _record_text(record, number) if isinstance(record, Mapping) else record for number, record in enumerate(corpus)
    ]


def _record_text(record: Mapping[str, Any], number: int) -> str:
    values = [record.get(name, "") or "" for name in ("title", "text")]
    if "text" not in record or not all(isinstance(value, str) for value in values):
        raise DataError(f'record {number} of the corpus must have a "text" and may have a "title", both strings')
    return " ".join(filter(None, values)).strip()
