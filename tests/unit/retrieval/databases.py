"""Small databases of made-up documents, with an embedder that needs no model."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig, save_project_config
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.indexed.writer import IndexedWriter
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_grit.retrieval.database.versions import record_version
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.stages.index_add import add_to_index
from megatron_grit.retrieval.stages.index_train import train_index
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.stages.run import validate_task
from megatron_grit.retrieval.stages.task import Job
from megatron_grit.retrieval.stages.tasks import TASKS
from megatron_grit.retrieval.work import Worker
from tests.corpus import sentences

CHUNK = 8


class WordEmbedder:
    """The sum of a random vector for each word. Counts what it embeds."""

    sides_alike = True
    model_group = None

    def __init__(self, dim: int = 16, name: str = "words") -> None:
        self.dim, self.fingerprint, self.num_embedded = dim, f"{name}-{dim}", 0
        self.num_queries = 0

    def embed(self, texts: Sequence[str], side: str = "passage") -> np.ndarray:
        self.num_embedded += len(texts)
        self.num_queries += len(texts) if side == "query" else 0
        out = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            for word in text.split():
                out[row] += _vector(word, self.dim)
        return out


@functools.cache
def _vector(word: str, dim: int) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(word.encode())).standard_normal(dim)


def tokenizer_of(folder: Path) -> Tokenizer:
    """A SentencePiece tokenizer of 400 pieces, made where it is not there."""
    if not (folder / "tokenizer.model").is_file():
        pairs = sentences(200, seed=5)
        train_sentencepiece([text for pair in pairs for text in pair], folder / "tokenizer", 400)
    return load_tokenizer(folder / "tokenizer.model")


def make_texts(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Documents of one to ``longest`` sentences."""
    random = np.random.default_rng(seed)
    answers = [answer for _, answer in sentences(400, seed=seed)]
    return [" ".join(random.choice(answers, random.integers(1, longest + 1))) for _ in range(count)]


def write_documents(prefix: Path, texts: Sequence[str], tokenizer: Tokenizer) -> str:
    """An indexed file of documents that end with EOS; its prefix."""
    with IndexedWriter(prefix, RowKind.GENERATIVE, tokenizer.vocab_size, overwrite=True) as writer:
        for text in texts:
            writer.add([(Role.TEXT, [*tokenizer.encode(text), tokenizer.eos_id])])
        writer.finalize(tokenizer_fingerprint=tokenizer.fingerprint, template="none", limits={})
    return str(prefix)


def make_project(folder: Path, data_paths: Sequence[str], tokenizer_folder: Path, **settings: object) -> Project:
    """A project over indexed files, with small blocks."""
    values = {"chunk_length": CHUNK, "doc_block_size": 7, "block_size": 16, "index": "Flat", "duplicates": "exact"}
    values |= {"num_neighbors_query": 20, "num_neighbors_save": 5, "max_overlap": None}
    config = RetroDbConfig(data_paths=list(data_paths), tokenizer=str(tokenizer_folder / "tokenizer.model"))
    return Project(folder, dataclasses.replace(config, **values | settings))  # type: ignore[arg-type]


def database_of(
    folder: Path,
    files: Mapping[str, Sequence[str]],
    held_out: Mapping[str, Sequence[str]] | None = None,
    *,
    query: bool = True,
    **settings: object,
) -> Project:
    """A database with its config.json in ``folder/db``.

    Args:
        folder: also of the files.
        files: texts of each file of documents, by name.
        held_out: of files whose neighbors are searched as well, and which are not in the database.
        query: whether neighbors are searched.
        settings: of the database.
    """
    tokenizer = tokenizer_of(folder)
    stored, asked = (
        [write_documents(folder / name, texts, tokenizer) for name, texts in each.items()]
        for each in (files, held_out or {})
    )
    if asked:
        settings = {"query_paths": stored + asked} | settings
    project = make_project(folder / "db", stored, folder, **settings)
    save_project_config(project.config, project.folder)
    return build(project, WordEmbedder(), query=query)


def build(project: Project, embedder: WordEmbedder, *, query: bool = True) -> Project:
    """Run the stages of a build in this process."""
    worker = Worker()
    build_chunks(project, worker)
    train_index(project, worker, embedder)
    add_to_index(project, worker, embedder)
    record_version(project, worker, embedder)
    if query:
        query_neighbors(project, worker, embedder)
    return project


def validate(name: str, project: Project, worker: Worker, embedder: WordEmbedder | None, fraction: float) -> int:
    """Compute a share of the blocks of a task again and compare. Returns how many blocks."""
    return validate_task(TASKS[name], Job(project, worker, embedder), fraction)


def another(project: Project, **settings: object) -> Project:
    """The same project, opened anew with other settings."""
    return Project(project.folder, dataclasses.replace(project.config, **settings))  # type: ignore[arg-type]
