"""The gradient of a step against one autograd graph over the whole global batch, parameter by parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_grit.data.batch import StepBatch
from tests.distributed.harness import run_on_ranks
from tests.rows import VOCAB, make_batch, tiny_config

LAYOUTS: dict[str, dict[str, Any]] = {"dp2": {}, "pp2": {"pipeline": 2}}
OBJECTIVES = ("embedding", "unified")


def one_graph(model: torch.nn.Module, batch: StepBatch, temperature: float) -> torch.Tensor:
    """Both losses of a batch, written out: every row in one graph, the definitions of the losses and nothing else."""
    from megatron_grit.models.gpt import Output

    texts: dict[int, torch.Tensor] = {}
    for row in batch.embedding_rows:
        assert row.slots_S is not None
        for slot, embedding in zip(row.slots_S.tolist(), model(row, Output.EMBEDDINGS), strict=True):
            texts[slot] = embedding
    loss = torch.zeros(())
    if texts:
        queries = torch.stack([texts[slot] for slot in range(batch.num_queries)])
        passages = torch.stack([texts[slot] for slot in range(batch.num_queries, len(texts))])
        targets = torch.arange(batch.num_queries) * batch.group_size
        loss = F.cross_entropy(queries @ passages.T / temperature, targets)
    if batch.generative_rows:
        logits, labels = [], []
        for row in batch.generative_rows:
            assert row.labels_1T is not None and row.loss_mask_1T is not None
            supervised = row.loss_mask_1T[0] > 0
            logits.append(model(row, Output.LOGITS)[supervised])
            labels.append(row.labels_1T[0, supervised])
        loss = loss + F.cross_entropy(torch.cat(logits), torch.cat(labels))
    return loss


def write_gradients(layout: dict[str, Any], objective: str, directory: str, reference: bool, **options: Any) -> float:
    """Gradient of a step from the same initial weights, each parameter under its global name."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_grit.models.gpt import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights, save_weights
    from megatron_grit.training.step import TrainStep

    config = tiny_config()
    config.training.objective = objective  # type: ignore[assignment]
    config.training.grad_cache = options.get("grad_cache", "auto")
    config.model.hidden_dropout = config.model.attention_dropout = options.get("dropout", 0.0)
    config.loss.emb_grad_scale = options.get("emb_grad_scale", "exact")
    for name, value in options.get("loss", {}).items():
        setattr(config.loss, name, value)
    for name, value in layout.items():
        setattr(config.parallel, name, value)
    with parallel_job(config.parallel, seed=1) as context:
        model = build_model(config, VOCAB, context)
        weights = Path(directory) / "initial"
        if not weights.exists():
            save_weights(model, context, weights)
        load_weights(weights, model, context)
        shape = {"objective": objective, "rows": options.get("rows", 4), "repeated": options.get("repeated", False)}
        batch = make_batch(context.data_rank, context.data_size, **shape)
        if reference:
            loss = one_graph(model, batch, config.loss.temperature)
            loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        else:
            ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
            wrapped = DistributedDataParallel(model.config, ddp, model)
            model.config.finalize_model_grads_func = finalize_model_grads
            wrapped.train()
            loss = torch.tensor(TrainStep(config, context, wrapped, None).accumulate_gradients(batch)["loss"])
            gradients = {name: p.main_grad for name, p in model.named_parameters()}
        offset = context.pipeline_rank * config.model.num_layers // context.pipeline_size
        arrays = {_global_name(name, offset): gradient.numpy() for name, gradient in gradients.items()}
        if context.data_rank == 0:
            np.savez(Path(directory) / f"{options['name']}_{context.pipeline_rank}.npz", **arrays)
        return float(loss)


def _global_name(name: str, offset: int) -> str:
    parts = name.split(".")
    if parts[0] == "decoder" and parts[1] == "layers":
        parts[2] = str(int(parts[2]) + offset)
    return ".".join(parts)


def compute(directory: str, cases: list[tuple[dict[str, Any], str, bool, dict[str, Any]]]) -> list[float]:
    return [
        write_gradients(layout, kind, directory, reference, **options) for layout, kind, reference, options in cases
    ]


def read_gradients(directory: Path, name: str) -> dict[str, np.ndarray]:
    gradients: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob(f"{name}_?.npz")):
        with np.load(path) as arrays:
            gradients |= dict(arrays)
    return gradients


def assert_equal_gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    untouched = {"output_layer.weight"}  # an embedding step does not use the language-model head
    assert ours.keys() - untouched == theirs.keys() - untouched
    flat = [np.concatenate([gradients[name].ravel() for name in sorted(theirs)]) for gradients in (ours, theirs)]
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert cosine > 1 - 1e-6
    for name, expected in theirs.items():
        error = np.linalg.norm(ours[name] - expected) / max(np.linalg.norm(expected), 1e-12)
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"mask_equal_texts": True},
    "all": {"mask_equal_texts": True, "symmetric": True, "same_side_negatives": True, "matryoshka_dims": [8, 32]},
    "margin": {"false_negative_margin": 0.02},
    "hard": {"negatives": "hard"},
}


def variants(layout: str) -> list[dict[str, Any]]:
    return [{"name": f"{layout}-{name}", "loss": loss, "repeated": True} for name, loss in VARIANTS.items()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All gradients of this file: the references and single-process cases on one rank, the layouts on two."""
    directory = tmp_path_factory.mktemp("gradients")
    single: list[Any] = [({}, kind, True, {"name": f"graph-{kind}"}) for kind in OBJECTIVES]
    single += [({}, kind, False, {"name": f"one-{kind}"}) for kind in OBJECTIVES]
    for dropout in (0.0, 0.2):
        for cache in ("on", "off"):
            options = {"name": f"cache-{cache}-{dropout}", "grad_cache": cache, "dropout": dropout, "rows": 1}
            single.append(({}, "unified", False, options))
    single += [({}, "embedding", False, options) for options in variants("one")]
    run_on_ranks(compute, 1, tmp_path_factory.mktemp("one"), str(directory), single)
    double: list[Any] = [
        (layout, kind, False, {"name": f"{name}-{kind}"}) for name, layout in LAYOUTS.items() for kind in OBJECTIVES
    ]
    double.append(({}, "embedding", False, {"name": "grit-embedding", "emb_grad_scale": "grit"}))
    double += [(layout, "embedding", False, options) for name, layout in LAYOUTS.items() for options in variants(name)]
    run_on_ranks(compute, 2, tmp_path_factory.mktemp("two"), str(directory), double)
    return directory


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_gradient_equals_one_graph(directory: Path, layout: str, objective: str) -> None:
    ours = read_gradients(directory, f"{layout}-{objective}")
    assert_equal_gradients(ours, read_gradients(directory, f"graph-{objective}"))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_grad_cache_on_and_off_are_equal(directory: Path, dropout: float) -> None:
    """With dropout too: the second pass draws what the first one drew."""
    on, off = (read_gradients(directory, f"cache-{cache}-{dropout}") for cache in ("on", "off"))
    assert_equal_gradients(on, off)


def test_dropout_was_on(directory: Path) -> None:
    with pytest.raises(AssertionError):
        assert_equal_gradients(read_gradients(directory, "cache-on-0.2"), read_gradients(directory, "cache-on-0.0"))


def test_grit_scale_divides_by_the_data_parallel_size(directory: Path) -> None:
    exact = read_gradients(directory, "graph-embedding")
    halved = {name: gradient / 2 for name, gradient in exact.items()}
    assert_equal_gradients(read_gradients(directory, "grit-embedding"), halved)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variants_of_the_loss_do_not_depend_on_the_layout(directory: Path, layout: str, variant: str) -> None:
    """Texts that are equal on different ranks included."""
    one = read_gradients(directory, f"one-{variant}")
    assert_equal_gradients(read_gradients(directory, f"{layout}-{variant}"), one)
    for other in VARIANTS.keys() - {variant}:
        with pytest.raises(AssertionError):
            assert_equal_gradients(read_gradients(directory, f"one-{other}"), one)
