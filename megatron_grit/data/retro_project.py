"""The project directory of a retrieval database: where everything is, and the datasets that it is made of."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_grit.config.retro_db import RetroDbConfig
from megatron_grit.data.indexed import IndexedFile, file_paths, read_meta
from megatron_grit.data.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.files import sha256_of_file, write_json


@dataclass(kw_only=True)
class DatasetInfo:
    """One indexed file of a database, as ``db/indexed_dataset_infos.json`` lists it; the names are Retro's."""

    prefix: str
    ratio: float = 1.0
    fingerprint: str = ""
    """Of the tokens: SHA-256 of the ``.bin`` where it is known, else of the ``.idx`` and the size of the ``.bin``."""
    bin_sha256: str = ""
    """Of the ``.bin``, whether or not a ``.json`` tells it."""
    bin_bytes: int = 0
    bin_mtime_ns: int = 0
    """Of the ``.bin`` when it was cut. While neither has changed its SHA-256 is taken to be the same."""
    n_docs: int = 0
    n_docs_train: int = 0
    n_chunks: int = 0
    """Valid chunks, duplicates left out."""
    n_chunks_train: int = 0
    n_chunks_invalid: int = 0
    """Empty ones and those of fewer tokens than ``min_chunk_tokens``."""
    n_chunks_duplicate: int = 0
    n_chunks_sampled: int = 0
    """Of those that the index is trained on; 0 before the task index-train, and for an index that is not trained."""


class Project:
    """Paths and inputs of a database.

    Args:
        folder: the project directory.
        config: its configuration.
    """

    def __init__(self, folder: Path, config: RetroDbConfig) -> None:
        self.folder, self.config = folder, config
        self.infos_path = folder / "db" / "indexed_dataset_infos.json"
        self.merged = folder / "db" / "merged"
        self._files: dict[str, IndexedFile] = {}
        self._tokenizer: Tokenizer | None = None

    def chunk_folder(self, number: int) -> Path:
        """Where the chunks of a dataset are."""
        # Two datasets may have one name in different folders.
        return self.folder / "db" / "individual" / f"{number:03d}_{Path(self.config.data_paths[number]).name}"

    def file(self, number: int) -> IndexedFile:
        """The tokens of a dataset, open."""
        prefix = self.config.data_paths[number]
        if prefix not in self._files:
            self._files[prefix] = IndexedFile(self.resolve(prefix))
        return self._files[prefix]

    def resolve(self, prefix: str) -> Path:
        """A dataset's prefix: as given, or below the project directory.

        Raises:
            DataError: neither is there.
        """
        for candidate in (self.folder / prefix, Path(prefix)):
            if file_paths(candidate)[1].is_file():
                return candidate
        raise DataError("no such indexed file; give the prefix, without extension", path=prefix)

    def fingerprint(self, number: int) -> str:
        """Of a dataset's tokens."""
        return fingerprint(self.resolve(self.config.data_paths[number]))

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the documents.

        Raises:
            ConfigError: none is given.
        """
        if self._tokenizer is None:
            if self.config.tokenizer is None:
                raise ConfigError("tokenizer is not set; give the one that the documents were made with")
            given = self.folder / self.config.tokenizer
            self._tokenizer = load_tokenizer(given if given.exists() else self.config.tokenizer)
            self._check_tokenizer()
        return self._tokenizer

    def _check_tokenizer(self) -> None:
        assert self._tokenizer is not None
        for prefix in self.config.data_paths:
            path = self.resolve(prefix)
            if file_paths(path)[2].is_file() and read_meta(path).tokenizer_fingerprint != self._tokenizer.fingerprint:
                raise DataError(f"was made with another tokenizer than {self._tokenizer.path}", path=path)

    def save_infos(self, infos: list[DatasetInfo]) -> None:
        """Write ``indexed_dataset_infos.json``."""
        write_json(self.infos_path, [asdict(info) for info in infos])

    def infos(self) -> list[DatasetInfo]:
        """The datasets of the database that was built.

        Raises:
            DataError: there is none, or its files have changed since.
        """
        if not self.infos_path.is_file():
            raise DataError("is missing; run the task db-build first", path=self.infos_path)
        try:
            values: list[dict[str, Any]] = json.loads(self.infos_path.read_text(encoding="utf-8"))
            infos = [DatasetInfo(**value) for value in values]
        except (ValueError, TypeError) as error:
            raise DataError(f"cannot be read ({error}); run db-build again", path=self.infos_path) from None
        for info in infos:
            self._check_unchanged(info)
        return infos

    def _check_unchanged(self, info: DatasetInfo) -> None:
        path = self.resolve(info.prefix)
        stat = file_paths(path)[0].stat()
        same = fingerprint(path) == info.fingerprint and stat.st_size == info.bin_bytes
        # A copy has other times; then the content decides.
        if not same or (stat.st_mtime_ns != info.bin_mtime_ns and sha256_of_bin(path) != info.bin_sha256):
            raise DataError(
                "has changed since the database was built of it; put the old file back, or build another database",
                path=path,
            )


def fingerprint(prefix: Path) -> str:
    """Of an indexed file's documents: SHA-256 of the ``.bin`` and the ``.idx`` where the ``.json`` tells them; else of
    the ``.idx`` and the size of the ``.bin``, which a change of single tokens does not alter."""
    return _fingerprint(prefix, tuple(_stamp(path) for path in file_paths(prefix)))


def sha256_of_bin(prefix: Path) -> str:
    """SHA-256 of the ``.bin``, read whole."""
    path = file_paths(prefix)[0]
    return _sha256(path, _stamp(path))


def _stamp(path: Path) -> tuple[int, int]:
    if not path.is_file():
        return -1, -1
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=256)
def _fingerprint(prefix: Path, stamps: tuple[tuple[int, int], ...]) -> str:
    bin_path, idx_path, json_path = file_paths(prefix)
    if json_path.is_file():
        meta = read_meta(prefix)
        if meta.bin_sha256:
            if (meta.bin_bytes, meta.idx_bytes) != (stamps[0][0], stamps[1][0]):
                raise DataError("is not as long as its .json says; build the indexed file again", path=bin_path)
            return f"bin:{meta.bin_sha256}:{meta.idx_sha256}"
    return f"idx:{_sha256(idx_path, stamps[1])}:{stamps[0][0]}"


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, stamp: tuple[int, int]) -> str:
    return sha256_of_file(path)
