"""A small corpus of both kinds, its tokenizer and its indexed files, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.builders.grit_builder import build_grit
from megatron_grit.data.text.tokenizer import train_sentencepiece
from tests.rows import tiny_config

_SUBJECTS = "parser socket buffer thread module stream decoder index queue cursor handler matrix".split()
_VERBS = "opens reads writes closes counts sorts merges splits copies checks rounds hashes".split()
_OBJECTS = "a file|two lists|the header|every byte|a string|the table|some lines|one record".split("|")


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of a question and its answer, of different lengths."""
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        subject, verb = random.choice(_SUBJECTS), random.choice(_VERBS)
        objects = random.choice(_OBJECTS, size=random.integers(1, 6), replace=False)
        pairs.append((f"what does the {subject} do when it {verb}?", f"The {subject} {verb} {' and '.join(objects)}."))
    return pairs


def write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tiny_run(directory: Path, *, experts: int | None = None, layers: int = 2) -> RunConfig:
    """A configuration that trains on the corpus, which is made under ``directory`` unless it is there.

    Two layers do where no pipeline is interleaved.
    """
    if not (directory / "gen.json").exists():
        pairs = sentences(96)
        embedding: list[dict[str, object]] = [
            {"query": ["Answer the question", q], "pos": [["", a]], "neg": [["", pairs[(i + 7) % 96][1]]]}
            for i, (q, a) in enumerate(pairs)
        ]
        generative: list[dict[str, object]] = [{"text": [q, a]} for q, a in pairs]
        write_jsonl(directory / "emb.jsonl", embedding)
        write_jsonl(directory / "gen.jsonl", generative)
        train_sentencepiece([text for pair in pairs for text in pair], directory / "tokenizer", 400)
        for name in ("emb", "gen"):
            build_grit([directory / f"{name}.jsonl"], directory / name, directory / "tokenizer.model")
    config = tiny_config(experts=experts, num_layers=layers)
    config.data.tokenizer = str(directory / "tokenizer.model")
    config.data.embedding = [str(directory / "emb")]
    config.data.generative = [str(directory / "gen")]
    config.data.tokens_per_row = 512
    config.data.num_rows_multiple = 2
    config.training.embedding_batch_size = 12
    config.training.generative_batch_size = 8
    config.training.steps = 6
    config.logging.progress = False
    config.output_dir = str(directory / "run")
    return config
