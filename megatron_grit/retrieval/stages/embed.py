"""What turns chunks into vectors, behind one protocol: an encoder of Hugging Face, or one of our own models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_grit.config.embedding_shape import tells_sides_apart
from megatron_grit.config.schema import ParallelConfig
from megatron_grit.data.text.markers import Side
from megatron_grit.errors import ConfigError, MeshError, NumericsError
from megatron_grit.retrieval.stages.work import Worker
from megatron_grit.store.digest import digest_of_files

if TYPE_CHECKING:
    from megatron_grit.inference.model import GritModel


_WINDOW = 8192
"""Texts that one of our own models is given at a time."""
MESH = ("tensor", "pipeline", "context", "expert")
"""What one of our own models can be spread over; ``embedder_tensor`` and so on of a database."""


class Embedder(Protocol):
    """Texts to vectors. A vector does not depend, beyond rounding, on the texts that are embedded together with it."""

    dim: int
    """Channels of a vector."""
    fingerprint: str
    """Of everything that a passage's vector follows from, weights included, but not of the machine or of
    ``batch_tokens``, which change the last digits."""
    sides_alike: bool
    """Whether a text has one vector as a query and as a passage."""

    def embed(self, texts: Sequence[str], side: Side = "passage") -> np.ndarray:
        """Vectors of texts, float32 [len(texts), dim], finite.

        Raises:
            DataError: a text that has no token.
            NumericsError: a vector is not finite; names the text.
        """
        ...


def load_embedder(
    path: str,
    *,
    pooling: str = "auto",
    max_length: int = 256,
    batch_tokens: int = 8192,
    precision: str = "fp32",
    query_instruction: str = "",
    device: str = "auto",
    parallel: ParallelConfig | None = None,
) -> Embedder:
    """The embedder that a directory holds.

    Args:
        path: a Hugging Face encoder, a sentence-transformers model, or a checkpoint or run of ours.
        pooling: of a Hugging Face encoder: mean, mean_text, cls, or auto for what its modules.json says.
        max_length: tokens to which a text is cut.
        batch_tokens: tokens of a forward pass.
        precision: fp32, or bf16 for the matrix products.
        query_instruction: what our own models embed queries for; with a Hugging Face encoder the text in front of
            queries, in place of the prompt that its directory names.
        device: auto, cpu or cuda; under a launcher each process takes the GPU of its local rank.
        parallel: the mesh that one of our own models is spread over; all processes of the job then call this, and those
            of a team embed together. None: each process holds all of it.

    Raises:
        ConfigError: the directory holds none of these, a package is missing, or the mesh is not for this embedder or
            not for this number of processes.
        DataError: a damaged file.
    """
    folder = Path(path)
    if (folder / "state.json").is_file() or (folder / "checkpoints").is_dir():
        from megatron_grit.inference.model import GritModel

        if pooling != "auto":
            raise ConfigError(
                f"embedder {path}: embedder_pooling is of Hugging Face encoders; ours are pooled as trained"
            )
        try:
            model = GritModel.load(folder, device=device, precision=precision, parallel=parallel)
        except MeshError as error:
            raise MeshError(f"embedder {path} with {_sizes(parallel)}: {error}") from None
        return GritEmbedder(model, folder, max_length, batch_tokens, query_instruction)
    if (folder / "config.json").is_file() or (folder / "modules.json").is_file():
        if parallel is not None and any(getattr(parallel, name) > 1 for name in MESH):
            raise ConfigError(
                f"embedder {path}: each process holds an encoder of Hugging Face whole, and only a checkpoint of ours "
                f"can be spread over several; leave out {_sizes(parallel)}"
            )
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise ConfigError("an encoder of Hugging Face needs transformers: pip install transformers") from None
        from megatron_grit.retrieval.encoders.encoder import HuggingFaceEmbedder

        return HuggingFaceEmbedder(folder, pooling, max_length, batch_tokens, precision, query_instruction, device)
    raise ConfigError(
        f"embedder {path}: holds neither config.json of a Hugging Face encoder nor a checkpoint; give a local directory"
    )


def _sizes(parallel: ParallelConfig | None) -> str:
    """As the settings of a database name them."""
    return ", ".join(f"embedder_{name} {getattr(parallel or ParallelConfig(), name)}" for name in MESH)


class GritEmbedder:
    """The bidirectional pass of one of our models, whole in this process or spread over a team of several.

    All processes of a team call :meth:`embed` with the same texts, and each is given all vectors.

    Args:
        model: it.
        folder: its checkpoint or run.
        max_length: tokens to which a text is cut.
        batch_tokens: tokens of a forward pass.
        query_instruction: what queries are embedded for.
    """

    def __init__(
        self, model: GritModel, folder: Path, max_length: int, batch_tokens: int, query_instruction: str
    ) -> None:
        from megatron_grit.training.checkpoint import resolve_checkpoint

        self._model, self._max_length, self._batch_tokens = model, max_length, batch_tokens
        self.team = model.team
        self._instructions = {"query": query_instruction, "passage": ""}
        self.sides_alike = not query_instruction and not tells_sides_apart(model.config.embedding)
        checkpoint = resolve_checkpoint(folder)
        # The manifest holds the checksums of all the other files.
        self.fingerprint = digest_of_files(
            checkpoint, [checkpoint / "manifest.json"], [max_length, model.config.training.precision]
        )
        self.dim = int(self._encode(["a"], "passage").shape[1])

    def embed(self, texts: Sequence[str], side: Side = "passage") -> np.ndarray:
        """As :class:`Embedder` says."""
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(texts), _WINDOW):
            out[start : start + _WINDOW] = self._encode(texts[start : start + _WINDOW], side)
        return finite(out, texts)

    def _encode(self, texts: Sequence[str], side: Side) -> np.ndarray:
        return self._model.encode(
            list(texts),
            self._instructions[side],
            side=side,
            max_length=self._max_length,
            batch_tokens=self._batch_tokens,
            progress=False,
        )


def in_teams(worker: Worker, embedder: Embedder | None) -> Worker:
    """The worker for a stage with this embedder: teams share out the blocks, and one process of each writes them."""
    if not isinstance(embedder, GritEmbedder):
        return worker
    team = embedder.team
    return replace(worker, team=team.number, num_teams=team.num_teams, leads=team.leads)


def finite(vectors_ND: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The vectors, if they are finite.

    Raises:
        NumericsError: one is not; names its text.
    """
    bad = np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))
    if len(bad):
        raise NumericsError(f"{len(bad)} vectors are not finite; the first is of the text {texts[int(bad[0])][:80]!r}")
    return vectors_ND
