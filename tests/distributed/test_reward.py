"""Reward models: packed pairs against a closed form on single conversations, every layout against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.distributed.kind_step import accumulate, compare_gradients, fill, gradient_error, loader_at, start_from
from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, tiny_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2": {"tensor": 2},
    "TP2 with sequence parallelism": {"tensor": 2, "sequence_parallel": True},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
}
MARGIN, CENTERING = 0.3, 0.05
NUM_PAIRS = 8


def write_pairs(prefix: Path) -> None:
    """Pairs of random tokens."""
    from megatron_grit.data.indexed.roles import Role, RowKind
    from megatron_grit.data.indexed.writer import IndexedWriter

    random = np.random.default_rng(0)
    with IndexedWriter(prefix, RowKind.PREFERENCE, VOCAB) as writer:
        for _ in range(NUM_PAIRS):
            lead = random.integers(0, VOCAB, random.integers(2, 6)).tolist()
            answers = [random.integers(0, VOCAB, random.integers(1, 24)).tolist() for _ in range(2)]
            writer.add(
                [
                    (Role.TEMPLATE, lead),
                    (Role.CHOSEN, answers[0]),
                    (Role.TEMPLATE, lead),
                    (Role.REJECTED, answers[1]),
                ]
            )
        writer.finalize(tokenizer_fingerprint="of the test", template="none", limits={})


def run_case(prefix: str, folder: str, name: str, layout: dict[str, Any], row_tokens: int = 96) -> dict[str, Any]:
    """Metrics of a step on all pairs, and each part of the gradient against that of one process, if there is one; else
    it is written."""
    from megatron_grit.config.embedding_shape import SCALAR
    from megatron_grit.config.kinds import option
    from megatron_grit.models.decoder import build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.optimizer import build_optimizer, wrap_chunks
    from megatron_grit.training.step import TrainStep

    config = tiny_config(num_layers=2)
    config.training.objective, config.data.tokens_per_row = "reward", row_tokens
    config.data.num_rows_multiple = 2
    vars(config.embedding).update(SCALAR)
    knobs = option(config, "reward")
    knobs.data, knobs.batch_size, knobs.weight = [prefix], NUM_PAIRS, 0.5
    knobs.margin, knobs.centering = MARGIN, CENTERING
    for key, value in layout.items():
        setattr(config.parallel, key, value)
    reference = Path(folder) / "gradient.safetensors"
    with parallel_job(config.parallel, seed=1) as context:
        chunks = build_chunks(config, VOCAB, context)
        start = start_from(Path(folder) / "weights.safetensors", chunks, context)
        loader = loader_at(config, context)
        batch = loader.batch(0)
        wrapped = wrap_chunks(chunks, config.parallel.overlap)
        step = TrainStep(config, context, wrapped, build_optimizer(config, wrapped))
        metrics = accumulate(step, batch)
        found: dict[str, Any] = {"name": name, "metrics": metrics, "rows": len(batch.rows)}
        found["parts"] = compare_gradients(reference, step, chunks, context)
        if found["parts"] is not None:
            return found
        fill(chunks, context, start)
        found["closed"] = _closed_form(chunks[0], loader)
        return found


@torch.no_grad()
def _closed_form(model: Any, loader: Any) -> dict[str, float]:
    """By TRL's formula, of the state of each conversation's last token in a row of its own, in fp64."""
    from megatron_grit.data.rows.stream import PlannedRow
    from megatron_grit.models.decoder import Output

    stream, rewards = loader.streams["reward"], []
    for segment in stream.segments(0):
        row = stream.make_row(PlannedRow(segments=[segment], slots=np.arange(1)), segment.length, 0)
        last = model(row, Output.HIDDEN)[-1, 0].double()
        rewards.append(last @ model.embedding_head.weight[0].double())
    chosen, rejected = torch.stack(rewards).view(-1, 2).unbind(1)
    loss = -F.logsigmoid(chosen - rejected - MARGIN).mean() + CENTERING * torch.mean((chosen + rejected) ** 2)
    return {
        "loss_reward": float(loss),
        "accuracy_reward": float((chosen > rejected).double().mean()),
        "margin_reward": float((chosen - rejected).mean()),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
    }


def compute(prefix: str, folder: str, cases: list[list[Any]]) -> list[dict[str, Any]]:
    return [run_case(prefix, folder, *case) for case in cases]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the ranks found, by case: one process first, the layouts on two."""
    folder = tmp_path_factory.mktemp("reward")
    prefix = folder / "pairs"
    write_pairs(prefix)
    found: dict[str, list[dict[str, Any]]] = {}
    single: list[list[Any]] = [["one", {}], ["unpacked", {}, 48]]
    for size, cases in ((1, single), (2, [[name, layout] for name, layout in LAYOUTS.items()])):
        for rank in run_on_ranks(compute, size, tmp_path_factory.mktemp("ranks"), str(prefix), str(folder), cases):
            for case in rank:
                found.setdefault(case["name"], []).append(case)
    return found


def test_packed_rows_have_the_closed_form(results: dict[str, list[dict[str, Any]]]) -> None:
    (one,) = results["one"]
    metrics = dict(one["metrics"])
    assert metrics.pop("loss") == pytest.approx(0.5 * one["closed"]["loss_reward"], abs=1e-6)
    assert metrics == pytest.approx(one["closed"], abs=1e-6)
    assert abs(metrics["margin_reward"]) > 1e-2 and 0 < metrics["accuracy_reward"] < 1


def test_unpacked_rows_train_alike(results: dict[str, list[dict[str, Any]]]) -> None:
    (packed,), (alone,) = results["one"], results["unpacked"]
    assert alone["rows"] > packed["rows"]
    assert alone["metrics"] == pytest.approx(packed["metrics"], abs=1e-6)
    assert gradient_error([alone]) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_alike(results: dict[str, list[dict[str, Any]]], layout: str) -> None:
    (one,), ranks = results["one"], results[layout]
    for rank in ranks:
        assert rank["metrics"] == pytest.approx(one["metrics"], abs=1e-6)
    assert gradient_error(ranks) < 1e-5
