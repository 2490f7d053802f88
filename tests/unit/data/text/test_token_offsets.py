"""Characters of tokens from their spelling, against the offsets that the tokenizers give themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.text.token_offsets import PieceWidths
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from tests.unit.data.json_tokenizers import chat_json
from tests.unit.data.samples import TEXT, byte_level_json

LETTERS = st.text(alphabet=st.sampled_from("ab theé漢🙂\u0301<|>/.:\n\t\u00a0_▁"), max_size=14)


@pytest.fixture(scope="module")
def fallback_json(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer.json in the manner of Llama 2: a space in front, ``▁`` for spaces, bytes for what is missing."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abthe", "th", "the", "▁the"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    backend.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(chat_json(tmp_path_factory.mktemp("bytes"), [TEXT] * 3, vocab_size=330))


@pytest.fixture(scope="module")
def composing(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from tokenizers import normalizers

    folder = tmp_path_factory.mktemp("nfc")
    return load_tokenizer(chat_json(folder, [TEXT] * 3, vocab_size=330, normalizer=normalizers.NFC()))


def check(tokenizer: Tokenizer, texts: list[str], *, begins: bool = True) -> np.ndarray:
    """Compare with the tokenizer's own offsets; whether each text was covered."""
    got = tokenizer.encode_batch_with_offsets(texts)
    assert got.lengths.sum() == len(got.ids) == len(got.begins) == len(got.ends)
    for text, stop, length in zip(texts, np.cumsum(got.lengths).tolist(), got.lengths.tolist(), strict=True):
        place = slice(stop - length, stop)
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert got.ids[place].tolist() == ids == tokenizer.encode(text)
        if begins:
            assert got.begins[place].tolist() == [begin for begin, _ in offsets]
    return got.covered


@given(texts=st.lists(LETTERS, max_size=5))
def test_sums_are_the_offsets(
    tokenizer: Tokenizer, mistral: Tokenizer, byte_level: Tokenizer, texts: list[str]
) -> None:
    for candidate in (tokenizer, mistral, byte_level):
        assert check(candidate, texts).all() or "▁" in "".join(texts)


@given(texts=st.lists(LETTERS, max_size=5))
def test_sums_of_a_llama_tokenizer_json(fallback_json: Tokenizer, texts: list[str]) -> None:
    # The library counts the space that it puts in front as the text's first character, so offsets differ there.
    check(fallback_json, texts, begins=False)
    for text in texts:
        encoded = fallback_json.encode_batch_with_offsets([text])
        if not text or not encoded.covered[0]:
            continue
        spelled = [fallback_json.id_to_token(index) for index in encoded.ids.tolist()]
        for token, begin, end in zip(spelled, encoded.begins.tolist(), encoded.ends.tolist(), strict=True):
            if not token.startswith("<0x"):
                assert text[begin:end].replace("▁", " ") in (token.replace("▁", " "), token.replace("▁", " ")[1:])


def test_text_that_is_normalised_is_asked_for(composing: Tokenizer) -> None:
    assert check(composing, ["the fox", "the e\u0301", "the é"]).tolist() == [True, False, True]


def test_tokenizers_that_normalise_have_no_widths(tmp_path: Path) -> None:
    import sentencepiece
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers

    backend = Backend(models.WordPiece({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "the": 3, "fox": 4}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    words = load_tokenizer(tmp_path / "tokenizer.json")
    assert words._piece_widths is None
    assert check(words, ["The  FOX", "fox"]).tolist() == [False, False]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 5), model_prefix=str(tmp_path / "nfkc"), vocab_size=45, minloglevel=2
    )
    assert load_tokenizer(tmp_path / "nfkc.model")._piece_widths is None


def test_sums_that_do_not_come_out_are_asked_for(tmp_path: Path) -> None:
    """The control: with one wrong width, texts with that token fall back to the tokenizer's offsets."""
    tokenizer = load_tokenizer(byte_level_json(tmp_path))
    assert check(tokenizer, ["Yes", "no"]).all()
    widths = tokenizer._piece_widths
    assert isinstance(widths, PieceWidths)
    widths.chars[tokenizer.encode("Yes")[0]] += 1
    assert check(tokenizer, ["Yes", "no"]).tolist() == [False, True]
