from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_grit.data.text import word_cache
from megatron_grit.data.text.tokenizer import JsonTokenizer, load_tokenizer
from megatron_grit.data.text.word_cache import SEPARATOR, cuts_at_spaces
from tests.unit.data.samples import sentence

GPT2, LLAMA3, QWEN = "GPT-2", "Llama 3", "Qwen"
# Letters, digits, marks and everything that some library calls white space; the tokenizers know only some of them.
CHARACTERS = (
    "abcéçß中и\u0301'’sS.,:;!?-_()\"/<|>019٣²\n\r\t \u00a0\u1680\u180e\u2003\u2028\u200b\u202f\u3000"
    "\x0b\x0c\x1c\x1f\x85\ufeff😀\0"
)
WHITE_SPACE = "\t\n\x0b\x0c\r\x1c\x1f\x85 \u00a0\u1680\u180e\u2003\u200b\u2028\u2029\u202f\u205f\u3000"
TEXTS = st.text(st.one_of(st.sampled_from(CHARACTERS + "   \n"), st.characters(codec="utf-8")), max_size=60)
WORDS = st.lists(
    st.sampled_from(["the", "  it's", "don't", "\n\n", " ", "12345", "a.b", "x\n", "\n ", "<|end|>", "<tool>"])
)


def pattern_of(name: str) -> str:
    digits = r"\p{N}{1,3}" if name == LLAMA3 else r"\p{N}"
    return word_cache._CONTRACTIONS + digits + word_cache._REST


@pytest.fixture(scope="module")
def tokenizers_by_name(tmp_path_factory: pytest.TempPathFactory) -> dict[str, JsonTokenizer]:
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name in (GPT2, LLAMA3, QWEN):
        tokenizer = Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == GPT2)
        tokenizer.pre_tokenizer = byte_level
        if name != GPT2:
            split = pre_tokenizers.Split(Regex(pattern_of(name)), behavior="isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        if name == QWEN:
            tokenizer.normalizer = normalizers.NFC()
        trainer = trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = [sentence(number, 12) + "\n\n  it's 2024.  \n" for number in range(200)]
        texts += [f"a{space}{spaces}b" for space in WHITE_SPACE for spaces in (" ", "  ", "   ")] * 99
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.add_tokens([AddedToken("<tool>", special=False)])
        path = folder / name / "tokenizer.json"
        path.parent.mkdir()
        tokenizer.save(str(path))
        (path.parent / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|end|>", "eos_token": "<|end|>"}))
        found[name] = load_tokenizer(path)
    return found


@pytest.mark.parametrize("name", [GPT2, LLAMA3, QWEN])
@given(texts=st.lists(st.one_of(TEXTS, WORDS.map(" ".join), WORDS.map("".join)), max_size=6))
@example(texts=[])
@example(texts=["", " ", "a", " a", "a ", "a  b", "a \n b"])
def test_ids_are_those_of_the_tokenizer(tokenizers_by_name, name, texts):
    tokenizer = tokenizers_by_name[name]
    assert tokenizer._words is not None
    ids, lengths = tokenizer.encode_batch_arrays(texts)
    expected = [tokenizer.encode(text) for text in texts]
    assert ids.tolist() == [index for found in expected for index in found]
    assert lengths.tolist() == [len(found) for found in expected]
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)


@pytest.mark.parametrize("name", [GPT2, LLAMA3, QWEN])
@pytest.mark.parametrize("space", WHITE_SPACE, ids=ascii)
def test_runs_of_white_space_stay_together(tokenizers_by_name, name, space):
    tokenizer = tokenizers_by_name[name]
    texts = [f"a{before}{space}{after}b" for before in ("", " ", "  ") for after in ("", " ", "  ", "   ")]
    texts += [text.removesuffix("b") for text in texts]
    ids, _ = tokenizer.encode_batch_arrays(texts)
    assert ids.tolist() == [index for text in texts for index in tokenizer.encode(text)]


def test_text_that_holds_the_separator(tokenizers_by_name):
    texts = ["one two", f"one {SEPARATOR} two", f"{SEPARATOR}", f"x {SEPARATOR}{SEPARATOR}y z"]
    for tokenizer in tokenizers_by_name.values():
        ids, _ = tokenizer.encode_batch_arrays(texts)
        assert ids.tolist() == [index for text in texts for index in tokenizer.encode(text)]
        assert ids.max() < tokenizer.vocab_size


def test_a_full_cache_begins_anew_and_long_words_are_not_kept(tokenizers_by_name, monkeypatch):
    tokenizer = tokenizers_by_name[GPT2]
    words = copy.copy(tokenizer._words)
    assert words is not None
    monkeypatch.setattr(words, "_capacity", 5)
    monkeypatch.setattr(words, "_known", {})
    for number in range(20):
        text = f"a word{number} and {'x' * 65} " + "y" * 64
        ids, _ = words.encode([text, text])
        assert ids.tolist() == 2 * tokenizer.encode(text)
        assert len(words._known) <= 5 + 3
        assert "y" * 64 in words._known and "x" * 65 not in words._known


def test_cutting_at_the_wrong_spaces_would_be_noticed(tokenizers_by_name, monkeypatch):
    text = "three   spaces and a\n   line"
    tokenizer = tokenizers_by_name[GPT2]
    assert tokenizer.encode_batch_arrays([text])[0].tolist() == tokenizer.encode(text)
    monkeypatch.setattr(word_cache, "cut", lambda text: text.split(" "))
    assert tokenizer.encode_batch_arrays([text])[0].tolist() != tokenizer.encode(text)
    assert load_tokenizer(tokenizer.path)._words is None, "the tokenizer finds out by itself"


def changed(description: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    description = copy.deepcopy(description)
    *keys, last = path.split("/")
    place: Any = description
    for key in keys:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    return description


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model/type", "Unigram"),
        ("model/dropout", 0.1),
        ("normalizer", {"type": "NFKC"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer", {"type": "Metaspace"}),
        ("pre_tokenizer/pretokenizers/0/pattern", {"Regex": r"\s+|\S+"}),
        ("pre_tokenizer/pretokenizers/0/pattern", {"String": " "}),
        ("pre_tokenizer/pretokenizers/0/behavior", "MergedWithNext"),
        ("pre_tokenizer/pretokenizers/0/invert", True),
        ("pre_tokenizer/pretokenizers/1/add_prefix_space", True),
        ("pre_tokenizer/pretokenizers/1/use_regex", True),
        ("added_tokens/1/content", "two words"),
        ("added_tokens/1/lstrip", True),
        ("added_tokens/1/single_word", True),
    ],
)
def test_other_tokenizers_are_left_alone(tokenizers_by_name, path, value):
    description = json.loads(tokenizers_by_name[LLAMA3].path.read_bytes())
    assert cuts_at_spaces(description)
    assert not cuts_at_spaces(changed(description, path, value))


def test_a_tokenizer_without_cache_gives_the_same_arrays(tokenizer, tmp_path: Path):
    texts = ["a text", "", " two  texts"]
    ids, lengths = tokenizer.encode_batch_arrays(texts)
    assert ids.tolist() == [index for text in texts for index in tokenizer.encode(text)]
    assert lengths.tolist() == [len(tokenizer.encode(text)) for text in texts]


def test_text_without_repetition_goes_past_the_cache(tokenizers_by_name, monkeypatch):
    """For a while; ids stay the same, and text that repeats finds the cache again."""
    monkeypatch.setattr(word_cache, "_WARM_CHARS", 100)
    tokenizer = load_tokenizer(tokenizers_by_name[GPT2].path)
    words = tokenizer._words
    calls: list[int] = []
    monkeypatch.setattr(words, "encode", lambda texts, encode=words.encode: (calls.append(1), encode(texts))[1])
    num_calls = 0
    for number in range(40):
        texts = [f"a{number}b{place} c{number}d{place}" for place in range(20)]
        ids, lengths = tokenizer.encode_batch_arrays(texts)
        assert np.split(ids, np.cumsum(lengths)[:-1])[3].tolist() == tokenizer.encode(texts[3])
        num_calls += 1
    assert 2 <= len(calls) <= num_calls // 8
    calls.clear()
    for _ in range(40):
        tokenizer.encode_batch_arrays([sentence(number, 12) for number in range(20)])
    assert len(calls) > 20
