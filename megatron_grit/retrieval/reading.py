"""Opens a database for a model that reads neighbors."""

from __future__ import annotations

from pathlib import Path

from megatron_grit.config.database.schema import CONFIG_FILE, load_project_config
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import ConfigError
from megatron_grit.inference.reading import check_database, check_every, check_reads
from megatron_grit.retrieval.retriever import Retriever
from megatron_grit.training.checkpoint import read_config, tokenizer_path


def open_retriever(folder: str | Path, checkpoint: Path, every: int | None = None) -> Retriever:
    """The database, once it is known that the model can read it; neither model nor embedder is loaded before.

    Args:
        folder: the project directory.
        checkpoint: of the model.
        every: after how many tokens it is to be asked.

    Raises:
        ConfigError: there is no database, or it is of another tokenizer or chunk length; the model reads no neighbors,
            or ``every`` is longer than its chunks.
        DataError: it has no index, or a file was changed.
    """
    project, config = load_project_config(Path(folder)), read_config(checkpoint)
    check_reads(config.model)
    check_every(every, config.model)
    if project is None:
        raise ConfigError(
            f"retro_project {folder}: holds no {CONFIG_FILE}; give the --project-dir of tools/retro/build_db.py"
        )
    if (path := tokenizer_path(checkpoint)) is not None:
        tokenizer = Project(Path(folder), project).tokenizer
        check_database(config.model, load_tokenizer(path), project.chunk_length, tokenizer)
    # What it reads in training is the table, whose queries are chunks.
    return Retriever(folder, population="chunks")
