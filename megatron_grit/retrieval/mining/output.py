"""Records with mined negatives, and the report about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_grit.data.text.records import Record, TextPair
from megatron_grit.retrieval.mining.corpus import Passage
from megatron_grit.retrieval.mining.judges import query_of


def report_lines(report: dict[str, Any]) -> list[str]:
    """A report of the mining to read."""
    lines = [
        f"{report['num_written']:,} of {report['num_records']:,} records written, {report['num_negatives']:,} "
        f"negatives from {report['num_passages']:,} passages; {report['num_records_with_too_few']:,} had too few"
    ]
    if report["num_kept_negatives_left_out"]:
        lines.append(f"  negatives of the input that were left out: {report['num_kept_negatives_left_out']:,}")
    dropped = report["dropped_candidates"]
    return lines + [f"  left out, {name}: {count:,}" for name, count in dropped.items() if count]


def with_negatives(record: Record, kept: Sequence[TextPair], mined: Sequence[Passage]) -> dict[str, Any]:
    """A record as JSON, with other negatives."""
    instruction = record.positives[0].instruction
    negatives = [*kept, *(TextPair(p.instruction if p.has_instruction else instruction, p.text) for p in mined)]
    # What is said of each negative, such as neg_scores, is of others.
    other = {key: value for key, value in record.other.items() if not key.startswith("neg_")}
    return {
        "query": _value(query_of(record)),
        "pos": [_value(pair) for pair in record.positives],
        "neg": [_value(pair) for pair in negatives],
        **other,
    }


def _value(pair: TextPair) -> str | list[str]:
    return pair.text if pair.instruction is None else [pair.instruction, pair.text]


def plain(value: Any) -> Any:
    """An option as JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
