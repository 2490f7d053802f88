"""Training on one GPU: precision, resuming, memory. On the CPU the same runs with a smaller model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows.batch import StepBatch
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.training.estimate_report import MemoryMeter
from megatron_grit.training.optimizer import build_optimizer, build_schedule, set_learning_rate, wrap_model
from megatron_grit.training.step import TrainStep
from megatron_grit.training.trainer import Trainer, train
from tests.corpus import tiny_run
from tests.rows import VOCAB, grit_batch, make_batch, make_row, tiny_config

STEPS = 20
BF16_TOLERANCE = 1e-2
"""Difference of a loss in up to 20 steps, as a share of the first loss; bf16 rounds each number to 2**-9 of itself."""


def train_on(
    config: RunConfig, context: ParallelContext, batch: StepBatch, steps: int, weights: dict[str, Any] | None = None
) -> tuple[list[dict[str, float]], dict[str, Any], Any]:
    """Losses of steps on one batch, the weights before them, and the optimizer."""
    model = build_model(config, VOCAB, context)
    if weights is not None:
        model.load_state_dict(weights)
    start = {name: value if value is None else value.clone() for name, value in model.state_dict().items()}
    wrapped = wrap_model(model)
    optimizer = build_optimizer(config, wrapped)
    schedule, step = build_schedule(config, optimizer), TrainStep(config, context, wrapped, optimizer)
    losses = []
    for number in range(steps):
        set_learning_rate(schedule, number)
        losses.append(step(replace(batch, step=number)))
    return losses, start, optimizer


def test_bf16_trains_as_fp32_does(context: ParallelContext) -> None:
    """From the same weights on the same batch: every loss of 20 steps, with fp32 main weights and gradients."""
    batch, on_cuda = make_batch(rows=2), context.device.type == "cuda"
    shape = {"hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 8} if on_cuda else {"num_layers": 2}
    losses, weights = {}, None
    for precision in ("bf16", "fp32"):
        config = tiny_config(**shape)
        config.parallel.device, config.training.precision = context.device.type, precision  # type: ignore[assignment]
        config.training.steps, config.optimizer.lr = STEPS, 2e-4
        losses[precision], weights, optimizer = train_on(config, context, batch, STEPS, weights)
        groups = [group for part in optimizer.chained_optimizers for group in part.param_groups]
        main = torch.cat([weight.flatten() for group in groups for weight in group["params"]])
        assert main.dtype is torch.float32 and (main != main.bfloat16()).float().mean() > 0.9, "rounded to bf16"
    first, last = losses["fp32"][0], losses["fp32"][-1]
    for name in ("loss_gen", "loss_emb"):
        assert last[name] < 0.9 * first[name], "nothing was learned"
        ours, expected = ([step[name] for step in losses[precision]] for precision in ("bf16", "fp32"))
        assert ours != expected
        assert ours == pytest.approx(expected, rel=0, abs=BF16_TOLERANCE * first[name])


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Kernels that add in a fixed order, where torch has them. TransformerEngine reads its own switch."""
    switches = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.usefixtures("deterministic")
def test_a_run_resumes_bit_for_bit(device: torch.device, tmp_path: Path, precision: str) -> None:
    """Trainer end to end: data, steps with dropout, a checkpoint, and the same weights as without the stop."""
    if device.type == "cpu" and precision == "fp32":
        pytest.skip("tests/distributed/test_resume.py does this on the CPU")
    weights = {}
    for name, stops in (("whole", [4]), ("resumed", [2, 4])):
        for steps in stops:
            config = tiny_run(tmp_path)
            config.output_dir, config.parallel.device = str(tmp_path / name), device.type  # type: ignore[assignment]
            config.training.precision, config.model.hidden_dropout = precision, 0.1  # type: ignore[assignment]
            config.training.steps, config.optimizer.schedule = steps, "constant"
            train(config)
        config.training.steps = 4
        with parallel_job(config.parallel, config.training.seed) as context:
            trainer = Trainer(config, context)
            assert trainer._restore() == 4
            weights[name] = {key: value.detach().clone() for key, value in trainer.chunks[0].named_parameters()}
    for key, value in weights["whole"].items():
        assert value.device.type == device.type
        assert torch.equal(value, weights["resumed"][key]), key


def dense(config: RunConfig) -> None:
    """Both objectives."""


def recomputed(config: RunConfig) -> None:
    """Whole layers are computed again."""
    config.training.recompute = "full"


def generative(config: RunConfig) -> None:
    """A wide vocabulary, logits above all, with biases and GELU."""
    settings = {"normalization": "layernorm", "activation": "gelu", "add_bias_linear": True, "vocab_size": 16000}
    config.model = replace(config.model, **settings)  # type: ignore[arg-type]
    config.training.objective = "generative"


@pytest.mark.slow
@pytest.mark.parametrize("change", [dense, recomputed, generative])
def test_the_plan_is_within_a_tenth_of_the_peak(device: torch.device, tmp_path: Path, change: Any) -> None:
    """On the CPU the run is the same and the peak is not looked at: tests/e2e/test_memory_estimate.py does that."""
    config = tiny_run(tmp_path)
    config.parallel.device, config.training.precision = device.type, "bf16"  # type: ignore[assignment]
    config.training.steps, config.data.num_rows_multiple = 2, None
    config.data.allow_shared_texts = True
    if device.type == "cuda":
        config.model = replace(
            config.model, hidden_size=2048, ffn_hidden_size=7168, num_attention_heads=16, num_query_groups=4
        )
        config.data.tokens_per_row = 2048
        config.training.embedding_batch_size = config.training.generative_batch_size = 96
    change(config)
    with parallel_job(config.parallel, config.training.seed) as context:
        if device.type == "cuda":  # cuBLAS takes its workspace from the same allocator, at its first product
            torch.ones(8, 8, device=device, dtype=torch.bfloat16).mm(torch.ones(8, 8, device=device).bfloat16())
        trainer = Trainer(config, context)
        trainer.run()
    report = trainer.report
    print(f"{report.estimated_bytes / 2**20:.1f} MiB estimated, {report.measured_bytes / 2**20:.1f} MiB measured")
    assert report.estimated_bytes > 0 and report.measured_bytes > 0
    if device.type == "cuda":
        assert report.estimated_bytes == pytest.approx(report.measured_bytes, rel=0.1)


def test_memory_does_not_grow_with_the_rows(context: ParallelContext) -> None:
    """GradCache: eight times the rows take no more than their tokens and embeddings."""
    peaks = {}
    for rows in (2, 2, 16):  # the first run takes what stays: cuBLAS's workspace, tables
        texts = [make_row(RowKind.EMBEDDING, [16] * 3, 48, list(range(3 * i, 3 * i + 3)), seed=i) for i in range(rows)]
        batch = grit_batch(texts, [], rows)
        config = tiny_config(num_layers=4)
        config.parallel.device, config.training.objective = context.device.type, "embedding"  # type: ignore[assignment]
        with SavedBytes() as saved:
            meter = MemoryMeter(context.device)
            train_on(config, context, batch, 1)
        peaks[rows] = meter.peak() if context.device.type == "cuda" else saved.most
    # Of 14 rows: embeddings and their gradients, a few times over, in fp32; small tensors, of 512 bytes at least.
    allowed = 14 * (3 * 64 * 4 * 8 + 16 * 1024)
    assert peaks[2] > 4 * allowed
    assert peaks[16] <= peaks[2] + allowed, peaks


class SavedBytes:
    """The most that autograd kept for backward passes at any one time, as far as the CPU can tell."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> _Held:
        held = _Held(self, tensor)
        self.now += held.size
        self.most = max(self.most, self.now)
        return held


class _Held:
    def __init__(self, owner: SavedBytes, tensor: torch.Tensor) -> None:
        self.tensor, self.size, self._owner = tensor.detach(), tensor.numel() * tensor.element_size(), owner

    def __del__(self) -> None:
        self._owner.now -= self.size
