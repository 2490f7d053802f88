"""GritModel: from a checkpoint on disk to embeddings, text and losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import CheckpointError, ConfigError, DataError
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.score import score_tokens
from megatron_grit.models.decoder import Output
from tests.corpus import sentences


@pytest.fixture(scope="module")
def model(trained_run: RunConfig) -> GritModel:
    return GritModel.load(trained_run.output_dir, device="cpu")


def test_encode_equals_the_training_pass(trained_run: RunConfig, model: GritModel) -> None:
    """Queries of a training batch, embedded as text, give what their packed rows give."""
    loader = GritDataLoader(trained_run, load_tokenizer(str(trained_run.data.tokenizer)))
    batch = loader.batch(0)
    pairs = sentences(96)
    for row in batch.rows_of("embedding"):
        with torch.no_grad():
            trained = model.model(row, Output.EMBEDDINGS).numpy()
        assert row.slots_S is not None
        queries = [
            (i, int(row.record_ids[i].rsplit("#", 1)[1]))
            for i, slot in enumerate(row.slots_S.tolist())
            if slot < batch.counts_of("embedding").num_queries
        ]
        encoded = model.encode([pairs[record][0] for _, record in queries], instruction="Answer the question")
        np.testing.assert_allclose(encoded, trained[[i for i, _ in queries]], atol=1e-5)


def test_encode_does_not_depend_on_the_company(model: GritModel) -> None:
    texts = [answer for _, answer in sentences(20)]
    together = model.encode(texts)
    assert together.shape == (20, 64) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = np.stack([model.encode(text) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, model.encode(texts, batch_tokens=64), atol=1e-5)


def test_the_instruction_matters(model: GritModel) -> None:
    text = "The parser opens a file."
    plain, empty, instructed = (model.encode(text, instruction=i) for i in (None, "", "Answer the question"))
    assert np.abs(plain - empty).max() > 1e-3
    assert np.abs(empty - instructed).max() > 1e-3


def test_token_losses_are_those_of_training(trained_run: RunConfig, model: GritModel) -> None:
    """The mean over a batch's records equals the batch's loss from its own rows."""
    sums, counts = model.token_losses(trained_run.data.generative[0])
    loader = GritDataLoader(trained_run, load_tokenizer(str(trained_run.data.tokenizer)))
    batch = loader.batch(0)
    total, records = 0.0, []
    for row in batch.rows_of("generative"):
        with torch.no_grad():
            total += float(model.model(row, Output.TOKEN_LOSSES).sum())
        records += [int(name.rsplit("#", 1)[1]) for name in row.record_ids]
    assert counts[records].sum() == batch.counts_of("generative").num_loss_tokens
    assert sums[records].sum() == pytest.approx(total, rel=1e-5)


def test_empty_documents_have_no_loss(model: GritModel) -> None:
    ids = [np.array(model.tokenizer.encode(text)) for text in ("the parser opens", "a queue")]
    texts = [(tokens, np.ones(len(tokens), bool)) for tokens in (ids[0][:0], ids[0], ids[0][:1], ids[1], ids[0][:0])]
    sums, counts = score_tokens(model.chunks, texts, group=model.model_group, batch_tokens=64)
    assert counts.tolist() == [0, len(ids[0]) - 1, 0, len(ids[1]) - 1, 0]
    np.testing.assert_array_equal(sums > 0, counts > 0)
    alone, _ = score_tokens(model.chunks, [texts[1], texts[3]], group=model.model_group, batch_tokens=64)
    np.testing.assert_allclose(sums[[1, 3]], alone, rtol=1e-6)


def test_generate(model: GritModel) -> None:
    answer = model.generate("what does the parser do when it opens?", max_new_tokens=8)
    assert isinstance(answer, str)
    conversations = [
        [{"role": "user", "content": "what does the parser do when it opens?"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what does the queue do?"}],
    ]
    answers = model.generate(conversations, max_new_tokens=8)
    assert isinstance(answers, list) and answers[0] == answer


def test_the_ids_of_one_text_are_one_text(model: GritModel) -> None:
    ids = model.embedding_tokens(["The parser opens a file."])[0][1]
    one = model.encode(ids)
    assert one.shape == (64,)
    np.testing.assert_array_equal(one, model.encode([ids])[0])
    np.testing.assert_allclose(one, model.encode("The parser opens a file."), atol=1e-6)


def test_texts_are_cut_at_the_last_position(model: GritModel, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The parser opens a file. " * 20
    expected = model.encode(text, max_length=16)
    monkeypatch.setattr(model.config.model, "max_position_embeddings", 16)
    np.testing.assert_array_equal(model.encode(text, max_length=10**6), expected)


def test_records_beyond_the_last_position(
    trained_run: RunConfig, model: GritModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config.model, "max_position_embeddings", 8)
    with pytest.raises(DataError, match=r"record 0 has \d+ tokens, and the model takes 8"):
        model.token_losses(trained_run.data.generative[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there is nothing to answer"),
        (5, "there is nothing to answer"),
        (None, "there is nothing to answer"),
        ("", "prompt must not be empty"),
        ("  \n", "prompt must not be empty"),
        ("a\ud800", "prompt holds half of a surrogate pair, or a byte that is no UTF-8, at character 1"),
        (["a", ""], "prompt must not be empty"),
        (["a", 5], "messages must be a list of"),
        ([[], "a"], "messages must be a list of"),
        ([{"role": "user", "content": "a"}, "b"], "messages must be a list of"),
        (
            [{"role": "bot", "content": "a"}],
            "message 0 must be one of system, developer, user, assistant, tool, environment, not",
        ),
        ([{"role": "user", "content": b"a"}], "content of message 0 must be a string, not b'a'"),
        ([{"content": "a"}], "role of message 0 must be one of"),
        ([{"role": "user", "content": "a", "images": ["b"]}], "message 0 holds images"),
    ],
)
def test_conversations_that_cannot_be(model: GritModel, given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.generate(given, max_new_tokens=1)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "there is no text to encode"),
        (None, {}, "texts must be a string, a list of strings, or ids of tokens, not null"),
        ({"a": 1}, {}, "texts must be a string, a list of strings, or ids of tokens"),
        (["a", 5], {}, "text 1 must be a string, not 5"),
        (["a", b"b"], {}, "text 1 must be a string"),
        (["a\udcff"], {}, "text 0 holds half of a surrogate pair"),
        ([[5, -1]], {}, "text 0 holds -1; ids of tokens are from 0 to 399"),
        ("a", {"max_length": 0}, "max_length must be at least 1, not 0"),
        ("a", {"max_length": 10**20}, "max_length must be at least 1 and at most 9223372036854775807"),
        ("a", {"max_length": "9"}, "max_length must be int, at least 1, not '9'"),
        ("a", {"batch_tokens": -5}, "batch_tokens must be at least 1, not -5"),
        ("a", {"batch_tokens": math.nan}, "batch_tokens must be int, at least 1, not nan"),
        ("a", {"dimensions": 65}, "dimensions must be at most 64, the model's, not 65"),
        ("a", {"instruction": 5}, "instruction must be str or null, not 5"),
        ("a", {"instruction": "\ud800"}, "instruction holds half of a surrogate pair"),
    ],
)
def test_texts_that_cannot_be_embedded(model: GritModel, given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        model.encode(given, **options)


def test_errors(model: GritModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text 1 is empty"):
        model.encode(["a", "  "])
    with pytest.raises(DataError, match="max_length 8"):
        model.encode("text", instruction="a long instruction " * 10, max_length=8)
    with pytest.raises(DataError, match="last turn has to be the user's"):
        model.generate([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    bad: list[dict[str, Any]] = [{"device": "gpu"}, {"device": None}, {"precision": "fp64"}, {"precision": 16}]
    for options in bad:
        (name,) = options
        with pytest.raises(ConfigError, match=f"{name} must be one of .*, not"):
            GritModel.load(tmp_path, **options)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        GritModel.load(tmp_path)
