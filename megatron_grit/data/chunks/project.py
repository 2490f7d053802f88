"""The project directory of a retrieval database: where everything is, and the datasets that it is made of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.indexed.reader import IndexedFile, file_paths, read_meta
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.store.content import content_digest
from megatron_grit.store.files import write_json
from megatron_grit.store.sealed import seal, unseal


@dataclass(kw_only=True)
class DatasetInfo:
    """One indexed file of a database, as ``db/indexed_dataset_infos.json`` lists it; the names are Retro's."""

    prefix: str
    ratio: float = 1.0
    fingerprint: str = ""
    """Of the tokens: SHA-256 of the ``.bin`` where it is known, else of the ``.idx`` and the size of the ``.bin``."""
    bin_sha256: str = ""
    """SHA-256 of the ``.bin``, computed even if no ``.json`` records it."""
    bin_bytes: int = 0
    bin_mtime_ns: int = 0
    """Of the ``.bin`` when it was cut."""
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
        """The tokens of a dataset, open.

        Raises:
            DataError: as :meth:`open`.
        """
        return self.open(self.config.data_paths[number])

    def open(self, prefix: str) -> IndexedFile:
        """An indexed file of documents of the project's tokenizer.

        Raises:
            DataError: it is missing or damaged, or was made with another tokenizer.
        """
        if prefix not in self._files:
            path = self.resolve(prefix)
            file = IndexedFile(path)
            if self.config.tokenizer is not None:
                self._check_tokenizer(path)
            self._files[prefix] = file
        return self._files[prefix]

    def resolve(self, prefix: str) -> Path:
        """A dataset's prefix: as given, or below the project directory.

        Raises:
            DataError: neither is there.
        """
        for candidate in (self.folder / prefix, Path(prefix)):
            if file_paths(candidate)[1].is_file():
                return candidate
        raise DataError(
            f"no such indexed file; give the prefix, without extension{self._looked_for(f'{prefix}.idx')}", path=prefix
        )

    def outline(self, prefix: str) -> str:
        """A line about an indexed file of documents."""
        file = self.open(prefix)
        return f"documents: {prefix}, {file.num_documents:,}, {file.bin_bytes // file.dtype.itemsize:,} tokens"

    def datasets(self) -> list[DatasetInfo]:
        """The datasets of the configuration as their files are now, not yet cut."""
        return [
            DatasetInfo(prefix=prefix, fingerprint=self.fingerprint(number), n_docs=self.file(number).num_documents)
            for number, prefix in enumerate(self.config.data_paths)
        ]

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
            path = given if given.exists() else Path(self.config.tokenizer)
            if not path.exists():
                raise DataError(f"no such tokenizer{self._looked_for(str(path))}", path=path)
            self._tokenizer = load_tokenizer(path)
        return self._tokenizer

    def _check_tokenizer(self, path: Path) -> None:
        if not file_paths(path)[2].is_file():
            return
        problem = read_meta(path).other_tokenizer(self.tokenizer.path, self.tokenizer.fingerprint)
        if problem is not None:
            raise DataError(f"{problem}; build it again with the database's", path=path)

    def _looked_for(self, name: str) -> str:
        """Where a file is not, in words."""
        if Path(name).is_absolute():
            return ""
        return (
            f"; looked for {(self.folder / name).resolve()} and {Path(name).resolve()}: a relative path counts from "
            "the project directory, or from where the command is run"
        )

    def save_infos(self, infos: list[DatasetInfo]) -> None:
        """Write ``indexed_dataset_infos.json``."""
        write_json(self.infos_path, [seal(asdict(info)) for info in infos])

    def infos(self) -> list[DatasetInfo]:
        """The datasets of the database that was built.

        Raises:
            DataError: there is none, or its files have changed since.
        """
        infos = self.listed()
        for info in infos:
            self._check_unchanged(info)
        return infos

    def listed(self) -> list[DatasetInfo]:
        """As :meth:`infos`, without a look at the files.

        Raises:
            DataError: the list is missing or damaged.
        """
        if not self.infos_path.is_file():
            raise DataError("is missing; run --tasks db-build", path=self.infos_path)
        try:
            values: list[dict[str, Any]] = json.loads(self.infos_path.read_text(encoding="utf-8"))
            if not isinstance(values, list) or not values:
                raise ValueError("lists no datasets")
            infos = [DatasetInfo(**unseal(value)) for value in values]
            for name, value in ((name, value) for info in infos for name, value in vars(info).items()):
                if isinstance(value, str) != (name in ("prefix", "fingerprint", "bin_sha256")):
                    raise ValueError(f"{name} is {value!r}")
            return infos
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"cannot be read ({error}); delete it and run --tasks db-build", path=self.infos_path
            ) from None

    def _check_unchanged(self, info: DatasetInfo) -> None:
        path = self.resolve(info.prefix)
        if fingerprint(path) != info.fingerprint or sha256_of_bin(path) != info.bin_sha256:
            raise DataError(
                "has changed since the database was built of it; put the old file back, or build another database",
                path=path,
            )


def fingerprint(prefix: Path) -> str:
    """Of an indexed file's documents: SHA-256 of the ``.bin`` and the ``.idx`` where the ``.json`` tells them; else of
    the ``.idx`` and the size of the ``.bin``, which a change of single tokens does not alter.

    Raises:
        DataError: a file is not what its ``.json`` says.
    """
    bin_path, idx_path, json_path = file_paths(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError("is missing; build the indexed file again", path=path)
    if json_path.is_file():
        meta = read_meta(prefix)
        if meta.bin_sha256:
            for path, size, sha256 in (
                (bin_path, meta.bin_bytes, meta.bin_sha256),
                (idx_path, meta.idx_bytes, meta.idx_sha256),
            ):
                if path.stat().st_size != size:
                    raise DataError("is not as long as its .json says; build the indexed file again", path=path)
                if content_digest(path) != sha256:
                    raise DataError(
                        "is damaged: it does not match the checksum in its .json; put it back from a copy, or build "
                        "the indexed file again",
                        path=path,
                    )
            return f"bin:{meta.bin_sha256}:{meta.idx_sha256}"
    return f"idx:{content_digest(idx_path)}:{bin_path.stat().st_size}"


def sha256_of_bin(prefix: Path) -> str:
    """SHA-256 of the ``.bin``."""
    return content_digest(file_paths(prefix)[0])
