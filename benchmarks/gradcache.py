"""What GradCache costs: time against full activation recompute, memory against the size of the batch, the loss alone.

time: an embedding step with GradCache, divided by the same step with all rows in one graph and full activation
recompute. Both run each layer forward twice and backward once, from the same weights on the same packed rows, with
AdamW and clipping. A third step, in which one long row holds the whole batch (training.grad_cache off,
training.recompute full), is what configuration alone can ask for. Steps alternate in one process, in an order that
turns; losses and gradient norms have to agree. Printed: the median of the repeats' ratios, and their range.

memory: the resident set's high-water mark during one step, in a fresh process for each batch size, on short texts. The
C library is told to hand freed tensors back at once, so that the mark is of what is alive and not of gaps between. What
belongs to the batch is counted apart: its tokens, COPIES tensors of all embeddings and their gradients, and one chunk
of similarities, whose size has a bound (losses/contrastive.py). The rest should be flat, and is near 0 where the loss
needs more than the activations of a row, since the two are not there at the same time. One graph without recompute is
shown for contrast.

loss: the contrastive loss and gradient of 65,536 queries and as many passages, in narrow embeddings: seconds, memory,
and how far sampled anchors are from the definition in fp64.

Texts are random tokens: nothing here depends on what they say.

Example:
    python -m benchmarks.gradcache --threads 2 --json gradcache.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.kinds.embedding import EmbeddingCounts, make_row
from megatron_grit.data.rows.batch import BatchPart, PackedRow, StepBatch
from megatron_grit.data.rows.packing import pack
from megatron_grit.data.rows.segments import Segment
from megatron_grit.data.rows.stream import PlannedRow
from megatron_grit.errors import ConfigError, GritError
from megatron_grit.losses import contrastive
from megatron_grit.parallel.launch import parallel_job

VOCAB, PAD, SEED = 4096, 0, 1
TOLERANCE = 1e-4
COPIES = 6
"""Tensors of all embeddings at the peak: rows', joined, in order, the gradient, that times the incoming, and joined."""
MEBIBYTE = 1 << 20
SMALLEST_MAPPED = 1 << 15
"""Bytes from which glibc maps an allocation of its own; by itself it raises this up to 32 MiB."""


class SyntheticTexts:
    """Random tokens in place of indexed files."""

    names = ("synthetic",)

    def __init__(self, lengths: np.ndarray, seed: int) -> None:
        self._starts = np.cumsum(lengths) - lengths
        self._tokens = np.random.default_rng(seed).integers(1, VOCAB, lengths.sum())

    def __getitem__(self, source: int) -> SyntheticTexts:
        return self

    def tokens(self, record: int, start: int, length: int) -> np.ndarray:
        """As :meth:`megatron_grit.data.order.sources.Sources.tokens` of one source."""
        begin = self._starts[record] + start
        return self._tokens[begin : begin + length]


def synthetic_batch(num_queries: int, group_size: int, length: int, tokens_per_row: int) -> StepBatch:
    """An embedding batch of ``length`` tokens a text on average, half of it to half as much again."""
    num_texts = num_queries * (1 + group_size)
    draw = np.random.default_rng(SEED)
    lengths = draw.integers(max(1, length // 2), length + (length + 1) // 2 + 1, num_texts)
    texts: Any = SyntheticTexts(lengths, SEED)
    segments = [
        Segment(sources=texts, source=0, record=i, start=0, stop=int(n), roles=[Role.QUERY], lengths=[int(n)])
        for i, n in enumerate(lengths)
    ]
    packed = pack(lengths, tokens_per_row)
    row_length = -(-max(int(lengths[slots].sum()) for slots in packed) // 8) * 8
    planned = [PlannedRow(segments=[segments[slot] for slot in slots], slots=slots) for slots in packed]
    rows = [make_row(row, row_length, PAD) for row in planned]
    counts = EmbeddingCounts(
        num_queries=num_queries,
        group_size=group_size,
        slots_by_rank=[torch.cat([row.slots_S for row in rows if row.slots_S is not None])],
    )
    return StepBatch(
        step=0,
        parts={"embedding": BatchPart(rows=rows, counts=counts)},
        row_length=row_length,
        num_tokens=int(lengths.sum()),
        num_padded_tokens=row_length * len(rows),
    )


def run_config(
    hidden_size: int, num_layers: int, projection_dim: int | None, grad_cache: Any, recompute: Any
) -> RunConfig:
    """A small Mistral that embeds, in fp32."""
    config = RunConfig()
    config.model.num_layers, config.model.hidden_size = num_layers, hidden_size
    config.model.ffn_hidden_size = hidden_size * 7 // 2
    config.model.num_attention_heads = max(1, hidden_size // 32)
    config.model.num_query_groups = max(1, hidden_size // 128)
    config.model.kv_channels = 32
    config.model.vocab_size = VOCAB
    config.embedding.projection_dim = projection_dim
    config.training.objective, config.training.precision = "embedding", "fp32"
    config.training.grad_cache, config.training.recompute = grad_cache, recompute
    config.training.steps, config.optimizer.lr = 1000, 1e-4
    config.optimizer.schedule, config.optimizer.warmup_ratio = "constant", 0.0
    config.loss.temperature = 0.05
    config.parallel.device = "cpu"
    return config


Step = Callable[[StepBatch], tuple[float, float]]
"""Trains on a batch; returns loss and gradient norm."""


def build_step(config: RunConfig, context: Any, weights: dict[str, Any] | None = None) -> tuple[Step, Any]:
    """The step of ``config``, and its model. grad_cache off with several rows: all of them in one graph."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_grit.models.decoder import Output, build_model
    from megatron_grit.training.optimizer import build_optimizer, wrap_model
    from megatron_grit.training.step import TrainStep

    model = build_model(config, VOCAB, context)
    if weights is not None:
        model.load_state_dict(weights)
    wrapped = wrap_model(model)
    optimizer = build_optimizer(config, wrapped)
    optimizer.reload_model_params()
    step = TrainStep(config, context, wrapped, optimizer)
    options = contrastive.ContrastiveOptions

    def scheduled(batch: StepBatch) -> tuple[float, float]:
        metrics = step(batch)
        return metrics["loss_emb"], metrics["grad_norm"]

    def one_graph(batch: StepBatch) -> tuple[float, float]:
        wrapped.train()
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        counts = batch.counts_of("embedding")
        outputs = torch.cat([wrapped(row, Output.EMBEDDINGS) for row in batch.rows_of("embedding")])
        texts = outputs[torch.argsort(counts.slots_by_rank[0])]
        knobs = options(temperature=config.loss.temperature, group_size=counts.group_size)
        loss = contrastive.contrastive_loss(texts[: counts.num_queries], texts[counts.num_queries :], knobs)
        loss.backward()
        finalize_model_grads([wrapped])
        _, norm, _ = optimizer.step()
        return loss.item(), float(norm)

    def run(batch: StepBatch) -> tuple[float, float]:
        several = config.training.grad_cache == "off" and len(batch.rows_of("embedding")) > 1
        return one_graph(batch) if several else scheduled(batch)

    return run, model


def measure_time(arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternating steps of the three kinds."""
    torch.set_num_threads(arguments.threads)
    shape = (arguments.hidden_size, arguments.num_layers, None)
    rows = synthetic_batch(arguments.queries, 2, arguments.length, arguments.tokens_per_row)
    long_row = synthetic_batch(arguments.queries, 2, arguments.length, rows.num_tokens)
    kinds: dict[str, tuple[RunConfig, StepBatch]] = {
        "gradcache": (run_config(*shape, "on", "none"), rows),
        "one_graph": (run_config(*shape, "off", "full"), rows),
        "one_row": (run_config(*shape, "off", "full"), long_row),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    with parallel_job(kinds["gradcache"][0].parallel, SEED) as context:
        steps: dict[str, Step] = {}
        weights: dict[str, Any] | None = None
        for kind, (config, _) in kinds.items():
            steps[kind], model = build_step(config, context, weights)
            weights = weights or {name: value for name, value in model.state_dict().items() if value is not None}
        for repeat in range(arguments.repeats + 1):
            order = list(kinds)[repeat % 3 :] + list(kinds)[: repeat % 3]
            results = {}
            for kind in order:
                began = time.perf_counter()
                results[kind] = steps[kind](kinds[kind][1])
                seconds[kind].append(time.perf_counter() - began)
            _check_agreement(repeat, results)
            shown = ", ".join(f"{kind} {times[-1]:.3f} s" for kind, times in seconds.items())
            print(f"repeat {repeat}{' (warm-up)' if repeat == 0 else ''}: {shown}", flush=True)
    summary: dict[str, Any] = {
        "queries": arguments.queries,
        "texts": 3 * arguments.queries,
        "tokens": rows.num_tokens,
        "rows": len(rows.rows_of("embedding")),
        "threads": arguments.threads,
        "seconds": {kind: statistics.median(times[1:]) for kind, times in seconds.items()},
    }
    for kind in ("one_graph", "one_row"):
        ratios = [a / b for a, b in zip(seconds["gradcache"][1:], seconds[kind][1:], strict=True)]
        summary[f"ratio_{kind}"] = {"median": statistics.median(ratios), "all": ratios}
    return summary


def _check_agreement(repeat: int, results: dict[str, tuple[float, float]]) -> None:
    expected = results["one_graph"]
    for kind, got in results.items():
        for name, ours, theirs in zip(("loss", "gradient norm"), got, expected, strict=True):
            if not abs(ours - theirs) <= TOLERANCE * abs(theirs):
                raise GritError(f"repeat {repeat}: {name} is {ours} with {kind} and {theirs} in one graph")


def _status(key: str) -> int:
    """Bytes of this process, from the kernel: VmRSS now, or VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise GritError(f"/proc/self/status has no {key}; the memory part needs Linux")


def _peak_of(function: Callable[[], Any]) -> tuple[int, int]:
    """Resident bytes before the call, and the most during it."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present size
    function()
    return before, _status("VmHWM")


def peak_of_step(arguments: argparse.Namespace, num_queries: int, grad_cache: str) -> dict[str, Any]:
    """One step's memory, in this process, which should be fresh."""
    torch.set_num_threads(arguments.threads)
    config = run_config(64, 2, arguments.width, grad_cache, "none")
    with parallel_job(config.parallel, SEED) as context:
        step, _ = build_step(config, context)
        step(synthetic_batch(64, 1, arguments.short_length, 1024))  # buffers and Adam's moments
        batch = synthetic_batch(num_queries, 1, arguments.short_length, 1024)
        began = time.perf_counter()
        before, peak = _peak_of(lambda: step(batch))
        seconds = time.perf_counter() - began
    num_texts = 2 * num_queries
    return {
        "queries": num_queries,
        "grad_cache": grad_cache,
        "rows": len(batch.rows_of("embedding")),
        "tokens": batch.num_tokens,
        "seconds": seconds,
        "peak": peak,
        "batch": sum(map(_bytes_of, batch.rows_of("embedding"))),
        "step": peak - before,
        "embeddings": COPIES * num_texts * arguments.width * 4,
        "similarities": 4 * min(max(contrastive.CHUNK_ELEMENTS, num_queries), num_queries**2),
    }


def _bytes_of(row: PackedRow) -> int:
    return sum(value.nbytes for value in vars(row).values() if isinstance(value, torch.Tensor))


def measure_memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A process for each size; GradCache for all of them, one graph for those it can be asked of."""
    results = []
    sizes = [(size, "on") for size in arguments.sizes]
    sizes += [(size, "off") for size in arguments.sizes if size <= arguments.largest_graph]
    for size, grad_cache in sizes:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gradcache", "--one-step", str(size), grad_cache]
        for name in ("threads", "width", "short_length"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(SMALLEST_MAPPED)}
        finished = subprocess.run(command, capture_output=True, text=True, env=environment)
        if finished.returncode:
            raise GritError(f"the step with {size} queries failed: {finished.stderr.strip()[-500:]}")
        result = json.loads(finished.stdout.splitlines()[-1])
        result["rest"] = result["step"] - result["embeddings"] - result["similarities"]
        results.append(result)
        _print_memory(result, header=len(results) == 1)
    return results


def measure_loss(arguments: argparse.Namespace) -> dict[str, Any]:
    """The loss of a large batch of narrow embeddings, and sampled anchors by the definition."""
    torch.set_num_threads(arguments.threads)
    count, width, temperature = arguments.loss_queries, 16, 0.1
    generator = torch.Generator().manual_seed(SEED)
    texts = torch.nn.functional.normalize(torch.randn(2 * count, width, generator=generator), dim=-1).requires_grad_()
    options = contrastive.ContrastiveOptions(temperature=temperature, group_size=1)
    gradients: list[torch.Tensor] = []

    def compute() -> None:
        queries, passages = texts.split(count)
        gradients.extend(torch.autograd.grad(contrastive.contrastive_loss(queries, passages, options), texts))

    began = time.perf_counter()
    before, peak = _peak_of(compute)
    seconds = time.perf_counter() - began
    queries, passages = texts.detach().double().split(count)
    sample = torch.arange(0, count, max(1, count // 64))
    shares = (queries[sample] @ passages.T / temperature).softmax(1)
    expected = (shares @ passages - passages[sample]) / temperature / count
    return {
        "queries": count,
        "width": width,
        "threads": arguments.threads,
        "seconds": seconds,
        "memory": peak - before,
        "whole_matrix": 4 * count**2,
        "gradient_error": float((gradients[0][sample] - expected).norm() / expected.norm()),
    }


def _print_time(summary: dict[str, Any]) -> None:
    print(
        f"\ntime: {summary['queries']} queries, {summary['texts']} texts, {summary['tokens']:,} tokens in "
        f"{summary['rows']} rows, {summary['threads']} threads"
    )
    for kind, seconds in summary["seconds"].items():
        print(f"{kind:10s} {seconds:.3f} s a step (median)")
    for kind, what in (("one_graph", "full recompute in one graph"), ("one_row", "full recompute in one row")):
        ratio = summary[f"ratio_{kind}"]
        print(f"GradCache / {what}: {ratio['median']:.3f} ({min(ratio['all']):.3f} to {max(ratio['all']):.3f})")


def _print_memory(result: dict[str, Any], header: bool) -> None:
    kinds = ("peak", "batch", "step", "embeddings", "similarities", "rest")
    if header:
        print("\nmemory in MiB; peak: of the process; step: what the step added; rest: step without the two before it")
        print(f"{'':10s} {'queries':>8s} {'tokens':>9s} {'seconds':>8s} " + " ".join(f"{kind:>12s}" for kind in kinds))
    kind = "GradCache" if result["grad_cache"] == "on" else "one graph"
    sizes = " ".join(f"{result[kind] / MEBIBYTE:12.1f}" for kind in kinds)
    print(f"{kind:10s} {result['queries']:8,} {result['tokens']:9,} {result['seconds']:8.1f} {sizes}", flush=True)


def _failures(arguments: argparse.Namespace, summary: dict[str, Any]) -> list[str]:
    failures = []
    if arguments.ratio_at_most is not None and "time" in summary:
        ratio = summary["time"]["ratio_one_graph"]["median"]
        if ratio > arguments.ratio_at_most:
            failures.append(f"the ratio {ratio:.3f} is above {arguments.ratio_at_most}")
    if arguments.growth_at_most is not None and "memory" in summary:
        flat = [result["rest"] for result in summary["memory"] if result["grad_cache"] == "on"]
        growth = (max(flat) - flat[0]) / MEBIBYTE
        if growth > arguments.growth_at_most:
            failures.append(f"memory grows by {growth:.1f} MiB, more than {arguments.growth_at_most}")
    return failures


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__)
    parts = ("time", "memory", "loss")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--threads", type=int, default=2)
    time_part = parser.add_argument_group("time")
    time_part.add_argument("--repeats", type=int, default=9, help="measured steps of each kind, after one to warm up")
    time_part.add_argument("--queries", type=int, default=64, help="each with two passages")
    time_part.add_argument("--length", type=int, default=48, help="mean tokens of a text")
    time_part.add_argument("--tokens-per-row", type=int, default=2048)
    time_part.add_argument("--hidden-size", type=int, default=256)
    time_part.add_argument("--num-layers", type=int, default=4)
    time_part.add_argument("--ratio-at-most", type=float, help="exit with status 1 where GradCache costs more")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096, 16384], help="queries of a batch")
    memory.add_argument("--largest-graph", type=int, default=1024, help="most queries to put in one graph")
    memory.add_argument("--short-length", type=int, default=8, help="mean tokens of a text")
    memory.add_argument("--width", type=int, default=32, help="of the embeddings")
    memory.add_argument("--growth-at-most", type=float, help="exit with status 1 where the rest grows by more MiB")
    memory.add_argument("--one-step", nargs=2, metavar=("QUERIES", "GRAD_CACHE"), help="one size, in this process")
    parser.add_argument_group("loss").add_argument("--loss-queries", type=int, default=65536)
    return parser.parse_args()


def main() -> int:
    """Measure, print. Returns the exit status."""
    arguments = parse_arguments()
    return harness.run("gradcache", arguments, lambda folder: measure(arguments))


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The parts that are asked for, printed as they come, and whether all limits are kept."""
    summary: dict[str, Any] = {}
    if arguments.one_step is not None:
        print(json.dumps(peak_of_step(arguments, int(arguments.one_step[0]), arguments.one_step[1])))
        return summary, True
    if arguments.repeats < 1 or min(arguments.sizes) < 1:
        raise ConfigError("--repeats and --sizes must be at least 1")
    if "time" in arguments.parts:
        summary["time"] = measure_time(arguments)
        _print_time(summary["time"])
    if "memory" in arguments.parts:
        summary["memory"] = measure_memory(arguments)
    if "loss" in arguments.parts:
        summary["loss"] = loss = measure_loss(arguments)
        print(
            f"\nloss: {loss['queries']:,} queries and passages of width {loss['width']}: {loss['seconds']:.1f} s, "
            f"{loss['memory'] / MEBIBYTE:.0f} MiB (the matrix of similarities has "
            f"{loss['whole_matrix'] / MEBIBYTE:,.0f}), error of sampled gradients {loss['gradient_error']:.1e}"
        )
    failures = _failures(arguments, summary)
    for failure in failures:
        print(f"gradcache: {failure}", file=sys.stderr)
    return summary, not failures


if __name__ == "__main__":
    sys.exit(main())
