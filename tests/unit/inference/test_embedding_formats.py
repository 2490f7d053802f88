"""Vectors in fewer bits against sentence-transformers, records of a corpus, and texts that are cut."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.embedding_formats import PRECISIONS, corpus_texts, quantize_vectors
from megatron_grit.inference.model import GritModel

TEXTS = ["The parser opens a file.", "A queue.", "The cache keeps a folder of files."]


@pytest.fixture(scope="module")
def model(trained_run: RunConfig) -> GritModel:
    return GritModel.load(trained_run.output_dir, device="cpu")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("given", [False, True], ids=["own", "ranges"])
def test_vectors_are_those_of_sentence_transformers(precision: Any, given: bool) -> None:
    from sentence_transformers.util import quantize_embeddings

    random = np.random.default_rng(3)
    vectors = random.standard_normal((130, 20)).astype(np.float32)
    vectors[:, 4] = 0.5  # a dimension that does not vary
    ranges = np.stack((vectors.min(0) + 0.3, vectors.max(0) - 0.3)).astype(np.float32) if given else None
    expected = quantize_embeddings(vectors, precision, ranges)
    ours = quantize_vectors(vectors, precision, ranges)
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


def test_forms_of_vectors(model: GritModel) -> None:
    plain = model.encode(TEXTS)
    np.testing.assert_array_equal(model.encode(TEXTS, precision="ubinary"), np.packbits(plain > 0, axis=-1))
    tensor = model.encode(TEXTS, precision="int8", convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int8
    np.testing.assert_array_equal(tensor.numpy(), quantize_vectors(plain, "int8"))
    ranges = np.stack((plain.min(0), plain.max(0)))
    one = model.encode(TEXTS[1], precision="int8", ranges=ranges)
    assert one.shape == (64,) and np.abs(one.astype(int) - tensor.numpy()[1]).max() <= 1
    with pytest.raises(ConfigError, match="precision int8 of one vector needs ranges"):
        model.encode(TEXTS[1], precision="int8")
    with pytest.raises(ConfigError, match="precision must be one of float32, int8, uint8, binary, ubinary, not 'int2'"):
        model.encode(TEXTS, precision="int2")  # type: ignore[arg-type]


def test_names_of_gritlm(model: GritModel) -> None:
    records = [{"title": "Parsers", "text": TEXTS[0]}, {"text": TEXTS[1], "_id": "7"}, {"title": "", "text": TEXTS[2]}]
    expected = model.encode([f"Parsers {TEXTS[0]}", *TEXTS[1:]], side="passage")
    np.testing.assert_array_equal(model.encode_corpus(records), expected)
    np.testing.assert_array_equal(model.encode_corpus(records[0]), model.encode(f"Parsers {TEXTS[0]}"))
    np.testing.assert_array_equal(model.encode_corpus(TEXTS), model.encode(TEXTS))
    queries = model.encode_queries(TEXTS, "Answer the question", precision="binary")
    np.testing.assert_array_equal(queries, model.encode(TEXTS, "Answer the question", precision="binary"))
    for record in ({"title": "a"}, {"text": 5}, {"text": "a", "title": ["b"]}):
        with pytest.raises(DataError, match='^record 1 of the corpus must have a "text"'):
            corpus_texts(["a", record])


def test_texts_that_are_cut_are_counted(model: GritModel, caplog: pytest.LogCaptureFixture) -> None:
    model.num_cut = 0
    sizes = [len(head) + len(tail) for head, tail in model.embedding_tokens(TEXTS)]
    with caplog.at_level(logging.INFO):
        model.encode(TEXTS, max_length=max(sizes))
        assert model.num_cut == 0 and "cut" not in caplog.text
        model.encode(TEXTS, max_length=max(sizes) - 1)
    assert model.num_cut == 1
    cut = [len(head) + len(tail) for head, tail in model.embedding_tokens(TEXTS, max_length=max(sizes) - 1)]
    assert cut == [min(size, max(sizes) - 1) for size in sizes]
    assert f"1 of 3 texts are longer than {max(sizes) - 1} tokens: cut" in caplog.text
    model.encode(TEXTS, max_length=min(sizes), progress=False)
    assert model.num_cut == 3
