"""Every kind of layout against one autograd graph on one process: loss, and the gradient of every parameter.

A layout's gradient is written as if it were weights and read back on one process, so that it is put together by the
same code that puts checkpoints together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch

from megatron_grit.config.schema import RunConfig
from tests.distributed.harness import run_on_ranks
from tests.distributed.test_gradients import one_graph
from tests.rows import VOCAB, make_batch, tiny_config

MODELS: dict[str, dict[str, Any]] = {"dense": {}, "moe": {"experts": 4}, "tied": {"tie_embeddings": True}}
SP = {"tensor": 2, "sequence_parallel": True}
# Number of processes, model, layout. What is left over of the processes is data parallel.
GRID: dict[str, tuple[int, str, dict[str, Any]]] = {
    "tp2": (2, "dense", {"tensor": 2}),
    "tp2_sp": (2, "dense", SP),
    "dp2": (2, "dense", {}),
    "cp2": (2, "dense", {"context": 2}),
    "pp2_vpp2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}),
    "pp2_vpp4": (2, "tied", {"pipeline": 2, "virtual_pipeline": 4}),
    "moe_tp2_sp": (2, "moe", SP),
    "moe_ep2": (2, "moe", {"expert": 2}),
    "moe_cp2": (2, "moe", {"context": 2}),
    "moe_cp2_ep2": (2, "moe", {"context": 2, "expert": 2}),
    "moe_pp2_vpp2": (2, "moe", {"pipeline": 2, "virtual_pipeline": 2}),
    "moe_tp2_sp_ep2": (2, "moe", SP | {"expert": 2, "expert_tensor": 1}),
    "pp4": (4, "dense", {"pipeline": 4}),
    "pp4_vpp2": (4, "dense", {"pipeline": 4, "virtual_pipeline": 2}),
    "tied_pp4": (4, "tied", {"pipeline": 4}),
    "cp4": (4, "dense", {"context": 4}),
    "tp4_sp": (4, "dense", {"tensor": 4, "sequence_parallel": True}),
    "cp2_tp2": (4, "dense", {"context": 2, "tensor": 2}),
    "cp2_tp2_sp": (4, "tied", SP | {"context": 2}),
    "cp2_pp2": (4, "dense", {"context": 2, "pipeline": 2}),
    "cp2_dp2": (4, "dense", {"context": 2}),
    "pp2_vpp2_dp2": (4, "dense", {"pipeline": 2, "virtual_pipeline": 2}),
    "moe_ep4": (4, "moe", {"expert": 4}),
    "moe_pp4_vpp2": (4, "moe", {"pipeline": 4, "virtual_pipeline": 2}),
    "moe_cp2_tp2_sp_ep2": (4, "moe", SP | {"context": 2, "expert": 2}),
    "moe_cp2_pp2_ep2": (4, "moe", {"context": 2, "pipeline": 2, "expert": 2}),
    "moe_etp2_ep2": (4, "moe", {"expert": 2, "expert_tensor": 2}),
    "tp2_sp_pp2_dp2": (8, "dense", SP | {"pipeline": 2}),
    "tp2_sp_pp2_vpp2_cp2": (8, "dense", SP | {"pipeline": 2, "virtual_pipeline": 2, "context": 2}),
    "pp4_vpp2_dp2": (8, "dense", {"pipeline": 4, "virtual_pipeline": 2}),
    "pp4_cp2": (8, "tied", {"pipeline": 4, "context": 2}),
    "pp8": (8, "dense", {"pipeline": 8}),
    "cp4_tp2_sp": (8, "dense", SP | {"context": 4}),
    "moe_tp2_sp_pp2_ep2": (8, "moe", SP | {"pipeline": 2, "expert": 2}),
    "moe_cp2_tp2_sp_ep4": (8, "moe", SP | {"context": 2, "expert": 4, "expert_tensor": 1}),
    "moe_pp4_vpp2_cp2_ep2": (8, "moe", {"pipeline": 4, "virtual_pipeline": 2, "context": 2, "expert": 2}),
}
FAST = 2  # processes


def batch_exchanges() -> Any:
    """Both stages of an interleaved pipeline send to and receive from one neighbour: batched, tensors are mixed up."""
    from megatron_grit.models import gpt

    original = gpt.transformer_config

    def with_batches(config: RunConfig) -> Any:
        engine_config = original(config)
        engine_config.overlap_p2p_comm, engine_config.batch_p2p_comm = False, True
        return engine_config

    return mock.patch.object(gpt, "transformer_config", with_batches)


def lose_boundaries_of_middle_stages() -> Any:
    """The tokens of a row attend across its segments on every stage but the first and the last."""
    from megatron_grit.models.attention import PackedSegments

    original = PackedSegments.of_row

    def of_row(*row: Any) -> PackedSegments:
        segments = original(*row)
        if 0 < torch.distributed.get_rank() < torch.distributed.get_world_size() - 1:
            segments.lengths = segments.key_lengths = [sum(segments.lengths)]
        return segments

    return mock.patch.object(PackedSegments, "of_row", of_row)


def fall_back_to_causal() -> Any:
    """What the engine's own attention does where no mask is given."""
    from megatron_grit.models import gpt
    from megatron_grit.models.attention import AttentionMode

    return mock.patch.object(gpt, "attention_mode", lambda *_: AttentionMode.CAUSAL)


def scale_by_context_size() -> Any:
    """A loss that is not a share of a sum: the engine multiplies it by the context parallel size."""
    from megatron_grit.training.step import TrainStep

    original = TrainStep._run_schedule

    def run_schedule(self: Any, forward_step: Any, *args: Any, **kwargs: Any) -> Any:
        def doubled(iterator: Any, model: Any) -> Any:
            output, loss_function = forward_step(iterator, model)

            def scaled(output: torch.Tensor) -> Any:
                loss, metrics = loss_function(output)
                return loss * self.context.context_size, metrics

            return output, scaled

        return original(self, doubled, *args, **kwargs)

    return mock.patch.object(TrainStep, "_run_schedule", run_schedule)


def take_another_slice() -> Any:
    """Context parallel ranks hold consecutive tokens, and the keys are picked as if they did not."""
    from megatron_grit.models import row_share

    def consecutive(row_length: int, rank: int, size: int) -> torch.Tensor:
        return torch.arange(row_length).view(size, -1)[rank]

    places = row_share.gathered_places
    right_places = {size: places(48, size) for size in (2, 4)}
    return mock.patch.multiple(
        row_share, held_positions=consecutive, gathered_places=lambda _, size: right_places[size]
    )


def pool_the_slice() -> Any:
    """Sums over a segment's tokens are not taken over the ranks that hold them."""
    from megatron_grit.models import pooling

    return mock.patch.object(pooling, "sum_over_group", lambda values, group: values)


# Layout, and what is taken out or put in: the gradient must then be another.
DAMAGED: dict[str, tuple[str, Callable[[], Any]]] = {
    "pp2_vpp2-batched": ("pp2_vpp2", batch_exchanges),
    "cp2-scaled": ("cp2", scale_by_context_size),
    "cp2-slice": ("cp2", take_another_slice),
    "cp2-pooling": ("cp2", pool_the_slice),
    "dp2-causal": ("dp2", fall_back_to_causal),
    "pp4-boundaries": ("pp4", lose_boundaries_of_middle_stages),
}


def grid_config(model: str, layout: dict[str, Any]) -> RunConfig:
    """Eight layers, so that eight stages or four of two chunks have one each."""
    shape = {"num_layers": 8, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4}
    config = tiny_config(**(shape | MODELS[model]))
    config.embedding.projection_dim = 12 if model == "dense" else None
    for name, value in layout.items():
        setattr(config.parallel, name, value)
    return config


def write_reference(directory: str) -> dict[str, float]:
    """Initial weights of each model, and loss and gradient of one graph over the whole batch."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_grit.models.gpt import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import save_weights

    losses = {}
    for name in MODELS:
        config = grid_config(name, {})
        with parallel_job(config.parallel, seed=1) as context:
            model = build_model(config, VOCAB, context)
            save_weights(model, context, Path(directory) / f"initial-{name}")
            batch = make_batch()
            num_rows = len(batch.embedding_rows) + len(batch.generative_rows)
            # The router adds its balancing loss to the backward pass of each row: the mean over rows is wanted.
            MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / num_rows))
            loss = one_graph(model.train(), batch, config.loss.temperature)
            loss.backward()
            losses[name] = float(loss)
            gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            safetensors.torch.save_file(gradients, Path(directory) / f"graph-{name}.safetensors")
    return losses


def write_layout(name: str, model_name: str, layout: dict[str, Any], directory: str) -> dict[str, float]:
    """A layout's gradient; returns its loss and how far ranks with the same weights are apart."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_grit.models.gpt import build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights, save_weights
    from megatron_grit.training.step import TrainStep

    config = grid_config(model_name, layout)
    with parallel_job(config.parallel, seed=1) as context:
        chunks = build_chunks(config, VOCAB, context)
        load_weights(Path(directory) / f"initial-{model_name}", chunks, context)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
        wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
        chunks[0].config.finalize_model_grads_func = finalize_model_grads
        batch = make_batch(context.data_rank, context.data_size)
        metrics = TrainStep(config, context, wrapped, None).accumulate_gradients(batch)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        apart = 0.0
        for group, split in ((context.replica_group, False), (context.tensor_group, True)):
            same = [p for p in parameters if getattr(p, "allreduce", True)]
            same = [p for p in same if not (split and getattr(p, "tensor_model_parallel", False))]
            apart = max(apart, spread(torch.cat([p.main_grad.flatten() for p in same]), group))
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(parameter.main_grad)
        save_weights(chunks, context, Path(directory) / name)
        return {"loss": metrics["loss"], "apart": apart}


def spread(values: torch.Tensor, group: Any) -> float:
    """Largest difference between ranks, relative to the norm."""
    bounds = torch.stack([values, -values])
    torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX, group=group)
    return float((bounds[0] + bounds[1]).norm() / values.norm().clamp(min=1e-12))


def run_layouts(world_size: int, directory: str) -> dict[str, dict[str, float]]:
    results = {
        name: write_layout(name, model, layout, directory)
        for name, (size, model, layout) in GRID.items()
        if size == world_size
    }
    for name, (undamaged, damage) in DAMAGED.items():
        size, model, layout = GRID[undamaged]
        if size == world_size:
            with damage():
                results[name] = write_layout(name, model, layout, directory)
    return results


def compare(names: list[str], directory: str) -> dict[str, dict[str, Any]]:
    """Errors of written gradients against the graph's."""
    from megatron_grit.models.gpt import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights

    results: dict[str, dict[str, Any]] = {}
    for name in names:
        model_name = GRID[DAMAGED[name][0] if name in DAMAGED else name][1]
        config = grid_config(model_name, {})
        with parallel_job(config.parallel, seed=1) as context:
            model = build_model(config, VOCAB, context)
            load_weights(Path(directory) / name, model, context)
        theirs = safetensors.torch.load_file(Path(directory) / f"graph-{model_name}.safetensors")
        assert theirs.keys() == dict(model.named_parameters()).keys()
        ours = {key: p.detach() for key, p in model.named_parameters()}
        errors = {key: float((ours[key] - grad).norm() / grad.norm()) for key, grad in theirs.items()}
        word = "embedding.word_embeddings.weight"
        results[name] = {
            "errors": errors,
            "cosine": float(torch.nn.functional.cosine_similarity(ours[word].flatten(), theirs[word].flatten(), 0)),
        }
    return results


class Grid:
    """Losses and errors of the layouts, computed once a number of processes."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory, self.directory = factory, factory.mktemp("grid")
        self.losses = run_on_ranks(write_reference, 1, factory.mktemp("reference"), str(self.directory))[0]
        self.results: dict[int, dict[str, dict[str, Any]]] = {}

    def of(self, name: str) -> dict[str, Any]:
        size = GRID[DAMAGED[name][0] if name in DAMAGED else name][0]
        if size not in self.results:
            ranks = run_on_ranks(run_layouts, size, self.factory.mktemp("ranks"), size, str(self.directory))
            names = list(ranks[0])
            read = run_on_ranks(compare, 1, self.factory.mktemp("compare"), names, str(self.directory))[0]
            self.results[size] = {name: read[name] | {"ranks": [rank[name] for rank in ranks]} for name in names}
        return self.results[size][name]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return Grid(tmp_path_factory)


def marked(names: dict[str, str]) -> list[Any]:
    return [pytest.param(name, marks=() if GRID[of][0] <= FAST else pytest.mark.slow) for name, of in names.items()]


@pytest.mark.parametrize("name", marked({name: name for name in GRID}))
def test_layout_equals_one_graph(grid: Grid, name: str) -> None:
    result = grid.of(name)
    for rank in result["ranks"]:
        assert rank["loss"] == pytest.approx(grid.losses[GRID[name][1]], rel=1e-6)
        assert rank["apart"] < 1e-6
    assert result["cosine"] > 1 - 1e-6
    worst = max(result["errors"], key=result["errors"].get)
    assert result["errors"][worst] < 1e-5, f"{worst}: relative error {result['errors'][worst]:.2e}"


@pytest.mark.parametrize("name", marked({name: undamaged for name, (undamaged, _) in DAMAGED.items()}))
def test_what_is_taken_out_is_missed(grid: Grid, name: str) -> None:
    """Each damage leaves a run that looks well, and the comparison above would tell."""
    assert max(grid.of(name)["errors"].values()) > 1e-2
