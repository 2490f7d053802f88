"""Every layout gives one process's losses and gradient: same weights, three steps, each objective.

The reference is one process with the same engine; that one process is right is shown against transformers in
tests/parity and against one graph in test_gradients.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, make_batch, tiny_config

OBJECTIVES = ("unified", "embedding", "generative")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "dp2": {},
    "dp2_overlap": {"overlap": True},
    "ep2": {"expert": 2},
    "ep2_overlap_moe": {"expert": 2, "overlap": True},
    "cp2_moe": {"context": 2},
    "tp2_sp_moe": {"tensor": 2, "sequence_parallel": True},
    "pp2_moe": {"pipeline": 2},
    "dp2_moe": {},
    "etp2_moe": {"expert_tensor": 2},
    "tp2_sp_etp1_moe": {"tensor": 2, "sequence_parallel": True, "expert_tensor": 1},
}
ROWS = (4, 2, 6)  # of each kind in each step
STEPS = len(ROWS)
TOLERANCE = 1e-5
ROUNDING = 1e-6  # a small loss is the difference of numbers of the order of 10 in fp32


def is_moe(layout: str) -> bool:
    return layout.endswith("_moe") or layout == "ep2"


def is_possible(layout: str, objective: str) -> bool:
    """Overlap needs a gradient for every weight; an embedding step has none for the language-model head."""
    return objective != "embedding" or "overlap" not in LAYOUTS.get(layout, {})


def train_steps(layout: dict[str, Any], experts: int | None, weights: str, objective: str) -> list[dict[str, float]]:
    """Three steps from the weights at ``weights``, which the first caller writes."""
    from megatron_grit.models.decoder import build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights, save_weights
    from megatron_grit.training.optimizer import build_optimizer, build_schedule, set_learning_rate, wrap_chunks
    from megatron_grit.training.step import TrainStep

    config = tiny_config(experts=experts)
    config.training.objective = objective  # type: ignore[assignment]
    for name, value in layout.items():
        setattr(config.parallel, name, value)
    with parallel_job(config.parallel, seed=1) as context:
        chunks = build_chunks(config, VOCAB, context)
        if not Path(weights).exists():
            save_weights(chunks, context, Path(weights))
        load_weights(Path(weights), chunks, context)
        wrapped = wrap_chunks(chunks, config.parallel.overlap)
        optimizer = build_optimizer(config, wrapped)
        schedule = build_schedule(config, optimizer)
        step = TrainStep(config, context, wrapped, optimizer)
        records = []
        for number in range(STEPS):
            batch = make_batch(context.data_rank, context.data_size, objective=objective, rows=ROWS[number])
            set_learning_rate(schedule, number)
            records.append(step(batch))
        return records


def run_all(weights_directory: str, layouts: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Every layout and objective, one after another in the same processes."""
    results = {}
    for name, layout in layouts.items():
        experts = 4 if is_moe(name) else None
        weights = str(Path(weights_directory) / ("moe" if experts else "dense"))
        for objective in (kind for kind in OBJECTIVES if is_possible(name, kind)):
            results[f"{name}/{objective}"] = train_steps(layout, experts, weights, objective)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Reference on one process, then all layouts on two."""
    weights = str(tmp_path_factory.mktemp("weights"))
    reference = run_on_ranks(run_all, 1, tmp_path_factory.mktemp("one"), weights, {"one": {}, "one_moe": {}})[0]
    by_rank = run_on_ranks(run_all, 2, tmp_path_factory.mktemp("two"), weights, LAYOUTS)
    assert by_rank[0] == by_rank[1], "ranks report different metrics"
    return reference | by_rank[0]


@pytest.mark.parametrize(
    ("layout", "objective"), [(name, kind) for name in LAYOUTS for kind in OBJECTIVES if is_possible(name, kind)]
)
def test_layout_equals_one_process(results: dict[str, list[dict[str, float]]], layout: str, objective: str) -> None:
    reference = results[f"{'one_moe' if is_moe(layout) else 'one'}/{objective}"]
    for step, (ours, theirs) in enumerate(zip(results[f"{layout}/{objective}"], reference, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE, abs=ROUNDING), f"step {step} {name}"


def test_training_moves_the_loss(results: dict[str, list[dict[str, float]]]) -> None:
    for name in ("one/unified", "one_moe/unified"):
        losses = [record["loss_gen"] for record in results[name]]
        assert losses[0] > losses[-1]
