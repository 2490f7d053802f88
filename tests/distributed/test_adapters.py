"""Adapters trained over several ranks come out as one process trains them, weight by weight."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch

from megatron_grit.config.schema import RunConfig
from tests.distributed.grid_run import parts_of
from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, make_batch, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, ROWS = 2, 2  # the second step takes what the first one left in the optimizer
TOLERANCE = 1e-6

# Model, adapter and training options of a reference, by name.
MODELS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora_deep": {"model": {"num_layers": 4}},
    "dora": {"adapter": {"kind": "dora"}, "model": {"add_qkv_bias": True}},
    # Of two layers the gradient is too small to be clipped, and a wrong norm would change nothing.
    "moe": {
        "model": {
            "num_layers": 4,
            "num_experts": 4,
            "moe_aux_loss_coeff": 0.01,
            "moe_shared_ffn_hidden_size": 96,
        }
    },
    "dora_moe": {"adapter": {"kind": "dora"}, "model": {"num_experts": 4, "moe_aux_loss_coeff": 0.01}},
    "rslora_some": {"adapter": {"targets": ["q_proj", "v_proj", "up_proj"], "rslora": True}},
    "embeddings": {
        "model": {"tie_embeddings": True},
        "training": {"trainable": ["embeddings", "norms"], "frozen": ["decoder.layers.0.*"]},
    },
    "head": {"embedding": {"projection_dim": 24}},
    "bitfit": {
        "adapter": {"kind": "none"},
        "model": {"add_bias_linear": True, "normalization": "layernorm", "add_output_bias": True},
        "training": {"trainable": ["biases"]},
    },
    "last_layer": {"adapter": {"kind": "none"}, "training": {"trainable": ["decoder.layers.1.*"], "recompute": "full"}},
}
TP2, SP = {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}
PP2 = {"pipeline": 2}
# Model and layout of each case; what else differs from the reference's run.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tp2": ("lora", TP2, {}),
    "sp": ("lora", SP, {}),
    "sp_recomputed": ("lora", SP, {"recompute": "full"}),
    "pp2": ("lora", PP2, {}),
    "pp2_recomputed": ("lora", PP2, {"recompute": "full"}),
    "pp2_vpp2": ("lora_deep", PP2 | {"virtual_pipeline": 2}, {}),
    "cp2": ("lora", {"context": 2}, {}),
    "dp2": ("lora", {}, {}),
    "dp2_overlap": ("lora", {"overlap": True}, {}),
    "dora_tp2": ("dora", TP2, {}),
    "dora_sp": ("dora", SP, {}),
    "moe_ep2": ("moe", {"expert": 2}, {}),
    "moe_sp": ("moe", SP, {}),
    "moe_etp2": ("moe", {"expert_tensor": 2}, {}),
    "moe_sp_etp1": ("moe", SP | {"expert_tensor": 1}, {}),
    "moe_sp_ep2": ("moe", SP | {"expert_tensor": 1, "expert": 2}, {}),
    "dora_moe_sp": ("dora_moe", SP, {}),
    "dora_moe_etp2": ("dora_moe", {"expert_tensor": 2}, {}),
    "some_tp2": ("rslora_some", TP2, {}),
    "embeddings_pp2": ("embeddings", PP2, {}),
    "embeddings_sp": ("embeddings", SP, {}),
    "head_pp2": ("head", PP2, {}),
    "bitfit_tp2": ("bitfit", TP2, {}),
    "bitfit_sp": ("bitfit", SP, {}),
    "last_layer_pp2": ("last_layer", PP2, {}),
}
# Layouts whose masks of dropout are compared: drawn again when a layer is recomputed, the same where ranks have to
# agree. One process draws others.
DROPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2": ("lora", TP2),
    "sp": ("lora", SP),
    "pp2": ("lora", PP2),
    "moe_sp": ("moe", SP),
    "moe_etp2": ("moe", {"expert_tensor": 2}),
}


def model_of(name: str) -> RunConfig:
    """Two layers do where no pipeline is interleaved."""
    return tiny_config(**({"num_layers": 2} | MODELS[name].get("model", {})))


def config_of(model: str, layout: dict[str, Any], training: dict[str, Any]) -> RunConfig:
    options = MODELS[model]
    config = model_of(model)
    config.adapter.kind, config.adapter.rank = "lora", 4
    sections = {"adapter": options.get("adapter", {}), "embedding": options.get("embedding", {}), "parallel": layout}
    training = dict(training)
    config.adapter.dropout = training.pop("dropout", 0.0)
    sections["training"] = options.get("training", {}) | training
    for section, values in sections.items():
        for name, value in values.items():
            setattr(getattr(config, section), name, value)
    # Adam divides a gradient by its own size: of one near zero it would blow up the rounding.
    config.optimizer.eps = 1e-4
    return config


def lose_sums_over_sequence_parallel_ranks() -> AbstractContextManager[Any]:
    """Each rank keeps the gradient of its own tokens."""
    from megatron_grit.models.adapters.split import Split

    mark = Split.mark

    def without(self: Split, name: str, parameter: Any, allreduce: bool) -> None:
        mark(self, name, parameter, allreduce)
        parameter.sequence_parallel = False

    return mock.patch.object(Split, "mark", without)


def lose_sums_over_tensor_parallel_ranks() -> AbstractContextManager[Any]:
    """What a column parallel part hands back is the share of one rank's rows."""
    return mock.patch("megatron_grit.models.adapters.split.copy_to_tensor_model_parallel_region", lambda x, group: x)


def count_replicas_in_the_norm() -> AbstractContextManager[Any]:
    """Every rank's copy of an expert's replicated part counts towards the gradient norm."""
    from megatron_grit.models.adapters.split import Split

    mark = Split.mark

    def without(self: Split, name: str, parameter: Any, allreduce: bool) -> None:
        mark(self, name, parameter, allreduce)
        parameter.shared = False

    return mock.patch.object(Split, "mark", without)


def reduce_experts_as_dense() -> AbstractContextManager[Any]:
    """Adapters of experts on several ranks are averaged as if all ranks had the same ones."""
    from megatron_grit.models.adapters.split import Split

    mark = Split.mark
    return mock.patch.object(Split, "mark", lambda self, name, parameter, _: mark(self, name, parameter, True))


# A case, and what is broken in it.
DAMAGED: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "sequence_parallel": ("sp", lose_sums_over_sequence_parallel_ranks),
    "tensor_parallel": ("tp2", lose_sums_over_tensor_parallel_ranks),
    "expert_tensor": ("moe_etp2", lose_sums_over_tensor_parallel_ranks),
    "norm": ("moe_etp2", count_replicas_in_the_norm),
    "expert": ("moe_ep2", reduce_experts_as_dense),
}


def train(case: tuple[str, dict[str, Any], dict[str, Any]], directory: str, *, is_reference: bool) -> dict[str, Any]:
    """Unified steps with GradCache. The reference writes what it trained, other layouts compare with it."""
    from megatron_grit.models.adapters import adapted_linears
    from megatron_grit.models.decoder import build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.audit.weights import find_unequal_replicas
    from megatron_grit.training.checkpoint import load_weights, save_weights
    from megatron_grit.training.optimizer import build_optimizer, build_schedule, set_learning_rate, wrap_chunks
    from megatron_grit.training.step import TrainStep

    config = config_of(*case)
    weights, trained = Path(directory) / f"{case[0]}_base", Path(directory) / f"{case[0]}.safetensors"
    if is_reference:
        plain = model_of(case[0])
        plain.embedding = config.embedding
        with parallel_job(plain.parallel, seed=1) as context:
            save_weights(build_chunks(plain, VOCAB, context), context, weights)
    with parallel_job(config.parallel, seed=1) as context:
        chunks = build_chunks(config, VOCAB, context)
        load_weights(weights, chunks, context)
        for chunk in chunks:
            for linear in adapted_linears(chunk).values():
                linear.adapter.reset_magnitudes(linear)
        named = [pair for chunk in chunks for pair in chunk.named_parameters()]
        frozen = [(name, p, p.detach().clone()) for name, p in named if not p.requires_grad]
        wrapped = wrap_chunks(chunks, config.parallel.overlap)
        optimizer = build_optimizer(config, wrapped)
        optimizer.reload_model_params()
        schedule = build_schedule(config, optimizer)
        step = TrainStep(config, context, wrapped, optimizer)
        records = []
        for number in range(STEPS):
            set_learning_rate(schedule, number)
            records.append(step(make_batch(context.data_rank, context.data_size, rows=ROWS)))
        for chunk in wrapped if config.parallel.overlap else []:
            chunk.start_param_sync(force_sync=True)
        moved = [name for name, parameter, before in frozen if not torch.equal(parameter, before)]
        assert not any(hasattr(parameter, "main_grad") or parameter.grad is not None for _, parameter, _ in frozen)
        unequal = find_unequal_replicas(chunks, context)
        parts = {f"{part.key} {list(part.place)}": part for part in parts_of(chunks, context)}
        if is_reference:
            safetensors.torch.save_file({name: part.tensor.detach().clone() for name, part in parts.items()}, trained)
            return {"records": records, "moved": moved, "unequal": unequal}
        whole = safetensors.torch.load_file(trained)
        errors = {}
        for name, part in parts.items():
            inside = tuple(slice(o, o + n) for o, n in zip(part.offset, part.tensor.shape, strict=True))
            expected = whole[name][inside]
            held = part.tensor.detach()[tuple(slice(0, n) for n in expected.shape)]
            errors[name] = float((held - expected).abs().max()) if expected.numel() else 0.0
        worst = max(errors, key=lambda name: errors[name])
        result = {"records": records, "moved": moved, "unequal": unequal}
        return result | {"error": errors[worst], "worst": worst}


def run_references(directory: str) -> dict[str, Any]:
    return {model: train((model, {}, {}), directory, is_reference=True) for model in MODELS}


def run_cases(directory: str, names: list[str]) -> dict[str, Any]:
    results = {name: train(CASES[name], directory, is_reference=False) for name in names}
    for name, (case, damage) in DAMAGED.items():
        with damage():
            results[f"damaged {name}"] = train(CASES[case], directory, is_reference=False)
    for name, (model, layout) in DROPPED.items():
        for recompute in ("none", "full"):
            case = (model, layout, {"recompute": recompute, "dropout": 0.3})
            results[f"dropped {name} {recompute}"] = train(case, directory, is_reference=False)
    return results


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def references(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = run_on_ranks(run_references, 1, tmp_path_factory.mktemp("one"), str(directory))[0]
    return found


@pytest.fixture(scope="module")
def results(references: Any, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(run_cases, 2, tmp_path_factory.mktemp("two"), str(directory), list(CASES))


@pytest.mark.parametrize("name", CASES)
def test_a_layout_trains_what_one_process_trains(
    references: dict[str, Any], results: list[dict[str, Any]], name: str
) -> None:
    expected = references[CASES[name][0]]
    for rank in results:
        assert rank[name]["error"] <= TOLERANCE, rank[name]["worst"]
        assert rank[name]["unequal"] is None
        for ours, theirs in zip(rank[name]["records"], expected["records"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_lost_reduction_is_seen(results: list[dict[str, Any]], name: str) -> None:
    errors = [rank[f"damaged {name}"]["error"] for rank in results]
    assert max(errors) > 10 * TOLERANCE


def test_frozen_weights_stay_bit_for_bit(references: dict[str, Any], results: list[dict[str, Any]]) -> None:
    for run in [*references.values(), *(run for rank in results for run in rank.values())]:
        assert run["moved"] == []


@pytest.mark.parametrize("name", DROPPED)
def test_masks_of_dropout(references: dict[str, Any], results: list[dict[str, Any]], name: str) -> None:
    plain = references[DROPPED[name][0]]["records"][-1]["loss"]
    for rank in results:
        once, again = (rank[f"dropped {name} {recompute}"] for recompute in ("none", "full"))
        assert once["unequal"] is None
        assert once["records"] == again["records"]
        assert abs(once["records"][-1]["loss"] - plain) > 1e-3
