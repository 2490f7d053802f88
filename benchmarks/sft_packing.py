"""Labels a second of tuning on instructions: packed rows against rows padded to a length, or to a batch's longest.

Dolly's conversations (alpagasus_3k_dolly.jsonl) are drawn as a run draws them, and the same step of the same model,
from the same weights, trains on three layouts of the same conversations:

    packed    as the loader packs them
    dynamic   --batch at a time, in the order in which they are drawn, each padded to the longest of the batch
    padded    each padded to --length

Padding is attended to within its own conversation, as in a batch of a plain trainer, and never predicted. Sides take
turns for --rounds rounds on the steps of a run, fp32; processor time of one thread counts, and the fastest round is
taken. The losses of the three must agree, and do so only where positions, masks and labels are right.

Targets: at least 7 times the labels a second of padded rows, and twice those of dynamic padding. Exit status 1 where
one is missed.

Example:
    python -m benchmarks.sft_packing --data ../shared/data --json sft_packing.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.model import ModelConfig
from megatron_grit.data.builders.grit_builder import build_grit, read_texts
from megatron_grit.data.builders.record_encoder import Limits
from megatron_grit.data.rows.batch import BatchPart, PackedRow, StepBatch
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece
from megatron_grit.errors import DataError
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.training.optimizer import build_optimizer, wrap_model
from megatron_grit.training.step import TrainStep

RECORDS = "alpagasus_3k_dolly.jsonl"
LEAST_OVER = {"dynamic": 2.0, "padded": 7.0}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Conversation:
    """A segment of a row: tokens, labels and mask, [L] each."""

    tokens_L: Tensor
    labels_L: Tensor
    mask_L: Tensor
    record_id: str
    slot: int
    """Place in the step."""


def conversations(part: BatchPart) -> list[Conversation]:
    """Of a step, in the order in which they were drawn."""
    found: dict[int, Conversation] = {}
    for row in part.rows:
        assert row.labels_1T is not None and row.loss_mask_1T is not None and row.slots_S is not None
        ends = row.cu_seqlens.tolist()
        spans = zip(ends[:-1], ends[1:], row.slots_S.tolist(), row.record_ids, strict=False)  # padding comes last
        for start, stop, slot, record_id in spans:
            each = row.tokens_1T, row.labels_1T, row.loss_mask_1T
            found[slot] = Conversation(*(values[0, start:stop] for values in each), record_id, slot)
    return [found[slot] for slot in sorted(found)]


def padded_row(group: Sequence[Conversation], length: int, like: PackedRow) -> PackedRow:
    """A batch of conversations, each padded to ``length``, one after another."""

    def laid(values: list[Tensor]) -> Tensor:
        padded = values[0].new_zeros(len(values), length)
        for place, value in enumerate(values):
            padded[place, : len(value)] = value
        return padded.reshape(1, -1)

    sizes = torch.tensor([len(each.tokens_L) for each in group])
    every = torch.arange(length)
    return replace(
        like,
        tokens_1T=laid([each.tokens_L for each in group]),
        positions_1T=every.repeat(len(group))[None],
        cu_seqlens=torch.arange(len(group) + 1, dtype=torch.int32) * length,
        max_seqlen=length,
        padding_mask_1T=(every[None] >= sizes[:, None]).reshape(1, -1),
        labels_1T=laid([each.labels_L for each in group]),
        loss_mask_1T=laid([each.mask_L for each in group]),
        record_ids=[each.record_id for each in group],
        slots_S=torch.tensor([each.slot for each in group]),
    )


def relaid(batch: StepBatch, group: int, length: int | None) -> StepBatch:
    """The step in batches of ``group`` conversations, padded to ``length``, or to the longest of each."""
    ((kind, part),) = batch.parts.items()
    drawn = conversations(part)
    rows = []
    for start in range(0, len(drawn), group):
        some = drawn[start : start + group]
        rows.append(padded_row(some, length or max(len(each.tokens_L) for each in some), part.rows[0]))
    sizes = [row.tokens_1T.shape[1] for row in rows]
    parts = {kind: BatchPart(rows=rows, counts=part.counts)}
    return replace(batch, parts=parts, row_length=max(sizes), num_padded_tokens=sum(sizes))


def run_config(folder: Path, arguments: argparse.Namespace) -> RunConfig:
    """A small decoder of Llama's kind."""
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
    config.data.tokenizer, config.data.generative = str(folder / "tokenizer.model"), [str(folder / "chats")]
    config.data.tokens_per_row = arguments.length
    config.training.objective, config.training.generative_batch_size = "generative", arguments.sequences
    config.training.precision, config.training.steps = "fp32", arguments.rounds
    return config


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Build the file, compare, time and print."""
    torch.set_num_threads(1)
    path = harness.data_file(arguments.data, RECORDS)
    model = train_sentencepiece(read_texts([path]), folder / "tokenizer", arguments.vocab_size)
    build_grit([path], folder / "chats", model, Limits(generative=arguments.length), template="tulu")
    config, tokenizer = run_config(folder, arguments), load_tokenizer(model)
    layouts = {"packed": None, "dynamic": (arguments.batch, None), "padded": (1, arguments.length)}
    with parallel_job(config.parallel, 1) as context:
        loader = GritDataLoader(config, tokenizer, row_multiple=context.row_multiple, equal_rows=False)
        steps = dict[str, TrainStep]()
        first = build_model(config, tokenizer.vocab_size, context).state_dict()
        for name in layouts:
            made = build_model(config, tokenizer.vocab_size, context)
            made.load_state_dict(first)
            wrapped = wrap_model(made)
            steps[name] = TrainStep(config, context, wrapped, build_optimizer(config, wrapped))
        found = {name: Side() for name in layouts}
        for batch in loader.iterate(0, arguments.rounds):
            for name, how in layouts.items():
                found[name].train(steps[name], relaid(batch, *how) if how else batch)
            losses = {name: side.losses[-1] for name, side in found.items()}
            if max(losses.values()) - min(losses.values()) > TOLERANCE:
                raise DataError(f"the layouts disagree in the loss of step {batch.step}: {losses}")
    return report(found, arguments)


class Side:
    """What a layout takes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.useful = self.computed = 0

    def train(self, step: TrainStep, batch: StepBatch) -> None:
        """One step."""
        (part,) = batch.parts.values()
        began = time.process_time()
        self.losses.append(float(step(batch)["loss"]))
        self.rates.append(part.counts.num_labels / (time.process_time() - began))
        self.useful += batch.num_tokens
        self.computed += batch.num_padded_tokens


def report(found: dict[str, Side], arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Print. Returns the numbers, and whether the targets are met."""
    numbers: dict[str, Any] = {"options": {name: str(value) for name, value in vars(arguments).items()}}
    best, met = max(found["packed"].rates), True
    for name, side in found.items():
        fill, rate = side.useful / side.computed, max(side.rates)
        over = best / rate
        met &= over >= LEAST_OVER.get(name, 0.0)
        numbers[name] = {"labels a second": rate, "fill": fill, "packed is faster by": over, "losses": side.losses}
        print(f"  {name:8s} {rate:9.0f} labels a second, {fill:6.1%} of the tokens are none of padding, {over:6.2f}")
    return numbers, met


def main() -> int:
    """Parse the command line and measure. Returns the exit status: 1 where a target is missed."""
    parser = harness.parser(__doc__, data=RECORDS)
    for name, default, told in (
        ("num-layers", 3, "of the model"),
        ("hidden-size", 192, "of the model"),
        ("vocab-size", 4096, "of the tokenizer, trained on the same text"),
        ("length", 2048, "of padded rows, and of packed ones"),
        ("batch", 8, "conversations that are padded to the longest of them"),
        ("sequences", 32, "conversations of a step"),
        ("rounds", 3, "steps"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{told} (default: %(default)s)")
    arguments = parser.parse_args()
    return harness.run("sft_packing", arguments, lambda folder: measure(arguments, folder))


if __name__ == "__main__":
    sys.exit(main())
