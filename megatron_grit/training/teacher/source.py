"""Where a teacher comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.schema import EmbeddingConfig, ModelConfig
from megatron_grit.errors import ConfigError
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.checkpoint import load_weights, read_config, tokenizer_path


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """A model on disk that is not trained."""

    name: str
    """As ``loss.teacher.model`` has it."""
    model: ModelConfig
    """Its shape."""
    tokenizer: Path
    """File or directory of its tokenizer."""
    fill: Callable[[Sequence[GritDecoder], ParallelContext], None]
    """Fills the weights of this process's chunks. Collective over all ranks."""
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    """What it has beside its layers."""


def checkpoint_source(name: str) -> TeacherSource:
    """A checkpoint of ours, or the newest of an output directory.

    Raises:
        CheckpointError: there is none.
        ConfigError: it has no tokenizer.
    """
    path = resolve_checkpoint(name)
    saved, tokenizer = read_config(path), tokenizer_path(path)
    if tokenizer is None:
        raise ConfigError(
            f"loss.teacher.model {path}: holds no tokenizer, so its tokens cannot be compared with the run's"
        )
    return TeacherSource(
        name=name,
        model=saved.model,
        tokenizer=tokenizer,
        fill=lambda chunks, context: load_weights(path, chunks, context),
        embedding=saved.embedding,
    )
