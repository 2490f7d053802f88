"""The table of published instruction data: every source from three rows of its own form, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.data.builders.options import SftConversion
from megatron_grit.data.builders.sources.instructions import SOURCES, SftCounts, convert_sft
from megatron_grit.data.builders.sources.raw_shapes import FEW_SHOT, ZERO_SHOT
from megatron_grit.data.builders.sources.wrappers import WEIGHTS, WITH_INPUT, WITHOUT_INPUT, Wrapper
from megatron_grit.data.text.records import parse_record
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError
from tests.unit.data.builders.raw_sets import EXPECTED, turns_of, write_raw


def convert(source: str, folder: Path, **options: Any) -> tuple[SftCounts, list[dict[str, Any]]]:
    output = folder.parent / f"{folder.name}.out.jsonl"
    counts = convert_sft(SftConversion(source=source, input=str(folder), output=str(output), **options))
    return counts, [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source(source: str, tmp_path: Path) -> None:
    folder = write_raw(tmp_path, source)
    counts, records = convert(source, folder)
    found = [turns_of(record) for record in records]
    assert sorted(found) == sorted(EXPECTED[source])
    if source != "super_ni":  # whose instances are in a drawn order
        assert found == EXPECTED[source]
    assert counts.kept == len(records)
    assert counts.num_turns == sum(len(parse_record(record).messages) // 2 for record in records)
    names = {record["dataset"].partition(".")[0] for record in records}
    assert names == {source} and all(record["id"].startswith(f"{source}_") for record in records)
    assert convert(source, folder) == (counts, records)


def test_all_sources_of_the_table_have_rows_here() -> None:
    assert set(EXPECTED) == set(SOURCES) and len(SOURCES) == 20


def test_rows_that_are_no_conversation_are_counted(tmp_path: Path) -> None:
    counts, _ = convert("sharegpt", write_raw(tmp_path, "sharegpt"))
    assert counts.left_out == {"a turn from bing": 1, "not in turns": 1}
    assert "left out 1: a turn from bing" in counts.summary()
    assert convert("open_orca", write_raw(tmp_path, "open_orca"))[0].left_out == {"an empty turn": 1}
    assert convert("baize", write_raw(tmp_path, "baize"))[0].left_out == {"without an answer": 4}
    assert convert("oasst1", write_raw(tmp_path, "oasst1"))[0].left_out == {"deleted": 1}


def test_labels_and_ids(tmp_path: Path) -> None:
    _, records = convert("science", write_raw(tmp_path, "science"))
    assert [record["dataset"] for record in records][:2] == ["science.evidence_inference", "science.scifact_json"]
    _, records = convert("wizardlm", write_raw(tmp_path, "wizardlm"))
    assert [record["id"] for record in records] == ["wizardlm_K0", "wizardlm_K1", "wizardlm_K2"]


def test_the_best_replies(tmp_path: Path) -> None:
    """Of equals the first."""
    _, records = convert("oasst1", write_raw(tmp_path, "oasst1"), top_k_replies=1)
    assert [turns_of(record) for record in records] == [["q", "good"], ["r", "first"]]
    _, records = convert("oasst1", write_raw(tmp_path, "oasst1"), top_k_replies=2)
    assert len(records) == 4


def test_records_are_drawn_by_the_seed(tmp_path: Path) -> None:
    folder = write_raw(tmp_path, "cot")
    counts, records = convert("cot", folder, most=2)
    assert (counts.kept, counts.not_drawn) == (4, 2)
    places = [EXPECTED["flan_v2"].index(turns_of(record)) for record in records]
    assert places[:2] == sorted(places[:2]) and places[2:] == sorted(places[2:]), "in the order of the file"
    assert convert("cot", folder, most=2)[1] == records
    drawn = {json.dumps(convert("cot", folder, most=1, seed=seed)[1]) for seed in range(12)}
    assert len(drawn) > 2
    assert convert("cot", folder, most=0)[0].kept == 6


def test_tasks_have_instances_alone_and_behind_examples(tmp_path: Path) -> None:
    folder = write_raw(tmp_path, "super_ni")
    task = json.loads((folder / "tasks" / "task001.json").read_text())
    task["Instances"] = [{"id": str(k), "input": f"i{k}", "output": [f"o{k}"]} for k in range(100)]
    (folder / "tasks" / "task001.json").write_text(json.dumps(task))
    _, records = convert("super_ni", folder)
    turns = [turns_of(record) for record in records]
    head = "Do task001.\n\nInput: e0\nOutput: f0\n\nInput: e1\nOutput: f1\n\nInput: i"
    behind = [(asked, answer) for asked, answer in turns if asked.startswith(head)]
    assert all(asked == f"{head}{answer[1:]}\nOutput:" for asked, answer in behind)
    assert (len(behind), len(turns)) == (FEW_SHOT, ZERO_SHOT + FEW_SHOT + 3)
    assert len({tuple(turn) for turn in turns}) == len(turns)


def test_phrasings_are_drawn_only_when_asked(tmp_path: Path) -> None:
    folder = write_raw(tmp_path, "dolly")
    plain, alpaca = (convert("dolly", folder, wrap=wrap)[1] for wrap in ("plain", "alpaca"))
    assert [turns_of(record) for record in plain] == EXPECTED["dolly"]
    assert turns_of(alpaca[1])[0].endswith("### Instruction:\nSay {hi}.\n\n### Response:")
    assert "### Input:\n1 and 2\n" in turns_of(alpaca[0])[0] and "### Input" not in turns_of(alpaca[2])[0]
    drawn = {json.dumps(convert("dolly", folder, wrap="drawn", seed=seed)[1]) for seed in range(5)}
    assert len(drawn) > 2
    assert [turns_of(record)[1] for record in plain] == [turns_of(record)[1] for record in alpaca]


def test_phrasings_have_their_weights() -> None:
    """Within 5 standard deviations of 4,000 draws; each phrasing holds what it is given, braces included, once."""
    assert len(WEIGHTS) == len(WITH_INPUT) == len(WITHOUT_INPUT) == 14 and abs(sum(WEIGHTS) - 1) < 1e-12
    wrap = Wrapper("drawn", np.random.default_rng(0))
    for given, phrasings in (("<{in}>", WITH_INPUT), ("", WITHOUT_INPUT)):
        counts = Counter(wrap("<{instruction}>", given) for _ in range(4000))
        assert len(counts) == 14
        assert all(text.count("<{instruction}>") == 1 and text.count("<{in}>") == bool(given) for text in counts)
        for phrasing, weight in zip(phrasings, WEIGHTS, strict=True):
            count = counts[phrasing.replace("{input}", given).replace("{instruction}", "<{instruction}>")]
            assert abs(count - 4000 * weight) < 5 * (4000 * weight * (1 - weight)) ** 0.5


def test_long_conversations_are_split_between_pairs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As many pairs as fit, 6 tokens a turn beside its own; what does not fit alone is left out."""
    texts = ["a b c", "d", "e f", "g h", "fox " * 60, "i", "j", "k"]
    folder = tmp_path / "sharegpt"
    folder.mkdir()
    turns = [{"from": "gpt" if k % 2 else "human", "value": text} for k, text in enumerate(texts)]
    raw = folder / "sharegpt_html_cleaned_and_split_2048.json"
    raw.write_text(json.dumps([{"id": "x", "conversations": turns}]))
    sizes = [len(tokenizer.encode(text)) + 6 for text in texts]
    first, second = sum(sizes[:2]), sum(sizes[2:4])
    options: dict[str, Any] = {"tokenizer": str(tokenizer.path)}
    counts, records = convert("sharegpt", folder, max_tokens=first + second, **options)
    assert [turns_of(record) for record in records] == [texts[:4], texts[6:]]
    assert [record["id"] for record in records] == ["sharegpt_x_0", "sharegpt_x_1"]
    assert counts.left_out == {"a pair that is too long": 1}
    _, records = convert("sharegpt", folder, max_tokens=first + second - 1, **options)
    assert [turns_of(record) for record in records] == [texts[:2], texts[2:4], texts[6:]]
    _, records = convert("sharegpt", folder, max_tokens=10_000, **options)
    assert [(record["id"], turns_of(record)) for record in records] == [("sharegpt_x", texts)]


def broken(folder: Path, source: str, name: str, text: str | None) -> Path:
    folder = write_raw(folder, source)
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("source", "name", "text", "message"),
    [
        ("cot", "cot_fsopt.jsonl", None, r"cot: cot needs cot_fsopt.jsonl, which is not there"),
        ("flan_v2", "tulu_v2_resampled_flan_50k.jsonl", None, "tulu_v2_resampled_flan_50k.jsonl or tulu_v1_resampled"),
        ("dolly", "databricks-dolly-15k.jsonl", '{"instruction": "a"}\n', r"15k.jsonl:1: has no output or response"),
        ("dolly", "databricks-dolly-15k.jsonl", "[]\n", r"15k.jsonl:1: expected a JSON object"),
        ("self_instruct", "all_instances_82K.jsonl", "{\n", r"82K.jsonl:1: malformed JSON"),
        ("stanford_alpaca", "alpaca_data.json", "{}", r"alpaca_data.json: must be a JSON list of objects"),
        (
            "stanford_alpaca",
            "alpaca_data.json",
            '[{"instruction": 3}]',
            r"data.json: row 1: instruction must be a text",
        ),
        ("stanford_alpaca", "alpaca_data.json", "[]", r"alpaca_data.json: gives no record of stanford_alpaca"),
        ("sharegpt", "sharegpt_html_cleaned_and_split_4096.json", '[{"id": 1}]', "row 1: conversations must be a list"),
        ("lima", "train.jsonl", '{"conversations": [1]}', r"train.jsonl:1: conversations must be a list of texts"),
        ("oasst1", "2023-04-12_oasst_ready.trees.jsonl", '{"prompt": {"role": "x"}}', ":1: a message needs a role"),
        (
            "unnatural_instructions",
            "core_data.jsonl",
            '{"instruction": "a"}',
            ":1: instances must be a list of objects",
        ),
        ("super_ni", "tasks/task003.json", None, r"train_tasks.txt:3: names the task task003"),
        ("super_ni", "tasks/task003.json", '{"Definition": []}', r"task003.json: row 1: has no Definition"),
    ],
)
def test_what_is_not_as_the_table_says(source: str, name: str, text: str | None, message: str, tmp_path: Path) -> None:
    folder = broken(tmp_path, source, name, text)
    with pytest.raises(DataError, match=message):
        convert(source, folder)
    assert not (tmp_path / f"{source}.out.jsonl").exists()


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    folder = write_raw(tmp_path, "lima")
    with pytest.raises(ConfigError, match="unknown source 'dolli'.*dolly"):
        convert("dolli", folder)
    with pytest.raises(ConfigError, match="unknown source 'zzzzzzzz'; there are super_ni, cot"):
        convert("zzzzzzzz", folder)
    with pytest.raises(ConfigError, match="max_tokens and tokenizer go together"):
        convert("lima", folder, max_tokens=5)
    with pytest.raises(DataError, match="absent: is no folder"):
        convert("lima", tmp_path / "absent")
    with pytest.raises(DataError, match="lima needs other.jsonl, which is not there"):
        convert("lima", folder, files=["other.jsonl"])
    with pytest.raises(ConfigError, match="which is read"):
        convert_sft(SftConversion(source="lima", input=str(folder), output=str(folder / "train.jsonl")))


def test_parquet_and_spreadsheets(tmp_path: Path) -> None:
    """Through pyarrow and openpyxl; the same records as from JSON lines."""
    pyarrow, openpyxl = pytest.importorskip("pyarrow"), pytest.importorskip("openpyxl")
    from pyarrow import parquet

    for source, name in (("open_orca", "1M-GPT4-Augmented.parquet"), ("hard_coded", "hard_coded_examples.xlsx")):
        folder = write_raw(tmp_path, source)
        (lines,) = folder.glob("*.jsonl")
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
        else:
            book = openpyxl.Workbook()
            for cells in [list(rows[0]), *(list(row.values()) for row in rows)]:
                book.active.append(cells)
            book.save(folder / name)
        lines.unlink()
        assert [turns_of(record) for record in convert(source, folder)[1]] == EXPECTED[source]
        (folder / name).write_bytes(b"neither")
        with pytest.raises(DataError, match="cannot be read as"):
            convert(source, folder)


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    for source, name in (("open_orca", "1M-GPT4-Augmented.parquet"), ("hard_coded", "hard_coded_examples.xlsx")):
        folder = write_raw(tmp_path, source)
        (folder / name).write_bytes(b"")
        with pytest.raises(ConfigError, match=rf"{name}: .* needs (pyarrow|openpyxl): pip install .*\[data\]"):
            convert(source, folder)
