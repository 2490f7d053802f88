"""Policy gradients: packed rows against TRL's formula on single completions, and every layout against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.distributed.kind_step import accumulate, compare_gradients, fill, gradient_error, loader_at, start_from
from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, tiny_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "sequence", "clip_high": 0.28},
    "dapo": {"aggregation": "token"},
    "start": {"behavior": "start", "kl_weight": 0.3, "aggregation": "sequence", "clip_low": 0.02, "clip_high": 0.03},
    "gspo": {"aggregation": "sequence", "ratio": "sequence", "clip_low": 0.05, "clip_high": 0.06, "advantages": "mean"},
}
ROW_TOKENS = 96
FACTOR = 1.3
NUM_PROMPTS, GROUP = 4, 4


def write_data(prefix: Path) -> None:
    """Completions of random tokens, sampled by a policy that knew little."""
    from megatron_grit.data.indexed.roles import Role, RowKind
    from megatron_grit.data.indexed.rollouts import write_rollouts
    from megatron_grit.data.indexed.writer import IndexedWriter

    random = np.random.default_rng(0)
    groups, rewards, behavior = [], [], []
    with IndexedWriter(prefix, RowKind.GENERATIVE, VOCAB) as writer:
        for prompt in range(NUM_PROMPTS):
            lead = random.integers(0, VOCAB, random.integers(2, 6)).tolist()
            for _ in range(GROUP):
                sampled = random.integers(0, VOCAB, random.integers(1, 24)).tolist()
                writer.add([(Role.TEMPLATE, lead), (Role.ANSWER, sampled)])
                groups.append(prompt)
                rewards.append(float(random.integers(0, 3)) / 2)
                behavior += [np.nan] * len(lead)
                behavior += (random.normal(-np.log(VOCAB), 0.3, len(sampled))).tolist()
        meta = writer.finalize(tokenizer_fingerprint="of the test", template="none", limits={})
    write_rollouts(prefix, meta, np.array(groups), np.array(rewards), np.array(behavior), {})


def run_case(
    prefix: str, folder: str, name: str, variant: str, layout: dict[str, Any], row_tokens: int = ROW_TOKENS
) -> dict[str, Any]:
    """Metrics of a step on all completions, and each part of the gradient against that of one process, if there is one;
    else it is written."""
    if name.endswith("damaged"):  # each context parallel rank takes its part of a completion for all of it
        with mock.patch("megatron_grit.training.objectives.rollout.sum_over_group", lambda values, group: values):
            return run_case(prefix, folder, name.removesuffix("damaged") + "control", variant, layout, row_tokens)
    from megatron_grit.config.kinds import option
    from megatron_grit.models.decoder import build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.optimizer import build_optimizer, wrap_chunks
    from megatron_grit.training.step import TrainStep

    config = tiny_config(num_layers=2)
    config.training.objective, config.data.tokens_per_row = "rollout", row_tokens
    config.data.num_rows_multiple = 2
    knobs = option(config, "rollout")
    knobs.data, knobs.batch_size, knobs.weight = [prefix], NUM_PROMPTS * GROUP, 0.5
    for key, value in VARIANTS[variant].items():
        setattr(knobs, key, value)
    for key, value in layout.items():
        setattr(config.parallel, key, value)
    config.output_dir = str(Path(folder) / name)
    reference = Path(folder) / f"{variant}.safetensors"
    with parallel_job(config.parallel, seed=1) as context:
        chunks = build_chunks(config, VOCAB, context)
        start = start_from(Path(folder) / "weights.safetensors", chunks, context)
        loader = loader_at(config, context)
        batch = loader.batch(0)
        wrapped = wrap_chunks(chunks, config.parallel.overlap)
        optimizer = build_optimizer(config, wrapped)
        step = TrainStep(config, context, wrapped, optimizer)
        before = None if reference.exists() else _policy(chunks[0], loader)
        if variant == "start":
            _move_away(step, chunks, loader)
        metrics = accumulate(step, batch)
        found: dict[str, Any] = {"name": name, "metrics": metrics, "rows": len(batch.rows)}
        found["parts"] = compare_gradients(reference, step, chunks, context)
        if found["parts"] is None:
            fill(chunks, context, start)
            if variant == "start":
                with torch.no_grad():
                    for parameter in chunks[0].parameters():
                        parameter.mul_(FACTOR)
            found["closed"] = _closed_form(before, _policy(chunks[0], loader), loader, knobs)
        return found


def _move_away(step: Any, chunks: list[Any], loader: Any) -> None:
    """Begin a run, and change the model: the weights that it began with are those of its reference."""
    from megatron_grit.training.objectives.base import RunStart

    (objective,) = step.objectives
    saved = objective.start(RunStart(step=0, streams=loader.streams, chunks=chunks, pad_id=0))
    assert set(saved) == {"behavior", "reference"}
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.mul_(FACTOR)
    # The second time nothing is computed: the weights are others now.
    objective.start(RunStart(step=1, streams=loader.streams, chunks=chunks, pad_id=0, saved=saved))


def _policy(model: Any, loader: Any) -> list[torch.Tensor]:
    """Log-probabilities of the tokens of each completion of the step but its first, one completion a row."""
    from megatron_grit.data.rows.stream import PlannedRow
    from megatron_grit.models.decoder import Output

    stream, found = loader.streams["rollout"], []
    for segment in stream.segments(0):
        row = stream.make_row(PlannedRow(segments=[segment], slots=np.arange(1)), segment.length, 0)
        with torch.no_grad():
            logits = model(row, Output.LOGITS).double()
        tokens = torch.from_numpy(stream.sources[0].tokens(segment.record).astype(np.int64))
        found.append(logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0])
    return found


def _closed_form(before: list[torch.Tensor] | None, policy: list[torch.Tensor], loader: Any, knobs: Any) -> float:
    """TRL's formula on completions one by one, padded by nothing."""
    stream = loader.streams["rollout"]
    known = stream.rollouts[0]
    losses: list[torch.Tensor] = []
    assert before is not None
    for segment, log_probs, reference in zip(stream.segments(0), policy, before, strict=True):
        behavior = torch.from_numpy(known.behavior(segment.record, 1, segment.length)).double()
        sampled = ~behavior.isnan()
        if knobs.behavior == "start":
            behavior = reference
        log_ratio = (log_probs - behavior)[sampled]
        if knobs.ratio == "sequence":
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        ratio, advantage = log_ratio.exp(), float(known.advantages_R[segment.record])
        clipped = ratio.clamp(1 - knobs.clip_low, 1 + knobs.clip_high)
        away = (reference - log_probs)[sampled]
        losses.append(
            -torch.minimum(ratio * advantage, clipped * advantage) + knobs.kl_weight * (away.exp() - away - 1)
        )
    if knobs.aggregation == "token":
        return float(torch.cat(losses).mean())
    return float(torch.stack([loss.mean() for loss in losses]).mean())


def compute(prefix: str, folder: str, cases: list[list[Any]]) -> list[dict[str, Any]]:
    return [run_case(prefix, folder, *case) for case in cases]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the ranks found, by case: one process first, the layouts on two."""
    folder = tmp_path_factory.mktemp("rollout")
    prefix = folder / "sampled"
    write_data(prefix)
    single = [[variant, variant, {}] for variant in VARIANTS]
    single += [[f"{variant} unpacked", variant, {}, 32] for variant in VARIANTS]
    double = [[f"{variant} {name}", variant, layout] for variant in VARIANTS for name, layout in LAYOUTS.items()]
    double.append(["gspo CP2 damaged", "gspo", LAYOUTS["CP2"]])
    found: dict[str, list[dict[str, Any]]] = {}
    for size, cases in ((1, single), (2, double)):
        for rank in run_on_ranks(compute, size, tmp_path_factory.mktemp("ranks"), str(prefix), str(folder), cases):
            for case in rank:
                found.setdefault(case["name"], []).append(case)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_rows_have_the_closed_form(results: dict[str, list[dict[str, Any]]], variant: str) -> None:
    (one,) = results[variant]
    metrics = one["metrics"]
    assert metrics["loss_rollout"] == pytest.approx(one["closed"], abs=1e-6)
    assert metrics["loss"] == pytest.approx(0.5 * one["closed"], abs=1e-6)
    assert abs(one["closed"]) > 1e-3
    assert 0 < metrics["clipped_rollout"] < 1 and metrics["kl_rollout"] > 1e-4
    assert ("kl_reference_rollout" in metrics) == (variant == "start")
    assert metrics["reward_rollout"] == pytest.approx(results["grpo"][0]["metrics"]["reward_rollout"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_unpacked_rows_train_alike(results: dict[str, list[dict[str, Any]]], variant: str) -> None:
    (packed,), (alone,) = results[variant], results[f"{variant} unpacked"]
    assert alone["rows"] > packed["rows"]
    assert alone["metrics"] == pytest.approx(packed["metrics"], abs=1e-6)
    assert gradient_error([alone]) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_train_alike(results: dict[str, list[dict[str, Any]]], variant: str, layout: str) -> None:
    (one,), ranks = results[variant], results[f"{variant} {layout}"]
    for rank in ranks:
        assert rank["metrics"] == pytest.approx(one["metrics"], abs=1e-6)
    assert gradient_error(ranks) < 1e-5


def test_a_damaged_layout_is_seen(results: dict[str, list[dict[str, Any]]]) -> None:
    ranks = results["gspo CP2 control"]
    assert abs(ranks[0]["metrics"]["loss_rollout"] - results["gspo"][0]["metrics"]["loss_rollout"]) > 1e-4
    assert gradient_error(ranks) > 1e-2
