"""What evaluations embed with: a checkpoint of ours, or a directory of Hugging Face or sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_grit.config.checkpoint_folder import holds_checkpoint, resolve_checkpoint
from megatron_grit.data.text.markers import Side
from megatron_grit.data.text.templates import EMBED_PREFIX, embedding_prefix
from megatron_grit.errors import CheckpointError, ConfigError
from megatron_grit.inference.encoders.protocol import EmbedderOptions
from megatron_grit.store.digest import digest_of_files
from megatron_grit.store.logs import get_logger, say_loading

if TYPE_CHECKING:
    from megatron_grit.inference.encoders.hugging_face import HuggingFaceEmbedder

log = get_logger(__name__)

_LONGEST = 1 << 20
"""Tokens; an encoder's own limit is below it."""


class TextEncoder(Protocol):
    """The part of :class:`~megatron_grit.inference.model.GritModel` that embeds."""

    def encode(
        self,
        texts: list[str],
        instruction: str | None,
        *,
        side: Side | None,
        max_length: int,
        batch_tokens: int,
        progress: bool = True,
    ) -> np.ndarray:
        """Vectors of texts, none of them blank: float32 [len(texts), D]. ``progress``: may show how far it is."""


class FolderEncoder:
    """A directory of Hugging Face or sentence-transformers with the members of :class:`TextEncoder`.

    An instruction is the text in front, in GRIT's template where the directory's own prompts are of it, as those of
    ``convert to-hf``. "" is the directory's own prompt of the side, None no prompt.
    """

    def __init__(self, embedder: HuggingFaceEmbedder) -> None:
        self._embedder = embedder
        self._own, self._limit = dict(embedder.prompts), embedder.max_length
        self.fingerprint = embedder.fingerprint
        self.is_grit = self._own["passage"].endswith(EMBED_PREFIX.lstrip())
        """Whether its prompts are of GRIT's template."""

    def prompt_of(self, instruction: str | None, side: Side) -> str:
        """What stands in front of a text."""
        if instruction:
            return embedding_prefix(instruction) if self.is_grit else instruction
        return "" if instruction is None else self._own[side]

    def encode(
        self,
        texts: list[str],
        instruction: str | None,
        *,
        side: Side | None,
        max_length: int,
        batch_tokens: int,
        progress: bool = True,
    ) -> np.ndarray:
        """As :class:`TextEncoder` says; nothing is shown."""
        embedder, side = self._embedder, side or "passage"
        embedder.prompts[side] = self.prompt_of(instruction, side)
        embedder.max_length, embedder.batch_tokens = min(max_length, self._limit), batch_tokens
        try:
            return embedder.embed(texts, side)
        finally:
            embedder.prompts.update(self._own)
            embedder.max_length = self._limit


def load_encoder(path: str | Path, device: Any = "auto", layer: int | None = None) -> TextEncoder:
    """What a directory holds.

    Args:
        path: a checkpoint, or the output directory of a run for its newest one, or a directory of Hugging Face or
            sentence-transformers.
        device: auto, cpu or cuda.
        layer: of a checkpoint, the layer after which states are pooled, as in SGPT (arXiv 2202.08904); 0 for the
            embedded tokens. None: the last.

    Raises:
        CheckpointError: it is none of these.
        ConfigError: an encoder that is not known here, a layer that the model does not have, or a package is missing.
        DataError: a damaged file.
    """
    if not holds_checkpoint(path) and is_model_folder(path):
        if layer is not None:
            raise ConfigError(f"{path}: --layer is of checkpoints; import the model with megatron-grit convert")
        from megatron_grit.inference.encoders.hugging_face import HuggingFaceEmbedder
        from megatron_grit.inference.encoders.load import load_embedder

        embedder = load_embedder(str(path), EmbedderOptions(max_length=_LONGEST, device=device))
        assert isinstance(embedder, HuggingFaceEmbedder)
        return FolderEncoder(embedder)
    if not holds_checkpoint(path):
        raise CheckpointError(
            f"{path}: no checkpoint here; expected state.json or checkpoints/step_*/state.json, or config.json of a "
            "directory of Hugging Face"
        )
    say_loading()
    from megatron_grit.inference.model import GritModel

    model = GritModel.load(path, device=device)
    if layer is not None:
        if layer > model.config.model.num_layers:
            raise ConfigError(f"--layer must be at most {model.config.model.num_layers}, the model's, not {layer}")
        model.layer = layer
    return model


def is_model_folder(path: str | Path) -> bool:
    """Whether a directory is of Hugging Face or sentence-transformers."""
    return any((Path(path) / name).is_file() for name in ("config.json", "modules.json"))


def model_fingerprint(path: str | Path, encoder: TextEncoder) -> str:
    """Digest of the weights and precision of a model that :func:`load_encoder` has loaded."""
    if isinstance(encoder, FolderEncoder):
        return encoder.fingerprint
    return checkpoint_digest(path, encoder.config.training.precision)  # type: ignore[attr-defined]


def checkpoint_digest(path: str | Path, *settings: Any) -> str:
    """Digest of a checkpoint's content, and of settings.

    Raises:
        CheckpointError: there is none.
    """
    checkpoint = resolve_checkpoint(path)
    # The manifest holds the checksums of all the other files.
    return digest_of_files(checkpoint, [checkpoint / "manifest.json"], list(settings))


def encode_filled(encoder: TextEncoder, texts: Sequence[str], instruction: str | None, **how: Any) -> np.ndarray:
    """Vectors of texts of a benchmark, in which some are blank: these have nothing to embed and get zeros, which are
    as near to one text as to any other.

    Args:
        encoder: the model.
        texts: any.
        instruction: of all of them.
        how: keywords of :meth:`TextEncoder.encode`.

    Returns:
        float32 [len(texts), D].

    Raises:
        ConfigError: all are blank.
    """
    filled = [row for row, text in enumerate(texts) if text.strip()]
    if not filled:
        raise ConfigError(f"all {len(texts)} texts are blank; there is nothing to embed")
    vectors = encoder.encode([texts[row] for row in filled], instruction, **how)
    if len(filled) == len(texts):
        return vectors
    log.info(f"{len(texts) - len(filled)} of {len(texts)} texts are blank and get zeros")
    embeddings = np.zeros((len(texts), vectors.shape[1]), dtype=np.float32)
    embeddings[filled] = vectors
    return embeddings
