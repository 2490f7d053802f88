"""What is supervised on real data, character by character, against an oracle that knows no tokens.

The oracle writes each conversation down as stretches of text and says whose each is. The file's tokens are spelled out
from the vocabulary alone, without offsets and without decoding, and have to give the same stretches, for each value of
``loss.labels``. All 2,996 records of
Alpagasus Dolly, and conversations of three turns with system messages made of them, for every template, with a
SentencePiece and a byte-level tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.config.schema.loss import LossConfig
from megatron_grit.data.builders.grit_builder import Limits, build_grit
from megatron_grit.data.indexed.label_weights import LabelWeights
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from tests.unit.data.json_tokenizers import CHATML, chat_json

NUM_RECORDS = 2996
Stretches = list[tuple[str, str]]
"""Whose text it is (t: the template, s, u, a: system, user, assistant), and the text; neighbours differ."""
LABELS = {"it": "a", "im": "sua", "im_release": "suat", "lm": "suat"}
"""Whose text is supervised; im_release leaves out what stands before the first turn."""
Spans = list[tuple[bool, list[int]]]
"""Tokens, and whether they are supervised."""
Marked = list[tuple[bool, str]]
"""Text, and whether it is supervised; neighbours differ."""


@pytest.fixture(scope="module")
def dolly(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[tuple[str, str]]]]:
    """The records of the file and longer ones made of them: path and conversations."""
    lines = (shared_data / "alpagasus_3k_dolly.jsonl").read_text(encoding="utf-8").splitlines()
    single = [[(m["role"], m["content"]) for m in json.loads(line)["messages"]] for line in lines]
    assert len(single) == NUM_RECORDS
    several = [
        [
            ("system", f" Rule {number}. "),
            *single[number],
            *single[number + 1],
            ("system", "Go on"),
            *single[number + 2],
        ]
        for number in range(0, NUM_RECORDS - 2, 9)
    ]
    path = tmp_path_factory.mktemp("dolly") / "chats.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for conversation in [*single, *several]:
            messages = [{"role": role, "content": content} for role, content in conversation]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path, [*single, *several]


@pytest.fixture(scope="module")
def tokenizers(dolly: tuple[Path, list], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, alone = (tmp_path_factory.mktemp(name) for name in ("tokenizers", "model"))
    texts = [content for conversation in dolly[1][:NUM_RECORDS:4] for _, content in conversation]
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    return {
        "sentencepiece": train_sentencepiece(texts, alone / "small", 1000),
        "byte-level": chat_json(folder, texts, special_tokens=specials, vocab_size=3000, settings=settings),
    }


def oracle(name: str, conversation: list[tuple[str, str]], eos: str) -> Stretches:
    """What a template writes."""
    stretches: Stretches = [] if name in ("chatml", "tokenizer") else [("t", "<s>")]
    rules = ""
    for place, (role, content) in enumerate(conversation):
        begins = place == 0 or conversation[place - 1][0] == "assistant"
        whose = role[0]
        if name != "llama2" and place and begins:
            stretches.append(("t", "\n"))
        if role == "assistant":
            stretches += _answer(name, content, eos)
        elif name in ("chatml", "tokenizer"):
            stretches += [("t", f"<|im_start|>{role}\n"), (whose, content), ("t", "<|im_end|>\n")]
        elif name == "tulu":
            stretches += [("t", f"<|{role}|>\n"), (whose, content.strip()), ("t", "\n")]
        elif name == "zephyr":
            stretches += [("t", f"<|{role}|>\n"), (whose, content), ("t", f"{eos}\n")]
        elif role == "system":
            rules = content
        elif name == "gritlm":
            stretches += [("t", "<|user|>\n"), ("u", rules + "\n" * bool(rules) + content), ("t", "\n")]
            rules = ""
        else:
            block = [("t", "<<SYS>>\n"), ("s", rules), ("t", "\n<</SYS>>\n\n")] if rules else []
            stretches += [("t", "[INST] "), *block, ("u", content.strip()), ("t", " [/INST]")]
            rules = ""
    if name == "tokenizer":
        stretches.append(("t", "\n"))
    return merge(stretches)


def _answer(name: str, content: str, eos: str) -> Stretches:
    if name == "tokenizer":  # ChatML as its own template writes it: nothing is stripped
        return [("t", "<|im_start|>assistant\n"), ("a", content + "<|im_end|>")]
    content = content.strip()
    if name == "chatml":
        return [("t", "<|im_start|>assistant\n"), ("a", content + "<|im_end|>")]
    if name == "llama2":
        return [("a", f" {content} {eos}")]
    return [("t", "<|assistant|>\n"), ("a", content + eos)]


def mark(labels: str, stretches: Stretches) -> Marked:
    """Which of the stretches are supervised."""
    first = next(place for place, (whose, _) in enumerate(stretches) if whose != "t")
    return merge(
        [
            (whose in LABELS[labels] and not (labels == "im_release" and place < first), text)
            for place, (whose, text) in enumerate(stretches)
        ]
    )


def merge(stretches: list[tuple[Any, str]]) -> list[tuple[Any, str]]:
    groups = groupby(stretches, key=lambda stretch: stretch[0])
    merged = [(whose, "".join(text for _, text in group)) for whose, group in groups]
    return [(whose, text) for whose, text in merged if text]


def spell_sentencepiece(tokenizer: Tokenizer) -> Callable[[Spans], Marked]:
    """Bytes of each piece. The space that SentencePiece puts before every stretch of text is left out."""
    names = [tokenizer.id_to_token(index) for index in range(tokenizer.vocab_size)]
    spelled = [
        bytes([int(name[3:5], 16)]) if name.startswith("<0x") else name.replace("▁", " ").encode() for name in names
    ]
    special = {tokenizer.bos_id, tokenizer.eos_id}

    def spell(spans: Spans) -> Marked:
        stretches = []
        fresh = True
        for supervised, ids in spans:
            parts = []
            for index in ids:
                part = spelled[index]
                parts.append(part.removeprefix(b" ") if fresh and index not in special else part)
                fresh = index in special
            stretches.append((supervised, b"".join(parts).decode()))
        return merge(stretches)

    return spell


def spell_byte_level(tokenizer: Tokenizer) -> Callable[[Spans], Marked]:
    """Bytes of each token, with the alphabet taken from the tokens of single bytes: they come in order of the bytes."""
    from tokenizers import decoders

    names = [tokenizer.id_to_token(index) for index in range(tokenizer.vocab_size)]
    decoder = decoders.ByteLevel()
    special = set(tokenizer.special_tokens.values())

    def spell(spans: Spans) -> Marked:
        stretches = []
        for supervised, ids in spans:
            text = ""
            run: list[str] = []
            for index in ids:
                if index in special:
                    text += (decoder.decode(run) if run else "") + names[index]
                    run = []
                else:
                    run.append(names[index])
            stretches.append((supervised, text + (decoder.decode(run) if run else "")))
        return merge(stretches)

    return spell


SPELL = {"sentencepiece": spell_sentencepiece, "byte-level": spell_byte_level}
CASES = [(kind, name) for kind in SPELL for name in ("tulu", "gritlm", "zephyr", "llama2", "chatml")]


def read_spans(prefix: Path, labels: str = "it") -> list[Spans]:
    weights, records = LabelWeights.of(LossConfig(labels=labels)), IndexedRecords(prefix)  # type: ignore[arg-type]
    found = []
    for index in range(len(records)):
        roles, lengths = records.spans(index)
        ids = records.tokens(index, 0, sum(lengths))
        weights_T = weights.of_tokens(roles, lengths, True, ids)
        by_span = weights.spans(roles, starts_record=True)
        assert weights_T[0] == 0 and np.array_equal(weights_T[1:], np.repeat(by_span, lengths)[1:])
        assert weights.total(roles, lengths, True) == (np.count_nonzero(weights_T), weights_T.sum())
        parts = np.split(ids, np.cumsum(lengths)[:-1])
        found.append([(weight > 0, part.tolist()) for weight, part in zip(by_span, parts, strict=True)])
    return found


@pytest.mark.parametrize(("kind", "name"), [*CASES, ("byte-level", "tokenizer")])
def test_supervised_characters(
    dolly: tuple[Path, list], tokenizers: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    path, conversations = dolly
    report = build_grit([path], tmp_path / name, tokenizers[kind], Limits(generative=1 << 20), template=name)
    tokenizer = load_tokenizer(tokenizers[kind])
    spell = SPELL[kind](tokenizer)
    eos = tokenizer.id_to_token(tokenizer.eos_id)
    dropped = dict.fromkeys(rejected_lines(tmp_path / name))
    if name == "tokenizer":
        # This template keeps white space: where an answer begins with some, one token holds it and the template's.
        assert report.dropped.keys() <= {"merged_answer"}
        wanted = [any(r == "assistant" and c[0].isspace() for r, c in chat) for chat in conversations]
        assert {line - 1 for line in dropped} <= set(np.flatnonzero(wanted).tolist())
    else:
        assert report.dropped == {}
    kept = [chat for number, chat in enumerate(conversations, 1) if number not in dropped]
    assert report.truncated == {}
    written = [oracle(name, conversation, eos) for conversation in kept]
    for stretches in written:
        if stretches[-1][1] == "\n":  # what follows the last answer is not stored
            stretches.pop()
    for labels in LABELS:
        records = read_spans(tmp_path / name, labels)
        assert len(records) == len(kept)
        for spans, stretches in zip(records, written, strict=True):
            found, expected = spell(spans), mark(labels, stretches)
            if name == "llama2" and labels in ("im", "im_release"):
                found = _with_begun_words(found, expected)
            assert found == expected


def _with_begun_words(found: Marked, expected: Marked) -> Marked:
    """Llama 2 writes a space before a message. The token that begins with it, and holds the first word of the message
    or its beginning, is the template's."""
    moved = list(found)
    for place in range(1, min(len(found), len(expected))):
        before, after = expected[place - 1][1], moved[place - 1][1]
        begun = after.removeprefix(before)
        if expected[place][0] and begun != after and before[-1] == " " and begun.split() == [begun]:
            moved[place - 1 : place + 1] = [(False, before), (True, begun + moved[place][1])]
    return moved


def rejected_lines(prefix: Path) -> list[int]:
    path = Path(f"{prefix}.rejected.jsonl")
    return [json.loads(line)["line"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("kind", SPELL)
def test_the_oracle_sees_a_mask_that_is_one_token_off(
    dolly: tuple[Path, list], tokenizers: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """The control: each way to be wrong by one token, or by one character of the text, is seen in every record."""
    path, conversations = dolly
    short = tmp_path / "short.jsonl"
    short.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[-40:]), encoding="utf-8")
    build_grit([short], tmp_path / "tulu", tokenizers[kind], Limits(generative=1 << 20), template="tulu")
    tokenizer = load_tokenizer(tokenizers[kind])
    spell, eos = SPELL[kind](tokenizer), tokenizer.id_to_token(tokenizer.eos_id)
    for spans, conversation in zip(read_spans(tmp_path / "tulu"), conversations[-40:], strict=True):
        expected = mark("it", oracle("tulu", conversation, eos))
        assert spell(spans) == expected
        answer = [place for place, (supervised, _) in enumerate(spans) if supervised][1]
        for wrong in (_shifted(spans, answer, 1), _shifted(spans, answer, -1), _without_end(spans, answer)):
            assert spell(wrong) != expected
        shifted = [(role, content + "." * (role == "assistant")) for role, content in conversation]
        assert spell(spans) != mark("it", oracle("tulu", shifted, eos))


def _shifted(spans: Spans, place: int, by: int) -> Spans:
    """The mask of one answer begins one token earlier or later."""
    before, answer = spans[place - 1][1], spans[place][1]
    both, cut = before + answer, len(before) + by
    return [*spans[: place - 1], (False, both[:cut]), (True, both[cut:]), *spans[place + 1 :]]


def _without_end(spans: Spans, place: int) -> Spans:
    """The EOS of an answer that is not the last loses its label."""
    ids = spans[place][1]
    return [*spans[:place], (True, ids[:-1]), (False, ids[-1:]), *spans[place + 1 :]]
