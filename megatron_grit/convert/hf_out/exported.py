"""What the files of an export are written from: the checkpoint, and facts about the exported weights."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_grit.config.embedding_shape import scalar_problem
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.convert.param_map import Family
from megatron_grit.data.chat.chat import Chat
from megatron_grit.data.chat.run_chat import checkpoint_chat
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import CheckpointError, GritError
from megatron_grit.training.checkpoint import read_config, read_state, tokenizer_path


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The checkpoint that is exported."""

    path: Path
    state: dict[str, Any]
    """state.json."""
    config: RunConfig
    model: ModelConfig
    """Its shape, with the size of the vocabulary."""
    tokenizer: Tokenizer
    chat: Chat

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, without padding."""
        assert self.model.vocab_size is not None
        return self.model.vocab_size

    @property
    def scores(self) -> bool:
        """Whether it gives a text one number, as a reward model does, rather than an embedding."""
        return scalar_problem(self.config.embedding) is None

    @property
    def run(self) -> Path:
        """The run's output directory, if the checkpoint is still in it."""
        return self.path.parent.parent


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The weights that were written, for config.json, modules and the model card."""

    source: Checkpoint
    family: Family
    dtype: torch.dtype
    num_bytes: int
    """Of all weights."""
    num_parameters: int
    weight_map: dict[str, str]
    """The file of each tensor."""
    head: dict[str, Tensor]
    """fp32 tensors of the embedding head; empty without one."""


def read_checkpoint(path: Path, tokenizer: str | Path | None) -> Checkpoint:
    """Read state, configuration and tokenizer of a checkpoint.

    Args:
        tokenizer: the tokenizer that it was trained with. None: the run's, or the checkpoint's copy.

    Raises:
        CheckpointError: no tokenizer, or not the one that the model was trained with.
    """
    state, config = read_state(path), read_config(path)
    model = replace(config.model, vocab_size=int(state["vocab_size"]))
    found = _tokenizer(path, state, config, tokenizer)
    chat = checkpoint_chat(path, config, found)
    return Checkpoint(path=path, state=state, config=config, model=model, tokenizer=found, chat=chat)


def _tokenizer(path: Path, state: dict[str, Any], config: RunConfig, given: str | Path | None) -> Tokenizer:
    fingerprint = state.get("tokenizer_fingerprint")
    if given is not None:
        found = load_tokenizer(given)
        if fingerprint not in (None, found.fingerprint):
            raise CheckpointError(f"{found.path}: is not the tokenizer that {path} was trained with; give that one")
        return found
    if config.data.tokenizer is not None and Path(config.data.tokenizer).exists():
        # Beside the run's own file lie the names of its special tokens, and its chat template.
        with suppress(GritError):  # it was replaced, or damaged, since
            found = load_tokenizer(config.data.tokenizer)
            if found.fingerprint == fingerprint:
                return found
    copy = tokenizer_path(path)
    if copy is None:
        raise CheckpointError(f"{path}: holds no tokenizer.model or tokenizer.json; give --tokenizer")
    return load_tokenizer(copy)
