"""ShareGPT's turns, conversational completions, roles of results: the same record as in messages, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.data.builders.grit_builder import build_grit
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.records import Record, parse_record
from megatron_grit.data.text.templates import encode_prompt
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import DataError
from tests.unit.data.json_tokenizers import CHATML, chat_json
from tests.unit.data.samples import TEXT

TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALL = {"name": "look", "arguments": {"of": "fox"}}


def turn(who: str, value: object, **more: object) -> dict[str, Any]:
    return {"from": who, "value": value, **more}


def message(role: str, content: object, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TURNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "human and gpt": (
        {"id": "a_1", "conversations": [turn("human", "u"), turn("gpt", "a"), turn("user", "v"), turn("chatgpt", "b")]},
        {
            "messages": [
                message("user", "u"),
                message("assistant", "a"),
                message("user", "v"),
                message("assistant", "b"),
            ]
        },
    ),
    "a system message beside them": (
        {"conversations": [turn("human", "u"), turn("assistant", "a")], "system": "s"},
        {"messages": [message("system", "s"), message("user", "u"), message("assistant", "a")]},
    ),
    "an unanswered turn at the end": (
        {"conversations": [turn("system", "s"), turn("human", "u"), turn("gpt", "a"), turn("human", "v")]},
        {"messages": [message("system", "s"), message("user", "u"), message("assistant", "a")]},
    ),
    "reasoning": (
        {"conversations": [turn("human", "u"), turn("gpt", "a", reasoning_content="r")]},
        {"messages": [message("user", "u"), message("assistant", "a", reasoning_content="r")]},
    ),
    "roles under the other key": (
        {"conversations": [message("user", "u"), message("assistant", "a", thinking="t")]},
        {"messages": [message("user", "u"), message("assistant", "a", thinking="t")]},
    ),
    "calls and tools as JSON": (
        {
            "conversations": [
                turn("human", "u"),
                turn("function_call", json.dumps(CALL)),
                turn("observation", "over"),
                turn("gpt", "a"),
            ],
            "tools": json.dumps([TOOL]),
        },
        {
            "messages": [
                message("user", "u"),
                message("assistant", None, tool_calls=[{"type": "function", "function": CALL}]),
                message("tool", "over"),
                message("assistant", "a"),
            ],
            "tools": [TOOL],
        },
    ),
    "a call in the text": (
        {"conversations": [turn("human", "u"), turn("gpt", "look"), turn("tool", "over"), turn("gpt", "a")]},
        {
            "messages": [
                message("user", "u"),
                message("assistant", "look"),
                message("tool", "over"),
                message("assistant", "a"),
            ]
        },
    ),
    "a prompt and completion of messages": (
        {"prompt": [message("system", "s"), message("user", "u")], "completion": [message("assistant", "a")]},
        {"messages": [message("system", "s"), message("user", "u"), message("assistant", "a")]},
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_another_shape_is_the_same_record(name: str) -> None:
    shape, messages = TURNS[name]
    found, expected = parse_record(shape), parse_record(messages)
    assert found == expected
    assert isinstance(found, Record) and found.messages[-1].role == "assistant"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"conversations": []}, '"conversations" must be a list of {"from"'),
    ({"conversations": ["u", "a"]}, '"conversations" must be a list of {"from"'),
    (
        {"conversations": [turn("human", "u"), turn("bing", "a")]},
        "turn 1 is from 'bing'; it must be from one of system",
    ),
    ({"conversations": [{"value": "u"}]}, "turn 0 is from None"),
    ({"conversations": [turn("gpt", "a"), turn("human", "u")]}, "message 0 is of role assistant where user was"),
    ({"conversations": [turn("human", "u"), turn("human", "v"), turn("gpt", "a")]}, "message 1 is of role user where"),
    ({"conversations": [turn("human", "u"), turn("gpt", None)]}, "content of message 1 must be a string, not None"),
    ({"conversations": [turn("human", "u")]}, "no user turn with an answer"),
    ({"conversations": [turn("system", "s"), turn("human", "u"), turn("gpt", "a")], "system": "t"}, "leave one"),
    ({"conversations": [turn("human", "u"), turn("gpt", "a")], "system": 3}, '"system" must be a string, not 3'),
    (
        {"conversations": [turn("human", "u"), turn("function_call", "look(fox)")]},
        "the function_call of turn 1 must be",
    ),
    ({"conversations": [turn("human", "u"), turn("gpt", "a")], "tools": "[{"}, '"tools" is a string that is no JSON'),
    ({"conversations": [turn("human", "u"), turn("tool", "t"), turn("gpt", "a")]}, "message 1 is of role tool where"),
    ({"conversations": [turn("human", "u"), turn("gpt", "a", weight=0)]}, "message 1 has the weight 0"),
    ({"messages": [message("user", "u"), message("assistant", "a", weight=0)]}, "message 1 has the weight 0"),
    ({"messages": [message("environment", "e")]}, "message 0 is of role environment where user was expected"),
    (
        {
            "messages": [
                message("user", "u"),
                message("assistant", None, tool_calls=[CALL]),
                message("assistant", "a"),
            ]
        },
        "message 2 is of role assistant where tool was expected",
    ),
    (
        {
            "prompt": [message("user", "u"), message("assistant", "a"), message("user", "v")],
            "completion": [message("assistant", "b")],
        },
        '"prompt" holds an answer',
    ),
    ({"prompt": [message("user", "u")], "completion": "a"}, '"prompt" and "completion" must be strings'),
]


@pytest.mark.parametrize(("value", "expected"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_has_no_place_is_named(value: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_record(value)
    assert expected.replace("None", "null") in str(caught.value).replace("None", "null")


def test_an_environment_is_rendered_and_never_trained(tmp_path: Path) -> None:
    """By the template under its own role; each answer is trained, once, behind all that came before it."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = load_tokenizer(chat_json(tmp_path / "t", [TEXT] * 3, special_tokens=special))
    (tmp_path / "t" / "chat_template.jinja").write_text(CHATML)
    messages = [message("user", "u"), message("assistant", "look"), message("environment", "over")]
    line = {"messages": [*messages, message("assistant", "a fox")]}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    build_grit([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer.path, template="tokenizer")
    records = IndexedRecords(tmp_path / "out")
    spans = [span for number in range(len(records)) for span in records.get(number)]
    trained = [tokenizer.decode(ids) for role, ids in spans if role is Role.ANSWER]
    assert [text.replace("<|im_end|>", "") for text in trained] == ["look", "a fox"]
    whole = tokenizer.decode([index for _, ids in records.get(len(records) - 1) for index in ids])
    assert "environment\nover" in whole and whole.index("look") < whole.index("over") < whole.index("a fox")
    assert any(role is Role.USER and ids.tolist() == tokenizer.encode("over") for role, ids in spans)
    prompt = encode_prompt(tokenizer, parse_record(line).messages[:-1], "tokenizer")
    *before, (role, _) = records.get(len(records) - 1)
    assert role is Role.ANSWER and [index for _, ids in before for index in ids] == prompt

    with pytest.raises(DataError, match="in.jsonl:1: message 2 is of role environment, which chat template tulu does"):
        build_grit([tmp_path / "in.jsonl"], tmp_path / "other", tokenizer.path, template="tulu")
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write(json.dumps({"messages": line["messages"][:2]}) + "\n")
    report = build_grit([tmp_path / "in.jsonl"], tmp_path / "none", tokenizer.path, template="tulu", on_error="skip")
    assert (report.num_kept, report.dropped) == (1, {"bad_line": 1})
