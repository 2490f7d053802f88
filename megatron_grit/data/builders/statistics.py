"""Statistics of instruction data: turns, lengths by role, instructions beside answers, and what they say of the loss.

Lengths are those of what messages say, without templates, in tokens or, without a tokenizer, in words between white
space. A conversation's instruction is all that is no answer: system messages, the user's, results of tools.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from megatron_grit.data.builders.build_report import draw_histogram
from megatron_grit.data.builders.filters import fingerprint
from megatron_grit.data.builders.options import SftStatistics
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.text.lines import Line, filled_lines
from megatron_grit.data.text.records import Record, parse_record
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import DataError
from megatron_grit.store.files import check_output, write_json
from megatron_grit.store.progress import Progress

_BATCH = 512
_PERCENTILES = (0, 25, 50, 75, 90, 95, 99, 100)
ANSWER = "assistant"
NO_DATASET = "(none)"


class MeasuredRecord(NamedTuple):
    """A line of data and how long what it says is."""

    line: Line
    dataset: str
    """Of its key of this name."""
    record: Record
    lengths: dict[str, int]
    """Of all messages of each role; a plain text is of the role text."""

    @property
    def instruction(self) -> int:
        """Length of all that is no answer."""
        return sum(self.lengths.values()) - self.answer

    @property
    def answer(self) -> int:
        """Length of all answers; of a plain text 0."""
        return self.lengths.get(ANSWER, 0)


def measured(
    inputs: Sequence[str], tokenizer: Tokenizer | None, skipped: Counter[str] | None = None
) -> Iterator[MeasuredRecord]:
    """The records of JSONL files with their lengths.

    Args:
        inputs: files or patterns.
        tokenizer: None: words are counted.
        skipped: counts lines that are no record, or one of pairs, and the first of them. None: they are an error.

    Raises:
        DataError: no such file, or such a line; names it.
    """
    records = _records(inputs, skipped)
    while batch := list(islice(records, _BATCH)):
        texts = [_texts(record) for _, _, record in batch]
        flat = [text for pairs in texts for _, text in pairs]
        if tokenizer is None:
            sizes = iter([len(text.split()) for text in flat])
        else:
            sizes = iter(tokenizer.encode_batch_with_offsets(flat).lengths.tolist())
        for (line, dataset, record), pairs in zip(batch, texts, strict=True):
            lengths: dict[str, int] = {}
            for role, _ in pairs:
                lengths[role] = lengths.get(role, 0) + next(sizes)
            yield MeasuredRecord(line, dataset, record, lengths)


def _records(inputs: Sequence[str], skipped: Counter[str] | None) -> Iterator[tuple[Line, str, Record]]:
    for path in inputs:
        for line in filled_lines(path):
            try:
                value = line.value()
                record = _parse(line, value)
            except DataError as error:
                if skipped is None:
                    raise
                if not skipped:
                    skipped[str(error)] = 0
                skipped["lines"] += 1
                continue
            dataset = value.get("dataset")
            yield line, dataset if isinstance(dataset, str) and dataset else NO_DATASET, record


def _parse(line: Line, value: object) -> Record:
    try:
        record = parse_record(value)
        if record.kind is not RowKind.GENERATIVE:
            raise DataError("is a query with passages; statistics are of conversations, completions and texts")
    except DataError as error:
        raise line.error(str(error)) from None
    return record


def _texts(record: Record) -> list[tuple[str, str]]:
    """Role and text of each part."""
    if record.text is not None:
        return [("text", record.text)]
    if record.completion is not None:
        return [("user", record.prompt or ""), (ANSWER, record.completion)]
    return [(message.role, message.content) for message in record.messages]


@dataclass
class InstructionStatistics:
    """What a data set is like."""

    unit: str
    """What lengths count: tokens or words."""
    num_records: int = 0
    num_skipped: int = 0
    num_answers: int = 0
    num_multi_turn: int = 0
    """Records with several answers."""
    num_duplicates: int = 0
    """Records that say the same as an earlier one, white space aside."""
    num_empty_answers: int = 0
    """Records in which an answer says nothing."""
    datasets: dict[str, int] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    """Length of all that each role says."""
    mean_instruction: float = 0.0
    """Of a record."""
    mean_answer: float = 0.0
    ratio: float | None = None
    """Length of all instructions over that of all answers. None: there are no answers."""
    percentiles: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of records, instructions and answers."""
    share_above: dict[str, float] = field(default_factory=dict)
    """Share of the records that are longer."""
    advice: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The statistics as text."""
        skipped = f", {self.num_skipped} lines skipped" if self.num_skipped else ""
        lines = [
            f"{self.num_records} records with {self.num_answers} answers, {self.num_multi_turn} of several turns, "
            f"{self.num_duplicates} exact duplicates, {self.num_empty_answers} with an empty answer{skipped}"
        ]
        if set(self.datasets) != {NO_DATASET}:
            lines += [f"  dataset {name:28s}{count:10d}" for name, count in self.datasets.items()]
        lines += [f"  {self.unit} of {role:32s}{total:10d}" for role, total in self.totals.items()]
        if self.ratio is not None:
            lines.append(
                f"  instruction {self.mean_instruction:.2f} and answer {self.mean_answer:.2f} {self.unit} a record; "
                f"instructions over answers {self.ratio:.3f}"
            )
        header = "".join(f"{f'{percent} %':>8s}" for percent in _PERCENTILES)
        lines.append(f"  {f'{self.unit} of a':14s}{header}")
        lines += [
            f"  {name:14s}" + "".join(f"{value:8d}" for value in values.values())
            for name, values in self.percentiles.items()
        ]
        above = ", ".join(f"{100 * share:.1f} % above {length}" for length, share in self.share_above.items())
        return [*lines, f"  records: {above}", *self.advice]


def measure_sft(options: SftStatistics, *, progress: bool = False) -> InstructionStatistics:
    """Statistics of JSONL files, written where the options say.

    Raises:
        DataError: a file that cannot be read, a line that is no record of the kind, or no record at all.
        OutputError: an output cannot be written.
    """
    for path in (options.output, options.plot):
        if path is not None:
            check_output(path, options.input)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer is not None else None
    skipped: Counter[str] = Counter()
    result = InstructionStatistics(unit="words" if tokenizer is None else "tokens")
    datasets, totals, seen = Counter[str](), Counter[str](), set[bytes]()
    sizes: list[tuple[int, int]] = []
    with Progress(None, "data_stats", "record", enabled=progress) as bar:
        for one in measured(options.input, tokenizer, skipped if options.on_error == "skip" else None):
            bar.update(1)
            answers = [text for role, text in _texts(one.record) if role == ANSWER]
            result.num_answers += len(answers)
            result.num_multi_turn += len(answers) > 1
            result.num_empty_answers += not all(text.strip() for text in answers)
            datasets[one.dataset] += 1
            totals.update(one.lengths)
            sizes.append((one.instruction, one.answer))
            seen.add(fingerprint(one.record))
    if not sizes:
        first = next(iter(skipped), None)
        raise DataError(f"no record in {', '.join(options.input)}" + (f"; the first line: {first}" if first else ""))
    result.num_records, result.num_skipped = len(sizes), skipped["lines"]
    result.num_duplicates = len(sizes) - len(seen)
    result.datasets, result.totals = dict(datasets.most_common()), dict(totals.most_common())
    lengths = _describe(result, np.array(sizes, dtype=np.int64), options.lengths)
    if options.output is not None:
        write_json(options.output, asdict(result))
    if options.plot is not None:
        draw_histogram(options.plot, lengths, result.unit)
    return result


def _describe(result: InstructionStatistics, sizes: np.ndarray, limits: Sequence[int]) -> dict[str, np.ndarray]:
    """Fill in what follows from the lengths of instructions and answers, int64 [num_records, 2]."""
    instructions, answers = sizes.T
    whole = sizes.sum(axis=1)
    lengths = {"record": whole}
    if result.num_answers:
        lengths |= {"instruction": instructions, "answer": answers}
        result.mean_instruction, result.mean_answer = float(instructions.mean()), float(answers.mean())
        if answers.sum():
            result.ratio = float(instructions.sum() / answers.sum())
            result.advice = advise(result.ratio, result.num_records)
    for name, values in lengths.items():
        found = np.percentile(values, _PERCENTILES, method="inverted_cdf").tolist()
        result.percentiles[name] = {f"p{percent}": int(v) for percent, v in zip(_PERCENTILES, found, strict=True)}
    result.share_above = {str(limit): float((whole > limit).mean()) for limit in limits}
    return lengths


RATIO_FIT = (18.85, 25.83)
"""Slope and intercept of the gain, in per cent, over the logarithm of the ratio (arXiv 2405.14394). That it is the
natural one follows from the range of its plot."""
SIZE_FIT = (-39.37, 431.74)
"""The same over the natural logarithm of the number of records, of subsets whose ratio is about 10."""
RATIO_RANGE = (0.094, 26.3)
"""Ratios of the seven data sets that the first fit is of."""


def advise(ratio: float, num_records: int) -> list[str]:
    """What the fits of Instruction Modelling's paper say of a data set, and how far they can be trusted.

    Args:
        ratio: length of all instructions over that of all answers.
        num_records: examples.

    Returns:
        Lines for a person.
    """
    by_ratio = RATIO_FIT[0] * math.log(ratio) + RATIO_FIT[1] if ratio > 0 else -math.inf
    by_size = SIZE_FIT[0] * math.log(num_records) + SIZE_FIT[1]
    if min(by_ratio, by_size) <= 0:
        verdict = "little to expect: keep --loss.labels it"
    elif ratio >= 1:
        verdict = "worth trying: compare --loss.labels im with it"
    else:
        verdict = "open: compare --loss.labels im with it before you decide"
    outside = "" if RATIO_RANGE[0] <= ratio <= RATIO_RANGE[1] else ", which is outside of what it was fitted to"
    shown = f"{by_ratio:+.0f} %" if math.isfinite(by_ratio) else "none"
    return [
        f"Instruction Modelling: {verdict}",
        f"  fit over the ratio {ratio:.3f}{outside}: {shown} of AlpacaEval's win rate",
        f"  fit over {num_records} examples, of data whose ratio is about 10: {by_size:+.0f} %",
        "  (arXiv 2405.14394; Llama-2-7B, seven data sets, one seed each; measured gains are up to 40 points off the "
        "fit, so measure data.valid)",
    ]


def ratio_of(one: MeasuredRecord) -> float:
    """Instruction over answer of a record; infinite without an answer."""
    return one.instruction / one.answer if one.answer else math.inf
