"""Neighbors in the prompt as benchmarks/retro_gain.py puts them there: the same labels, nothing before its time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import retro_gain
from benchmarks.retro_gain import with_prompts
from megatron_grit.config.schema import ParallelConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from tests.neighbors import with_neighbors
from tests.rows import VOCAB, RowKind, make_row, tiny_config

CHUNK, DELIMITER = 6, 3


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        yield context


def read_row(**options: float) -> PackedRow:
    return with_neighbors(make_row(RowKind.GENERATIVE, [20, 9], 32), CHUNK, **options)  # type: ignore[arg-type]


def test_neighbors_stand_between_their_chunk_and_the_next() -> None:
    row = read_row(missing=0.3)
    assert row.neighbors is not None and row.labels_1T is not None and row.loss_mask_1T is not None
    texts = np.split(row.neighbors.tokens_1N[0].numpy(), np.cumsum(row.neighbors.lengths_U)[:-1])
    expected: list[int] = []
    bounds = [0]
    for (start, stop), end, read in zip(
        row.neighbors.chunk_bounds_C2, row.neighbors.segment_ends_C, row.neighbors.text_of_Ck, strict=True
    ):
        expected += row.tokens_1T[0, start:stop].tolist()
        if stop == end:
            bounds.append(len(expected))
        elif (read >= 0).any():
            expected.append(DELIMITER)
            for text in read[read >= 0]:
                expected += [*texts[text], DELIMITER]
    made = with_prompts(row, DELIMITER)
    assert made.tokens_1T[0, : len(expected)].tolist() == expected and made.num_tokens == len(expected)
    assert made.cu_seqlens.tolist()[:3] == bounds and made.tokens_1T.shape[1] % 8 == 0
    starts = np.repeat(made.cu_seqlens.numpy()[:-1], np.diff(made.cu_seqlens.numpy()))
    assert made.positions_1T[0].tolist() == (np.arange(len(starts)) - starts).tolist()
    assert made.labels_1T is not None and made.loss_mask_1T is not None
    labels = made.labels_1T[made.loss_mask_1T > 0]
    assert labels.equal(row.labels_1T[row.loss_mask_1T > 0]) and len(labels) == 27
    # What predicts a token stands right before it.
    assert labels.equal(made.tokens_1T[:, 1:][made.loss_mask_1T[:, :-1] > 0])
    assert made.neighbors is not None
    ends = made.neighbors.chunk_bounds_C2[:, 1] - 1
    assert made.tokens_1T[0, ends].equal(row.tokens_1T[0, row.neighbors.chunk_bounds_C2[:, 1] - 1])


def losses(model: GritDecoder, row: PackedRow) -> torch.Tensor:
    assert row.loss_mask_1T is not None
    with torch.no_grad():
        return model.eval()(row, Output.TOKEN_LOSSES)[row.loss_mask_1T[0] > 0]


@pytest.mark.parametrize("reads", [False, True])
def test_nothing_is_read_before_its_time(context: ParallelContext, reads: bool) -> None:
    config = tiny_config(num_layers=2)
    if reads:
        config.model.retro = RetroConfig(num_neighbors=2, chunk_length=CHUNK, layers=[1])
    model, row = build_model(config, VOCAB, context), read_row()
    before = losses(model, with_prompts(row, DELIMITER))
    assert row.neighbors is not None
    second = int(row.neighbors.text_of_Ck[1, 0])  # read from the end of the second chunk on, so from label 11 on
    starts = np.cumsum(row.neighbors.lengths_U) - row.neighbors.lengths_U
    tokens = row.neighbors.tokens_1N.clone()
    tokens[0, starts[second]] += 1
    after = losses(model, with_prompts(replace(row, neighbors=replace(row.neighbors, tokens_1N=tokens)), DELIMITER))
    changed = (before - after).abs() > 1e-6
    assert not changed[:11].any() and changed[11:19].all() and not changed[19:].any()
    nothing = read_row(missing=1.0)
    plain = losses(model, replace(nothing, neighbors=None))
    assert (losses(model, with_prompts(nothing, DELIMITER)) - plain).abs().max() < 1e-5


def run_of(loss: float, **overlaps: float) -> dict[str, Any]:
    """What a training found."""
    found: dict[str, Any] = {"valid_loss": loss, "valid_loss_without_copies": loss, "valid_tokens": 9}
    found |= {"valid_tokens_without_copies": 9, "seconds": 1.0, "curve": [loss], "at_step_0": None, "parameters": 1}
    for name, value in overlaps.items():
        found |= {f"valid_loss_overlap/{name}": value, f"valid_tokens_overlap/{name}": 3}
    return found


def test_a_seed_without_tokens_in_a_bucket_is_left_out_of_its_mean(capsys: pytest.CaptureFixture[str]) -> None:
    """Shuffled neighbors of one seed may hold a stretch of the text, and those of another none."""
    runs = [run_of(4.0, none=4.0, to_1=3.0), run_of(5.0, none=5.0), run_of(6.0, none=6.0, to_1=1.0)]
    numbers, _ = retro_gain.report({"retro_shuffled": runs}, {})
    arm = numbers["arms"]["retro_shuffled"]
    assert arm["loss"] == [4.0, 5.0, 6.0] and arm["by_overlap"] == {"none": [4.0, 5.0, 6.0], "to_1": [3.0, 1.0]}
    assert "5.0000    2.0000" in capsys.readouterr().out


def test_what_a_training_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that stopped goes on with what it has; another rate or number of steps is another training."""
    calls: list[retro_gain.Job] = []

    def train(job: retro_gain.Job) -> dict[str, Any]:
        calls.append(job)
        return run_of(float(len(calls)))

    monkeypatch.setattr(retro_gain, "train", train)
    jobs = [retro_gain.Job(tmp_path, "gpt", retro_gain.ARMS["gpt"], 1, steps, 0.003) for steps in (4, 8, 4)]
    assert [retro_gain.trained(job)["valid_loss"] for job in jobs] == [1.0, 2.0, 1.0]
    assert len(calls) == 2
