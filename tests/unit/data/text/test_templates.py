"""Templates: golden ids of GritLM's own tokenizer, and masks that cover what they must.

The golden ids are those of the Mistral 7B v0.1 vocabulary for the whole prompt tokenised at once. They were compared
with a byte-pair tokenizer of the tokenizers library built from the same pieces, with that model's normaliser.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.indexed.roles import Role, RowKind, check_grammar
from megatron_grit.data.text.records import parse_record
from megatron_grit.data.text.templates import (
    embedding_prefix,
    encode_chat,
    encode_embedding,
    encode_prompt,
    render,
)
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import DataError
from tests.unit.data.samples import byte_level_json

# fmt: off
INSTRUCTION = [1, 523, 28766, 1838, 28766, 28767, 13, 8637, 12891, 272, 4372, 13, 28789, 28766, 18320, 28766, 28767, 13]
INSTRUCTED_TEXT = [28760, 4538, 349, 28705, 16129, 7819, 282, 28723]
NO_INSTRUCTION = [1, 523, 28766, 18320, 28766, 28767, 13]
BARE_TEXT = [28741, 6029, 7242, 28747, 1879, 28920, 333, 28705, 233, 191, 165, 28705, 29340]
FIRST_TURN = [1, 523, 28766, 1838, 28766, 28767, 13, 23809, 13, 28789, 28766, 489, 11143, 28766, 28767, 13]
FIRST_ANSWER = [16230, 28808, 2]
SECOND_TURN = [28705, 13, 28789, 28766, 1838, 28766, 28767, 13, 13849, 13, 8063, 28804, 13,
               28789, 28766, 489, 11143, 28766, 28767, 13]
SECOND_ANSWER = [28740, 28723, 5592, 13, 28750, 28723, 708, 2]
THIRD_TURN = [28705, 13, 28789, 28766, 1838, 28766, 28767, 13, 2463, 28706, 28705, 13,
              28789, 28766, 489, 11143, 28766, 28767, 13]
THIRD_ANSWER = [7992, 368, 28723, 2]
# fmt: on
TURNS = ["Hi", "Hello!", "Two\nlines?", "1. Yes\n2. no", " Bye ", "See you. "]

WORD = st.text(alphabet=st.sampled_from("abcdefgh éñ漢🙂<|>/.:\n\t"), min_size=1, max_size=12)
ANSWER = WORD.filter(lambda text: bool(text.strip()))


def test_golden_embedding_with_instruction(mistral: Tokenizer) -> None:
    for instruction in ("Retrieve the answer", " \tRetrieve the answer: \n"):
        assert encode_embedding(mistral, "BERT is  bidirectional.", instruction) == (INSTRUCTION, INSTRUCTED_TEXT)


def test_golden_embedding_without_instruction(mistral: Tokenizer) -> None:
    for instruction in ("", " :\n"):
        assert encode_embedding(mistral, "A tokeniser: naïve 漢 🙂", instruction) == (NO_INSTRUCTION, BARE_TEXT)


def test_golden_plain_text(mistral: Tokenizer) -> None:
    ids = [330, 6029, 7242]
    assert encode_embedding(mistral, "A tokeniser", None) == ([], ids)


def test_golden_one_turn(mistral: Tokenizer) -> None:
    assert encode_chat(mistral, TURNS[:2]) == [
        (Role.TEMPLATE, FIRST_TURN[:7]),
        (Role.USER, FIRST_TURN[7:8]),
        (Role.TEMPLATE, FIRST_TURN[8:]),
        (Role.ANSWER, FIRST_ANSWER),
    ]


def test_golden_three_turns(mistral: Tokenizer) -> None:
    assert encode_chat(mistral, TURNS) == [
        (Role.TEMPLATE, FIRST_TURN[:7]),
        (Role.USER, FIRST_TURN[7:8]),
        (Role.TEMPLATE, FIRST_TURN[8:]),
        (Role.ANSWER, FIRST_ANSWER),
        (Role.TEMPLATE, SECOND_TURN[:8]),
        (Role.USER, SECOND_TURN[8:12]),
        (Role.TEMPLATE, SECOND_TURN[12:]),
        (Role.ANSWER, SECOND_ANSWER),
        (Role.TEMPLATE, THIRD_TURN[:8]),
        (Role.USER, THIRD_TURN[8:11]),
        (Role.TEMPLATE, THIRD_TURN[11:]),
        (Role.ANSWER, THIRD_ANSWER),
    ]


def test_golden_prompt(mistral: Tokenizer) -> None:
    assert encode_prompt(mistral, TURNS[:1], "gritlm") == FIRST_TURN
    assert encode_prompt(mistral, TURNS[:3], "gritlm") == FIRST_TURN + FIRST_ANSWER + SECOND_TURN
    with pytest.raises(DataError, match="last turn has to be the user's"):
        encode_prompt(mistral, TURNS[:2], "gritlm")


@given(turns=st.lists(st.tuples(WORD, ANSWER), min_size=1, max_size=5))
def test_supervised_tokens_are_the_answers_and_their_eos(
    tokenizer: Tokenizer, mistral: Tokenizer, turns: list[tuple[str, str]]
) -> None:
    for candidate in (tokenizer, mistral):
        spans = encode_chat(candidate, [text for turn in turns for text in turn])
        check_grammar([role for role, _ in spans], RowKind.GENERATIVE, "chat")
        answers = [ids for role, ids in spans if role is Role.ANSWER]
        assert [ids[-1] for ids in answers] == [candidate.eos_id] * len(turns)
        for ids, (_, answer) in zip(answers, turns, strict=True):
            # A first piece that follows the template's newline has no space of its own to lose in decoding.
            assert candidate.decode([*candidate.encode("\n"), *ids[:-1]]).lstrip(" ") == "\n" + answer.strip()
        ids = [index for _, span in spans for index in span]
        assert ids.count(candidate.bos_id) == 1
        assert ids.count(candidate.eos_id) == len(turns)


@given(instruction=WORD, text=WORD)
def test_split_keeps_the_ids_of_the_whole(tokenizer: Tokenizer, instruction: str, text: str) -> None:
    prefix = embedding_prefix(instruction)
    head, tail = encode_embedding(tokenizer, text, instruction)
    assert [*head, *tail] == [tokenizer.bos_id, *tokenizer.encode(prefix + text)]
    assert tokenizer.decode(head) == prefix


@given(max_length=st.integers(1, 90))
def test_truncation_keeps_the_beginning(mistral: Tokenizer, max_length: int) -> None:
    full = [index for _, ids in encode_chat(mistral, TURNS) for index in ids]
    spans = encode_chat(mistral, TURNS, max_length)
    kept = [index for _, ids in spans for index in ids]
    assert kept == full[: len(kept)]
    assert len(kept) <= max_length
    if spans:
        check_grammar([role for role, _ in spans], RowKind.GENERATIVE, "chat")
    dropped = encode_chat(mistral, TURNS)[len(spans) :]
    assert len(kept) == min(max_length, len(full)) or dropped[0][0] is not Role.ANSWER
    head, tail = encode_embedding(mistral, "BERT is  bidirectional.", "Retrieve the answer", max_length)
    assert [*head, *tail] == (INSTRUCTION + INSTRUCTED_TEXT)[:max_length]


def test_token_across_the_boundary_goes_to_where_it_begins(tmp_path: Path) -> None:
    merging = load_tokenizer(byte_level_json(tmp_path))
    assert len(merging.encode(">\nYes")) == 1
    head, tail = encode_embedding(merging, "Yes sir", "a")
    assert merging.decode(head) == "<|user|>\na\n<|embed|>\nYes"
    assert merging.decode(tail) == " sir"


def test_answer_that_loses_its_beginning_is_refused(tmp_path: Path) -> None:
    merging = load_tokenizer(byte_level_json(tmp_path))
    with pytest.raises(DataError, match="merges the template's end with the start of the answer 'Yes sir'"):
        encode_chat(merging, ["Is it?", "Yes sir"])
    roles = [role for role, _ in encode_chat(merging, ["Is it?", "No sir"])]
    assert roles == [Role.TEMPLATE, Role.USER, Role.TEMPLATE, Role.ANSWER]


def test_render_is_what_the_model_sees() -> None:
    pair = parse_record({"query": ["find: ", "q"], "pos": ["p"], "neg": [["", "n"]]})
    assert render(pair) == ["<|user|>\nfind\n<|embed|>\nq", "p", "<|embed|>\nn"]
    chat = parse_record({"text": ["u", " a ", "v", "b"]})
    assert render(chat) == ["<|user|>\nu\n<|assistant|>\na", "<|user|>\nv\n<|assistant|>\nb"]
    assert render(parse_record({"text": "t"})) == ["t"]
