"""Statistics and parts of instruction data against counts by hand, and against figures of real data."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.cli.main import main
from megatron_grit.data.builders.options import SftSelection, SftStatistics
from megatron_grit.data.builders.selection import SelectionCounts, select_sft
from megatron_grit.data.builders.statistics import InstructionStatistics, advise, measure_sft
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError


def messages(*turns: tuple[str, str], **more: object) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


RECORDS: list[dict[str, Any]] = [
    messages(
        ("system", "be brief"), ("user", "a b c"), ("assistant", "d"), ("user", "e"), ("assistant", "f g"), dataset="x"
    ),
    messages(("user", "a  b"), ("assistant", "c"), dataset="x"),
    messages(("user", "a b"), ("assistant", " c"), dataset="y"),
    {"prompt": "a b c d", "completion": "e"},
    {"text": "a b c d e f g"},
    messages(("user", "a"), ("assistant", " ")),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def measure(path: Path, **options: Any) -> InstructionStatistics:
    return measure_sft(SftStatistics(input=[str(path)], **options))


def test_counts_by_hand(data: Path, tmp_path: Path) -> None:
    found = measure(data, lengths=[3, 6], output=str(tmp_path / "out.json"))
    assert (found.num_records, found.num_answers, found.num_multi_turn) == (6, 6, 1)
    assert (found.num_duplicates, found.num_empty_answers) == (1, 1)
    assert found.datasets == {"(none)": 3, "x": 2, "y": 1}
    assert found.totals == {"user": 13, "assistant": 6, "text": 7, "system": 2}
    assert found.percentiles["record"]["p0"] == 1 and found.percentiles["record"]["p100"] == 9
    assert found.percentiles["answer"]["p100"] == 3 and found.percentiles["instruction"]["p100"] == 7
    assert found.share_above == {"3": 3 / 6, "6": 2 / 6}
    assert (found.mean_instruction, found.mean_answer) == (22 / 6, 1.0)
    assert found.ratio == pytest.approx(22 / 6)
    assert json.loads((tmp_path / "out.json").read_text())["totals"] == found.totals
    assert "6 records with 6 answers, 1 of several turns, 1 exact duplicates" in found.lines()[0]


def test_tokens_are_the_tokenizers(data: Path, tokenizer: Tokenizer) -> None:
    found = measure(data, tokenizer=str(tokenizer.path))
    expected = Counter[str]()
    for record in RECORDS:
        for message in record.get("messages", []):
            expected[message["role"]] += len(tokenizer.encode(message["content"]))
    expected["user"] += len(tokenizer.encode("a b c d"))
    expected["assistant"] += len(tokenizer.encode("e"))
    expected["text"] += len(tokenizer.encode(RECORDS[4]["text"]))
    assert found.totals == expected and found.unit == "tokens"


def test_a_picture_of_the_lengths(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measure(data, plot=str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_lines_that_are_no_record(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with data.open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "alone"}]}\n{"query": "q", "pos": ["p"]}\n')
    assert main(["data-stats", "--input", str(data)]) == 2
    message = capsys.readouterr().err
    assert message == f"megatron-grit data-stats: error: {data}:7: no user turn with an answer in this conversation\n"
    found = measure(data, on_error="skip")
    assert (found.num_records, found.num_skipped) == (6, 2)
    data.write_text('{"query": "q", "pos": ["p"]}\n')
    with pytest.raises(DataError, match=r"in.jsonl:1: is a query with passages"):
        measure(data)
    with pytest.raises(DataError, match=r"no record in .*; the first line: .*in.jsonl:1: is a query"):
        measure(data, on_error="skip")
    with pytest.raises(ConfigError, match="which is read"):
        measure(data, output=str(data))


@pytest.mark.parametrize(
    ("ratio", "count", "verdict"),
    [(26.3, 13_533, "worth trying"), (0.644, 2_996, "open"), (0.094, 1_030, "little"), (10.0, 326_181, "little")],
)
def test_advice(ratio: float, count: int, verdict: str) -> None:
    """Data of the paper: long instructions and few examples are where it helps most."""
    lines = advise(ratio, count)
    assert lines[0].startswith(f"Instruction Modelling: {verdict}")
    assert f"{18.85 * math.log(ratio) + 25.83:+.0f} %" in lines[1]
    assert f"{-39.37 * math.log(count) + 431.74:+.0f} %" in lines[2]
    assert "outside" not in lines[1] and "2405.14394" in lines[3]
    assert "outside" in advise(100.0, count)[1] and "none" in advise(0.0, count)[1]


def select(path: Path, **options: Any) -> tuple[SelectionCounts, list[str]]:
    output = path.parent / "out.jsonl"
    counts = select_sft(SftSelection(input=[str(path)], output=str(output), **options))
    return counts, output.read_text().splitlines()


def test_duplicates_are_left_out(data: Path) -> None:
    lines = data.read_text().splitlines()
    counts, kept = select(data, deduplicate=True)
    assert kept == [line for place, line in enumerate(lines) if place != 2]
    assert counts.summary() == "5 records of 6, 1 duplicates left out"


def test_records_nearest_to_a_ratio(data: Path) -> None:
    """Ratios are 2, 2, 2, 4, and none of a text and of an empty answer; of equals the first are taken."""
    lines = data.read_text().splitlines()
    assert select(data, ratio=3.5, num_records=1)[1] == [lines[3]]
    counts, kept = select(data, ratio=1.0, num_records=2)
    assert kept == lines[:2] and counts.ratios == (2.0, 2.0)
    assert select(data, ratio=3.5, num_records=2)[1] == [lines[0], lines[3]]
    assert select(data, ratio=1.0, num_records=2, deduplicate=True)[1] == lines[:2]
    with pytest.raises(DataError, match="5 records are asked for, and 4 have an answer"):
        select(data, ratio=1.0, num_records=5)


def test_a_fraction_of_each_data_set(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    sizes = {"x": 50, "y": 25, "z": 7}
    names = [name for name, count in sizes.items() for _ in range(count)]
    path.write_text(
        "".join(
            json.dumps(messages(("user", str(k)), ("assistant", "a"), dataset=n)) + "\n" for k, n in enumerate(names)
        )
    )
    lines = path.read_text().splitlines()
    for fraction in (0.1, 0.2, 0.5, 1.0):
        _, kept = select(path, fraction=fraction)
        counts = Counter(json.loads(line)["dataset"] for line in kept)
        assert len(kept) == int(82 * fraction + 0.5)
        assert all(abs(counts[name] - fraction * size) < 1 for name, size in sizes.items())
        assert kept == [line for line in lines if line in kept], "in their order, none twice"
        assert select(path, fraction=fraction)[1] == kept
    assert len({tuple(select(path, fraction=0.2, seed=seed)[1]) for seed in range(5)}) == 5
    with pytest.raises(DataError, match="nothing is left of"):
        select(path, fraction=0.001)


def test_options_that_select_nothing() -> None:
    for options in ({}, {"ratio": 1.0}, {"num_records": 3, "deduplicate": True}):
        with pytest.raises(ConfigError, match="nothing is selected|ratio and num_records go together"):
            SftSelection(input=["a"], output="b", **options)  # type: ignore[arg-type]


def test_figures_of_real_data(shared_data: Path) -> None:
    """Words a record as published, 43.83 and 68.08, which count a word more for each message."""
    path = shared_data / "alpagasus_3k_dolly.jsonl"
    found = measure(path)
    assert (found.num_records, found.num_answers, found.num_multi_turn, found.num_duplicates) == (2996, 2996, 0, 1)
    assert round(found.mean_instruction, 2) == 42.83 and round(found.mean_answer, 2) == 67.08
    published = [found.totals[role] + 2996 for role in ("user", "assistant")]
    assert round(published[0] / published[1], 3) == 0.644
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [[m["content"] for m in json.loads(line)["messages"]] for line in lines]
    assert found.totals == {
        "assistant": sum(len(answer.split()) for _, answer in pairs),
        "user": sum(len(asked.split()) for asked, _ in pairs),
    }
