"""Tokens per second of a Retro model that generates with its cache, against no cache and against a GPT with one.

Three sides continue the same prompt greedily to --length tokens, fp32, one process, fresh weights of one seed:

- retro: cached, with k neighbors of two chunks for each chunk, which are encoded when it ends;
- full: the same model and neighbors, a full forward pass for each token; passes of --passes lengths, the longest among
  them, are timed, and their times summed over all lengths by the trapezoidal rule;
- gpt: the decoder of the same shape without neighbors, cached.

Neighbors are random tokens: searching is not part of it. Processor time of one thread counts, so other work on the
machine does not; sides take turns for --rounds rounds, of which the fastest is taken. The logits of retro are compared
with those of the full passes.

Targets: at least 25 times the tokens per second of full passes at --length tokens, and at most 1.6 times the time a
token of gpt. Exit status 1 where one is missed.

Example:
    python -m benchmarks.retro_generate --json retro_generate.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import harness
from megatron_grit.config.options import SamplingOptions
from megatron_grit.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.rows.neighbors import Neighbors
from megatron_grit.errors import DataError
from megatron_grit.inference.generation.generate import continuation_row, generate_tokens
from megatron_grit.inference.reading import Passage, Reader, Window
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.parallel.launch import parallel_job

LEAST_OVER_FULL, MOST_OVER_GPT = 25.0, 1.6
TOLERANCE = 1e-4


class RandomNeighbors:
    """For every window other passages, the same each time it is asked."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._shape, self._vocab = (arguments.neighbors, 2 * arguments.chunk_length), arguments.vocab_size

    def find(self, windows: Sequence[Window]) -> list[list[Passage]]:
        """Full ones."""
        drawn = [np.random.default_rng(window.tokens).integers(0, self._vocab, self._shape) for window in windows]
        return [[Passage(text.tolist()) for text in texts] for texts in drawn]


class Noting(Reader):
    """Remembers what the passes read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.noted: list[tuple[int, Neighbors]] = []

    def read(self, sequences: Sequence[int], tokens: Sequence[Sequence[int]], lengths: Sequence[int]) -> Neighbors:
        """As ever."""
        found = super().read(sequences, tokens, lengths)
        self.noted.append((lengths[0], found))
        return found


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Build, compare, time and print."""
    torch.set_num_threads(1)
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        models = {}
        for name, neighbors in (("retro", arguments.neighbors), ("gpt", 0)):
            config = run_config(arguments, neighbors)
            models[name] = build_model(config, arguments.vocab_size, context).eval()
        return compare(models["retro"], models["gpt"], arguments)


def run_config(arguments: argparse.Namespace, num_neighbors: int) -> RunConfig:
    """A decoder of Llama's kind."""
    config = RunConfig(
        model=ModelConfig(
            num_layers=arguments.num_layers,
            hidden_size=arguments.hidden_size,
            ffn_hidden_size=4 * arguments.hidden_size,
            num_attention_heads=max(1, arguments.hidden_size // 64),
            num_query_groups=max(1, arguments.hidden_size // 64),
            kv_channels=64,
            max_position_embeddings=arguments.length,
            retro=RetroConfig(num_neighbors=num_neighbors, chunk_length=arguments.chunk_length),
        )
    )
    config.training.precision = "fp32"
    return config


def compare(retro: GritDecoder, gpt: GritDecoder, arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The figures, and whether the targets are met."""
    prompt = np.random.default_rng(1).integers(0, arguments.vocab_size, arguments.prompt).tolist()
    new = arguments.length - arguments.prompt
    options = SamplingOptions(max_new_tokens=new)
    noting = reader(arguments, Noting)
    limits: dict[str, Any] = {"stop_ids": (), "max_positions": arguments.length}
    seen: list[torch.Tensor] = []
    with mock.patch.object(retro, "logits_at", lambda *given: _note(seen, type(retro).logits_at(retro, *given))):
        (answer,) = generate_tokens(retro, [prompt], options, reader=noting, **limits)
    tokens = [*prompt, *answer.tokens[:-1]]
    lengths = np.linspace(arguments.prompt, len(tokens), arguments.passes).round().astype(int).tolist()
    rows = {length: full_row(tokens[:length], noting) for length in lengths}
    for length, row in rows.items():
        difference = float((full_pass(retro, row)[-1] - seen[length - arguments.prompt]).abs().max())
        if difference > TOLERANCE:
            raise DataError(f"cached logits after {length} tokens differ by {difference:.2g} from those of a full pass")

    def cached(model: GritDecoder) -> float:
        source = reader(arguments) if model is retro else None
        return cpu_seconds(lambda: generate_tokens(model, [prompt], options, reader=source, **limits))

    sides: dict[str, Any] = {"retro": lambda: cached(retro), "gpt": lambda: cached(gpt)}
    sides |= {
        f"full at {length}": (lambda row=row: cpu_seconds(lambda: full_pass(retro, row)))
        for length, row in rows.items()
    }
    times = {name: min(found) for name, found in harness.in_turn(sides, arguments.rounds).items()}
    full = [times[f"full at {length}"] for length in lengths]
    numbers: dict[str, Any] = vars(arguments) | {
        "json": None,
        "retro_ms": 1000 * times["retro"] / new,
        "gpt_ms": 1000 * times["gpt"] / new,
        "full_ms": 1000 * float(np.trapezoid(full, lengths)) / (lengths[-1] - lengths[0]),
        "full_at_length_ms": 1000 * full[-1],
    }
    numbers["over_full_at_length"] = numbers["full_at_length_ms"] / numbers["retro_ms"]
    numbers["over_full"] = numbers["full_ms"] / numbers["retro_ms"]
    numbers["over_gpt"] = numbers["retro_ms"] / numbers["gpt_ms"]
    for name in ("retro_ms", "gpt_ms", "full_ms", "full_at_length_ms"):
        print(f"{name:>20} {numbers[name]:9.2f} a token, {1000 / numbers[name]:8.1f} tokens/s")
    for name in ("over_full_at_length", "over_full", "over_gpt"):
        print(f"{name:>20} {numbers[name]:9.2f}")
    met = numbers["over_full_at_length"] >= LEAST_OVER_FULL and numbers["over_gpt"] <= MOST_OVER_GPT
    return numbers, met


def reader(arguments: argparse.Namespace, kind: type[Reader] = Reader) -> Any:
    """Reads random neighbors."""
    return kind(RandomNeighbors(arguments), arguments.chunk_length, arguments.every, [arguments.prompt])


def full_row(tokens: list[int], noting: Noting) -> Any:
    """All tokens, with the neighbors that they read."""
    row, length = continuation_row([tokens], [0]), len(tokens)
    noted = [(start, read) for start, read in noting.noted if len(read.chunk_bounds_C2)]
    bounds = np.concatenate([start + read.chunk_bounds_C2 for start, read in noted])
    there = bounds[:, 1] <= length
    count, k = int(there.sum()), noted[0][1].text_of_Ck.shape[1]
    lengths_U = np.concatenate([read.lengths_U for _, read in noted])[: count * k]
    # A last chunk without neighbors, which ends behind the row: its tokens go on reading those of the chunk before.
    row.neighbors = Neighbors(
        chunk_bounds_C2=np.concatenate([bounds[there], [[length, length + 1]]]),
        segment_ends_C=np.full(count + 1, length),
        text_of_Ck=np.concatenate([np.arange(count * k).reshape(count, k), np.full((1, k), -1)]),
        lengths_U=lengths_U,
        tokens_1N=torch.cat([read.tokens_1N for _, read in noted], 1)[:, : lengths_U.sum()],
    )
    return row


def _note(seen: list[torch.Tensor], logits_BV: torch.Tensor) -> torch.Tensor:
    seen.append(logits_BV[-1])
    return logits_BV


def cpu_seconds(function: Callable[[], Any]) -> float:
    """Processor time of a call."""
    began = time.process_time()
    function()
    return time.process_time() - began


@torch.no_grad()
def full_pass(model: GritDecoder, row: Any) -> torch.Tensor:
    """Logits, [T, V]."""
    return model(row, Output.LOGITS)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure. Returns the exit status."""
    parser = harness.parser(__doc__)
    for name, default in (
        ("num-layers", 12),
        ("hidden-size", 512),
        ("vocab-size", 4096),
        ("length", 512),
        ("prompt", 64),
        ("chunk-length", 64),
        ("neighbors", 2),
        ("every", 64),
        ("passes", 4),
        ("rounds", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args(argv)

    def measured(_: Path) -> tuple[dict[str, Any], bool]:
        return measure(arguments)

    return harness.run("retro_generate", arguments, measured)


if __name__ == "__main__":
    sys.exit(main())
