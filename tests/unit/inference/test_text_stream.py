"""Text while its tokens come, against the text of all tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.config.options import SamplingOptions
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_grit.errors import DataError
from megatron_grit.inference.generation.text_stream import TextStream, stop_at
from megatron_grit.inference.model import GritModel

TEXTS = ["The parser opens a file, größer als 5 €.", "  two  spaces\nand a line", "日本語 is written 🙂 here"]


@pytest.fixture(scope="module", params=["sentencepiece", "byte_level"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        return load_tokenizer(train_sentencepiece(TEXTS * 20, folder / "tokenizer", 300))
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    backend.train_from_iterator(TEXTS, trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return load_tokenizer(folder)


def streamed(tokenizer: Tokenizer, tokens: list[int], stops: list[str]) -> tuple[list[str], str]:
    stream, pieces = TextStream(tokenizer, stops), []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.ended:
            break
    text, rest = stream.close()
    return [*pieces, rest], text


@given(st.data())
def test_pieces_are_the_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Of any tokens, bytes that are no characters among them."""
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    stops = data.draw(st.lists(st.sampled_from(["e", "ab", " t", "\n", "ö", "The parser"]), max_size=2))
    pieces, text = streamed(tokenizer, tokens, stops)
    assert "".join(pieces) == text
    if not stops:
        assert text == tokenizer.decode(tokens)
    assert stop_at(text, stops) < 0


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    pieces, whole = streamed(tokenizer, tokenizer.encode(text), [])
    assert whole == text and "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 5 and not any("\ufffd" in piece for piece in pieces)


def test_what_a_stop_text_may_begin_with_is_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("opens a file, greater")
    pieces, text = streamed(tokenizer, ids, ["file, less", "zz"])
    assert "".join(pieces) == text == "opens a file, greater"
    pieces, text = streamed(tokenizer, ids, ["file, gr", "ater"])
    assert "".join(pieces) == text == "opens a "


def test_a_model_streams_what_it_generates(trained_run: RunConfig) -> None:
    model = GritModel.load(trained_run.output_dir, device="cpu")
    for options in ({"max_new_tokens": 16}, {"max_new_tokens": 16, "temperature": 1.3, "seed": 4, "stop": ["e"]}):
        pieces = list(model.stream("what does the queue do?", SamplingOptions(**options)))  # type: ignore[arg-type]
        assert "".join(pieces) == model.generate("what does the queue do?", **options)  # type: ignore[arg-type]
        assert len(pieces) > 1
    calls: list[int] = []
    stream = model.stream("what does the queue do?", before_pass=lambda: calls.append(1))
    assert next(stream) and len(calls) < 8, "the first piece comes with the first tokens"
    with pytest.raises(DataError, match="one conversation to stream"):
        model.stream(["a", "b"])
