"""What hard negatives are mined from and how, and which of that cannot be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_grit.config.knob import check_values, knob
from megatron_grit.config.options import BatchSize
from megatron_grit.data.text.line_blocks import find_inputs
from megatron_grit.errors import ConfigError
from megatron_grit.store.files import check_output, check_text_path


def read_ranks(text: str) -> tuple[int, int]:
    """First and last rank of "10-100"."""
    ranks = re.fullmatch("([0-9]{1,18})-([0-9]{1,18})", text)
    if ranks is None:
        raise ValueError("is no range; give FIRST-LAST, such as 10-100")
    return int(ranks[1]), int(ranks[2])


@dataclass(kw_only=True)
class MineOptions:
    """What is mined and how."""

    input: list[Path] = knob(path=True)
    """JSONL of embedding records, or patterns of files."""
    output: Path = knob(path=True)
    """JSONL to write; compressed where it ends in .gz."""
    embedder: str | None = knob(None, path=True)
    """The student: directory of a Hugging Face encoder or of one of our checkpoints."""
    corpus: list[Path] = knob([], path=True)
    """JSONL with passages: plain texts ({"text": ...}) or embedding records. Empty: the passages of the input."""
    project_dir: Path | None = knob(None, path=True)
    """A retrieval database, whose chunks are the passages and whose embedder is the student, in place of both."""
    version: int | None = knob(None, at_least=1)
    """Of the database. None: the configured one, or the newest."""
    num_negatives: int = knob(7, at_least=1)
    """Negatives of a record, at most."""
    min_negatives: int = knob(1, at_least=0)
    """Records that end up with fewer are left out."""
    ranks: tuple[int, int] = knob((10, 100), read=read_ranks)
    """First and last rank of candidates, from 1 on."""
    max_overlap: float | None = knob(0.5, at_least=0, at_most=1)
    """A part of a positive of the query is no negative, nor is a passage that shares more of its different runs of
    three words with one (of the passage and the positive, those of the one with fewer). null: only equal texts are
    none."""
    margin: float | None = None
    """A negative's score is at least so much below that of the worst positive."""
    max_fraction: float | None = knob(None, above=0, at_most=1)
    """A negative's score is at most this share of the worst positive's (0.95 in NV-Retriever)."""
    teacher: str | None = knob(None, path=True)
    """Directory of a better embedder."""
    teacher_gap: float = 0.05
    """A negative's score by the teacher is at least so much below that of the worst positive."""
    cross_encoder: Path | None = knob(None, path=True)
    """Directory of a Hugging Face cross-encoder, or a JSONL of "query", "passage" and "score"."""
    cross_margin: float = 3.0
    """A negative's score by the cross-encoder is at least so much below that of the worst positive."""
    sampling: Literal["random", "top"] = "random"
    """Which of the candidates that are left: any, or the nearest."""
    keep_negatives: bool = False
    """Keep the negatives that records have, in front, but for those with the text of the query or of a positive."""
    seed: int = knob(0, at_least=0)
    """Of the sampling."""
    query_instruction: str = ""
    """What the embedders embed queries for. Instructions in records are kept and not read."""
    max_length: int = knob(256, at_least=1)
    """Tokens of an embedder to which texts are cut."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the embedders' matrix products."""
    batch_tokens: int = knob(BatchSize.batch_tokens, at_least=1)
    """Tokens of a forward pass."""
    index: str = "auto"
    """A faiss factory string. auto: chosen from the number of passages and index_memory_gb."""
    index_memory_gb: float = knob(16.0, above=0)
    """With index auto: memory for the index."""
    block_size: int = knob(10_000, at_least=1)
    """Passages and records of a block."""


def work_folder(options: MineOptions) -> Path:
    """Where blocks are until the output is whole."""
    return options.output.with_name(f".{options.output.name}.work")


def report_path(output: Path) -> Path:
    """``mined.report.json`` for ``mined.jsonl`` and ``mined.jsonl.gz``."""
    plain = output.with_suffix("") if output.suffix == ".gz" else output
    return plain.with_suffix(".report.json")


def most_negatives(options: MineOptions) -> int:
    """That a record can get."""
    first, last = options.ranks
    return min(options.num_negatives, last - first + 1)


def check_options(options: MineOptions) -> None:
    """Refuse options that cannot be.

    Raises:
        ConfigError: one of them; names it.
        DataError: an input that is not there.
        OutputError: the output cannot be written.
    """
    first, last = options.ranks
    check_values(options)
    if not 1 <= first <= last:
        raise ConfigError(f"ranks must be FIRST-LAST with 1 <= FIRST <= LAST, such as 10-100, not {first}-{last}")
    if options.min_negatives > most_negatives(options):
        raise ConfigError(f"min_negatives cannot be {options.min_negatives}: {most_negatives(options)} are the most")
    check_text_path(options.output)
    reads = [*options.input, *options.corpus, *([options.cross_encoder] if options.cross_encoder is not None else [])]
    for path in (options.output, report_path(options.output)):
        check_output(path, reads)
    for path in (*options.input, *options.corpus):
        find_inputs([path])
    if (options.project_dir is None) == (options.embedder is None):
        raise ConfigError("give an embedder, or a project_dir, whose embedder it then is")
    if options.project_dir is not None and (options.corpus or options.query_instruction):
        raise ConfigError("with project_dir passages and query_instruction are those of the database")
