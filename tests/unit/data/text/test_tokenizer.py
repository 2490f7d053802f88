"""Tokenizers: files, special tokens, offsets, training."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_grit.errors import ConfigError, DataError
from tests.unit.data.samples import byte_level_json

TEXT = "Hé 漢🙂 x</s><s>\n\n  two  spaces "


def test_sentencepiece_file_and_folder(tokenizer_path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copy(tokenizer_path, tmp_path / "tokenizer.model")
    again = load_tokenizer(tmp_path)
    assert again.path == tmp_path / "tokenizer.model"
    assert again.fingerprint == tokenizer.fingerprint == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 400)
    assert tokenizer.pad_id == tokenizer.eos_id


@pytest.mark.parametrize("text", ["", " ", "\n", "a\n\n  b\n", TEXT, "tab\there", "zero\u200bwidth"])
def test_trained_tokenizer_gives_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_not_read_from_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for candidate in (tokenizer, load_tokenizer(byte_level_json(tmp_path))):
        ids = candidate.encode("<s>a</s>")
        assert candidate.bos_id not in ids
        assert candidate.eos_id not in ids
        assert candidate.decode(ids) == "<s>a</s>"
        assert candidate.encode_batch([TEXT, "", "b"]) == [candidate.encode(text) for text in (TEXT, "", "b")]


def test_newline_is_always_its_own_token(tmp_path: Path) -> None:
    """Also where every newline of the training text has the same neighbours, so that a merge would pay."""
    tokenizer = load_tokenizer(train_sentencepiece(["answer:\nyes\n\nthen"] * 100, tmp_path / "merging", 285))
    pieces = [tokenizer.id_to_token(index) for index in tokenizer.encode("answer:\nyes\n\nthen")]
    assert [piece for piece in pieces if "\n" in piece or piece == "<0x0A>"] == ["\n"] * 3
    assert len(pieces) < 12  # the words have merged


@given(text=st.text(alphabet=st.sampled_from("ab \n<|>é漢🙂"), max_size=30))
def test_offsets_cover_the_text_in_order(tokenizer: Tokenizer, text: str) -> None:
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert len(ids) == len(offsets)
    covered = [index for begin, end in offsets for index in range(begin, end)]
    assert covered == list(range(len(text)))


def test_json_offsets_are_characters(tmp_path: Path) -> None:
    candidate = load_tokenizer(byte_level_json(tmp_path))
    ids, offsets = candidate.encode_with_offsets("é>\nYes")
    assert ids == candidate.encode("é>\nYes")
    assert offsets[-1][1] == 6


def test_training_is_deterministic(tmp_path: Path) -> None:
    texts = ["some words to learn", "words in lines\nof text"] * 20
    first = train_sentencepiece(texts, tmp_path / "a", 300).read_bytes()
    assert train_sentencepiece(iter(texts), tmp_path / "b", 300).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model"]


def test_training_errors_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size must be at least 270"):
        train_sentencepiece(["text"], tmp_path / "a", 200)
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["", " "], tmp_path / "a", 300)
    with pytest.raises(DataError, match="could not train 9000 pieces"):
        train_sentencepiece(["too little text"], tmp_path / "a", 9000)
    assert not list(tmp_path.iterdir())


def test_json_special_tokens_from_its_config(tmp_path: Path) -> None:
    path = byte_level_json(tmp_path, config={"bos_token": {"content": "</s>"}, "eos_token": "<s>", "pad_token": "</s>"})
    candidate = load_tokenizer(path)
    assert (candidate.bos_id, candidate.eos_id, candidate.pad_id) == (1, 0, 1)
    plain = load_tokenizer(byte_level_json(tmp_path / "plain"))
    assert (plain.bos_id, plain.eos_id, plain.pad_id) == (0, 1, 1)


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent.model: no such tokenizer"):
        load_tokenizer(tmp_path / "absent.model")
    with pytest.raises(DataError, match=r"no tokenizer.model or tokenizer.json in this folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"bad.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no bos_token"):
        load_tokenizer(byte_level_json(tmp_path / "other", config={"bos_token": "<absent>"}))


def test_special_tokens_beside_a_sentencepiece_model_are_in_its_fingerprint(
    tokenizer_path: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Data built with another end of sequence are refused; settings that change no id leave the fingerprint alone."""
    shutil.copyfile(tokenizer_path, tmp_path / "tokenizer.model")

    def beside(**settings: object) -> Tokenizer:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(tmp_path)

    same = {str(index): {"content": tokenizer.id_to_token(index), "special": True} for index in range(3)}
    own = hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    assert beside(eos_token="</s>", pad_token="<unk>", added_tokens_decoder=same).fingerprint == own
    more = {str(tokenizer.vocab_size): {"content": "<|end|>", "special": True}}
    found = {own, beside(eos_token="<s>").fingerprint, beside(added_tokens_decoder=more).fingerprint}
    assert len({*found, beside(added_tokens_decoder=more, eos_token="<|end|>").fingerprint}) == 4


def test_ids_of_added_tokens_are_the_next_ones_or_refused(
    tokenizer_path: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shutil.copyfile(tokenizer_path, tmp_path / "tokenizer.model")
    size = tokenizer.vocab_size
    token = {"content": "<|end|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {size + 5: token}}))
    with pytest.raises(DataError, match=rf"tokenizer_config.json .*'<\|end\|>' the id {size + 5}, .* it has {size}"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": size + 5}))
    with pytest.raises(DataError, match=rf"added_tokens.json .* the id {size + 5}, .* it has {size}"):
        load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": size}))
    assert load_tokenizer(tmp_path).eos_id == size
