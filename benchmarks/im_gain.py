"""What a loss over instructions is worth where they are long and answers short, beside noise on embeddings.

Text: Dolly's records whose instruction is at least --ratio times as long as the answer, of which each fifth is held
out; a tiny decoder first reads all other records as plain language (base), once a seed. Arms start from that base and
train on the same samples in the same order:

    it              loss over answers
    im              loss over instructions and answers, not over the template (Instruction Modelling, arXiv 2405.14394)
    neftune         as it, with noise on the embeddings (NEFTune, arXiv 2310.05914)
    im_neftune      both

Three seeds draw weights, order and noise. The loss is that of held-out answers (nats a token), after each quarter of
the steps, and at the end that of the answers that were trained on, with t intervals over the seeds and of paired
differences. Nothing is a target: the table is the result.

Example:
    python -m benchmarks.im_gain --data ../shared/data --json im_gain.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import t_interval
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.model import ModelConfig
from megatron_grit.data.builders.grit_builder import build_grit, read_texts
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece

SEEDS = (1, 2, 3)
RECORDS = "alpagasus_3k_dolly.jsonl"
SHORTEST = 200
"""Characters of a long instruction."""
VOCABULARY, MAX_LENGTH = 2048, 2048
BATCH = 8


@dataclass(frozen=True)
class Arm:
    """How the base goes on."""

    labels: str = "it"
    noise: float = 0.0


ARMS = {
    "it": Arm(),
    "im": Arm("im"),
    "neftune": Arm(noise=5.0),
    "im_neftune": Arm("im", 5.0),
}


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokenizer and indexed files. Returns what they hold."""
    parts: dict[str, list[str]] = {"base": [], "train": [], "held_out": []}
    sizes = {name: [0, 0] for name in parts}
    chosen = 0
    for line in harness.data_file(arguments.data, RECORDS).read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        answer = sum(len(message["content"]) for message in messages if message["role"] == "assistant")
        instruction = sum(len(message["content"]) for message in messages) - answer
        name = "base"
        if instruction >= max(SHORTEST, arguments.ratio * answer):
            name, chosen = "train" if (chosen + 1) % 5 else "held_out", chosen + 1
        parts[name].append(line)
        sizes[name] = [sizes[name][0] + instruction, sizes[name][1] + answer]
    paths = {name: folder / f"{name}.jsonl" for name in parts}
    for name, path in paths.items():
        path.write_text("\n".join(parts[name]) + "\n", encoding="utf-8")
    model = train_sentencepiece(read_texts([paths["base"], paths["train"]]), folder / "tokenizer", VOCABULARY)
    for path in paths.values():
        build_grit([path], path.with_suffix(""), model, template="tulu")
    return {
        name: {
            "records": len(lines),
            "characters of instructions": sizes[name][0] / len(lines),
            "characters of answers": sizes[name][1] / len(lines),
            "tokens": int(IndexedFile(paths[name].with_suffix("")).lengths.sum()),
        }
        for name, lines in parts.items()
    }


def run_config(folder: Path, seed: int, steps: int, lr: float) -> RunConfig:
    """The run of the base."""
    config = RunConfig(output_dir=str(folder / "runs"))
    config.model = ModelConfig(
        num_layers=2,
        hidden_size=96,
        ffn_hidden_size=288,
        num_attention_heads=3,
        num_query_groups=None,
        max_position_embeddings=MAX_LENGTH,
        tie_embeddings=True,
        sliding_window=None,
    )
    config.parallel.device = "cpu"
    config.data.tokenizer, config.data.generative = str(folder / "tokenizer.model"), [str(folder / "base")]
    config.data.tokens_per_row = 2048
    config.optimizer.lr, config.optimizer.min_lr, config.optimizer.schedule = lr, 0.0, "linear"
    config.optimizer.warmup_ratio, config.optimizer.beta2, config.optimizer.weight_decay = 0.03, 0.98, 0.0
    config.loss.labels = "lm"
    config.training.objective, config.training.generative_batch_size = "generative", BATCH
    config.training.precision, config.training.steps, config.training.seed = "fp32", steps, seed
    return config


def arm_config(base: RunConfig, arm: Arm, folder: Path, steps: int, lr: float) -> RunConfig:
    """The run of an arm."""
    config = replace(base, data=replace(base.data), loss=replace(base.loss), training=replace(base.training))
    config.optimizer = replace(base.optimizer, lr=lr)
    config.data.generative = [str(folder / "train")]
    config.data.valid = [str(folder / "held_out")]
    config.loss.labels = arm.labels  # type: ignore[assignment]
    config.training.neftune_alpha, config.training.steps = arm.noise, steps
    return config


@dataclass(frozen=True)
class Job:
    """All trainings of a seed."""

    folder: Path
    seed: int
    base_steps: int
    steps: int
    base_lr: float
    lr: float


def train(job: Job) -> dict[str, Any]:
    """The base of a seed and its arms, in a process of its own."""
    import torch

    from megatron_grit.data.rows.loader import GritDataLoader
    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights, save_weights
    from megatron_grit.training.optimizer import build_optimizer, build_schedule, set_learning_rate, wrap_model
    from megatron_grit.training.step import TrainStep
    from megatron_grit.training.validation.loss import Validation

    torch.set_num_threads(1)
    base = run_config(job.folder, job.seed, job.base_steps, job.base_lr)
    configs = {name: arm_config(base, arm, job.folder, job.steps, job.lr) for name, arm in ARMS.items()}
    held_out = configs["it"]  # the loss of answers, without noise
    trained_on = replace(held_out, data=replace(held_out.data, valid=held_out.data.generative))
    assert base.data.tokenizer is not None
    tokenizer, weights = load_tokenizer(base.data.tokenizer), job.folder / f"base_{job.seed}"
    found: dict[str, Any] = {}
    with parallel_job(base.parallel, job.seed) as context:
        for name, config in ({"base": base} | configs).items():
            began = time.process_time()
            loader = GritDataLoader(config, tokenizer, row_multiple=context.row_multiple, equal_rows=False)
            model = build_model(config, tokenizer.vocab_size, context)
            wrapped = wrap_model(model)
            if name != "base":
                load_weights(weights, [model], context)
            optimizer = build_optimizer(config, wrapped)
            schedule, step = build_schedule(config, optimizer), TrainStep(config, context, wrapped, optimizer)
            validation, after = (
                Validation(measured, tokenizer, context, [wrapped]) for measured in (held_out, trained_on)
            )
            curve = [] if name == "base" else [validation()["valid_loss"]]
            for batch in loader.iterate(0, config.training.steps):
                set_learning_rate(schedule, batch.step)
                step(batch)
                if name != "base" and (batch.step + 1) % max(1, job.steps // 4) == 0:
                    curve.append(validation()["valid_loss"])
            figures = validation()
            if name == "base":
                save_weights([model], context, weights)
            found[name] = {
                "loss": figures["valid_loss"],
                "loss on trained answers": after()["valid_loss"],
                "tokens": figures["valid_tokens"],
                "curve": curve,
                "seconds": time.process_time() - began,
            }
            print(f"seed {job.seed} {name}: {found[name]}", flush=True)
    return found


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Build the files, train all, print."""
    text = prepare(arguments, folder)
    print("\n".join(f"{name}: {about}" for name, about in text.items()), flush=True)
    jobs = [
        Job(folder, seed, arguments.base_steps, arguments.steps, arguments.base_lr, arguments.lr)
        for seed in SEEDS[: arguments.seeds]
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        runs = pool.map(train, jobs, chunksize=1)
    return {"text": text, "options": {k: str(v) for k, v in vars(arguments).items()}, **report(runs)}, True


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the table. Returns its numbers."""
    arms: dict[str, Any] = {}
    print(f"\n  {'arm':12s} {'held-out answers':>20s} {'trained answers':>18s}   held out after each quarter")
    for name in runs[0]:
        own = [run[name] for run in runs]
        held_out, trained = ([one[key] for one in own] for key in ("loss", "loss on trained answers"))
        curve = [statistics.fmean(values) for values in zip(*(one["curve"] for one in own), strict=True)]
        arms[name] = {"loss": held_out, **t_interval(held_out), "trained": trained, "curve": curve}
        print(
            f"  {name:12s} {arms[name]['mean']:9.4f} +- {arms[name]['half_interval']:7.4f} "
            f"{statistics.fmean(trained):18.4f}   {' '.join(f'{value:.4f}' for value in curve)}"
        )
    gains = {}
    for name in ARMS:
        if name != "it":
            differences = [a - b for a, b in zip(arms["it"]["loss"], arms[name]["loss"], strict=True)]
            gains[f"it - {name}"] = gain = t_interval(differences)
            print(f"  it - {name}: {gain['mean']:+.4f} +- {gain['half_interval']:.4f}")
    return {"arms": arms, "gains": gains, "tokens": runs[0]["it"]["tokens"]}


def main() -> int:
    """Parse the command line and measure. Returns the exit status."""
    parser = harness.parser(__doc__, data=RECORDS)
    parser.add_argument("--ratio", type=float, default=2.0, help="of lengths, instruction by answer, at least")
    parser.add_argument("--steps", type=int, default=88, help="of an arm (default: %(default)s, three epochs)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of an arm, at its peak (default: %(default)s)")
    parser.add_argument("--base-steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--base-lr", type=float, default=3e-3, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, len(SEEDS) + 1), help="the first so many")
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time (default: %(default)s)")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    return harness.run("im_gain", arguments, lambda folder: measure(arguments, folder))


if __name__ == "__main__":
    sys.exit(main())
