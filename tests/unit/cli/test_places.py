"""No command writes over what it reads, and each finds an output that cannot be written before it begins."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_grit.cli import main as cli
from megatron_grit.data.indexed.roles import RowKind
from tests.unit.data import indexed_files
from tests.unit.data.samples import byte_level_json, embedding_record


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    records = "".join(json.dumps(embedding_record(number)) + "\n" for number in range(4))
    for name in ("pairs.jsonl", "data.json", "data.rejected.jsonl", "data.report.json", "tok.model"):
        Path(name).write_text(records)
    Path("nli.tsv").write_text("split\tsentence1\tsentence2\tlabel\n")
    Path("q.tsv").write_text("1\ttext\n")
    Path("figures.json").write_text("{}")
    Path("out").mkdir()
    Path("out/report.json").write_text("{}")
    byte_level_json(tmp_path)
    indexed_files.write_chats(tmp_path / "part", [(3, 4)])
    indexed_files.write(tmp_path / "other", [indexed_files.text(1, 5)], RowKind.GENERATIVE)
    return tmp_path


REPORT = "report --after figures.json --metrics figures.json --timings q.tsv --output-dir out"
MSMARCO = "convert-msmarco --queries q.tsv --corpus q.tsv --output q.tsv"
OVER_INPUT = [
    "merge-indexed --input part other --output-prefix other --overwrite",
    "merge-indexed --input part other --output-prefix ./out/../part --overwrite",
    "build-grit --input data.json --output-prefix data --tokenizer tokenizer.json --overwrite",
    "build-grit --input data.rejected.jsonl --output-prefix data --tokenizer tokenizer.json --overwrite",
    "build-grit --input data.report.json --output-prefix data --tokenizer tokenizer.json --overwrite",
    "build-grit --input pairs.jsonl --output-prefix tokenizer --tokenizer tokenizer.json --overwrite",
    "build-grit --input pairs.jsonl --output-prefix tokenizer --tokenizer . --overwrite",
    "build-sft --input data.json --output-prefix data --tokenizer tokenizer.json --overwrite",
    "preprocess-data --input data.json --output-prefix d --json-keys query --tokenizer-model tokenizer.json",
    "train-tokenizer --input tok.model --output-prefix tok --vocab-size 300",
    "mine-negatives --input pairs.jsonl --output pairs.jsonl --embedder nothing",
    "convert-allnli --input nli.tsv --output nli.tsv",
    f"{MSMARCO} --negatives pairs.jsonl",
    "encode --checkpoint nothing --input pairs.jsonl --output pairs.jsonl",
    "evaluate --checkpoint nothing --retrieval pairs.jsonl --output pairs.jsonl",
    "evaluate --checkpoint nothing --generative part --output part.json",
    "evaluate loss --checkpoint nothing --input part --output part.idx",
    "evaluate qa q.tsv pairs.jsonl --output q.tsv",
    "evaluate qa q.tsv pairs.jsonl --output out/../pairs.jsonl",
    f"{REPORT} --before out/report.json",
]


def run(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(command.split()) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("command", OVER_INPUT)
def test_what_is_read_is_not_written(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if command.startswith("preprocess"):
        os.link("data.json", "d_query_document.json")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert "would take the place of" in run(command, capsys)
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


UNWRITABLE = [
    "merge-indexed --input part other --output-prefix /proc/x/y",
    "build-grit --input pairs.jsonl --output-prefix /proc/x/y --tokenizer tokenizer.json",
    "build-sft --input pairs.jsonl --output-prefix /proc/x/y --tokenizer tokenizer.json",
    "preprocess-data --input pairs.jsonl --output-prefix /proc/x/y --json-keys query --tokenizer-model tokenizer.json",
    "train-tokenizer --input pairs.jsonl --output-prefix /proc/x/y --vocab-size 300",
    "mine-negatives --input pairs.jsonl --output /proc/x/y --embedder nothing",
    "convert-allnli --input nli.tsv --output /proc/x/y",
    "convert-msmarco --queries q.tsv --corpus q.tsv --negatives q.tsv --output /proc/x/y",
    "encode --checkpoint nothing --input pairs.jsonl --output /proc/x/y",
    "evaluate --checkpoint nothing --retrieval pairs.jsonl --output /proc/x/y",
    "evaluate loss --checkpoint nothing --input part --output /proc/x/y",
    "evaluate qa q.tsv pairs.jsonl --output /proc/x/y",
    "report --before figures.json --after figures.json --metrics figures.json --timings q.tsv --output-dir /proc/x",
]


@pytest.mark.parametrize("command", UNWRITABLE)
def test_an_output_that_cannot_be_written_is_found_first(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model: there is none."""
    assert "cannot be written" in run(command, capsys)


FOLDERS = [
    "merge-indexed --input part other --output-prefix out/",
    "build-grit --input pairs.jsonl --output-prefix out/ --tokenizer tokenizer.json",
    "build-sft --input pairs.jsonl --output-prefix out/ --tokenizer tokenizer.json",
    "train-tokenizer --input pairs.jsonl --output-prefix out/ --vocab-size 300",
    "preprocess-data --input pairs.jsonl --output-prefix out/ --tokenizer-model tokenizer.json",
    "encode --checkpoint nothing --input pairs.jsonl --output out",
    "encode --checkpoint nothing --input pairs.jsonl --output out/",
    "evaluate --checkpoint nothing --retrieval pairs.jsonl --output out",
    "evaluate loss --checkpoint nothing --input part --output out",
    "evaluate qa q.tsv pairs.jsonl --output out/",
    "mine-negatives --input pairs.jsonl --output out --embedder nothing",
    "convert-allnli --input nli.tsv --output out/",
]


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_is_no_file(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a folder" in run(command, capsys)
