"""The task embed: the vectors of all chunks, kept on disk; and the embedder that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.config.schema import ParallelConfig
from megatron_grit.data.chunks.versions import built_chunks
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.encoders.load import MESH, load_embedder
from megatron_grit.inference.encoders.protocol import Embedder, EmbedderOptions
from megatron_grit.retrieval.database.vectors import embed_chunks, open_vectors
from megatron_grit.retrieval.stages.index_train import index_line
from megatron_grit.retrieval.stages.task import EMBEDDER_SETTINGS, Inputs, Job, Task
from megatron_grit.retrieval.work import MINUTES, Check
from megatron_grit.store.blocks import signature_of


class Embed(Task):
    """Vectors of all chunks, on disk. Without it the tasks that follow embed what they need."""

    name = "embed"
    makes_versions = True
    settings = (*EMBEDDER_SETTINGS, "block_size")
    makes = ("embeddings",)
    trace = "embeddings/*.hdf5"

    def check(self, inputs: Inputs) -> Iterator[str]:
        """As :class:`Task` says: what is embedded must fit the index that follows."""
        yield from index_line(inputs)

    def run(self, job: Job) -> None:
        """As :class:`Task` says.

        Raises:
            DataError: blocks are there that are of another embedder or other chunks.
        """
        vectors = open_vectors(job.project, job.worker, job.embedder)
        if job.worker.is_first:
            signatures = [signature_of(block.path) for block in vectors.blocks.blocks]
            count = sum(signature not in (None, vectors.blocks.signature) for signature in signatures)
            if count:
                raise DataError(
                    f"{count} of {len(signatures)} blocks are of another embedder or of other chunks; put back what "
                    "was changed, or make them again with --overwrite embed",
                    path=vectors.blocks.folder,
                )
        job.worker.barrier()
        embed_chunks(vectors, job.worker)

    def validate(self, job: Job) -> Iterator[Check]:
        vectors = open_vectors(job.project, job.worker, job.embedder, built_chunks(job.project))
        yield Check("embeddings", vectors.blocks, vectors.compute)


def project_embedder(config: RetroDbConfig, *, alone: bool = False) -> Embedder:
    """The embedder that a configuration names.

    Args:
        config: of the database.
        alone: load all of it in this process, for a few texts, whatever mesh the database is built with.

    Raises:
        ConfigError: it names none, or none that can be loaded by so many processes.
    """
    if config.embedder is None:
        raise ConfigError("embedder is not set; give the directory of an encoder or of one of our checkpoints")
    if not Path(config.embedder).exists():
        where = Path(config.embedder).absolute()
        raise ConfigError(
            f"embedder {config.embedder}: is not there ({where}); give a local directory, by its full path"
        )
    options = EmbedderOptions(
        pooling=config.embedder_pooling,
        max_length=config.embedder_max_length,
        batch_tokens=config.batch_tokens,
        precision=config.embedder_precision,
        query_instruction=config.query_instruction,
    )
    mesh: dict[str, Any] = {name: 1 if alone else getattr(config, f"embedder_{name}") for name in MESH}
    # A process may wait for the others of its group as long as processes do anywhere in a build.
    parallel = ParallelConfig(**mesh, timeout_minutes=MINUTES)
    return load_embedder(config.embedder, options, parallel=parallel)
