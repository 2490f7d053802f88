"""JSONL to records: the formats, and messages that name file and line."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.text.records import BadLine, Message, Record, TextPair, alternate, read_records
from megatron_grit.errors import DataError


def only(path: Path) -> Record | BadLine:
    (item,) = read_records(path)
    return item


def test_formats_are_found_for_each_line(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(
        [
            {"query": "q", "pos": ["p"], "neg": ["n", "m"], "source": "extra keys are ignored"},
            {"query": ["i", "q"], "pos": [["", "p"], "plain"]},
            "",
            {"text": "plain"},
            {"text": ["u", "a", "v", "b"]},
        ]
    )
    plain, instructed, text, chat = read_records(path)
    assert plain == Record(
        path=path,
        line=1,
        kind=RowKind.EMBEDDING,
        query=TextPair(None, "q"),
        positives=[TextPair(None, "p")],
        negatives=[TextPair(None, "n"), TextPair(None, "m")],
        other={"source": "extra keys are ignored"},
    )
    assert instructed.query == TextPair("i", "q")
    assert instructed.positives == [TextPair("", "p"), TextPair(None, "plain")]
    assert instructed.negatives == []
    assert (text.kind, text.line, text.text, text.messages) == (RowKind.GENERATIVE, 4, "plain", [])
    assert (chat.line, chat.text, chat.messages) == (5, None, alternate(["u", "a", "v", "b"]))
    assert [(message.role, message.content) for message in chat.messages][:2] == [("user", "u"), ("assistant", "a")]


def message(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def test_messages(write_jsonl: Callable[..., Path]) -> None:
    messages = [
        message("system", "be brief"),
        message("user", "u"),
        message("assistant", "a"),
        message("system", "s"),
        message("system", "t"),
        message("user", "v"),
        message("assistant", "b"),
        message("user", "nobody answers"),
    ]
    record = only(write_jsonl([{"messages": messages}]))
    assert record.messages == [Message(item["role"], item["content"]) for item in messages[:-1]]


def test_prompt_and_completion(write_jsonl: Callable[..., Path]) -> None:
    record = only(write_jsonl([{"prompt": "p", "completion": "c", "messages": "the pair comes first"}]))
    assert (record.kind, record.prompt, record.completion) == (RowKind.GENERATIVE, "p", "c")
    record = only(write_jsonl([{"prompt": "a column of its own", "text": "plain"}]))
    assert (record.text, record.prompt) == ("plain", None)


def test_gzip_and_progress(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n\n{"text": "two"}'))
    steps: list[int] = []
    assert [(item.line, item.text) for item in read_records(path, steps.append)] == [(1, "one"), (3, "two")]
    assert sum(steps) == path.stat().st_size
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"input.jsonl.gz .byte \d+.: not a whole gzip file"):
        list(read_records(path))


def test_several_files_of_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text('\n{"text": "three"}')
    found = [(item.path.name, item.line, item.text) for item in read_records(tmp_path / "*.jsonl")]
    assert found == [("a.jsonl", 1, "one"), ("a.jsonl", 2, "two"), ("b.jsonl", 2, "three")]


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert [item.text for item in read_records(path)] == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"', "malformed JSON: Expecting ',' delimiter at column 13"),
        ("[1, 2]", "expected a JSON object, found a list of 2"),
        ("null", "expected a JSON object, found null"),
        ("{}", 'no "query", "text", "messages", "conversations", or "prompt" with'),
        ('{"prompt": "p"}', 'no "query", "text", "messages", "conversations", or "prompt" with'),
        ('{"prompt": "p", "completion": 3}', '"prompt" and "completion" must be strings'),
        ('{"query": 3, "pos": ["p"]}', '"query" must hold a string or [instruction, text], found a number'),
        ('{"query": ["a", "b", "c"], "pos": ["p"]}', "found a list of 3"),
        ('{"query": "q"}', '"pos" is missing'),
        ('{"query": "q", "pos": []}', '"pos" is empty'),
        ('{"query": "q", "pos": "p"}', '"pos" must be a list of passages, found a string'),
        ('{"query": "q", "pos": ["p"], "neg": [null]}', '"neg" must hold a string or [instruction, text], found null'),
        ('{"text": 5}', '"text" must be a string, or a list'),
        ('{"text": ["u", "a", "u"]}', '"text" has 3 turns'),
        ('{"text": []}', '"text" has 0 turns'),
        ('{"text": ["u", 1]}', '"text" must be a string, or a list'),
        ('{"messages": "m"}', 'messages must be a list of {"role"'),
        ('{"messages": []}', "messages must be a list of"),
        ('{"messages": [{"role": "bot", "content": "c"}]}', "the role of message 0 must be one of system, developer"),
        ('{"messages": [{"role": "tool", "content": "c"}]}', "message 0 is of role tool where user was expected"),
        ('{"messages": [{"role": "user", "content": "c"}], "tools": {"a": 1}}', '"tools" must be a list, not {'),
        ('{"messages": [{"role": "user", "content": null}]}', "content of message 0 must be a string, not null"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "message 0 is of role assistant where user was"),
        ('{"messages": [{"role": "user", "content": "u"}]}', "no user turn with an answer"),
        (
            '{"messages": [{"role": "user", "content": "u"}, {"role": "system", "content": "s"}]}',
            "message 1 is of role system where assistant was",
        ),
        ('{"text": "half \\ud83d"}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_lines_are_named(write_jsonl: Callable[..., Path], line: str, expected: str) -> None:
    good, bad, after = read_records(write_jsonl([{"text": "good"}, line, {"text": "after"}]))
    assert isinstance(bad, BadLine)
    assert str(bad.error).startswith(f"{good.path}:2: ")
    assert expected in str(bad.error)
    assert (good.text, after.text) == ("good", "after")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    assert str(only(path).error) == f"{path}:1: not UTF-8: byte 10 of the line; convert the file"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent.jsonl: no such input file"):
        list(read_records(tmp_path / "absent.jsonl"))
