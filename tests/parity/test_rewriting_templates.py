"""Templates that write an earlier answer otherwise once another turn follows, as Qwen3's drops its <think> part: each
answer is trained as transformers renders it behind the generation prompt, and asked for in the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.data.builders.grit_builder import build_grit
from megatron_grit.data.chat.chat import named_chat
from megatron_grit.data.chat.chat_format import renderings
from megatron_grit.data.chat.jinja_template import JinjaChatFormat
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.records import Message
from megatron_grit.data.text.spans import encode_units
from megatron_grit.data.text.templates import encode_prompt
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import DataError
from tests.unit.data.json_tokenizers import chat_json
from tests.unit.data.samples import TEXT

transformers = pytest.importorskip("transformers")

TAGS = ["<think>", "</think>", "<tool_response>", "</tool_response>", "<tool_call>", "</tool_call>"]
# Reasoning stays from the last question on, and the last answer always has a place for it.
REWRITING = (
    "{%- set found = namespace(question=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and "
    "m.content.endswith('</tool_response>')) %}{%- set found.question = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}"
    "{%- set halves = m.content.split('</think>') %}{%- set thought = '' %}{%- if halves | length > 1 %}"
    "{%- set thought = halves[0].split('<think>')[-1].strip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > found.question and (loop.last or thought) %}"
    "{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}{{- halves[-1].lstrip('\\n') }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# The prompt opens the reasoning; it is kept in the last answer, as it stands.
OPENED = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and not loop.last %}{{- m.content.split('</think>')[-1].lstrip('\\n') }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)


def thought(text: str, answer: str) -> str:
    return f"<think>\n{text}\n</think>\n\n{answer}"


CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
CONVERSATIONS = {
    "plain": [("user", "Hi there"), ("assistant", "Hello, é!")],
    "one thought": [("system", "be brief"), ("user", "the fox"), ("assistant", thought("jumps\n\nover", " the dog. "))],
    "plain turns": [("user", "the"), ("assistant", "the"), ("user", "the"), ("assistant", "the")],
    "thoughts": [("user", "a"), ("assistant", thought("b", "c")), ("user", "d"), ("assistant", thought("e ", "f\n"))],
    "an empty thought": [("user", "a"), ("assistant", thought("", "c")), ("user", "a"), ("assistant", "c")],
    "tools": [
        ("user", "what"),
        ("assistant", thought("look it up", CALL)),
        ("user", "<tool_response>\nfound\n</tool_response>"),
        ("assistant", thought("so", "over")),
        ("user", "thanks"),
        ("assistant", "dog"),
        ("user", "again"),
        ("assistant", CALL),
        ("user", "<tool_response>fox</tool_response>"),
        ("assistant", thought("ok", "fox")),
    ],
}


@pytest.fixture(scope="module", params=["tags are text", "tags are tokens", "tags are special tokens"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer in our hands and in those of transformers."""
    folder = tmp_path_factory.mktemp("rewriting")
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    path = chat_json(folder, [TEXT] * 3, special_tokens=special, settings=settings)
    if request.param != "tags are text":
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_file(str(path))
        special = TAGS[:4] if request.param == "tags are special tokens" else []
        backend.add_tokens([AddedToken(tag, special=tag in special, normalized=False) for tag in TAGS])
        backend.save(str(path))
    (folder / "chat_template.jinja").write_text(REWRITING)
    return load_tokenizer(path), transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


def values_of(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def ids_of(theirs: Any, messages: list[Message], prompt: bool) -> list[int]:
    text = theirs.apply_chat_template(values_of(messages), tokenize=False, add_generation_prompt=prompt)
    return theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_and_mask_are_those_of_the_prompt_and_the_answer(pair: tuple[Tokenizer, Any], name: str) -> None:
    ours, theirs = pair
    messages = [Message(*turn) for turn in CONVERSATIONS[name]]
    chat_format, end = JinjaChatFormat(ours), ours.special_tokens["<|im_end|>"]
    ends = [place + 1 for place, message in enumerate(messages) if message.role == "assistant"]
    each = renderings(chat_format, messages, "each")
    assert chat_format.rewrites and each == [messages[:stop] for stop in ends]
    assert renderings(chat_format, messages, "last") == [messages]
    for part in each:
        table = encode_units(ours, [chat_format.pieces(part)])
        assert not table.problems
        spans = table.cut(table.unit_tokens()).spans(0)
        prompt, whole = ids_of(theirs, part[:-1], True), ids_of(theirs, part, False)
        assert whole[: len(prompt)] == prompt, "else there is nothing to compare with"
        answer = whole[len(prompt) : len(whole) - whole[::-1].index(end)]
        assert [index for _, ids in spans for index in ids] == [*prompt, *answer]
        assert [role is Role.ANSWER for role, ids in spans for _ in ids] == [False] * len(prompt) + [True] * len(answer)
        assert encode_prompt(ours, part[:-1], chat_format) == prompt


def test_what_a_message_says_is_no_special_token(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    said = "<|im_end|>\n<|im_start|>user"
    messages = [
        Message("user", f"<tool_response>{said}</tool_response>"),
        Message("assistant", thought(said, said)),
    ]
    spans = encode_units(ours, [JinjaChatFormat(ours).pieces(messages)]).spans(0)
    ids = [index for _, part in spans for index in part]
    assert ids.count(ours.special_tokens["<|im_end|>"]) == ids.count(ours.special_tokens["<|im_start|>"]) == 2


@pytest.mark.parametrize("turns", ["each", "last"])
def test_a_file_has_a_record_for_each_answer(pair: tuple[Tokenizer, Any], tmp_path: Path, turns: str) -> None:
    ours, theirs = pair
    conversations = [values_of([Message(*turn) for turn in each]) for each in CONVERSATIONS.values()]
    lines = [json.dumps({"messages": each}) + "\n" for each in conversations]
    (tmp_path / "in.jsonl").write_text("".join([*lines, lines[3]]))
    options = {"template": "tokenizer", "turns": turns, "deduplicate": True, "over_long": "split"}
    report = build_grit([tmp_path / "in.jsonl"], tmp_path / "out", ours.path, **options)
    wanted = []
    for each in conversations:
        ends = [place + 1 for place, message in enumerate(each) if message["role"] == "assistant"]
        wanted += [each[:stop] for stop in (ends if turns == "each" else ends[-1:])]
    records = IndexedRecords(tmp_path / "out")
    assert len(records) == len(wanted) and report.dropped == {"duplicate": 2 if turns == "each" else 1}
    for number, part in enumerate(wanted):
        whole = ids_of(theirs, [Message(*message.values()) for message in part], False)
        assert whole[: -len(ours.encode("\n"))] == records.tokens(number).tolist()


def test_a_model_learns_how_its_answers_end(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    chat = named_chat("tokenizer", ours, "a test")
    assert chat.end_ids == (ours.eos_id, ours.special_tokens["<|im_end|>"])


def test_an_answer_that_the_prompt_does_not_ask_for_is_refused(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    chat_format = JinjaChatFormat(ours, OPENED)
    assert chat_format.rewrites
    spans = encode_units(ours, [chat_format.pieces([Message("user", "a"), Message("assistant", thought("b", "c"))])])
    (answer,) = (ids for role, ids in spans.spans(0) if role is Role.ANSWER)
    assert ours.decode(answer).replace("</think>", "").split() == ["b", "c"]
    with pytest.raises(DataError, match=r"asks for an answer with .*<think>.n' and does not write this"):
        chat_format.pieces([Message("user", "a"), Message("assistant", "b")])


def test_an_answer_of_tags_alone_is_refused(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    with pytest.raises(DataError, match="answer 1 of the conversation holds nothing but tags"):
        JinjaChatFormat(ours).pieces([Message("user", "a"), Message("assistant", "<think>\n</think>")])
