"""A folder of documents to a database that the model itself embeds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.data.builders.documents import DocumentOptions, preprocess
from megatron_grit.data.text.lines import filled_lines
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.rag.documents import Document, find_files, read_documents
from megatron_grit.retrieval.rag.options import RagBuild
from megatron_grit.retrieval.stages.preparation import Preparation
from megatron_grit.retrieval.stages.run import run_tasks
from megatron_grit.store.digest import sha256_of_file
from megatron_grit.store.files import json_text, replacing
from megatron_grit.store.logs import get_logger
from megatron_grit.training.checkpoint import tokenizer_path

log = get_logger(__name__)

SOURCES = "sources.jsonl"
"""Of a database: a line for each document, in their order, with its text, source and title."""
_TASKS = "db-build,embed,index-build"


def build_database(options: RagBuild) -> int:
    """Read documents, cut them into chunks, embed these and make an index. The same command resumes a killed build.

    Returns:
        The number of documents.

    Raises:
        DataError: a file that cannot be read, or other documents than those of the database that is there.
        ConfigError: a checkpoint without a tokenizer, or options that differ from what was built.
    """
    checkpoint = resolve_checkpoint(options.checkpoint)
    tokenizer = tokenizer_path(checkpoint)
    if tokenizer is None:
        raise ConfigError(f"checkpoint {options.checkpoint}: holds no tokenizer; give one that was trained with one")
    folder = Path(options.project_dir)
    num_documents = _write_sources(options, folder)
    prefix = folder / "documents"
    workers = options.workers or len(os.sched_getaffinity(0))
    indexed = Path(f"{prefix}_text_document")
    if options.overwrite or not indexed.with_suffix(".json").exists():
        documents = DocumentOptions(tokenizer=str(tokenizer))
        preprocess([folder / SOURCES], prefix, documents, overwrite=options.overwrite, workers=workers)
    given: dict[str, Any] = {
        "data_paths": [str(indexed.resolve())],
        "tokenizer": str(tokenizer),
        "embedder": str(checkpoint.resolve()),
        "chunk_length": options.chunk_length,
        # Twice: what is before and around a chunk's text, and tokens that its cut has split.
        "embedder_max_length": 2 * options.chunk_length,
        "query_instruction": options.query_instruction,
        "batch_tokens": options.batch_tokens,
        "metric": "inner_product",
    }
    run_tasks(Preparation(folder, _TASKS, given, overwrite=_TASKS if options.overwrite else ""))
    return num_documents


def read_sources(folder: Path) -> list[Document]:
    """The documents of a database, in their order.

    Raises:
        DataError: it was not made by :func:`build_database`.
    """
    path = folder / SOURCES
    if not path.is_file():
        raise DataError("is missing; make the database with megatron-grit rag build", path=path)
    return [Document(**line.value()) for line in filled_lines(path)]


def _write_sources(options: RagBuild, folder: Path) -> int:
    """Write all documents into one file, or see that they are those that are there. Returns their number."""
    files = find_files(options.input)
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / SOURCES, 0
    if path.exists() and not options.overwrite:
        digest = hashlib.sha256()
        for number, line in enumerate(_lines(files, options), 1):  # noqa: B007
            digest.update(line)
        if digest.hexdigest() != sha256_of_file(path):
            raise DataError(
                "was built of other documents; give another --project-dir, or --overwrite to build it again",
                path=folder,
            )
    else:
        with replacing(path, "wb") as file:
            for number, line in enumerate(_lines(files, options), 1):  # noqa: B007
                file.write(line)
            if not number:
                raise DataError("holds no text", path=Path(options.input[0]))
    log.info(f"{number:,} documents of {len(files):,} files")
    return number


def _lines(files: list[tuple[Path, str]], options: RagBuild) -> Iterator[bytes]:
    for document in read_documents(files, options.text_key):
        yield f"{json_text(document._asdict())}\n".encode()
