"""Our own models as embedders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_grit.config.embedding_shape import tells_sides_apart
from megatron_grit.data.text.markers import Side
from megatron_grit.inference.encoders.protocol import EmbedderOptions, finite
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.model_group import ModelGroup
from megatron_grit.store.digest import digest_of_files
from megatron_grit.training.checkpoint import resolve_checkpoint

_WINDOW = 8192
"""Texts that the model is given at a time."""


class GritEmbedder:
    """The bidirectional pass of one of our models, whole in this process or sharded over a model-parallel group.

    All processes of the group call :meth:`embed` with the same texts, and each gets all vectors.

    Args:
        model: the loaded model.
        folder: its checkpoint or run.
        options: how texts are embedded.
    """

    def __init__(self, model: GritModel, folder: Path, options: EmbedderOptions) -> None:
        self._model, self._options = model, options
        self.model_group: ModelGroup | None = model.model_group
        self._instructions = {"query": options.query_instruction, "passage": ""}
        self.sides_alike = not options.query_instruction and not tells_sides_apart(model.config.embedding)
        checkpoint = resolve_checkpoint(folder)
        # The manifest holds the checksums of all the other files.
        self.fingerprint = digest_of_files(
            checkpoint, [checkpoint / "manifest.json"], [options.max_length, model.config.training.precision]
        )
        self.dim = int(self._encode(["a"], "passage").shape[1])

    def embed(self, texts: Sequence[str], side: Side = "passage") -> np.ndarray:
        """As :class:`~megatron_grit.inference.encoders.protocol.Embedder` says."""
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(texts), _WINDOW):
            out[start : start + _WINDOW] = self._encode(texts[start : start + _WINDOW], side)
        return finite(out, texts)

    def _encode(self, texts: Sequence[str], side: Side) -> np.ndarray:
        return self._model.encode(
            list(texts),
            self._instructions[side],
            side=side,
            max_length=self._options.max_length,
            batch_tokens=self._options.batch_tokens,
            progress=False,
        )
