"""Indexed files made span by span, without a template, and the tokenizer that they say they were built with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_grit.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.indexed.writer import IndexedWriter

VOCAB = 5000
TOKENIZER: Any = SimpleNamespace(fingerprint="f" * 64, path="tokenizer.model", pad_id=0, vocab_size=VOCAB)


def ids(start: int, count: int) -> list[int]:
    """``count`` tokens that no near ``start`` gives."""
    return [1 + (start * 31 + place * 7) % (VOCAB - 1) for place in range(count)]


def chat(number: int, *lengths: int) -> list[tuple[Role, list[int]]]:
    """A conversation: tokens of a prompt, an answer, a prompt ..."""
    roles = (Role.TEMPLATE, Role.ANSWER)
    return [(roles[turn % 2], ids(number * 97 + turn, length)) for turn, length in enumerate(lengths)]


def text(number: int, length: int) -> list[tuple[Role, list[int]]]:
    """A plain text."""
    return [(Role.TEXT, ids(number, length))]


def pair(query: int, positive: int, negative: int | None = None, length: int = 6) -> list[tuple[Role, list[int]]]:
    """A query with an instruction, a positive and, if given, a negative; equal numbers are equal texts."""
    spans = [
        (Role.QUERY_INSTRUCTION, [1, 2, 3]),
        (Role.QUERY, [4, query + 5]),
        (Role.POSITIVE, [4, positive + 5, *([6] * length)]),
    ]
    return spans if negative is None else [*spans, (Role.NEGATIVE, [7, negative + 5])]


def write(prefix: Path, records: Sequence[Sequence[tuple[Role, Sequence[int]]]], kind: RowKind) -> str:
    """Write records; the prefix."""
    with IndexedWriter(prefix, kind, VOCAB, overwrite=True) as writer:
        for record in records:
            writer.add(record)
        writer.finalize(tokenizer_fingerprint=TOKENIZER.fingerprint, template="none", limits={})
    return str(prefix)


def write_chats(prefix: Path, lengths: Sequence[Sequence[int]]) -> str:
    """Conversations of given lengths."""
    return write(prefix, [chat(number, *turns) for number, turns in enumerate(lengths)], RowKind.GENERATIVE)


def run_config(folder: Path, *, objective: str = "generative", training: dict[str, Any] | None = None, **data: Any):
    """A run over such files with its caches under ``folder``."""
    sizes: dict[str, Any] = {"generative_batch_size": 8, "embedding_batch_size": 4, "seed": 7} | (training or {})
    settings: dict[str, Any] = {"tokens_per_row": 64, "train_group_size": 1, "cache_dir": str(folder / "cache")}
    return RunConfig(
        model=ModelConfig(max_position_embeddings=4096),
        data=DataConfig(**(settings | data)),
        training=TrainingConfig(objective=objective, **sizes),  # type: ignore[arg-type]
    )
