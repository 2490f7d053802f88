"""Shapes that only some model families have, on two processes: loss and every gradient against one process.

The forward passes of one process are compared with transformers in tests/parity/test_hf_import.py, so autograd's
gradient of one graph there is the reference. A layout's gradient is written as if it were weights and read back on one
process, so that it is put together by the code that puts checkpoints together.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch

from megatron_grit.config.schema import RunConfig
from tests.distributed.test_gradients import one_graph
from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, make_batch, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

MODELS: dict[str, dict[str, Any]] = {
    "gpt_neox": {
        "normalization": "layernorm",
        "activation": "gelu",
        "parallel_residual": "two_norms",
        "add_bias_linear": True,
        "rotary_percent": 0.5,
    },
    "gptj": {
        "normalization": "layernorm",
        "activation": "gelu_tanh",
        "parallel_residual": "one_norm",
        "add_mlp_bias": True,
        "add_output_bias": True,
        "rotary_interleaved": True,
    },
    "gpt_neo": {
        "normalization": "layernorm",
        "position_embedding": "learned_absolute",
        "attention_scale": 1.0,
        "sliding_window": 4,
        "window_layers": [1, 3],
        "add_attention_output_bias": True,
        "tie_embeddings": True,
    },
    "qwen3": {
        "qk_norm": True,
        "add_qkv_bias": True,
        "rope_type": "yarn",
        "rope_factor": 4.0,
        "rope_original_length": 16,
    },
    "qwen2_moe": {
        "experts": 4,
        "moe_ffn_hidden_size": 32,
        "moe_shared_ffn_hidden_size": 48,
        "moe_shared_expert_gate": True,
        "moe_normalize_top_k": False,
        "moe_dense_layers": [1],
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "ep2": {"expert": 2},
}
CASES = [
    (model, layout)
    for model in MODELS
    for layout in LAYOUTS
    if layout != ("tp2" if "moe" in model else "ep2")  # the engine wants sequence parallelism with experts
]


def family_config(model: str, layout: dict[str, Any]) -> RunConfig:
    config = tiny_config(**MODELS[model])
    for name, value in layout.items():
        setattr(config.parallel, name, value)
    return config


def write_references(directory: str) -> dict[str, float]:
    """Initial weights of each model, and loss and gradient of one graph over the whole batch."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import save_weights

    losses = {}
    for name in MODELS:
        config = family_config(name, {})
        with parallel_job(config.parallel, seed=1) as context:
            model = build_model(config, VOCAB, context)
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():  # biases and norms that are no zeros and ones
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            save_weights(model, context, Path(directory) / f"initial-{name}")
            batch = make_batch(rows=2)
            num_rows = len(batch.rows_of("embedding")) + len(batch.rows_of("generative"))
            # The router adds its balancing loss to the backward pass of each row: the mean over rows is wanted.
            MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / num_rows))
            loss = one_graph(model.train(), batch, config.loss.temperature)
            loss.backward()
            losses[name] = float(loss)
            gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            safetensors.torch.save_file(gradients, Path(directory) / f"graph-{name}.safetensors")
    return losses


def write_layout(model_name: str, layout: str, directory: str, name: str) -> float:
    """A layout's gradient; returns its loss."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_grit.models.decoder import build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights, save_weights
    from megatron_grit.training.step import TrainStep

    config = family_config(model_name, LAYOUTS[layout])
    with parallel_job(config.parallel, seed=1) as context:
        chunks = build_chunks(config, VOCAB, context)
        load_weights(Path(directory) / f"initial-{model_name}", chunks, context)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
        wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
        chunks[0].config.finalize_model_grads_func = finalize_model_grads
        batch = make_batch(context.data_rank, context.data_size, rows=2)
        loss = TrainStep(config, context, wrapped, None).accumulate_gradients(batch)["loss"]
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.copy_(parameter.main_grad)
        save_weights(chunks, context, Path(directory) / name)
        return loss


def run_layouts(directory: str) -> dict[str, float]:
    losses = {
        f"{model}-{layout}": write_layout(model, layout, directory, f"{model}-{layout}") for model, layout in CASES
    }
    # What the engine does for the norms of queries and keys, whose heads are on several ranks, is left out.
    engine = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    with mock.patch.object(engine, "_allreduce_non_tensor_model_parallel_grads", lambda *_, **__: None):
        losses["damaged"] = write_layout("qwen3", "tp2", directory, "damaged")
    return losses


def read_errors(directory: str, names: list[str]) -> dict[str, dict[str, float]]:
    """Relative error of every parameter's gradient."""
    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights

    errors = {}
    for name in names:
        model_name = "qwen3" if name == "damaged" else name.partition("-")[0]
        config = family_config(model_name, {})
        with parallel_job(config.parallel, seed=1) as context:
            model = build_model(config, VOCAB, context)
            load_weights(Path(directory) / name, model, context)
        theirs = safetensors.torch.load_file(Path(directory) / f"graph-{model_name}.safetensors")
        ours = {key: p.detach() for key, p in model.named_parameters()}
        assert ours.keys() == theirs.keys()
        errors[name] = {key: float((ours[key] - grad).norm() / grad.norm()) for key, grad in theirs.items()}
    return errors


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Any, Any]:
    """(losses of one process, losses of the ranks, errors)."""
    directory = str(tmp_path_factory.mktemp("families"))
    expected = run_on_ranks(write_references, 1, tmp_path_factory.mktemp("reference"), directory)[0]
    ranks = run_on_ranks(run_layouts, 2, tmp_path_factory.mktemp("ranks"), directory)
    errors = run_on_ranks(read_errors, 1, tmp_path_factory.mktemp("errors"), directory, list(ranks[0]))[0]
    return expected, ranks, errors


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_layout_equals_one_process(results: Any, model: str, layout: str) -> None:
    expected, ranks, errors = results
    name = f"{model}-{layout}"
    for rank in ranks:
        assert rank[name] == pytest.approx(expected[model], rel=1e-6)
    worst = max(errors[name], key=errors[name].get)
    assert errors[name][worst] < 1e-5, f"{worst}: relative error {errors[name][worst]:.2e}"


def test_a_reduction_that_is_left_out_is_missed(results: Any) -> None:
    wrong = {key for key, error in results[2]["damaged"].items() if error > 1e-2}
    assert wrong and all("_layernorm" in key and "self_attention" in key for key in wrong)
