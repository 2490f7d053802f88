"""Preferences: packed rows against formulas on single conversations, a cached reference against a live one, and every
layout against one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.distributed.kind_step import accumulate, compare_gradients, fill, gradient_error, loader_at, whole
from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, tiny_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo", "beta": 0.5, "label_smoothing": 0.1, "sft_weight": 0.2},
    "kto": {"loss": "kto", "beta": 0.5, "undesirable_weight": 0.7},
}
OTHERS: dict[str, dict[str, Any]] = {
    "ipo": {"loss": "ipo", "beta": 0.5},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.3},
    "orpo": {"loss": "orpo", "beta": 0.5},
}
"""Losses whose arithmetic after the log-probabilities is their own: at the layouts in which ranks share a sum of it."""
SHARED = ("DP2", "CP2")
ROW_TOKENS = 128
NUM_RECORDS = 8
NAMES = ("loss_preference", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins")


def write_data(prefix: Path, *, rated: bool) -> None:
    """Records of random tokens: pairs, and between them single answers where ``rated``."""
    from megatron_grit.data.indexed.roles import Role, RowKind
    from megatron_grit.data.indexed.writer import IndexedWriter

    random = np.random.default_rng(0)

    def tokens(least: int, most: int) -> list[int]:
        return random.integers(0, VOCAB, random.integers(least, most)).tolist()

    with IndexedWriter(prefix, RowKind.PREFERENCE, VOCAB) as writer:
        for number in range(NUM_RECORDS):
            lead = [(Role.TEMPLATE, tokens(2, 5)), (Role.USER, tokens(1, 5))]
            if number % 2:
                lead += [(Role.ANSWER, tokens(1, 4)), (Role.USER, tokens(1, 4))]
            chosen, rejected = [*lead, (Role.CHOSEN, tokens(1, 16))], [*lead, (Role.REJECTED, tokens(1, 16))]
            single = {2: chosen, 5: rejected}.get(number) if rated else None
            writer.add([*chosen, *rejected] if single is None else single)
        writer.finalize(tokenizer_fingerprint="of the test", template="none", limits={})


def run_case(folder: str, name: str, variant: str, change: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a step on all records, and each part of the gradient against that of one process, if there is one;
    else it is written.

    ``change`` may hold values of parallel.*, and ``row_tokens``, ``adapter``, ``reference``, ``same`` (the model is its
    reference) and ``damaged`` (each context parallel rank takes the sums of its own tokens for those of all).
    """
    from megatron_grit.config.kinds import option
    from megatron_grit.models.decoder import build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.objectives.base import RunStart
    from megatron_grit.training.optimizer import build_optimizer, wrap_chunks
    from megatron_grit.training.step import TrainStep

    config = tiny_config(num_layers=2)
    config.training.objective, config.data.tokens_per_row = "preference", change.get("row_tokens", ROW_TOKENS)
    config.training.steps, config.data.num_rows_multiple = 1, 2
    knobs = option(config, "preference")
    knobs.data, knobs.batch_size, knobs.weight = [f"{folder}/{variant}"], NUM_RECORDS, 0.5
    knobs.cache_dir, knobs.reference = f"{folder}/cache {name}", change.get("reference", "cache")
    for key, value in (VARIANTS | OTHERS)[variant].items():
        setattr(knobs, key, value)
    if change.get("same"):  # smoothing does not move the loss of chance, and a next-token loss would
        knobs.sft_weight = 0.0
    for key in ("tensor", "pipeline", "context"):
        setattr(config.parallel, key, change.get(key, 1))
    if "adapter" in change:
        config.adapter.kind = change["adapter"]
    gradient = Path(folder) / f"{variant}.safetensors"
    with parallel_job(config.parallel, seed=1) as context:
        chunks = build_chunks(config, VOCAB, context)
        start, later = _weights(Path(folder) / f"weights{change.get('adapter', '')}", chunks, context)
        loader = loader_at(config, context)
        wrapped = wrap_chunks(chunks, config.parallel.overlap)
        step = TrainStep(config, context, wrapped, build_optimizer(config, wrapped))
        fill(chunks, context, start)
        (objective,) = step.objectives
        kept = objective.start(RunStart(step=0, streams=loader.streams, chunks=chunks, pad_id=0))
        if not change.get("same"):
            fill(chunks, context, later)
        batch = loader.batch(0)
        with mock.patch(
            "megatron_grit.training.reference.forward.sum_over_group", _own if change.get("damaged") else _all
        ):
            metrics = accumulate(step, batch)
        found: dict[str, Any] = {"name": name, "metrics": metrics, "rows": len(batch.rows), "kept": kept}
        if objective.reference is not None:
            found["reference"] = objective.reference._sources[0].values.tolist()
        if "adapter" in change:  # most weights have no gradient
            return found
        found["parts"] = compare_gradients(gradient, step, chunks, context)
        if found["parts"] is None:
            fill(chunks, context, later)
            found["log_probs"] = _log_probs(chunks[0], loader)
            fill(chunks, context, start)
            found["reference_log_probs"] = _log_probs(chunks[0], loader)
        return found


def _all(values: torch.Tensor, group: Any) -> torch.Tensor:
    from megatron_grit.parallel.collectives import sum_over_group

    return sum_over_group(values, group)


def _own(values: torch.Tensor, group: Any) -> torch.Tensor:
    return values


def _weights(path: Path, chunks: Any, context: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of the reference, and those after some steps, of adapters alone where there are any."""
    import safetensors.torch

    from tests.distributed.grid_run import parts_of

    if not Path(f"{path}.start").exists():
        start = whole("weight", parts_of(chunks, context))
        generator = torch.Generator().manual_seed(5)
        later = {
            key: value + 0.05 * torch.randn(value.shape, generator=generator)
            if "adapter" in key or path.name == "weights"
            else value
            for key, value in start.items()
        }
        safetensors.torch.save_file(start, f"{path}.start")
        safetensors.torch.save_file(later, f"{path}.later")
    return safetensors.torch.load_file(f"{path}.start"), safetensors.torch.load_file(f"{path}.later")


def _log_probs(model: Any, loader: Any) -> list[list[list[float]]]:
    """By record and conversation: log-probability of its answer, and of the other record's in its place, one by one."""
    from megatron_grit.data.indexed.roles import Role, RowKind, split_conversations
    from megatron_grit.models.decoder import Output
    from tests.rows import make_row

    source = loader.streams["preference"].sources[0]

    def parts(record: int, place: int) -> tuple[list[int], list[int]]:
        spans = source.get(record)
        bounds = split_conversations([role for role, _ in spans])
        first, last = bounds[min(place, len(bounds) - 1)]
        own = spans[first:last]
        lead = [token for role, tokens in own[:-1] for token in tokens.tolist()]
        assert own[-1][0] in (Role.CHOSEN, Role.REJECTED)
        return lead, own[-1][1].tolist()

    def score(lead: list[int], answer: list[int]) -> float:
        tokens = torch.tensor(lead + answer)
        row = make_row(RowKind.GENERATIVE, [len(tokens)], len(tokens))
        row.tokens_1T = tokens[None]
        with torch.no_grad():
            logits = model(row, Output.LOGITS).double()
        each = logits[: len(tokens) - 1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        return float(each[len(lead) - 1 :].sum())

    found = []
    for record in range(len(source)):
        roles = [role for role, _ in source.get(record)]
        conversations = []
        for place, (_, last) in enumerate(split_conversations(roles)):
            lead, answer = parts(record, place)
            _, other = parts((record + len(source) // 2) % len(source), place)
            desirable = roles[last - 1] is Role.CHOSEN
            conversations.append([float(desirable), score(lead, answer), score(lead, other), float(len(answer))])
        found.append(conversations)
    return found


def compute(folder: str, cases: list[list[Any]]) -> list[dict[str, Any]]:
    return [run_case(folder, *case) for case in cases]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the ranks found, by case: one process first, the layouts on two."""
    folder = tmp_path_factory.mktemp("preference")
    for variant in (*VARIANTS, *OTHERS):
        write_data(folder / variant, rated=variant == "kto")
    single: list[list[Any]] = [[variant, variant, {}] for variant in (*VARIANTS, *OTHERS)]
    single += [[f"{variant} unpacked", variant, {"row_tokens": 48}] for variant in VARIANTS]
    single += [["same", "dpo", {"same": True}], ["same unpacked", "dpo", {"same": True, "row_tokens": 48}]]
    adapters = {"adapter": "lora"}
    single += [["cached", "dpo", adapters], ["live", "dpo", adapters | {"reference": "adapters_off"}]]
    double = [[f"{variant} {name}", variant, layout] for variant in VARIANTS for name, layout in LAYOUTS.items()]
    double += [[f"{variant} {name}", variant, LAYOUTS[name]] for variant in OTHERS for name in SHARED]
    double.append(["damaged", "dpo", LAYOUTS["CP2"] | {"damaged": True}])
    found: dict[str, list[dict[str, Any]]] = {}
    for size, cases in ((1, single), (2, double)):
        for rank in run_on_ranks(compute, size, tmp_path_factory.mktemp("ranks"), str(folder), cases):
            for case in rank:
                found.setdefault(case["name"], []).append(case)
    return found


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def test_pairs_have_the_closed_form(results: dict[str, list[dict[str, Any]]]) -> None:
    (one,) = results["dpo"]
    beta, smoothing = 0.5, 0.1
    losses, rewards, labels, sft = [], [], 0.0, 0.0
    for policy, reference in zip(one["log_probs"], one["reference_log_probs"], strict=True):
        (is_chosen, first, _, size), (is_other, second, _, _) = policy
        assert (is_chosen, is_other) == (1, 0)
        reward = beta * (first - reference[0][1]), beta * (second - reference[1][1])
        margin = reward[0] - reward[1]
        losses.append(-(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin))
        rewards.append(reward)
        labels, sft = labels + size, sft - first
    metrics, loss = one["metrics"], np.mean(losses) + 0.2 * sft / labels
    assert metrics["loss_preference"] == pytest.approx(loss, abs=1e-5)
    assert metrics["loss"] == pytest.approx(0.5 * loss, abs=1e-5)
    assert [metrics["rewards/chosen"], metrics["rewards/rejected"]] == pytest.approx(np.mean(rewards, 0), abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(np.mean(rewards, 0) @ [1, -1], abs=1e-5)
    assert metrics["rewards/accuracies"] == np.mean([first > second for first, second in rewards])
    assert abs(metrics["rewards/margins"]) > 1e-3
    cached = [[conversation[1] for conversation in record] for record in one["reference_log_probs"]]
    assert np.array(one["reference"]) == pytest.approx(np.array(cached), abs=1e-4)


def log_odds(log_prob: float) -> float:
    return log_prob - math.log1p(-math.exp(log_prob))


@pytest.mark.parametrize("loss", OTHERS)
def test_other_pairs_have_the_closed_form(results: dict[str, list[dict[str, Any]]], loss: str) -> None:
    """Of log-probabilities a token; orpo's with the next-token loss of the preferred answers."""
    (one,) = results[loss]
    losses, rewards, labels, sft = [], [], 0.0, 0.0
    for policy, reference in zip(one["log_probs"], one["reference_log_probs"], strict=True):
        (_, first, _, size), (_, second, _, other_size) = policy
        means = first / size, second / other_size
        if loss == "ipo":
            means = means[0] - reference[0][1] / size, means[1] - reference[1][1] / other_size
            losses.append((means[0] - means[1] - 1 / (2 * 0.5)) ** 2)
        elif loss == "simpo":
            losses.append(-log_sigmoid(2.0 * (means[0] - means[1] - 0.3)))
        else:
            losses.append(-0.5 * log_sigmoid(log_odds(means[0]) - log_odds(means[1])))
            labels, sft = labels + size, sft - first
        rewards.append(OTHERS[loss]["beta"] * np.array(means))
    metrics, expected = one["metrics"], np.mean(losses) + (sft / labels if labels else 0.0)
    assert metrics["loss_preference"] == pytest.approx(expected, abs=1e-5)
    assert [metrics["rewards/chosen"], metrics["rewards/rejected"]] == pytest.approx(np.mean(rewards, 0), abs=1e-5)
    assert metrics["rewards/accuracies"] == np.mean([first > second for first, second in rewards])
    assert abs(metrics["rewards/margins"]) > 1e-4
    assert ("reference" in one) == (loss == "ipo")


@pytest.mark.parametrize("layout", SHARED)
@pytest.mark.parametrize("loss", OTHERS)
def test_other_losses_train_alike(results: dict[str, list[dict[str, Any]]], loss: str, layout: str) -> None:
    (one,), ranks = results[loss], results[f"{loss} {layout}"]
    for rank in ranks:
        assert rank["metrics"] == pytest.approx(one["metrics"], abs=1e-6, rel=1e-6)
    assert gradient_error(ranks) < 1e-5


def test_rated_answers_have_the_closed_form(results: dict[str, list[dict[str, Any]]]) -> None:
    (one,) = results["kto"]
    pairs = zip(one["log_probs"], one["reference_log_probs"], strict=True)
    every = [(now, before) for policy, reference in pairs for now, before in zip(policy, reference, strict=True)]
    assert len(every) == 2 * NUM_RECORDS - 2
    kl = max(0.0, float(np.mean([now[2] - before[2] for now, before in every])))
    losses = []
    for (desirable, log_prob, *_), (_, reference, *_) in every:
        sign, weight = (1, 1.0) if desirable else (-1, 0.7)
        losses.append(weight * (1 - 1 / (1 + math.exp(-0.5 * sign * (log_prob - reference - kl)))))
    assert one["metrics"]["kl"] == pytest.approx(kl, abs=1e-5)
    assert one["metrics"]["loss_preference"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_model_that_is_its_reference_has_the_loss_of_chance(results: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("same", "same unpacked"):
        (found,) = results[name]
        metrics = found["metrics"]
        assert [metrics["rewards/chosen"], metrics["rewards/rejected"]] == pytest.approx([0, 0], abs=2e-6)
        assert metrics["loss_preference"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unpacked_rows_train_alike(results: dict[str, list[dict[str, Any]]], variant: str) -> None:
    (packed,), (alone,) = results[variant], results[f"{variant} unpacked"]
    assert alone["rows"] > packed["rows"]
    assert alone["metrics"] == pytest.approx(packed["metrics"], abs=1e-6, rel=1e-6)
    assert gradient_error([alone]) < 1e-5


def test_a_cached_reference_is_the_live_one(results: dict[str, list[dict[str, Any]]]) -> None:
    (cached,), (live,) = results["cached"], results["live"]
    assert live["metrics"] == pytest.approx(cached["metrics"], abs=1e-6, rel=1e-6)
    assert "reference" in cached and "reference" not in live and not live["kept"]
    assert abs(cached["metrics"]["rewards/margins"]) > 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_train_alike(results: dict[str, list[dict[str, Any]]], variant: str, layout: str) -> None:
    (one,), ranks = results[variant], results[f"{variant} {layout}"]
    for rank in ranks:
        assert rank["metrics"] == pytest.approx(one["metrics"], abs=1e-6, rel=1e-6)
        assert rank["kept"] == one["kept"], "the fingerprint of the reference is that of one process"
        assert np.array(rank["reference"]) == pytest.approx(np.array(one["reference"]), abs=1e-4)
    assert gradient_error(ranks) < 1e-5


def test_a_damaged_layout_is_seen(results: dict[str, list[dict[str, Any]]]) -> None:
    ranks, (one,) = results["damaged"], results["dpo"]
    assert ranks[0]["metrics"]["loss_preference"] != pytest.approx(one["metrics"]["loss_preference"], abs=1e-3)
    assert gradient_error(ranks) > 1e-2
