"""What a teacher says of the tokens of an indexed file: its most probable next tokens, with their log-probabilities.

A cache is a folder with two files for each indexed file NAME: ``NAME.npy`` has a row for each token of the ``.bin``, in
its order, int32 [tokens, 2K + 1]: K ids, the bits of their K float32 log-probabilities, and those of the
log-probability of all other tokens together. The row of a token is of the token after it; the last of a record has -1
as its first id. ``NAME.json`` says what they follow from.

Shape suffix legend: N = tokens, K = ids of each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.indexed.reader import IndexedMeta
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.store.content import content_digest
from megatron_grit.store.rows import read_rows

FORMAT = "megatron_grit.top_probabilities"


def cache_paths(folder: str | Path, prefix: str) -> tuple[Path, Path]:
    """The array of an indexed file, and what it follows from."""
    name = Path(prefix).name
    return Path(folder) / f"{name}.npy", Path(folder) / f"{name}.json"


def data_facts(meta: IndexedMeta) -> dict[str, Any]:
    """What identifies the tokens of an indexed file, and the template that they were written by."""
    return {
        "bin_sha256": meta.bin_sha256,
        "idx_sha256": meta.idx_sha256,
        "num_tokens": meta.num_tokens,
        "tokenizer": meta.tokenizer_fingerprint,
        "template": meta.template,
    }


def check_predicted(records: IndexedRecords) -> None:
    """Refuse a file whose next tokens are not predicted.

    Raises:
        DataError: it is of pairs to embed.
    """
    if records.kind is not RowKind.GENERATIVE:
        raise DataError(f"holds {records.meta.kind} records; a teacher reads generative ones", path=records.prefix)


def rows_of(ids_NK: np.ndarray, log_probs_NK1: np.ndarray) -> np.ndarray:
    """Rows of the array, int32 [N, 2K + 1]."""
    return np.concatenate((ids_NK.astype(np.int32), log_probs_NK1.astype(np.float32).view(np.int32)), axis=1)


class TopProbabilities:
    """Reads a cache by record.

    Args:
        folder: the cache.
        records: the indexed file.

    Attributes:
        facts: ``teacher``, its ``weights`` and ``vocab_size``, ``data``, ``top_k`` and ``temperature``.
        top_k: K.

    Raises:
        ConfigError: there is no cache of this file, or it is of other data.
        DataError: it is damaged.
    """

    def __init__(self, folder: str | Path, records: IndexedRecords) -> None:
        array, described = cache_paths(folder, records.prefix)
        remedy = f"write it with megatron-grit teacher-logits --input {records.prefix} --output {folder}"
        if not described.is_file():
            raise ConfigError(f"loss.teacher.cache {folder}: holds nothing of {records.prefix}; {remedy}")
        try:
            self.facts: dict[str, Any] = json.loads(described.read_bytes())
            found, digest = self.facts["data"], self.facts["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"cannot be read; {remedy}", path=described) from None
        expected = data_facts(records.meta)
        if found != expected:
            differs = next((name for name in expected if found.get(name) != expected[name]), "format")
            raise ConfigError(
                f"{described}: was written of other data than {records.prefix}: {differs} is {found.get(differs)} "
                f"there and {expected[differs]} here; {remedy}"
            )
        self._array = array
        try:
            if content_digest(array) != digest:
                raise ValueError("does not match its checksum")
            self._rows = read_rows(array, np.int32, mapped=True)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read ({error}); {remedy}", path=array) from None
        self.top_k = int(self.facts["top_k"])
        if self._rows.shape != (records.meta.num_tokens, 2 * self.top_k + 1):
            raise DataError(f"holds {list(self._rows.shape)} numbers; {remedy}", path=array)
        self._starts = np.concatenate(([0], np.cumsum(records.lengths())))

    def read(self, record: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the first tokens of a record: ids int32 [N, K], log-probabilities float32 [N, K + 1]."""
        start = self._starts[record]
        rows = np.array(self._rows[start : start + num_tokens])
        return rows[:, : self.top_k], rows[:, self.top_k :].copy().view(np.float32)


def open_caches(
    folder: str, temperature: float, vocab_size: int, every: Sequence[IndexedRecords]
) -> list[TopProbabilities]:
    """The caches of several indexed files, of one teacher.

    Args:
        folder: of all of them.
        temperature: that the teacher's logits are to be divided by.
        vocab_size: of the trained model.
        every: the files.

    Raises:
        ConfigError: one is missing, of other data, of another teacher than the first, or of another temperature.
        DataError: one is damaged.
    """
    caches = [TopProbabilities(folder, records) for records in every]
    for cache, records in zip(caches, every, strict=True):
        if cache.facts["temperature"] != temperature:
            raise ConfigError(
                f"loss.teacher.cache {folder}: {records.prefix} was written at temperature "
                f"{cache.facts['temperature']:g}, and loss.teacher.temperature is {temperature:g}; set it, or write "
                "the cache again"
            )
        size = cache.facts["vocab_size"]
        if size > vocab_size:
            raise ConfigError(
                f"loss.teacher.cache {folder}: its teacher {cache.facts['teacher']} has {size} rows of tokens, and the "
                f"trained model {vocab_size}; set model.vocab_size to {size}"
            )
        for name in ("weights", "top_k"):
            first, here = caches[0].facts[name], cache.facts[name]
            if first != here:
                raise ConfigError(
                    f"loss.teacher.cache {folder}: {every[0].prefix} and {records.prefix} differ in {name}, {first} "
                    f"and {here}; write both with one teacher and --top-k"
                )
    return caches
