"""build_grit: filters, reports, and that a failed build leaves nothing behind."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_grit.data.builders.grit_builder import BuildReport, Limits, build_grit, read_texts
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.templates import encode_chat, encode_embedding
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError
from tests.unit.data.samples import chat_record, embedding_record, sentence

LIMITS = Limits(query=24, passage=40, generative=64)
GOOD = {"query": ["find", "fox"], "pos": [["", "brown fox"]], "neg": [["", "lazy dog"]]}


@pytest.fixture
def build(tmp_path: Path, tokenizer_path: Path) -> Callable[..., BuildReport]:
    def run(*inputs: Path, limits: Limits = LIMITS, **options: object) -> BuildReport:
        return build_grit(inputs, tmp_path / "out" / "data", tokenizer_path, limits, **options)

    return run


def outputs(tmp_path: Path) -> list[str]:
    """Names of what was built. The hidden folder with which an interrupted build goes on is none of it."""
    return sorted(path.name for path in (tmp_path / "out").glob("[!.]*"))


def rejected(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / "data.rejected.jsonl").read_text().splitlines()]


def test_embedding_records(write_jsonl, build, tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [GOOD, {"query": "plain", "pos": ["one", "two"]}, embedding_record(3)]
    report = build(write_jsonl(records), limits=Limits())
    assert outputs(tmp_path) == ["data.bin", "data.idx", "data.json", "data.report.json", "data.report.png"]
    read = IndexedRecords(tmp_path / "out" / "data")
    head, tail = encode_embedding(tokenizer, "brown fox", "")
    spans = [(role, ids.tolist()) for role, ids in read.get(0)]
    assert spans[2:4] == [(Role.POSITIVE_INSTRUCTION, head), (Role.POSITIVE, tail)]
    assert [role for role, _ in read.get(1)] == [Role.QUERY, Role.POSITIVE, Role.POSITIVE]
    assert tokenizer.decode(read.get(1)[2][1].tolist()) == "two"
    assert report.token_quantiles["query"]["count"] == 3
    assert report.token_quantiles["positive"]["count"] == 5
    assert report.num_tokens == int(read.lengths().sum()) == read.meta.num_tokens
    assert json.loads((tmp_path / "out" / "data.report.json").read_text()) == vars(report)
    read.verify()


def test_generative_records(write_jsonl, build, tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = chat_record(5, 2)
    report = build(write_jsonl([chat, {"text": "plain text"}]), limits=Limits())
    read = IndexedRecords(tmp_path / "out" / "data")
    assert [(role, ids.tolist()) for role, ids in read.get(0)] == encode_chat(tokenizer, chat["text"])
    ((role, ids),) = read.get(1)
    assert (role, ids.tolist()) == (Role.TEXT, tokenizer.encode("plain text"))
    assert report.num_supervised_tokens == read.meta.num_supervised_tokens
    assert list(report.token_quantiles) == ["text", "conversation"]


def test_texts_lose_their_end(write_jsonl, build, tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = sentence(4, 80)
    report = build(write_jsonl([{"query": ["find", long], "pos": [long], "neg": [["", "short"]]}]))
    record = IndexedRecords(tmp_path / "out" / "data").get(0)
    assert [sum(len(ids) for _, ids in record[:2]), len(record[2][1])] == [24, 40]
    assert record[2][1].tolist() == tokenizer.encode(long)[:40]
    assert report.truncated == {"query": 1, "positive": 1}
    assert report.token_quantiles["positive"]["p100"] == 40


def test_strings_of_pairs_are_cut_before_they_are_tokenised(write_jsonl, build, tmp_path: Path) -> None:
    build(write_jsonl([{"query": "\n" * 20, "pos": ["p"]}, {"query": "q", "pos": ["p"]}]), limits=Limits())
    assert [entry["reason"] for entry in rejected(tmp_path)] == ["empty_text"]
    blank_then_text = " " * (LIMITS.max_chars + 1) + "text"
    with pytest.raises(DataError, match="the query has no text"):
        build(write_jsonl([{"query": blank_then_text, "pos": ["p"]}]), overwrite=True)


LONG_INSTRUCTION = "quick " * 30
DROPPED = [
    ({**GOOD, "query": ["find", " \n"]}, "empty_text", "the query has no text"),
    ({**GOOD, "neg": [["", "good"], ["x", ""]]}, "empty_text", "the negative has no text"),
    ({**GOOD, "query": [LONG_INSTRUCTION, "fox"]}, "instruction_too_long", "of its 24 tokens and leaves none"),
    ({**GOOD, "pos": [["x" * 401, "fox"]]}, "instruction_too_long", "401 characters; the limit is 400, 10 x its 40"),
    ({**GOOD, "neg": [["q " * 100, "fox"]]}, "instruction_too_long", "the negative's instruction takes"),
]
DROPPED_TEXTS = [
    ({"text": " "}, "empty_text", "the text is empty"),
    ({"text": "\n"}, "empty_text", "the text is empty"),
    ({"text": ["hi", " \n"]}, "empty_text", "answer 1 of the conversation is empty"),
    ({"text": ["hi", "a", "more", ""]}, "empty_text", "answer 2 of the conversation is empty"),
    ({"text": [sentence(1, 60), "yes"]}, "instruction_too_long", "of 64 tokens and leaves none for the answer"),
]


@pytest.mark.parametrize(("record", "reason", "message"), DROPPED + DROPPED_TEXTS)
def test_filters(write_jsonl, build, tmp_path: Path, record: dict, reason: str, message: str) -> None:
    good = {"text": "good text"} if "text" in record else GOOD
    path = write_jsonl([good, record, good])
    report = build(path)
    assert (report.num_read, report.num_kept, report.dropped) == (3, 2, {reason: 1})
    (entry,) = rejected(tmp_path)
    assert (entry["path"], entry["line"], entry["reason"]) == (str(path), 2, reason)
    assert message in entry["message"]
    assert len(IndexedRecords(tmp_path / "out" / "data")) == 2
    assert sum(texts["count"] for texts in report.token_quantiles.values()) in (2, 6)  # none of the dropped record's


@pytest.mark.parametrize(("record", "reason", "message"), DROPPED + DROPPED_TEXTS)
def test_filters_that_stop(write_jsonl, build, tmp_path: Path, record: dict, reason: str, message: str) -> None:
    good = {"text": "good text"} if "text" in record else GOOD
    path = write_jsonl([good, record])
    with pytest.raises(DataError) as caught:
        build(path, on_filtered="stop")
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)
    assert outputs(tmp_path) == []


def test_first_turn_that_just_fits(write_jsonl, build, tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = ["hi there", "yes indeed"]
    prompt = sum(len(ids) for _, ids in encode_chat(tokenizer, chat)[:-1])
    build(write_jsonl([{"text": chat}]), limits=Limits(generative=prompt + 1))
    *context, answer = IndexedRecords(tmp_path / "out" / "data").get(0)
    assert (sum(len(ids) for _, ids in context), len(answer[1])) == (prompt, 1)
    with pytest.raises(DataError, match="instruction_too_long"):
        build(write_jsonl([{"text": chat}]), limits=Limits(generative=prompt), overwrite=True)


def test_nothing_left_names_the_reasons(write_jsonl, build, tmp_path: Path) -> None:
    path = write_jsonl([{"text": [sentence(1, 60), "yes"]}, {"text": ""}, {"text": " "}])
    with pytest.raises(
        DataError,
        match=rf"nothing is left for .*: 2 of 3 .* empty_text, 1 of 3 .*; the first: {path}:1: the first user",
    ):
        build(path)
    assert outputs(tmp_path) == []
    with pytest.raises(DataError, match="no records for .* in the input"):
        build(write_jsonl([""]))


def test_bad_line_stops_or_is_skipped(write_jsonl, build, tmp_path: Path) -> None:
    path = write_jsonl([GOOD, '{"query": ', GOOD])
    with pytest.raises(DataError, match=rf"^{path}:2: malformed JSON"):
        build(path)
    assert outputs(tmp_path) == []
    report = build(path, on_error="skip")
    assert (report.num_kept, report.dropped) == (2, {"bad_line": 1})
    assert rejected(tmp_path)[0]["line"] == 2
    build(write_jsonl([GOOD]), overwrite=True)
    assert "data.rejected.jsonl" not in outputs(tmp_path)  # that of the build before went with it


def test_failed_build_keeps_the_one_before(write_jsonl, build, tmp_path: Path) -> None:
    build(write_jsonl([GOOD, {"query": "q", "pos": [""]}]))
    before = {name: (tmp_path / "out" / name).read_bytes() for name in outputs(tmp_path)}
    with pytest.raises(DataError, match="data.bin: exists already"):
        build(write_jsonl([GOOD]))
    with pytest.raises(DataError, match="malformed"):
        build(write_jsonl([GOOD, "{"]), overwrite=True)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in outputs(tmp_path)} == before


def test_kinds_do_not_mix(write_jsonl, build, tmp_path: Path) -> None:
    first, second = write_jsonl([GOOD], "a.jsonl"), write_jsonl(["", {"text": "plain text"}], "b.jsonl")
    with pytest.raises(DataError, match=rf"^{second}:2: a record of kind generative after records of kind embedding"):
        build(first, second, on_error="skip")
    assert outputs(tmp_path) == []


def test_input_and_limits_are_checked_first(write_jsonl, build, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent.jsonl: no such input file"):
        build(write_jsonl([GOOD]), tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="no input files"):
        build()
    with pytest.raises(ConfigError, match="query must be at least 2, not 1"):
        Limits(query=1)
    assert outputs(tmp_path) == []


def test_report_is_readable(write_jsonl, build) -> None:
    report = build(write_jsonl([GOOD, {**GOOD, "query": ["find", ""]}]))
    text = "\n".join(report.lines())
    assert "1 embedding records of 2 read, 1 dropped" in text
    assert "dropped, empty_text" in text
    assert "supervised" not in text


def test_texts_for_a_tokenizer(write_jsonl) -> None:
    path = write_jsonl([GOOD, {"text": ["u", "a"]}])
    assert list(read_texts([path])) == [
        "<|user|>\nfind\n<|embed|>\nfox",
        "<|embed|>\nbrown fox",
        "<|embed|>\nlazy dog",
        "<|user|>\nu\n<|assistant|>\na",
    ]
    with pytest.raises(DataError, match=r"input.jsonl:1: malformed"):
        list(read_texts([write_jsonl(["{"])]))


@pytest.fixture
def tool(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a tool of tools/preprocess in this process: status, standard output, standard error."""
    monkeypatch.setattr("megatron_grit.parallel.failures.configure_logging", lambda: None)

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        path = repository / "tools" / "preprocess" / name
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(path), run_name="__main__")
        return exit_.value.code, *capsys.readouterr()

    return run


def test_tools_from_jsonl_to_inspection(write_jsonl, tool, tmp_path: Path) -> None:
    pairs = write_jsonl([embedding_record(number) for number in range(30)])
    model, prefix = tmp_path / "words", tmp_path / "pairs"
    status, out, _ = tool("train_tokenizer.py", "--input", pairs, "--output-prefix", model, "--vocab-size", 320)
    assert (status, out) == (0, f"{model}.model: 320 pieces\n")
    tokenizer = ["--tokenizer", f"{model}.model"]
    status, out, _ = tool("build_grit.py", "--input", pairs, "--output-prefix", prefix, *tokenizer)
    assert status == 0 and "30 embedding records of 30 read, 0 dropped" in out
    status, out, _ = tool("inspect_indexed.py", "--prefix", prefix, *tokenizer, "--checksum")
    assert status == 0 and "QUERY_INSTRUCTION    attended" in out and "verified" in out


def test_instruction_data_to_inspection(write_jsonl, tool, tmp_path: Path, tokenizer_path: Path) -> None:
    messages = [{"role": role, "content": f"the {role}"} for role in ("system", "user", "assistant")]
    path = write_jsonl([{"messages": messages}, {"messages": messages}, {"prompt": "one", "completion": "two"}])
    arguments = ["--input", path, "--output-prefix", tmp_path / "sft", "--tokenizer", tokenizer_path, "--deduplicate"]
    status, out, _ = tool("build_sft.py", *arguments, "--workers", 1)
    assert status == 0 and "2 generative records of 3 read, 1 dropped" in out
    inspect = ["--prefix", tmp_path / "sft", "--tokenizer", tokenizer_path]
    status, out, _ = tool("inspect_indexed.py", *inspect, "--colour", "always")
    assert status == 0 and "template tulu" in out
    shown = [line.split()[0] for line in out.splitlines()[3:9]]
    assert shown == ["TEMPLATE", "SYSTEM", "TEMPLATE", "USER", "TEMPLATE", "ANSWER"]
    assert "\x1b[32mthe·assistant</s>\x1b[0m" in out and "\x1b[2mthe·system\x1b[0m" in out
    for choice in ("auto", "never"):
        assert "\x1b" not in tool("inspect_indexed.py", *inspect, "--colour", choice)[1]
    embedding = write_jsonl([GOOD])
    arguments[1] = embedding
    status, _, err = tool("build_sft.py", *arguments, "--overwrite")
    assert status == 2 and err.startswith(f"build_sft: error: {embedding}:1: a record of kind embedding")


def test_tools_end_with_one_line_and_status_2(write_jsonl, tool, tmp_path: Path, tokenizer_path: Path) -> None:
    path = write_jsonl([GOOD, '{"query": "q"}'])
    build = ["--input", path, "--output-prefix", tmp_path / "out", "--tokenizer", tokenizer_path]
    train = ["--input", path, "--output-prefix", tmp_path / "out", "--vocab-size", 400]
    for name, arguments, message in (
        ("build_grit.py", build, f'build_grit: error: {path}:2: "pos" is missing\n'),
        (
            "build_grit.py",
            [*build, "--query-max-len", 0],
            "build_grit: error: --query-max-len must be at least 2",
        ),
        ("train_tokenizer.py", train, f"train_tokenizer: error: {path}:2: "),
        ("inspect_indexed.py", ["--prefix", tmp_path / "no"], f"inspect_indexed: error: {tmp_path}/no.json: no such"),
    ):
        status, out, err = tool(name, *arguments)
        assert (status, out) == (2, "")
        assert err.startswith(message) and err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_the_engine_adds_nothing_to_the_error(
    write_jsonl, repository: Path, tmp_path: Path, tokenizer_path: Path
) -> None:
    path = write_jsonl([GOOD, "{"])
    command = [sys.executable, str(repository / "tools" / "preprocess" / "build_grit.py"), "--input", str(path)]
    command += ["--output-prefix", str(tmp_path / "out"), "--tokenizer", str(tokenizer_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"build_grit: error: {path}:2: malformed JSON") and done.stderr.count("\n") == 1
