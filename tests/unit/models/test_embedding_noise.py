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
    row.noise_keys = [3, 5, 7]
    row = row.to(torch.device("cpu"))
    noise = embedding_noise(row, 5.0, 256)[:, 0]
    for begin, end in ((0, 9), (9, 34), (34, 40)):
        bound = 5.0 / math.sqrt((end - begin) * 256)
        part = noise[begin:end]
        assert 0.98 * bound < part.abs().max() <= bound * (1 + 1e-6)
        assert abs(float(part.mean())) < 4 * bound / math.sqrt(3 * part.numel())
        assert float(part.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not noise[40:].any()
    alone = make_row(RowKind.GENERATIVE, [25], 25)
    alone.noise_keys = [5]
    assert torch.equal(embedding_noise(alone.to(torch.device("cpu")), 5.0, 256)[:, 0], noise[9:34])
    row.noise_keys = [4, 5, 7]
    other = embedding_noise(row, 5.0, 256)[:, 0]
    assert not torch.equal(other[:9], noise[:9]) and torch.equal(other[9:], noise[9:])


def test_in_training_only(context: ParallelContext) -> None:
    config = tiny_config(num_layers=1)
    config.training.neftune_alpha = 20.0
    model, row = build_model(config, VOCAB, context), make_row(RowKind.GENERATIVE, [9, 25, 6], 64)
    with torch.no_grad():
        plain = model.train()(row.to(context.device), Output.TOKEN_LOSSES)
        row.noise_keys = [3, 5, 7]
        noised = row.to(context.device)
        assert torch.equal(model.eval()(noised, Output.TOKEN_LOSSES), plain)
        trained = model.train()(noised, Output.TOKEN_LOSSES)
        assert not torch.allclose(trained, plain, atol=1e-3)
        assert torch.equal(model(noised, Output.TOKEN_LOSSES), trained)  # recomputed layers see the same


def test_segments_of_a_step_have_keys_of_their_own(tmp_path: Path) -> None:
    """Whatever rows and ranks they are in; none where the run asks for none."""
    prefix = write_chats(tmp_path / "chats", [[3, 9]] * 40)
    config = run_config(tmp_path, generative=[prefix])
    assert all(row.noise_keys is None for row in GritDataLoader(config, TOKENIZER).batch(0).rows)
    config.training.neftune_alpha = 5.0

    def keys_of(step: int, data_size: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for rank in range(data_size):
            for row in GritDataLoader(config, TOKENIZER, rank, data_size).batch(step).rows:
                assert row.noise_keys is not None
                found |= dict(zip(row.record_ids, row.noise_keys, strict=True))
        return found

    first, second = keys_of(0, 1), keys_of(1, 1)
    assert len(set(first.values()) | set(second.values())) == len(first) + len(second) == 16
    assert keys_of(0, 3) == first and keys_of(1, 4) == second
