"""Preference records: which formats are read, what is supervised, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_grit.data.builders.grit_builder import Limits, build_grit
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role, RowKind, split_conversations
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import DataError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def build(path: Path, tokenizer_path: Path, **options: object) -> IndexedRecords:
    prefix = path.with_suffix("")
    report = build_grit([path], prefix, tokenizer_path, kind=RowKind.PREFERENCE, turns="last", **options)
    records = IndexedRecords(prefix)
    assert report.kind == "preference" and report.num_supervised_tokens == records.meta.num_supervised_tokens
    return records


def rated(records: IndexedRecords, tokenizer: Tokenizer, record: int) -> list[tuple[str, list[str]]]:
    """Of each conversation all of its text, and what of it is supervised."""
    spans = records.get(record)
    found = []
    for first, last in split_conversations([role for role, _ in spans]):
        parts = [(role, tokenizer.decode(tokens.tolist()).strip()) for role, tokens in spans[first:last]]
        found.append((" ".join(text for _, text in parts), [f"{role.name} {text}" for role, text in parts[-1:]]))
        assert all(role not in (Role.CHOSEN, Role.REJECTED) for role, _ in parts[:1])
    return found


FORMATS: dict[str, tuple[dict[str, object], list[str]]] = {
    "whole conversations": (
        {"chosen": [user("a"), answer("good")], "rejected": [user("a"), answer("bad")]},
        ["CHOSEN good", "REJECTED bad"],
    ),
    "a prompt of messages": (
        {"prompt": [user("a")], "chosen": [answer("good")], "rejected": [answer("good too")]},
        ["CHOSEN good", "REJECTED good too"],
    ),
    "a prompt of messages, answers as text": (
        {"prompt": [user("a")], "chosen": "good", "rejected": "bad"},
        ["CHOSEN good", "REJECTED bad"],
    ),
    "a prompt beside conversations": (
        {"prompt": "a", "chosen": [user("a"), answer("good")], "rejected": [user("a"), answer("bad")]},
        ["CHOSEN good", "REJECTED bad"],
    ),
    "a prompt and answers as messages": (
        {"prompt": "a", "chosen": [answer("good")], "rejected": [answer("bad")]},
        ["CHOSEN good", "REJECTED bad"],
    ),
    "texts": ({"prompt": "a", "chosen": "good", "rejected": "bad"}, ["CHOSEN good", "REJECTED bad"]),
    "ShareGPT's words": (
        {
            "chosen": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "good"}],
            "rejected": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "bad"}],
        },
        ["CHOSEN good", "REJECTED bad"],
    ),
    "turns that are shared": (
        {
            "chosen": [user("a"), answer("same"), user("b"), answer("good")],
            "rejected": [user("a"), answer("same"), user("b"), answer("bad")],
        },
        ["CHOSEN good", "REJECTED bad"],
    ),
    "desirable": ({"messages": [user("a"), answer("one"), user("b"), answer("two")], "label": True}, ["CHOSEN two"]),
    "undesirable": ({"prompt": "a", "completion": "bad", "label": False}, ["REJECTED bad"]),
    "rated messages": (
        {"prompt": [user("a"), answer("one"), user("b")], "completion": [answer("two")], "label": False},
        ["REJECTED two"],
    ),
}


def test_formats(write_jsonl: Callable[..., Path], tokenizer_path: Path, tokenizer: Tokenizer) -> None:
    records = build(write_jsonl([record for record, _ in FORMATS.values()]), tokenizer_path)
    assert len(records) == len(FORMATS)
    for number, (name, (_, expected)) in enumerate(FORMATS.items()):
        found = rated(records, tokenizer, number)
        assert [text.replace(" ⁇ ", "") for _, (text,) in found] == expected, name
    records.verify()
    roles, lengths = records.spans(list(FORMATS).index("turns that are shared"))
    assert roles.count(Role.ANSWER) == 2 and roles.count(Role.CHOSEN) == roles.count(Role.REJECTED) == 1
    assert records.meta.longest_segment_tokens == max(records.lengths()) >= sum(lengths)


REFUSED = {
    "equal": ({"chosen": [user("a"), answer("x")], "rejected": [user("a"), answer("x")]}, "are equal"),
    "equal texts": ({"prompt": "a", "chosen": "x ", "rejected": "x"}, "are equal"),
    "other prompts": ({"chosen": [user("a"), answer("x")], "rejected": [user("b"), answer("y")]}, "prompts differ"),
    "one missing": ({"chosen": [user("a"), answer("x")]}, '"rejected" is missing beside "chosen"'),
    "the other missing": ({"prompt": "a", "rejected": "x"}, '"chosen" is missing beside "rejected"'),
    "no prompt": ({"chosen": "x", "rejected": "y"}, 'string without a "prompt"'),
    "two shapes": ({"prompt": "a", "chosen": "x", "rejected": [answer("y")]}, "one is a string"),
    "a beginning": (
        {"chosen": [user("a"), answer("x")], "rejected": [user("a"), answer("x"), user("b"), answer("y")]},
        '"chosen" is the beginning of "rejected"',
    ),
    "no label": ({"messages": [user("a"), answer("x")]}, 'no "label" beside'),
    "a number": ({"messages": [user("a"), answer("x")], "label": 1}, "must be true or false, not 1"),
    "a plain text": ({"text": "a", "label": True}, "no answer to rate"),
    "a query": ({"query": "a", "pos": ["b"], "label": True}, 'stands beside "query"'),
    "another prompt": (
        {"prompt": "z", "chosen": [user("a"), answer("x")], "rejected": [user("a"), answer("y")]},
        'messages in which the "prompt" is not',
    ),
    "no answer": ({"chosen": [user("a")], "rejected": [user("a"), answer("y")]}, "no user turn with an answer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_records(name: str, write_jsonl: Callable[..., Path], tokenizer_path: Path) -> None:
    record, said = REFUSED[name]
    path = write_jsonl([FORMATS["texts"][0], record])
    with pytest.raises(DataError) as error:
        build(path, tokenizer_path)
    assert said in str(error.value) and f"{path}:2" in str(error.value)
    assert "\n" not in str(error.value)


def test_long_answers_are_cut_and_keep_a_label(
    write_jsonl: Callable[..., Path], tokenizer_path: Path, tokenizer: Tokenizer
) -> None:
    prompt = user("one two three")
    long = " ".join(["word"] * 100)
    turns = [prompt, answer(long), user("more"), answer("x")]
    path = write_jsonl(
        [
            {"prompt": [prompt], "chosen": [answer(long)], "rejected": [answer("short")]},
            # what is rated lies behind the limit, and the earlier answer must not be taken for it
            {"chosen": turns, "rejected": [*turns[:-1], answer("y")]},
        ]
    )
    records = build(path, tokenizer_path, limits=Limits(generative=60), over_long="terminate")
    assert len(records) == 1
    spans = records.get(0)
    (first, last), (start, stop) = split_conversations([role for role, _ in spans])
    assert sum(len(tokens) for _, tokens in spans[first:last]) == 60
    assert spans[last - 1][1][-1] == spans[stop - 1][1][-1] == tokenizer.eos_id
    assert sum(len(tokens) for _, tokens in spans[start:stop]) < 60
    assert "instruction_too_long" in path.with_suffix(".rejected.jsonl").read_text()


def test_answers_that_become_equal_are_dropped(
    write_jsonl: Callable[..., Path], tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = "word " * 60
    path = write_jsonl(
        [
            {"prompt": [user("a")], "chosen": [answer("fine")], "rejected": [answer("fine ")]},
            {"prompt": [user("a")], "chosen": [answer("fine")], "rejected": [answer("finer")]},
            {"prompt": [user("a")], "chosen": [answer(same + "A")], "rejected": [answer(same + "B")]},
            {"prompt": "a", "chosen": same + "A", "rejected": same},
            {"messages": [user("a"), answer("one"), user("b")], "label": True},
            {"messages": [user("a"), answer("one")], "label": True},
        ]
    )
    records = build(path, tokenizer_path, limits=Limits(generative=40))
    rejected = [json.loads(line) for line in path.with_suffix(".rejected.jsonl").read_text().splitlines()]
    assert len(records) == 3 and [line["reason"] for line in rejected] == ["equal_answers"] * 3
    assert [line["line"] for line in rejected] == [1, 3, 4]
    assert ["cut to 40 tokens" in line["message"] for line in rejected] == [False, True, True]
    report = json.loads(path.with_suffix(".report.json").read_text())
    assert (report["dropped"], report["num_unanswered"]) == ({"equal_answers": 3}, 1)
    with pytest.raises(DataError, match="the same tokens once they are read"):
        build(path, tokenizer_path, on_filtered="stop", overwrite=True)


def test_equal_pairs_are_found_and_held_out_ones(write_jsonl: Callable[..., Path], tokenizer_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "one two three four", "rejected": "bad"}
    other = {"prompt": "a", "chosen": "bad", "rejected": "one two  three four"}
    held = write_jsonl([{"text": "five six seven"}], "held.jsonl")
    contaminated = {"prompt": "a", "chosen": "x", "rejected": "so five six seven"}
    path = write_jsonl([pair, other, {**pair, "chosen": "one  two three four"}, contaminated])
    records = build(path, tokenizer_path, deduplicate=True, held_out=(held,), ngram=3)
    assert len(records) == 2, "the swapped pair says something else"
