"""An encoder for tests of the build engine: a line is a document, its bytes are its tokens.

Worker processes import this module, which is why it is no test module.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.builders.block_build import BuildRun, BuildSpec, BuildTotals, OutputSpec, build_blocks
from megatron_grit.data.builders.block_encoder import EncodedBlock, Rejection
from megatron_grit.data.indexed.writer import IndexedFacts, TokenBlock
from megatron_grit.data.text.line_blocks import LineBlock
from megatron_grit.errors import ConfigError

FACTS = IndexedFacts(kind="documents", tokenizer_fingerprint="lines", vocab_size=256)


@dataclass
class LineEncoder:
    """Lines that begin with "bad" are rejected; "fatal", "raise", "refuse" and "die" do what they say."""

    log: Path | None = None
    """Every block that is encoded adds a line with its first line."""

    def encode(self, block: LineBlock) -> EncodedBlock:
        lines = block.lines()
        if self.log is not None:
            with self.log.open("ab") as log:
                log.write(lines[0] + b"\n")
        kept, rejections = [], []
        for number, line in enumerate(lines):
            word = line.partition(b" ")[0].decode()
            if word == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if word == "raise":
                raise ValueError("as told")
            if word == "refuse":
                raise ConfigError("the encoder refuses")
            if word in ("bad", "fatal"):
                rejections.append(Rejection(number, word, f"the line is {word}", fatal=word == "fatal"))
            elif line.strip():
                kept.append(number)
        tokens = [np.frombuffer(lines[number], dtype=np.uint8).astype(np.uint16) for number in kept]
        return EncodedBlock(
            outputs={
                "lines": TokenBlock(
                    tokens=np.concatenate([*tokens, np.empty(0, dtype=np.uint16)]),
                    lengths=np.array([len(ids) for ids in tokens], dtype=np.int32),
                    documents=np.ones(len(tokens), dtype=np.int32),
                )
            },
            num_lines=len(lines),
            num_records=len(kept) + len(rejections),
            rejections=rejections,
            counters={"bytes": sum(map(len, tokens))},
            lines=np.array(kept, dtype=np.int32),
            fingerprints=b"".join(hashlib.blake2b(lines[number], digest_size=16).digest() for number in kept),
        )


def build_lines(inputs: list[Any], prefix: Path, *, log: Path | None = None, **options: Any) -> BuildTotals:
    """Build an indexed file of lines."""
    output = OutputSpec(prefix=prefix, dtype=np.uint16, with_modes=False, facts=FACTS)
    of_spec = {name: options.pop(name) for name in ("signature", "deduplicate", "stop_on") if name in options}
    values = {"signature": {"version": 1}, "work_prefix": prefix, **of_spec}
    spec = BuildSpec(outputs={"lines": output}, factory=partial(LineEncoder, log), **values)
    return build_blocks(inputs, spec, BuildRun(**options))


def contents(prefix: Path) -> Mapping[str, bytes]:
    """Every file of a build, by extension."""
    return {
        path.name.removeprefix(prefix.name): path.read_bytes()
        for path in sorted(prefix.parent.glob(f"{prefix.name}.*"))
        if path.is_file()
    }
