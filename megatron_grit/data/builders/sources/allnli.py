"""AllNLI to records that build_grit reads: pairs of sentences with labels, or triplets.

A premise with entailments and contradictions becomes two records, as in sentence-transformers' and SGPT's training
script: the premise finds its entailments, and an entailment finds the premise, both among the contradictions. Every
pair counts in both directions: a sentence is the premise of whatever it was labelled with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from megatron_grit.config.options import AllNliChoice
from megatron_grit.data.text.lines import Line, filled_lines
from megatron_grit.errors import DataError
from megatron_grit.store.files import check_output, replacing
from megatron_grit.store.progress import Progress

COLUMNS = ("split", "sentence1", "sentence2", "label")
"""Of the header of a table that are read."""
TRIPLET_KEYS = ("anchor", "positive", "negative")


@dataclass
class _Premise:
    entailed: dict[str, None] = field(default_factory=dict)
    """A set that keeps its order."""
    contradicted: dict[str, None] = field(default_factory=dict)


def convert_allnli(
    input_path: str | Path, output_path: str | Path, *, split: str = "train", seed: int = 42, progress: bool = False
) -> int:
    """Write JSONL with "query", "pos" and "neg".

    Args:
        input_path: AllNLI.tsv, a table with a header, tabs and no quotes; or .jsonl with an object of three texts,
            anchor, positive and negative, a line, each of which becomes a record. Plain, ``.gz`` or ``.zst``.
        output_path: written whole or not at all.
        split: rows of the table that are taken.
        seed: decides which entailment stands for a premise in its second record.
        progress: show a bar on stderr.

    Returns:
        Records written.

    Raises:
        DataError: a line that is not as described, or no record at all.
        ConfigError: the output is the input, or a value that is none.
        OutputError: it cannot be written.
    """
    AllNliChoice(split=split, seed=seed)
    path = Path(input_path)
    check_output(output_path, [path])
    is_table = ".tsv" in path.suffixes
    with Progress(None, "convert_allnli", "line", enabled=progress) as bar, replacing(output_path) as output:
        lines = filled_lines(path, lambda _, num_lines: bar.update(num_lines))
        count = _table(lines, output, split, seed) if is_table else _triplets(lines, output)
        if not count:
            raise DataError(f"gives no record{f' of the split {split}' if is_table else ''}", path=path)
    return count


def write_record(output: IO[str], query: str, positives: list[str], negatives: list[str]) -> None:
    """One line of what build_grit reads, without instructions."""
    output.write(json.dumps({"query": query, "pos": positives, "neg": negatives}, ensure_ascii=False) + "\n")


def _triplets(lines: Iterator[Line], output: IO[str]) -> int:
    count = 0
    for line in lines:
        value = line.value()
        given = [value.get(key) for key in TRIPLET_KEYS] if isinstance(value, dict) else []
        texts = [text.strip() for text in given if isinstance(text, str)]
        if len(texts) != len(TRIPLET_KEYS) or not all(texts):
            raise line.error(f"expected an object with the texts {', '.join(TRIPLET_KEYS)}")
        write_record(output, texts[0], [texts[1]], [texts[2]])
        count += 1
    return count


def _table(lines: Iterator[Line], output: IO[str], split: str, seed: int) -> int:
    premises: dict[str, _Premise] = {}
    places: list[int] = []
    width = 0
    for line in lines:
        cells = line.text().split("\t")
        if not places:
            missing = [name for name in COLUMNS if name not in cells]
            if missing:
                raise line.error(f"its header has no column {missing[0]}")
            places, width = [cells.index(name) for name in COLUMNS], len(cells)
            continue
        if len(cells) != width:
            raise line.error(f"{len(cells)} cells in a table of {width} columns")
        row_split, first, second, label = (cells[place].strip() for place in places)
        if row_split == split and first and second:
            for premise, other in ((first, second), (second, first)):
                found = premises.setdefault(premise, _Premise())
                if label == "entailment":
                    found.entailed[other] = None
                elif label == "contradiction":
                    found.contradicted[other] = None
    random, count = np.random.default_rng(seed), 0
    for premise, found in premises.items():
        if found.entailed and found.contradicted:
            positives, negatives = list(found.entailed), list(found.contradicted)
            write_record(output, premise, positives, negatives)
            write_record(output, positives[int(random.integers(len(positives)))], [premise], negatives)
            count += 2
    return count
