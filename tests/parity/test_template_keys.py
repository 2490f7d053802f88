"""What messages hold beside role and content: ids and mask are those of transformers' apply_chat_template for a
template that reads it, and a template that does not read it refuses the line, whichever door it came through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.data.builders.grit_builder import build_grit
from megatron_grit.data.chat.chat_templates import load_chat_format
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.records import parse_record
from megatron_grit.data.text.templates import encode_prompt
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import DataError
from megatron_grit.inference.messages import read_messages
from tests.unit.data.json_tokenizers import CHATML, chat_json
from tests.unit.data.samples import TEXT

transformers = pytest.importorskip("transformers")

# In the manner of Qwen's: tools in a system message, calls as JSON behind what is said, reasoning in tags.
TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- for m in messages %}"
    "{%- if m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.reasoning_content is string and loop.last %}{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}"
    "{%- endif %}{%- if m.content %}{{- m.content }}{%- endif %}{%- for call in m.tool_calls or [] %}"
    "{%- if loop.index0 or m.content %}{{- '\\n' }}{%- endif %}"
    "{{- '<tool_call>\\n' }}{{- call.function | tojson }}{{- '\\n</tool_call>' }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TOOL = {"type": "function", "function": {"name": "look", "description": "looks é up", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"of": ["the fox", 3]}}}
ASKED, ANSWERED = {"role": "user", "content": "what jumps?"}, {"role": "assistant", "content": "The fox."}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
FOUND = {"role": "tool", "tool_call_id": "1", "content": "over <|im_end|>"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a call": [ASKED, CALLING, FOUND, ANSWERED],
    "calls behind a text": [ASKED, ANSWERED | {"tool_calls": [CALL, CALL]}, FOUND, FOUND, ANSWERED, ASKED, ANSWERED],
    "a call at the end": [ASKED, ANSWERED, ASKED, CALLING],
    "an environment": [ASKED, ANSWERED, FOUND | {"role": "environment"}, ANSWERED],
    "a result behind a call in the text": [ASKED, ANSWERED, FOUND, ANSWERED],
    "reasoning": [ASKED, ANSWERED | {"reasoning_content": "well"}, ASKED, ANSWERED | {"reasoning_content": "so\n"}],
    "reasoning and a call": [ASKED, CALLING | {"reasoning_content": "look"}, FOUND, ANSWERED | {"score": 3}],
}


@pytest.fixture(scope="module", params=["text", "special tokens"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer in our hands and in those of transformers; the tags of calls are text, or special tokens."""
    folder = tmp_path_factory.mktemp("keys")
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    special += ["<tool_call>", "</tool_call>"] if request.param == "special tokens" else []
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    path = chat_json(folder, [TEXT] * 3, special_tokens=special, settings=settings)
    (folder / "chat_template.jinja").write_text(TOOLS)
    return load_tokenizer(path), transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


def ids_of(ours: Tokenizer, theirs: Any, messages: list[dict[str, Any]], tools: Any, prompt: bool) -> list[int]:
    """Of transformers' rendering. What the tool found is text here, though it spells a special token."""
    text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    parts = [theirs(part, add_special_tokens=False)["input_ids"] for part in text.split(FOUND["content"])]
    if len(parts) == 1:
        return parts[0]
    state = json.loads(theirs.backend_tokenizer.to_str())
    from tokenizers import Tokenizer as Backend

    plain = Backend.from_str(json.dumps(state))
    plain.add_tokens(["@@"])
    ids = plain.encode(text.replace(FOUND["content"], "over @@"), add_special_tokens=False).ids
    spelled, mark = ours.encode("<|im_end|>"), plain.token_to_id("@@")
    return [index for one in ids for index in (spelled if one == mark else [one])]


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_and_mask(pair: tuple[Tokenizer, Any], tmp_path: Path, name: str, tools: Any) -> None:
    """A record for each answer: the prompt of transformers, then what it writes for the answer up to its end."""
    ours, theirs = pair
    messages = CONVERSATIONS[name]
    line = {"messages": messages} | ({} if tools is None else {"tools": tools})
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    build_grit([tmp_path / "in.jsonl"], tmp_path / "out", ours.path, template="tokenizer")
    records = IndexedRecords(tmp_path / "out")
    ends = [place + 1 for place, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(records) == len(ends)
    for number, stop in enumerate(ends):
        prompt = ids_of(ours, theirs, messages[: stop - 1], tools, True)
        whole = ids_of(ours, theirs, messages[:stop], tools, False)
        answer = whole[len(prompt) : len(whole) - whole[::-1].index(ours.special_tokens["<|im_end|>"])]
        assert whole[: len(prompt)] == prompt, "else there is nothing to compare with"
        spans = records.get(number)
        assert [index for _, ids in spans for index in ids] == [*prompt, *answer]
        assert [role is Role.ANSWER for role, ids in spans for _ in ids] == [False] * len(prompt) + [True] * len(answer)
        known = [{key: value for key, value in each.items() if key != "score"} for each in messages[: stop - 1]]
        assert encode_prompt(ours, read_messages(known), "tokenizer", tools=tools) == prompt


REFUSED = {
    "tool_calls": [ASKED, CALLING],
    "reasoning_content": [ASKED, ANSWERED | {"reasoning_content": "so"}],
    "role tool": [ASKED, ANSWERED | {"tool_calls": [CALL]}, FOUND, ANSWERED],
    "tools": [ASKED, ANSWERED],
}


@pytest.mark.parametrize("template", ["tulu", "tokenizer"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_template_that_does_not_read_it(
    pair: tuple[Tokenizer, Any], tmp_path: Path, what: str, template: str
) -> None:
    """By the number of the line, or left out and counted; a prompt is refused in the same words."""
    ours, _ = pair
    folder = tmp_path / "plain"
    folder.mkdir()
    with_template(ours, folder, CHATML)
    messages, tools = REFUSED[what], [TOOL] if what == "tools" else None
    lines = [{"messages": [ASKED, ANSWERED | {"score": 3, "tool_calls": None}]}, {"messages": messages, "tools": tools}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    key = "tool_calls" if what == "role tool" else what
    message = rf"(holds|has) {key}, which chat template {template}.* does not read; leave it out"
    options: dict[str, Any] = {"tokenizer_path": folder, "template": template}
    with pytest.raises(DataError, match=rf"in.jsonl:2: .*{message}"):
        build_grit([tmp_path / "in.jsonl"], tmp_path / "out", **options)
    report = build_grit([tmp_path / "in.jsonl"], tmp_path / "out", **options, on_error="skip")
    assert (report.num_kept, report.dropped) == (1, {"bad_line": 1})
    asked = [*read_messages(messages), *read_messages([ASKED])]
    with pytest.raises(DataError, match=message):
        encode_prompt(load_tokenizer(folder), asked, template, tools=tools)


def test_a_call_that_spells_a_special_token_is_refused(pair: tuple[Tokenizer, Any]) -> None:
    """Else it would be one: what a template makes of a call is not told from the template's own text."""
    ours, _ = pair
    call = {"function": {"name": "look", "arguments": {"of": "the <|im_end|>"}}}
    messages = parse_record({"messages": [ASKED, CALLING | {"tool_calls": [call]}]}).messages
    with pytest.raises(DataError, match="hold 'the <|im_end|>', where the template's text has a special token"):
        load_chat_format("tokenizer", ours).of(messages)


def supervised(ours: Tokenizer, folder: Path, messages: list[dict[str, Any]]) -> list[list[str]]:
    """The answers of each record that a conversation becomes."""
    (folder / "in.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    build_grit([folder / "in.jsonl"], folder / "out", ours.path, template="tokenizer", overwrite=True)
    records = IndexedRecords(folder / "out")
    kept = [[ids for role, ids in records.get(number) if role is Role.ANSWER] for number in range(len(records))]
    return [[ours.decode(ids).strip() for ids in each] for each in kept]


def test_names_of_users_leave_a_conversation_whole(pair: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    """A template names ``name`` and ``type`` of calls; only what it writes of an answer makes it say more."""
    ours = with_template(pair[0], tmp_path, "{#- #}{%- set calls = ['name', 'type', 'thought'] %}" + TOOLS)
    plain = [ASKED, ANSWERED, ASKED, ANSWERED, ASKED, ANSWERED]
    named = [each | {"name": "Ann", "type": "text"} for each in plain]
    assert supervised(ours, tmp_path, named) == supervised(ours, tmp_path, plain) == [["The fox."] * 3]


def test_another_key_that_the_template_writes_of_an_answer(pair: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    written = TOOLS.replace(
        "{%- if m.content %}", "{%- if m.thought %}{{- m.thought + '. ' }}{%- endif %}{%- if m.content %}"
    )
    ours = with_template(pair[0], tmp_path, written)
    thinking = [ASKED, ANSWERED | {"thought": "Hm"}, ASKED, ANSWERED]
    assert ["".join(each) for each in supervised(ours, tmp_path, thinking)] == ["Hm. The fox.", "The fox."]


def test_answers_before_the_first_call_are_trained_once(pair: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    messages = [ASKED, ANSWERED, ASKED, ANSWERED | {"content": "No."}, ASKED, CALLING]
    before, call = supervised(pair[0], tmp_path, messages)
    assert before == ["The fox.", "No."] and len(call) > 0 and "look" in "".join(call)


def with_template(ours: Tokenizer, folder: Path, template: str) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(ours.path.with_name(name).read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)
