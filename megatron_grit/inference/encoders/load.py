"""The embedder that a directory holds: one of our models, or an encoder of Hugging Face or sentence-transformers."""

from __future__ import annotations

from pathlib import Path

from megatron_grit.config.checkpoint_folder import holds_checkpoint
from megatron_grit.config.schema import ParallelConfig
from megatron_grit.errors import ConfigError, MeshError
from megatron_grit.inference.encoders.protocol import Embedder, EmbedderOptions
from megatron_grit.store.logs import get_logger, say_loading

log = get_logger(__name__)

MESH = ("tensor", "pipeline", "context", "expert")
"""Axes that one of our own models can be sharded along; ``embedder_tensor`` and so on of a database."""


def load_embedder(
    path: str, options: EmbedderOptions | None = None, *, parallel: ParallelConfig | None = None
) -> Embedder:
    """The embedder that a directory holds.

    Args:
        path: a Hugging Face encoder, a sentence-transformers model, or a checkpoint or run of ours.
        options: how texts are embedded. None: the defaults.
        parallel: the mesh that one of our own models is sharded over; all processes of the job then call this, and
            those of a model-parallel group embed together. None: each process holds all of it.

    Raises:
        ConfigError: the directory holds none of these, a package is missing, or the mesh is not for this embedder or
            not for this number of processes.
        DataError: a damaged file.
    """
    folder, options = Path(path), options or EmbedderOptions()
    if holds_checkpoint(folder):
        say_loading()
        from megatron_grit.inference.encoders.grit import GritEmbedder
        from megatron_grit.inference.model import GritModel
        from megatron_grit.parallel.devices import device_errors

        for error in device_errors(options.device, "embedder_device"):
            raise error
        if options.pooling != "auto":
            raise ConfigError(
                f"embedder {path}: embedder_pooling is of Hugging Face encoders; ours are pooled as trained"
            )
        log.info(f"loading the embedder {path}")
        try:
            model = GritModel.load(folder, device=options.device, precision=options.precision, parallel=parallel)
        except MeshError as error:
            raise MeshError(f"embedder {path} with {_sizes(parallel)}: {error}") from None
        return GritEmbedder(model, folder, options)
    if (folder / "config.json").is_file() or (folder / "modules.json").is_file():
        if parallel is not None and any(getattr(parallel, name) > 1 for name in MESH):
            raise ConfigError(
                f"embedder {path}: each process holds an encoder of Hugging Face whole, and only a checkpoint of ours "
                f"can be sharded over several; leave out {_sizes(parallel)}"
            )
        say_loading()
        log.info(f"loading the embedder {path}")
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise ConfigError("an encoder of Hugging Face needs transformers: pip install transformers") from None
        from megatron_grit.inference.encoders.hugging_face import HuggingFaceEmbedder

        return HuggingFaceEmbedder(folder, options)
    raise ConfigError(
        f"embedder {path}: holds neither config.json of a Hugging Face encoder nor a checkpoint; give a local directory"
    )


def _sizes(parallel: ParallelConfig | None) -> str:
    """As the settings of a database name them."""
    return ", ".join(f"embedder_{name} {getattr(parallel or ParallelConfig(), name)}" for name in MESH)
