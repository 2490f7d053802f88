"""A model that tells queries from passages: trained from a model without its options, saved, loaded, called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.evaluation.checkpoint import evaluate_checkpoint
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.text_files import encode_file
from megatron_grit.models.decoder import Output
from megatron_grit.training.trainer import train
from tests.corpus import sentences, tiny_run

SIDES: tuple[Literal["query", "passage"], ...] = ("query", "passage")


@pytest.fixture(scope="module")
def config(trained_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two steps from there with new tokens, under the audit; linear layers would be missing from the base."""
    config = tiny_run(Path(trained_run.output_dir).parent)
    config.output_dir = str(tmp_path_factory.mktemp("sides"))
    config.embedding.brackets, config.embedding.side_tokens, config.embedding.pooling = "speca", True, "weightedmean"
    config.model.vocab_size = 406
    config.checkpoint.load = trained_run.output_dir
    config.training.objective, config.training.steps = "embedding", 2
    train(config)
    return config


@pytest.fixture(scope="module")
def asymmetric(trained_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two steps with linear layers of each side after pooling, learned weights, and the vocabulary's brackets."""
    config = tiny_run(Path(trained_run.output_dir).parent)
    config.output_dir = str(tmp_path_factory.mktemp("asymmetric"))
    config.embedding.brackets, config.embedding.asymmetric, config.embedding.pooling = "specb", "heads", "learnedmean"
    config.embedding.num_linear_layers, config.embedding.linear_activation = 2, "tanh"
    config.embedding.linear_place, config.embedding.projection_dim = "after_pooling", 24
    config.training.steps, config.optimizer.lr = 2, 1e-2
    train(config)
    return config


@pytest.mark.parametrize("name", ["config", "asymmetric"])
def test_encode_equals_the_training_pass(name: str, request: pytest.FixtureRequest) -> None:
    config = request.getfixturevalue(name)
    model = GritModel.load(config.output_dir, device="cpu")
    batch, pairs = GritDataLoader(config, load_tokenizer(str(config.data.tokenizer))).batch(0), sentences(96)
    compared = 0
    for row in batch.rows_of("embedding"):
        with torch.no_grad():
            trained = model.model(row, Output.EMBEDDINGS).numpy()
        assert row.slots_S is not None
        for place, slot in enumerate(row.slots_S.tolist()):
            record = int(row.record_ids[place].rpartition("#")[2])
            if slot < batch.counts_of("embedding").num_queries:
                ours = model.encode(pairs[record][0], "Answer the question", side="query")
                other = model.encode(pairs[record][0], "Answer the question", side="passage")
            else:
                counts = batch.counts_of("embedding")
                negative = (slot - counts.num_queries) % counts.group_size > 0
                text = pairs[(record + 7) % 96 if negative else record][1]
                ours, other = model.encode(text, side="passage"), model.encode(text, side="query")
            np.testing.assert_allclose(ours, trained[place], atol=1e-5)
            assert np.abs(other - ours).max() > 1e-3, "the other side gives the same"
            compared += 1
    assert compared == 12 * 3


def test_new_tokens_are_trained_and_the_rest_is_the_bases(trained_run: RunConfig, config: RunConfig) -> None:
    before, after = (
        GritModel.load(run.output_dir, device="cpu").model.embedding.word_embeddings.weight
        for run in (trained_run, config)
    )
    assert before.shape == after.shape == (448, 64)  # 400 and 406, padded to a multiple of 64
    moved = (after - before).abs().amax(1) > 0
    assert moved[400:406].all() and not moved[406:].any()
    assert float((after - before).detach().abs().max()) < 0.01, "the base's weights were not taken"
    fresh = after[400:406].detach()
    assert float((fresh[:, None] - fresh[None]).abs().amax(2).fill_diagonal_(1).min()) > 1e-3, "two of them are one"


def test_the_side_has_to_be_given(config: RunConfig, trained_run: RunConfig) -> None:
    model = GritModel.load(config.output_dir, device="cpu")
    with pytest.raises(DataError, match='give side="query" or side="passage"'):
        model.encode("a text")
    with pytest.raises(ConfigError, match="side must be one of query, passage or null, not 'document'"):
        model.encode("a text", side="document")  # type: ignore[arg-type]
    plain = GritModel.load(trained_run.output_dir, device="cpu")
    assert np.array_equal(plain.encode("a text"), plain.encode("a text", side="query"))


def test_markers_count_towards_max_length(config: RunConfig) -> None:
    model = GritModel.load(config.output_dir, device="cpu")
    assert len(model.tokenizer.encode("one two three")) > 2
    with pytest.raises(DataError, match="fills max_length 3"):
        model.encode("one two three", None, side="query", max_length=3)
    cut = model.encode("one two three", None, side="query", max_length=4)
    assert not np.allclose(cut, model.encode("one two three", None, side="query"), atol=1e-3)


def test_files_evaluation_and_server_pass_the_side_on(config: RunConfig, tmp_path: Path) -> None:
    from megatron_grit.serving.server import Service

    (tmp_path / "texts.txt").write_text("one text\nanother text\n")
    given = (config.output_dir, str(tmp_path / "texts.txt"), tmp_path / "out.npy")
    files = {side: encode_file(*given, side=side, device="cpu") for side in SIDES}
    with pytest.raises(DataError, match="side"):
        encode_file(*given, device="cpu")
    model = GritModel.load(config.output_dir, device="cpu")
    service = Service(model, "grit")
    for side in SIDES:
        answer = service.embeddings({"input": ["one text", "another text"], "side": side})()
        np.testing.assert_allclose([row["embedding"] for row in answer["data"]], files[side], atol=1e-6)
        tokens = model.embedding_tokens(["one text", "another text"], "", side=side)
        assert answer["usage"]["prompt_tokens"] == sum(len(head) + len(tail) for head, tail in tokens)
        assert all(tail[: len(model.markers.query.opening)] for _, tail in tokens)
    assert np.abs(files["query"] - files["passage"]).max() > 1e-3
    with pytest.raises(DataError, match="side must be one of query, passage"):
        service.embeddings({"input": "text", "side": "document"})
    record = {"query": ["", "one text"], "pos": [["", "another text"]]}
    (tmp_path / "task.jsonl").write_text(json.dumps(record) + "\n")
    figures = evaluate_checkpoint(
        config.output_dir, tmp_path / "out.json", retrieval=tmp_path / "task.jsonl", device="cpu"
    )
    assert figures["num_queries"] == 1
