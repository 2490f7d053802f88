"""Preferences at the price of tuning: how full packed rows of pairs are, and a DPO step beside one of next tokens.

Pairs are made of Dolly's conversations (alpagasus_3k_dolly.jsonl): the answer to a question is preferred to the answer
to another one. Rows are filled from the stream of pairs (data.packing window), each pair whole, and the share of tokens
that are none of padding is taken over an epoch.

Both sides then train the same model from the same weights on the same rows, tokens and labels, in turn: one with DPO,
whose reference was computed before and is read from its cache, the other with the next-token loss. fp32, one thread,
processor time, the fastest round of each side.

Targets: rows that are 99% full, and a DPO step of at most 1.05 times the other. Exit status 1 where one is missed.

Example:
    python -m benchmarks.preference --data ../shared/data --json preference.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from megatron_grit.config.kinds import option
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.model import ModelConfig
from megatron_grit.data.builders.grit_builder import build_grit, read_texts
from megatron_grit.data.builders.record_encoder import Limits
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.kinds.generative import count_labels
from megatron_grit.data.rows.batch import BatchPart, StepBatch
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.training.objectives.base import RunStart
from megatron_grit.training.optimizer import build_optimizer, wrap_model
from megatron_grit.training.step import TrainStep

RECORDS = "alpagasus_3k_dolly.jsonl"
LEAST_FILL, MOST_OVER = 0.99, 1.05
PAIRS, TEXTS = "preference", "generative"


def write_pairs(source: Path, target: Path) -> None:
    """Each conversation's answer, and the next one's in its place."""
    records = [json.loads(line)["messages"] for line in source.read_text(encoding="utf-8").splitlines()]
    with target.open("w", encoding="utf-8") as file:
        for messages, other in zip(records, records[1:] + records[:1], strict=True):
            *prompt, chosen = messages
            pair = {"prompt": prompt, "chosen": [chosen], "rejected": [other[-1]]}
            if chosen["content"] != other[-1]["content"]:
                file.write(json.dumps(pair) + "\n")


def run_config(folder: Path, arguments: argparse.Namespace) -> RunConfig:
    """A small decoder of Llama's kind, on full rows of pairs."""
    config = RunConfig(output_dir=str(folder / "runs"))
    config.model = ModelConfig(
        num_layers=arguments.num_layers,
        hidden_size=arguments.hidden_size,
        ffn_hidden_size=3 * arguments.hidden_size,
        num_attention_heads=max(1, arguments.hidden_size // 64),
        num_query_groups=None,
        max_position_embeddings=arguments.length,
        sliding_window=None,
    )
    config.parallel.device = "cpu"
    config.data.tokenizer, config.data.tokens_per_row = str(folder / "tokenizer.model"), arguments.length
    config.data.packing = "window"
    config.training.objective, config.training.precision = PAIRS, "fp32"
    config.training.steps = arguments.rounds
    own = option(config, PAIRS)
    own.data, own.rows, own.over_long = [str(folder / "pairs")], arguments.rows, "truncate"
    return config


def fill_of(loader: GritDataLoader, config: RunConfig) -> float:
    """Share of an epoch's tokens that are none of padding, rows as a run makes them."""
    stream = loader.streams[PAIRS]
    per_step = option(config, PAIRS).rows * config.data.tokens_per_row
    steps = max(
        1, int(sum(stream.sources.meta(number).num_tokens for number in range(len(stream.sources))) // per_step)
    )
    batches = [loader.batch(step) for step in range(steps)]
    return sum(batch.num_tokens for batch in batches) / sum(batch.num_padded_tokens for batch in batches)


def as_texts(batch: StepBatch) -> StepBatch:
    """The same rows for the loss of next tokens: every label of them counts."""
    part = batch.parts[PAIRS]
    rows = [replace(row, kind=TEXTS) for row in part.rows]
    labels = part.counts.num_labels
    counts = count_labels(np.array([float(labels)]), labels, len(rows))
    return replace(batch, parts={TEXTS: BatchPart(rows=rows, counts=counts)})


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Build the pairs, look at rows, take steps in turn, and print."""
    torch.set_num_threads(1)
    path = harness.data_file(arguments.data, RECORDS)
    model = train_sentencepiece(read_texts([path]), folder / "tokenizer", arguments.vocab_size)
    write_pairs(path, folder / "pairs.jsonl")
    limits = Limits(generative=arguments.length // 2)
    build_grit([folder / "pairs.jsonl"], folder / "pairs", model, limits, kind=RowKind.PREFERENCE, template="tulu")
    config, tokenizer = run_config(folder, arguments), load_tokenizer(model)
    with parallel_job(config.parallel, 1) as context:
        loader = GritDataLoader(config, tokenizer, row_multiple=context.row_multiple, equal_rows=False)
        fill = fill_of(loader, config)
        first = build_model(config, tokenizer.vocab_size, context).state_dict()
        steps = {}
        for name, kind in (("dpo", PAIRS), ("sft", TEXTS)):
            made = build_model(config, tokenizer.vocab_size, context)
            made.load_state_dict(first)
            wrapped = wrap_model(made)
            own = replace(config, training=replace(config.training, objective=kind))
            steps[name] = TrainStep(own, context, wrapped, build_optimizer(own, wrapped))
            start = RunStart(step=0, streams=loader.streams, chunks=[made], pad_id=tokenizer.pad_id)
            steps[name].objectives[0].start(start)
        taken: dict[str, list[float]] = {name: [] for name in steps}
        losses = []
        for batch in loader.iterate(0, arguments.rounds):
            for name, step in steps.items():
                began = time.process_time()
                metrics = step(batch if name == "dpo" else as_texts(batch))
                taken[name].append(time.process_time() - began)
                losses.append(metrics["loss"])
    over = min(taken["dpo"]) / min(taken["sft"])
    print(
        f"  fill {fill:.4f}, a DPO step takes {over:.3f} of one of next tokens; the first DPO loss is {losses[0]:.7f}"
    )
    numbers = {
        "options": {name: str(value) for name, value in vars(arguments).items()},
        "fill": fill,
        "dpo_over_sft": over,
        "seconds": taken,
        "first_dpo_loss": losses[0],
    }
    return numbers, fill >= LEAST_FILL and over <= MOST_OVER


def main() -> int:
    """Parse the command line and measure. Returns the exit status: 1 where a target is missed."""
    parser = harness.parser(__doc__, data=RECORDS)
    for name, default, told in (
        ("num-layers", 3, "of the model"),
        ("hidden-size", 192, "of the model"),
        ("vocab-size", 4096, "of the tokenizer, trained on the same text"),
        ("length", 4096, "tokens of a row; a conversation has at most half of it"),
        ("rows", 1, "rows of a step"),
        ("rounds", 6, "steps of each side"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{told} (default: %(default)s)")
    arguments = parser.parse_args()
    return harness.run("preference", arguments, lambda folder: measure(arguments, folder))


if __name__ == "__main__":
    sys.exit(main())
