"""Noise on embeddings (NEFTune). That every layout has the same is tested in tests/distributed/test_grid.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_grit.config.schema import ParallelConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.models.decoder import Output, build_model
from megatron_grit.models.vocabulary import embedding_noise
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from tests.rows import VOCAB, make_row, tiny_config
from tests.unit.data.indexed_files import TOKENIZER, run_config, write_chats


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        yield context


def test_bound_is_that_of_the_true_length() -> None:
    """alpha / root(tokens x width) of each segment, however long the row is; nothing on padding."""
    row = make_row(RowKind.GENERATIVE, [9, 25, 6], 64)
    row.noise_key = 3
    row = row.to(torch.device("cpu"))
    noise = embedding_noise(row, 5.0, 256)[:, 0]
    for begin, end in ((0, 9), (9, 34), (34, 40)):
        bound = 5.0 / math.sqrt((end - begin) * 256)
        part = noise[begin:end]
        assert 0.98 * bound < part.abs().max() <= bound * (1 + 1e-6)
        assert abs(float(part.mean())) < 4 * bound / math.sqrt(3 * part.numel())
        assert float(part.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not noise[40:].any()
    row.noise_key = 4
    assert not torch.equal(embedding_noise(row, 5.0, 256)[:, 0], noise)


def test_in_training_only(context: ParallelContext) -> None:
    config = tiny_config(num_layers=1)
    config.training.neftune_alpha = 20.0
    model, row = build_model(config, VOCAB, context), make_row(RowKind.GENERATIVE, [9, 25, 6], 64)
    with torch.no_grad():
        plain = model.train()(row.to(context.device), Output.TOKEN_LOSSES)
        row.noise_key = 3
        noised = row.to(context.device)
        assert torch.equal(model.eval()(noised, Output.TOKEN_LOSSES), plain)
        trained = model.train()(noised, Output.TOKEN_LOSSES)
        assert not torch.allclose(trained, plain, atol=1e-3)
        assert torch.equal(model(noised, Output.TOKEN_LOSSES), trained)  # recomputed layers see the same


def test_rows_of_a_step_have_keys_of_their_own(tmp_path: Path) -> None:
    """Whatever the data parallel size; no row has one where the run asks for none."""
    prefix = write_chats(tmp_path / "chats", [[3, 9]] * 40)
    config = run_config(tmp_path, generative=[prefix], num_rows_multiple=4)
    assert all(row.noise_key is None for row in GritDataLoader(config, TOKENIZER).batch(0).rows)
    config.training.neftune_alpha = 5.0
    alone, two = GritDataLoader(config, TOKENIZER), [GritDataLoader(config, TOKENIZER, rank, 2) for rank in range(2)]
    keys = [[row.noise_key for row in alone.batch(step).rows] for step in (0, 1, 0)]
    assert keys[0] == keys[2] and len(set(keys[0] + keys[1])) == 8
    assert [row.noise_key for row in two[1].batch(1).rows] == keys[1][1::2]
