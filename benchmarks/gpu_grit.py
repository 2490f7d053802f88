"""Model FLOPs utilisation of training steps on one GPU, against plain transformers on the same GPU.

A stack of Mistral-7B-shaped layers with its embeddings and head: as many layers as planning/memory.py says fit, or
--layers. Three objectives: unified, embedding and generative. Both sides start each of them from the same random
weights and train on the same texts (benchmarks/random_batch.py), one side after the other:

- megatron_grit: packed rows of --tokens-per-row, GradCache row by row, fp32 main weights and gradients;
- transformers: the GritLM step of tests/parity/gritlm_reference.py, padded, GradCache in chunks of about as many padded
  tokens, SDPA, weights and AdamW states in the precision of the run, as its published scripts have them.

Neither recomputes activations. The losses of the first steps have to agree. A step's operations are counted by
planning/operations.py for the tokens that are no padding and without GradCache's first pass, the same for both sides;
utilisation is these operations, divided by the seconds of the step and by the peak of the card. Memory is the peak of
torch's allocator. After the timed steps one more is timed phase by phase, with the GPU waited for in between.

Example:
    python -m benchmarks.gpu_grit --json gpu_grit.json --markdown gpu_grit.md
    python -m benchmarks.gpu_grit --device cpu --scale tiny        (in miniature, to see that it runs)
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.gpu_report import Measured, machine, markdown, row_of
from benchmarks.grit_step import CLIP_GRAD, LR, TEMPERATURE, Profile, build_ours, reference_batch
from benchmarks.random_batch import GROUP_SIZE, random_batch
from megatron_grit.config.schema import RunConfig
from megatron_grit.convert.families import mistral
from megatron_grit.data.rows.batch import StepBatch
from megatron_grit.errors import ConfigError, GritError
from megatron_grit.models.attention import select_backend
from megatron_grit.models.layer_specs import transformer_config
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.planning.memory import Workload, estimate_memory
from megatron_grit.planning.operations import count_flops
from megatron_grit.training.estimate_report import workload_of
from tests.parity.gritlm_reference import GritBatch, adamw, grit_step

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "unified": ("generative", "embedding"),
    "embedding": ("embedding",),
    "generative": ("generative",),
}
TOLERANCE = {"bf16": 5e-2, "fp32": 1e-3}
"""Largest relative difference of the first losses."""
LOSS_GEN_FACTOR = 0.003
"""With the sum of the tokens' losses divided by the number of sequences, as GritLM's 8x7B recipe has it: then the plain
side may take any number of sequences at a time."""
MEMORY_SHARE = 0.85
"""Of the card, for the estimate that the number of layers is chosen by."""


@dataclass(frozen=True)
class Shape:
    """The model and the batch of a scale."""

    hidden_size: int
    ffn_hidden_size: int
    heads: int
    groups: int
    vocab_size: int
    layers: int
    """Most layers."""
    queries: int
    tokens_per_row: int
    longest: int


SCALES = {
    "7b": Shape(4096, 14336, 32, 8, 32000, layers=32, queries=128, tokens_per_row=4096, longest=2048),
    "tiny": Shape(64, 128, 4, 2, 512, layers=2, queries=8, tokens_per_row=256, longest=96),
}
SEQUENCES_A_QUERY = 1 / 8
"""Of GritLM's 7B recipe: 256 conversations to 2,048 queries."""


class DeviceProfile(Profile):
    """Seconds of steps, and with ``phases`` of their parts, the GPU waited for at both ends."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.phases, self._device = False, device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if name != "total" and not self.phases:
            yield
            return
        wait(self._device)
        with super().__call__(name):
            yield
            wait(self._device)


def wait(device: torch.device) -> None:
    """Until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def model_config(shape: Shape, layers: int, row: int) -> dict[str, Any]:
    """Settings of transformers' MistralConfig."""
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.hidden_size // shape.heads,
        "max_position_embeddings": row,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }


def run_config(arguments: argparse.Namespace, layers: int) -> RunConfig:
    """Our run."""
    from transformers import MistralConfig

    shape = SCALES[arguments.scale]
    config = RunConfig()
    settings = MistralConfig(**model_config(shape, layers, arguments.tokens_per_row)).to_dict()
    config.model = mistral.model_config(settings)
    config.model.attention_backend = arguments.attention_backend
    config.parallel.device = arguments.device
    config.data.train_group_size, config.data.tokens_per_row = GROUP_SIZE, arguments.tokens_per_row
    config.training.precision = arguments.precision
    config.training.steps = arguments.warmup + arguments.steps + 2
    config.training.embedding_batch_size = arguments.batch
    config.training.generative_batch_size = num_sequences(arguments)
    config.loss.temperature, config.loss.loss_gen_factor = TEMPERATURE, LOSS_GEN_FACTOR
    config.loss.loss_gen_type = "sequence"
    config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup_ratio = LR, "constant", 0.0
    config.optimizer.clip_grad = CLIP_GRAD
    return config


def num_sequences(arguments: argparse.Namespace) -> int:
    """Conversations of a batch."""
    return max(1, round(arguments.batch * SEQUENCES_A_QUERY))


def choose_layers(arguments: argparse.Namespace, workload: Workload, memory: int) -> int:
    """The most layers whose estimated peak is within a share of the card's memory.

    Raises:
        ConfigError: not one.
    """
    shape = SCALES[arguments.scale]
    for layers in range(shape.layers, 0, -1):
        estimate = estimate_memory(run_config(arguments, layers), 1, shape.vocab_size, workload)
        if estimate.peak <= MEMORY_SHARE * memory:
            return layers
    raise ConfigError(f"one layer does not fit into {memory / 2**30:.0f} GiB; lower --tokens-per-row or --batch")


def make_batches(arguments: argparse.Namespace) -> list[StepBatch]:
    """Warm-up, timed steps, and one to look into."""
    shape = SCALES[arguments.scale]
    return [
        random_batch(
            step,
            num_queries=arguments.batch,
            num_sequences=num_sequences(arguments),
            longest=min(shape.longest, arguments.tokens_per_row),
            tokens_per_row=arguments.tokens_per_row,
            vocab_size=shape.vocab_size,
            seed=arguments.seed,
        )
        for step in range(arguments.warmup + arguments.steps + 1)
    ]


def part_of(batch: StepBatch, objective: str) -> StepBatch:
    """The rows of a batch that an objective trains on."""
    if objective == "unified":
        return batch
    part = batch.parts[objective]
    lengths = [row.tokens_1T.shape[1] for row in part.rows]
    return replace(
        batch,
        parts={objective: part},
        num_tokens=sum(row.num_tokens for row in part.rows),
        num_padded_tokens=sum(lengths),
        row_length=max(lengths),
    )


def measure(
    arguments: argparse.Namespace, device: torch.device, profile: DeviceProfile, step: Callable[[int], dict[str, float]]
) -> tuple[dict[str, float], list[float], dict[str, float], int | None]:
    """Warm up, time, and look into one more step.

    Returns:
        Losses of the first step, seconds of the timed ones, seconds of each phase of the last, peak bytes.
    """
    first: dict[str, float] = {}
    for number in range(arguments.warmup + arguments.steps):
        if device.type == "cuda" and number == arguments.warmup:
            torch.cuda.reset_peak_memory_stats(device)
        losses = profile.step(step, number)
        first = first or losses
    seconds = [record["total"] for record in profile.steps[arguments.warmup :]]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    profile.phases = True
    profile.step(step, arguments.warmup + arguments.steps)
    return first, seconds, dict(profile.steps[-1]), peak


def write_profile(arguments: argparse.Namespace, name: str, device: torch.device, step: Callable[[], Any]) -> None:
    """A table of where one step's time goes, by kernel, under ``--profile``."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        step()
        wait(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    arguments.profile.mkdir(parents=True, exist_ok=True)
    table = recorded.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
    (arguments.profile / f"{name}.txt").write_text(table + "\n", encoding="utf-8")


def measure_ours(
    arguments: argparse.Namespace, config: RunConfig, context: Any, weights: dict[str, torch.Tensor], objective: str
) -> Measured:
    """Our steps of an objective, from ``weights``."""
    config.training.objective = objective  # type: ignore[assignment]
    profile = DeviceProfile(context.device)
    batches = [part_of(batch, objective) for batch in make_batches(arguments)]
    train_step = build_ours(config, weights, context, profile)
    measured = measure(arguments, context.device, profile, lambda number: train_step(batches[number]))
    if arguments.profile is not None:
        write_profile(arguments, f"megatron_grit_{objective}", context.device, lambda: train_step(batches[-1]))
    return Measured(*measured, [batch.num_padded_tokens for batch in batches])


def measure_reference(
    arguments: argparse.Namespace, model: Any, device: torch.device, weights: dict[str, torch.Tensor], objective: str
) -> Measured:
    """The steps of plain transformers, from ``weights``."""
    model.load_state_dict(weights)
    model.train()
    optimizer, parts = adamw(model, LR), OBJECTIVES[objective]
    profile = DeviceProfile(device)
    batches = [reference_batch(batch) for batch in make_batches(arguments)]

    def step(number: int) -> dict[str, float]:
        batch = batches[number]
        loss_emb, loss_gen, _ = grit_step(
            model,
            batch.to(device),
            optimizer,
            temperature=TEMPERATURE,
            clip_grad=CLIP_GRAD,
            parts=parts,
            chunk_size=arguments.reference_chunk or _at_a_time(arguments, batch.passages.ids_NL),
            generative_chunk_size=_divisor(len(batch.labels_BL), _at_a_time(arguments, batch.labels_BL)),
            loss_gen_kind="token",
            loss_gen_factor=LOSS_GEN_FACTOR,
            phase=profile,
        )
        return {"loss_emb": loss_emb, "loss_gen": loss_gen}

    measured = measure(arguments, device, profile, step)
    if arguments.profile is not None:
        write_profile(arguments, f"transformers_{objective}", device, lambda: step(len(batches) - 1))
    return Measured(*measured, [_padded_tokens(batch, parts) for batch in batches])


def _at_a_time(arguments: argparse.Namespace, ids_NL: torch.Tensor) -> int:
    """Padded texts that have about as many tokens as one of our rows."""
    return max(1, round(arguments.tokens_per_row / ids_NL.shape[1]))


def _divisor(count: int, most: int) -> int:
    return max(size for size in range(1, min(count, most) + 1) if count % size == 0)


def _padded_tokens(batch: GritBatch, parts: tuple[str, ...]) -> int:
    generative = batch.generative_ids_BL.numel()
    embedding = batch.num_padded_tokens - generative
    return generative * ("generative" in parts) + embedding * ("embedding" in parts)


def free(device: torch.device) -> None:
    """Give back what is not referred to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both sides; returns all that is reported.

    Raises:
        ConfigError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("the other side is transformers: pip install 'megatron-grit[dev]'")
    from transformers import MistralConfig, MistralForCausalLM

    shape = SCALES[arguments.scale]
    batches = make_batches(arguments)
    config = run_config(arguments, arguments.layers or 1)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    results: dict[str, dict[str, Measured]] = {objective: {} for objective in arguments.objectives}
    with parallel_job(config.parallel, arguments.seed) as context:
        device = context.device
        if arguments.layers is None:
            on_cuda = device.type == "cuda"
            memory = torch.cuda.get_device_properties(device).total_memory if on_cuda else 2**62
            arguments.layers = choose_layers(arguments, workload_of(run_config(arguments, 1), batches[0], 1), memory)
            config = run_config(arguments, arguments.layers)
        settings = MistralConfig(**model_config(shape, arguments.layers, arguments.tokens_per_row))
        settings._attn_implementation = "sdpa"
        torch.manual_seed(arguments.seed)
        with torch.device(device):
            model = MistralForCausalLM._from_config(settings, dtype=dtype)
        weights = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
        del model
        for objective in arguments.objectives:
            free(device)
            results[objective]["megatron_grit"] = measure_ours(arguments, config, context, weights, objective)
        free(device)
        with torch.device(device):
            model = MistralForCausalLM._from_config(settings, dtype=dtype)
        for objective in arguments.objectives:
            free(device)
            results[objective]["transformers"] = measure_reference(arguments, model, device, weights, objective)
            _check_losses(arguments, objective, results[objective])
        return _report(arguments, config, device, batches, results)


def _check_losses(arguments: argparse.Namespace, objective: str, sides: dict[str, Measured]) -> None:
    ours, theirs = sides["megatron_grit"].losses, sides["transformers"].losses
    for part in OBJECTIVES[objective]:
        name = {"embedding": "loss_emb", "generative": "loss_gen"}[part]
        if not abs(ours[name] - theirs[name]) <= TOLERANCE[arguments.precision] * abs(theirs[name]):
            raise GritError(f"{objective}: the first {name} is {ours[name]} here and {theirs[name]} in transformers")


def _report(
    arguments: argparse.Namespace,
    config: RunConfig,
    device: torch.device,
    batches: list[StepBatch],
    results: dict[str, dict[str, Measured]],
) -> dict[str, Any]:
    shape, where = SCALES[arguments.scale], machine(device, arguments.precision, arguments.peak_tflops)
    timed = slice(arguments.warmup, arguments.warmup + arguments.steps)
    rows = []
    for objective, sides in results.items():
        parts = [part_of(batch, objective) for batch in batches[timed]]
        config.training.objective = objective  # type: ignore[assignment]
        flops = [count_flops(config, 1, shape.vocab_size, workload_of(config, part, 1)).model for part in parts]
        seconds = {side: statistics.median(measured.seconds) for side, measured in sides.items()}
        for side, measured in sides.items():
            padded = measured.padded_tokens[timed]
            row = row_of(objective, side, measured, parts, flops, padded, where["peak_tflops"])
            rows.append(row | {"speed": seconds["transformers"] / seconds[side]})
    return where | {
        "attention_backend": select_backend(config.model.attention_backend, device, transformer_config(config)),
        "scale": arguments.scale,
        "layers": arguments.layers,
        "precision": arguments.precision,
        "tokens_per_row": arguments.tokens_per_row,
        "queries": arguments.batch,
        "passages": arguments.batch * GROUP_SIZE,
        "sequences": num_sequences(arguments),
        "steps": arguments.steps,
        "rows": rows,
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what depends on the scale and the device filled in."""
    parser = harness.parser(__doc__)
    parser.add_argument("--layers", type=int, help="default: as many as fit")
    parser.add_argument("--tokens-per-row", type=int, help="token budget of a row; default: of the scale")
    parser.add_argument("--batch", type=int, help="queries of a step; default: of the scale")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16, fp32 on the CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--scale", choices=tuple(SCALES), default="7b", help="shape of model and batch")
    parser.add_argument("--objectives", nargs="+", choices=tuple(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--attention-backend", choices=("auto", "te", "varlen", "sdpa"), default="auto")
    parser.add_argument("--reference-chunk", type=int, help="texts of transformers' GradCache chunk")
    parser.add_argument("--peak-tflops", type=float, help="of the card; default: by its name, in bf16")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--profile", type=Path, help="also write here, for each step, a table of its kernels")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    arguments = parser.parse_args(words)
    shape = SCALES[arguments.scale]
    arguments.tokens_per_row = arguments.tokens_per_row or shape.tokens_per_row
    arguments.batch = arguments.batch or shape.queries
    on_cpu = arguments.device == "cpu" or not torch.cuda.is_available()
    arguments.precision = arguments.precision or ("fp32" if on_cpu else "bf16")
    return arguments


def main() -> int:
    """Measure, print and write. Returns the exit status."""
    arguments = parse()

    def measured(folder: Path) -> tuple[dict[str, Any], bool]:
        report = run(arguments)
        text = markdown(report)
        print(text, end="")
        if arguments.markdown is not None:
            arguments.markdown.write_text(text, encoding="utf-8")
        return report, True

    return harness.run("gpu_grit", arguments, measured)


if __name__ == "__main__":
    sys.exit(main())
