"""Published instruction data to records that build_sft reads: a table of sources, and one function that converts any.

A row that has no place in a conversation is left out and counted by its reason; one that is not as the table says ends
the conversion with its file and line. What is drawn is drawn by the seed, the source and the file alone.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_grit.config.commands import suggestion
from megatron_grit.data.builders.options import SftConversion
from megatron_grit.data.builders.sources import raw_shapes as shapes
from megatron_grit.data.builders.sources.raw_shapes import Conversation, LeftOut, Shape, ShapeOptions
from megatron_grit.data.builders.sources.table_rows import TableRow, read_rows
from megatron_grit.data.builders.sources.wrappers import Wrapper
from megatron_grit.data.text.lines import filled_lines, read_json
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.store.files import check_output, replacing
from megatron_grit.store.progress import Progress

_TOKENS_OF_A_TURN = 6
"""What splitting counts for the template of a turn."""


@dataclass(frozen=True)
class RawFile:
    """A file of a source."""

    names: tuple[str, ...]
    """Patterns of its name; the first that is there is taken."""
    most: int | None = None
    """Records drawn from it. None: all. 0: the file is taken only where it is named."""


@dataclass(frozen=True)
class InstructionSource:
    """How a published data set becomes conversations."""

    files: tuple[RawFile, ...]
    shape: Shape
    read: Callable[[Path], Iterator[TableRow]] = read_rows


def _read_tasks(path: Path) -> Iterator[TableRow]:
    """The tasks that a list names, from the folder ``tasks`` beside the lists'; those of MMLU are left out."""
    for line in filled_lines(path):
        name = line.text().strip()
        if "_mmmlu_" in name:
            continue
        task = path.parents[2] / "tasks" / f"{name}.json"
        if not task.is_file():
            raise line.error(f"names the task {name}, and {task} is not there")
        value = read_json(task)
        if not isinstance(value, dict):
            raise DataError("must be a JSON object with Definition and Instances", path=task)
        yield TableRow(task, 1, value, is_line=False)


def _files(*names: str, most: int | None = None) -> tuple[RawFile, ...]:
    return tuple(RawFile((name,), most) for name in names)


_ALPACA = shapes.instruction
SOURCES: dict[str, InstructionSource] = {
    "super_ni": InstructionSource(_files("splits/xlingual/train_tasks.txt"), shapes.task, _read_tasks),
    "cot": InstructionSource(_files("cot_zsopt.jsonl", "cot_fsopt.jsonl", most=50_000), shapes.inputs_and_targets),
    "flan_v2": InstructionSource(
        (RawFile(("tulu_v2_resampled_flan_50k.jsonl", "tulu_v1_resampled_flan_100k.jsonl")),), shapes.inputs_and_targets
    ),
    "dolly": InstructionSource(_files("databricks-dolly-15k.jsonl"), _ALPACA),
    "self_instruct": InstructionSource(_files("all_instances_82K.jsonl"), _ALPACA),
    "unnatural_instructions": InstructionSource(_files("core_data.jsonl"), shapes.unnatural),
    "stanford_alpaca": InstructionSource(_files("alpaca_data.json"), _ALPACA),
    "code_alpaca": InstructionSource(_files("code_alpaca_20k.json"), _ALPACA),
    "gpt4_alpaca": InstructionSource(
        (*_files("alpaca_gpt4_data.json"), *_files("alpaca_gpt4_data_zh.json", most=0)), _ALPACA
    ),
    "sharegpt": InstructionSource(
        (RawFile(tuple(f"sharegpt_html_cleaned_and_split_{length}.json" for length in (4096, 2048))),), shapes.speakers
    ),
    "baize": InstructionSource(
        _files(*(f"{name}_chat_data.json" for name in ("alpaca", "medical", "quora", "stackoverflow"))),
        shapes.transcript,
    ),
    "oasst1": InstructionSource(_files("2023-04-12_oasst_ready.trees.jsonl"), shapes.reply_tree),
    "lima": InstructionSource(_files("train.jsonl"), shapes.alternating),
    "wizardlm": InstructionSource(
        (RawFile(("WizardLM_evol_instruct_V2_143k.json", "*.parquet"), 30_000),), shapes.speakers
    ),
    "open_orca": InstructionSource(
        (
            RawFile(("1M-GPT4-Augmented.parquet", "1M-GPT4-Augmented.jsonl"), 30_000),
            RawFile(("3_5M-GPT3_5-Augmented.parquet", "3_5M-GPT3_5-Augmented.jsonl"), 0),
        ),
        shapes.pair("question", "response", system="system_prompt"),
    ),
    "hard_coded": InstructionSource(
        (RawFile(("hard_coded_examples.xlsx", "hard_coded_examples.jsonl")),), shapes.pair("Prompt", "Output")
    ),
    "science": InstructionSource(_files("science_train.jsonl"), shapes.pair("input", "output", label="dataset")),
    "alpagasus_alpaca_5k": InstructionSource(_files("claude_t45.json"), _ALPACA),
    "alpagasus_dolly_9k": InstructionSource(_files("chatgpt_9k.json"), _ALPACA),
    "alpagasus_dolly_3k": InstructionSource(_files("dolly_3k.json"), _ALPACA),
}
"""Names, raw files and default sampling as of the mixtures that Tulu 1 and 2, and Instruction Modelling, were trained
on (arXiv 2306.04751, 2311.10702, 2405.14394)."""


@dataclass
class SftCounts:
    """What became of a source."""

    kept: int = 0
    num_turns: int = 0
    """Answers of all records."""
    not_drawn: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows, or parts of rows, by the reason."""

    def summary(self) -> str:
        """One line for a terminal."""
        parts = [f"{self.kept} records with {self.num_turns} answers"]
        parts += [f"{self.not_drawn} not drawn"] * bool(self.not_drawn)
        parts += [f"left out {count}: {reason}" for reason, count in sorted(self.left_out.items())]
        return "; ".join(parts)


def convert_sft(options: SftConversion, *, progress: bool = False) -> SftCounts:
    """Write JSONL with "dataset", "id" and "messages".

    Args:
        options: the source, where it lies, and how it is taken.
        progress: show a bar on stderr.

    Returns:
        What became of it.

    Raises:
        ConfigError: a source that the table does not have, or a library that is missing.
        DataError: a raw file that is missing, or a row that is not as the table says; names it.
        OutputError: the output cannot be written.
    """
    source = SOURCES.get(options.source)
    if source is None:
        hint = suggestion(options.source, SOURCES) or f"; there are {', '.join(SOURCES)}"
        raise ConfigError(f"unknown source {options.source!r}{hint}")
    files = _find_files(source, options)
    check_output(options.output, [path for path, _ in files])
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer is not None else None
    counts = SftCounts()
    with Progress(None, "convert_sft", "record", enabled=progress) as bar, replacing(options.output) as output:
        for path, most in files:
            drawn = None
            if most is not None:
                total = sum(1 for _ in _conversations(source, path, options, tokenizer, Counter()))
                drawn = set(_random(options, path, "draw").permutation(total)[:most].tolist())
                counts.not_drawn += total - len(drawn)
            for number, found in enumerate(_conversations(source, path, options, tokenizer, counts.left_out)):
                if drawn is None or number in drawn:
                    output.write(_line(options.source, counts.kept, found))
                    counts.kept += 1
                    counts.num_turns += sum(role == "assistant" for role, _ in found.turns)
                    bar.update(1)
        if not counts.kept:
            raise DataError(f"gives no record of {options.source}: {counts.summary()}", path=files[0][0])
    return counts


def _find_files(source: InstructionSource, options: SftConversion) -> list[tuple[Path, int | None]]:
    """Files to read, and how many records are drawn of each."""
    folder = Path(options.input)
    if not folder.is_dir():
        raise DataError("is no folder; give the one that holds the raw files", path=folder)
    files = [RawFile((name,)) for name in options.files] if options.files else [f for f in source.files if f.most != 0]
    found: list[tuple[Path, int | None]] = []
    for file in files:
        paths = [folder / file.names[0]] if options.files else [p for n in file.names for p in sorted(folder.glob(n))]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise DataError(f"{options.source} needs {' or '.join(file.names)}, which is not there", path=folder)
        most = file.most if options.most is None else options.most or None
        found.append((path, most))
    return found


def _random(options: SftConversion, path: Path, purpose: str) -> np.random.Generator:
    return np.random.default_rng([options.seed, zlib.crc32(f"{options.source} {path.name} {purpose}".encode())])


def _conversations(
    source: InstructionSource, path: Path, options: SftConversion, tokenizer: Tokenizer | None, left_out: Counter[str]
) -> Iterator[Conversation]:
    """What a file becomes, the same each time."""
    wrapper = Wrapper(options.wrap, _random(options, path, "wrap"))
    how = ShapeOptions(wrapper, _random(options, path, "rows"), options.top_k_replies)
    for row in source.read(path):
        for found in source.shape(row, how):
            if isinstance(found, LeftOut):
                left_out[found.reason] += 1
            elif tokenizer is None:
                yield found
            else:
                yield from _split(found, tokenizer, options.max_tokens or 0, left_out)


def _split(
    found: Conversation, tokenizer: Tokenizer, max_tokens: int, left_out: Counter[str]
) -> Iterator[Conversation]:
    """Conversations of as many whole pairs as fit; a pair that does not fit alone is left out and ends one."""
    lead = [turn for turn in found.turns if turn[0] == "system"]
    spoken = found.turns[len(lead) :]
    sizes = [len(tokenizer.encode(text)) + _TOKENS_OF_A_TURN for _, text in found.turns]
    room = max_tokens - sum(sizes[: len(lead)])
    sizes = sizes[len(lead) :]
    parts: list[list[tuple[str, str]]] = [[]]
    size = 0
    for place in range(0, len(spoken), 2):
        pair = sizes[place] + sizes[place + 1]
        if pair > room:
            left_out["a pair that is too long"] += 1
        if size + pair > room:
            parts.append([])
            size = 0
        if pair <= room:
            parts[-1] += spoken[place : place + 2]
            size += pair
    for number, part in enumerate(filter(None, parts)):
        key = found.key if found.key is None or len(part) == len(spoken) else f"{found.key}_{number}"
        yield found._replace(turns=[*lead, *part], key=key)


def _line(source: str, number: int, found: Conversation) -> str:
    record = {
        "dataset": source if found.label is None else f"{source}.{found.label}",
        "id": f"{source}_{number if found.key is None else found.key}",
        "messages": [{"role": role, "content": text} for role, text in found.turns],
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
