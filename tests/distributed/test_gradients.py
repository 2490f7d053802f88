"""The gradient of a step against one autograd graph over the whole global batch, parameter by parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_grit.data.rows.batch import StepBatch
from tests.harness.ranks import run_on_ranks
from tests.rows import VOCAB, make_batch, tiny_config

LAYOUTS: dict[str, dict[str, Any]] = {"dp2": {}, "pp2": {"pipeline": 2}, "cp2": {"context": 2}}
OBJECTIVES = ("embedding", "unified")


def one_graph(model: torch.nn.Module, batch: StepBatch, temperature: float) -> torch.Tensor:
    """Both losses of a batch, written out: every row in one graph, the definitions of the losses and nothing else."""
    from megatron_grit.models.decoder import Output

    texts: dict[int, torch.Tensor] = {}
    for row in batch.rows_of("embedding"):
        assert row.slots_S is not None
        for slot, embedding in zip(row.slots_S.tolist(), model(row, Output.EMBEDDINGS), strict=True):
            texts[slot] = embedding
    loss = torch.zeros(())
    if texts:
        counts = batch.counts_of("embedding")
        queries = torch.stack([texts[slot] for slot in range(counts.num_queries)])
        passages = torch.stack([texts[slot] for slot in range(counts.num_queries, len(texts))])
        targets = torch.arange(counts.num_queries) * counts.group_size
        loss = F.cross_entropy(queries @ passages.T / temperature, targets)
    if batch.rows_of("generative"):
        logits, labels = [], []
        for row in batch.rows_of("generative"):
            assert row.labels_1T is not None and row.loss_mask_1T is not None
            supervised = row.loss_mask_1T[0] > 0
            logits.append(model(row, Output.LOGITS)[supervised])
            labels.append(row.labels_1T[0, supervised])
        loss = loss + F.cross_entropy(torch.cat(logits), torch.cat(labels))
    return loss


def gradient_of_each_text(model: torch.nn.Module, batch: StepBatch, temperature: float) -> dict[int, np.ndarray]:
    """Gradient of the contrastive loss with respect to every embedding, by slot. Leaves the model in fp64."""
    from megatron_grit.models.decoder import Output

    texts: dict[int, torch.Tensor] = {}
    model.double()
    for row in batch.rows_of("embedding"):
        assert row.slots_S is not None
        with torch.no_grad():
            states = model(row, Output.HIDDEN)[:, 0]
        for slot, start, stop in zip(row.slots_S.tolist(), row.cu_seqlens, row.cu_seqlens[1:], strict=False):
            texts[slot] = F.normalize(states[start:stop].mean(0), dim=0)
    texts_ND = torch.stack([texts[slot] for slot in range(len(texts))]).requires_grad_()
    counts = batch.counts_of("embedding")
    targets = torch.arange(counts.num_queries) * counts.group_size
    logits = texts_ND[: counts.num_queries] @ texts_ND[counts.num_queries :].T / temperature
    (gradient_ND,) = torch.autograd.grad(F.cross_entropy(logits, targets), texts_ND)
    assert gradient_ND.dtype is torch.float64
    return dict(enumerate(gradient_ND.numpy()))


def cached_gradient_of_each_text(objective: Any, batch: StepBatch) -> dict[int, np.ndarray]:
    """What the objective trains with: of this rank's texts, where it is on the last stage."""
    slots = [slot for row in batch.rows_of("embedding") if row.slots_S is not None for slot in row.slots_S.tolist()]
    gradients = [gradient.numpy() for gradients in objective.cached_gradients for gradient in gradients]
    assert len(gradients) in (0, len(slots))
    return dict(zip(slots, gradients, strict=False))


def write_gradients(layout: dict[str, Any], objective: str, directory: str, reference: bool, **options: Any) -> float:
    """Gradient of a step from the same initial weights, each parameter under its global name."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights, save_weights
    from megatron_grit.training.step import TrainStep

    config = tiny_config(num_layers=2)
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
            by_slot = gradient_of_each_text(model, batch, config.loss.temperature)
        else:
            ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
            wrapped = DistributedDataParallel(model.config, ddp, model)
            model.config.finalize_model_grads_func = finalize_model_grads
            wrapped.train()
            step = TrainStep(config, context, wrapped, None)
            metrics = step.accumulate_gradients(batch)
            (Path(directory) / f"{options['name']}_metrics_{context.rank}.json").write_text(json.dumps(metrics))
            loss = torch.tensor(metrics["loss"])
            by_slot = cached_gradient_of_each_text(step.objectives[0], batch)
            gradients = {name: p.main_grad for name, p in model.named_parameters()}
        offset = context.pipeline_rank * config.model.num_layers // context.pipeline_size
        arrays = {_global_name(name, offset): gradient.numpy() for name, gradient in gradients.items()}
        if context.data_rank == context.context_rank == 0:
            np.savez(Path(directory) / f"{options['name']}_{context.pipeline_rank}.npz", **arrays)
        texts = {str(slot): gradient for slot, gradient in by_slot.items()}
        np.savez(Path(directory) / f"{options['name']}_texts_{context.rank}.npz", **texts)
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


def read_texts(directory: Path, name: str) -> np.ndarray:
    """Gradient of every text's embedding, [N, D], from whichever rank has it."""
    by_slot: dict[int, np.ndarray] = {}
    for path in sorted(directory.glob(f"{name}_texts_?.npz")):
        with np.load(path) as arrays:
            by_slot |= {int(slot): gradient for slot, gradient in arrays.items()}
    return np.stack([by_slot[slot] for slot in range(len(by_slot))])


def assert_equal_gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    untouched = {"output_layer.weight"}  # an embedding step does not use the language-model head
    assert ours.keys() - untouched == theirs.keys() - untouched
    flat = [np.concatenate([gradients[name].ravel() for name in sorted(theirs)]) for gradients in (ours, theirs)]
    assert cosine(*flat) > 1 - 1e-6
    for name, expected in theirs.items():
        error = np.linalg.norm(ours[name] - expected) / max(np.linalg.norm(expected), 1e-12)
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"mask_equal_texts": True},
    "all": {"mask_equal_texts": True, "symmetric": True, "same_side_negatives": True, "matryoshka_dims": [8, 32]},
    "margin": {"false_negative_margin": 0.02},
    "hard": {"negatives": "hard"},
    "blocks": {"num_blocks": 2, "symmetric": True},
    "queries": {"gradient_sides": "queries"},
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


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_gradient_of_the_embeddings(directory: Path, layout: str) -> None:
    """Against fp64: the whole tensor's cosine, and each text's, the smallest gradients included."""
    ours, expected = (read_texts(directory, f"{name}-embedding") for name in (layout, "graph"))
    assert ours.shape == expected.shape == (12, 64)
    assert cosine(ours.ravel(), expected.ravel()) > 1 - 1e-6
    assert min(map(cosine, ours, expected)) > 1 - 1e-6
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-4)


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
def test_metrics_do_not_depend_on_the_layout(directory: Path, layout: str, variant: str) -> None:
    """The loss is summed from the shares of the ranks."""
    one = json.loads((directory / f"one-{variant}_metrics_0.json").read_text())
    for rank in range(2):
        metrics = json.loads((directory / f"{layout}-{variant}_metrics_{rank}.json").read_text())
        assert metrics == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variants_of_the_loss_do_not_depend_on_the_layout(directory: Path, layout: str, variant: str) -> None:
    """Texts that are equal on different ranks included."""
    one = read_gradients(directory, f"one-{variant}")
    assert_equal_gradients(read_gradients(directory, f"{layout}-{variant}"), one)
    for other in VARIANTS.keys() - {variant}:
        with pytest.raises(AssertionError):
            assert_equal_gradients(read_gradients(directory, f"one-{other}"), one)
