"""The interface of the build engine to formats of data: an encoder turns the lines of a block into documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_grit.data.indexed.writer import TokenBlock
from megatron_grit.data.text.line_blocks import LineBlock


@dataclass(frozen=True)
class Rejection:
    """A line that gives no document."""

    line: int
    """0-based within the block."""
    reason: str
    """Short name; rejected lines are counted by it."""
    message: str
    """What is wrong and what to do about it, without file and line."""
    fatal: bool = False
    """Whether the build stops, whatever its settings."""


@dataclass(kw_only=True)
class EncodedBlock:
    """What an encoder makes of a block."""

    outputs: dict[str, TokenBlock]
    """By name of the output. The outputs of a build may hold different numbers of documents."""
    num_lines: int
    """Lines of the block, blank ones included."""
    num_records: int
    """Lines that were read as records, rejected ones included."""
    rejections: list[Rejection] = field(default_factory=list)
    """In the order of the lines."""
    counters: dict[str, int] = field(default_factory=dict)
    """Added up over the blocks of a build."""
    lines: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    """int32 [num_documents]: line of each document, 0-based within the block. Needed where duplicates are removed."""
    fingerprints: bytes = b""
    """16 bytes a document. Documents with equal ones are duplicates."""


class BlockEncoder(Protocol):
    """Makes documents of lines. One is made in every worker process and sees blocks in no particular order."""

    def encode(self, block: LineBlock) -> EncodedBlock:
        """Encode a block. What it returns may depend on the block's lines and on nothing else."""
