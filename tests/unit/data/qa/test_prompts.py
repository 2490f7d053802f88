"""A question is asked with the same tokens in training and in generation, and only contexts are cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.qa.options import EncoderContexts, PromptOptions, load_prompts
from megatron_grit.data.qa.prompts import encode_example, encode_question, encoder_contexts
from megatron_grit.data.qa.records import QaRecord, read_records
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError
from tests.unit.data.json_tokenizers import chat_json

CONTEXTS = [f"The {word} of the parser reads every byte and counts two lines." for word in ("head", "tail", "middle")]
QUESTION = {"question": "What does the parser count?", "answers": ["two lines", "lines"], "ctxs": CONTEXTS}
DIALOGUE = {"question": ["hello", "good day", "what is it?"], "answer": "a parser", "ctxs": CONTEXTS}


def record_of(folder: Path, value: dict[str, Any]) -> QaRecord:
    (folder / "q.json").write_text(json.dumps([value]))
    return next(read_records(folder / "q.json"))


@pytest.mark.parametrize("form", [QUESTION, DIALOGUE], ids=["question", "dialogue"])
@pytest.mark.parametrize("template", load_prompts()["templates"])
@pytest.mark.parametrize("task", ["squad1.1", "boolq", "race", "eli5"])
def test_training_and_generation_ask_alike(
    task: str, template: str, form: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    record = record_of(tmp_path, form)
    options = PromptOptions(task=task, prompt_template=template, ft_neighbours=2)
    whole = encode_example(tokenizer, record, options, 2048)
    for spans in (whole, encode_example(tokenizer, record, options, sum(len(ids) for _, ids in whole) - 9)):
        *prompt, (role, answer) = spans
        asked = [token for _, ids in prompt for token in ids]
        assert role is Role.ANSWER and Role.ANSWER not in [role for role, _ in prompt]
        room = sum(len(ids) for _, ids in whole) - len(answer) - (0 if spans is whole else 9)
        assert encode_question(tokenizer, record, options, room) == asked and len(asked) <= room
        assert answer[-1] == tokenizer.eos_id and tokenizer.decode(answer).strip() == record.answers[0]
        text = tokenizer.decode(asked)
        assert record.question in text, "a question is never cut"
        assert (CONTEXTS[0] in text, CONTEXTS[1] in text) == (True, spans is whole) and CONTEXTS[2] not in text


def test_the_whole_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = record_of(tmp_path, QUESTION | {"ctxs": [{"title": "T", "text": "body"}]})
    asked = encode_question(tokenizer, record, PromptOptions(task="SQuAD2.0"), 2048)
    system = load_prompts()["system"]
    assert system.startswith("System: ")
    assert tokenizer.decode(asked) == (
        f"{system}\n\ntitle: T, source: body\n\nUser: What does the parser count? Answer the question with a short "
        "phrase.\n\nAssistant: The answer is"
    )
    bare = tokenizer.decode(encode_question(tokenizer, record, PromptOptions(ft_neighbours=0), 2048))
    assert bare == (
        f"{system}\n\nUser: What does the parser count? Give a full and complete answer to the question.\n\nAssistant:"
    )


def test_roles_are_those_of_what_is_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    spans = encode_example(tokenizer, record_of(tmp_path, QUESTION), PromptOptions(task="nq"), 2048)
    said = {role: "".join(tokenizer.decode(ids) for found, ids in spans if found is role) for role in Role}
    assert said[Role.SYSTEM] == load_prompts()["system"]
    assert said[Role.USER].split("\n\n")[0] == CONTEXTS[0] and said[Role.USER].endswith(QUESTION["question"])
    assert "User:" in said[Role.TEMPLATE] and "parser" not in said[Role.TEMPLATE]


def test_options_and_encoder_contexts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = record_of(tmp_path, QUESTION | {"multichoice_options": ["two lines", "one"]})
    asked = tokenizer.decode(encode_question(tokenizer, record, PromptOptions(task="nq"), 2048))
    assert "(A) two lines\n(B) one Answer the question with one of the options." in asked
    prompt = PromptOptions(ft_neighbours=1)
    assert encoder_contexts(record, prompt, EncoderContexts()) == CONTEXTS[1:3]
    assert encoder_contexts(record, prompt, EncoderContexts(encoder_neighbours=1)) == CONTEXTS[1:2]
    assert encoder_contexts(record, prompt, EncoderContexts(reuse_top=True)) == CONTEXTS[:2]
    assert encoder_contexts(record, prompt, EncoderContexts(encoder_neighbours=0)) == []


def test_what_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    unanswered = record_of(tmp_path, QUESTION | {"answers": [" "]})
    with pytest.raises(DataError, match=r"q.json: item 1: has no answer"):
        encode_example(tokenizer, unanswered, PromptOptions(), 2048)
    with pytest.raises(DataError, match=r"q.json: item 1: its question takes \d+ tokens, and there is room for 20"):
        encode_question(tokenizer, unanswered, PromptOptions(), 20)
    with pytest.raises(ConfigError, match="prompt_template 9 is none of prompts.yaml; it has retro, short, 1, 2"):
        PromptOptions(prompt_template="9")


def test_a_tokenizer_that_merges_prompt_and_answer(tmp_path: Path) -> None:
    """One whose pieces may hold a line break and what follows: an answer would begin in the prompt."""
    from megatron_grit.data.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(chat_json(tmp_path, ["is two is two is two"] * 9, vocab_size=300))
    spans = encode_example(tokenizer, record_of(tmp_path, QUESTION), PromptOptions(task="nq"), 2048)
    assert tokenizer.decode(spans[-1][1]) == " two lines", "words are kept apart"
