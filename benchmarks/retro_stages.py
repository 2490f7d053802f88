"""Retro over pipeline stages: neighbors encoded once and sent from stage to stage, or encoded again on each stage.

Two sides train the same rows with the same weights on two gloo processes, a pipeline stage each, the first of which
has the first layer that reads:

- sent: as the decoder does it, the encoded neighbors travel behind the row;
- again: in their place the states travel that neighbors are conditioned on, as many as the row has. The second stage
  has an encoder and an input embedding of its own, embeds and encodes the neighbors once more, and both stages add up
  the gradients of what they have twice.

Losses have to agree, and the gradients of the encoder. Printed: seconds of a step (forward and backward passes of all
rows, the addition included), the slower process's; processor seconds of both processes; bytes that stages send; the
fastest of --rounds rounds, the sides in turn. Then what a row takes by itself: the encoder's passes, and a send of the
neighbors' states and of their gradients.

Last, what follows for a GPU of stated speed and stated links, for models of several widths: bytes of a row that the
second side does not send, operations that it makes again, and the link at which both take as long. That is arithmetic
and not measured.

Example:
    python -m benchmarks.retro_stages --json retro_stages.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks import harness
from megatron_grit.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.config.shape import padded_vocabulary, read_tokens
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.errors import DataError
from megatron_grit.planning.operations import Machine, encoding_flops
from tests.harness.ranks import run_on_ranks
from tests.neighbors import with_neighbors
from tests.rows import make_row

TOLERANCE = 1e-4
WIDTHS = (1024, 2048, 4096, 8192)
"""Of models that the last table is of; 1,024 is that of examples/pretrain_retro.sh."""


def run_config(arguments: argparse.Namespace) -> RunConfig:
    """A decoder of Llama's kind, half of its layers on each stage; the last of the first stage encodes."""
    layers = arguments.num_layers
    config = RunConfig(
        model=shape_of(
            arguments.hidden_size,
            num_layers=layers,
            max_position_embeddings=arguments.length,
            retro=RetroConfig(
                num_neighbors=arguments.neighbors,
                chunk_length=arguments.chunk_length,
                layers=[layers // 2 - 1, layers - 1],
            ),
        ),
        parallel=ParallelConfig(device="cpu", pipeline=2),
    )
    config.training.precision = "fp32"
    return config


def shape_of(width: int, **options: Any) -> ModelConfig:
    """A shape with four times the width in feed-forward layers."""
    heads = max(1, width // 64)
    return ModelConfig(
        hidden_size=width,
        ffn_hidden_size=4 * width,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=64,
        activation="gelu",
        **options,
    )


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes that this process sends to other stages meanwhile, one entry an exchange."""
    sent: list[int] = []
    exchange = dist.batch_isend_irecv

    def count(operations: list[Any]) -> Any:
        sent.append(sum(each.tensor.nbytes for each in operations if each.op is dist.isend))
        return exchange(operations)

    with mock.patch.object(dist, "batch_isend_irecv", count):
        yield sent


def encodes_again(config: RunConfig, vocab_size: int) -> Any:
    """The class of a stage of the second side."""
    from megatron_grit.models.decoder import GritDecoder
    from megatron_grit.models.layer_specs import _encoder
    from megatron_grit.models.retro.layer import RetroLayer
    from megatron_grit.models.retro.plan import RetroSegments, plan_of
    from megatron_grit.models.vocabulary import token_embedding

    class EncodesAgain(GritDecoder):
        """The second side."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            engine_config, context = given[1], given[3]
            if self.pre_process:
                self.encoder, self.words = encoder_of(self), self.embedding
                layer = next(each for each in self.decoder.layers if isinstance(each, RetroLayer))
                layer.pre_cross_attn_layernorm.register_forward_hook(self._keep)
                self.decoder.layers[-1].register_forward_hook(self._send)
            else:
                num_rows = padded_vocabulary(vocab_size, config.model.vocab_multiple, 1)
                self.words = token_embedding(config.model, engine_config, num_rows, self.tp_group)
                self.encoder = _encoder(config, engine_config, context.device)()

        def _keep(self, module: Any, inputs: Any, normed: torch.Tensor) -> None:
            self._chunks = normed

        def _send(self, module: Any, inputs: Any, output: Any) -> Any:
            return torch.cat([output[0][: len(self._chunks)], self._chunks]), output[1]

        def _read_neighbors(self, row: Any, segments: Any, share: Any) -> Any:
            if self.pre_process:
                return super()._read_neighbors(row, segments, share)
            neighbors, length = row.neighbors, row.tokens_1T.shape[1]
            plan = plan_of(neighbors, length, self.retro, row.tokens_1T.device)
            assert plan is not None and self._received is not None
            states, chunks = self._received.split(length)
            self.decoder.set_input_tensor(states)
            texts = self.words(input_ids=neighbors.tokens_1N, position_ids=plan.positions_N[None])
            return RetroSegments(**vars(segments), plan=plan), self.encoder(texts, chunks, plan)

        def twice(self) -> list[torch.nn.Parameter]:
            """Parameters that both stages have."""
            return [*self.words.parameters(), *self.encoder.parameters()]

    return EncodesAgain


def encoder_of(model: Any) -> Any:
    """The encoder of a stage."""
    from megatron_grit.models.retro.layer import NeighborEncoder

    return next(each for each in model.modules() if isinstance(each, NeighborEncoder))


def on_stage(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one process measures; see the docstring of the file."""
    from megatron_grit.models.decoder import GritDecoder, Output
    from megatron_grit.models.layer_specs import transformer_config
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.step import run_schedule

    config, vocab_size = run_config(arguments), arguments.vocab_size
    torch.set_num_threads(1)
    with parallel_job(config.parallel, seed=1) as context:
        engine_config = transformer_config(config)
        sent = GritDecoder(config, engine_config, vocab_size, context)
        again = encodes_again(config, vocab_size)(config, engine_config, vocab_size, context)
        again.load_state_dict(sent.state_dict(), strict=False)
        for parameter in again.twice():
            dist.broadcast(parameter.data, src=0)
        rows = [
            with_neighbors(
                make_row(RowKind.GENERATIVE, [arguments.length], arguments.length, seed=number),
                arguments.chunk_length,
                arguments.neighbors,
                full=True,
                seed=number,
            )
            for number in range(arguments.rows)
        ]

        def step(model: GritDecoder) -> float:
            def forward_step(items: Iterator[Any], module: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
                losses_T = module(next(items), Output.TOKEN_LOSSES)
                return losses_T, lambda losses_T: (losses_T.mean(), {"loss": losses_T.mean().detach()})

            model.zero_grad()
            done = run_schedule([model], context, forward_step, rows, arguments.length, forward_only=False)
            if model is again:
                flat = torch.cat([parameter.grad.flatten() for parameter in model.twice()])  # type: ignore[union-attr]
                dist.all_reduce(flat, group=context.pipeline_group)
                for parameter, part in zip(model.twice(), flat.split([p.numel() for p in model.twice()]), strict=True):
                    parameter.grad = part.view_as(parameter)
            return sum(float(entry["loss"]) for entry in done)

        sides = {"sent": sent, "again": again}
        losses = {name: step(side) for name, side in sides.items()}
        problem = abs(losses["sent"] - losses["again"]) / max(abs(losses["sent"]), 1)
        if context.is_first_stage:
            pairs = zip(encoder_of(sent).parameters(), again.encoder.parameters(), strict=True)
            problem = max((a.grad - b.grad).norm().item() / b.grad.norm().item() for a, b in pairs)  # type: ignore
        found: dict[str, Any] = {"problem": problem}
        for name, side in sides.items():
            with counted_bytes() as counted:
                step(side)
            found[name] = {"sent_bytes": sum(counted), "wall": [], "cpu": []}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                dist.barrier()
                began = time.perf_counter(), time.process_time()
                step(side)
                found[name]["wall"].append(time.perf_counter() - began[0])
                found[name]["cpu"].append(time.process_time() - began[1])
        found["encoder"] = [encode(again.encoder, again.words, rows[0], config) for _ in range(arguments.rounds)]
        found["send"] = [send(context.rank, rows[0].neighbors.tokens_1N.shape[1], config) for _ in range(5)]
    return found


def encode(encoder: Any, words: Any, row: Any, config: RunConfig) -> float:
    """Processor seconds of the encoder's passes over the neighbors of a row, forward and backward."""
    from megatron_grit.models.retro.plan import plan_of

    length = row.tokens_1T.shape[1]
    plan = plan_of(row.neighbors, length, config.model.retro, row.tokens_1T.device)
    chunks = torch.randn(length, 1, config.model.hidden_size, requires_grad=True)
    began = time.process_time()
    texts = words(input_ids=row.neighbors.tokens_1N, position_ids=plan.positions_N[None])
    encoder(texts, chunks, plan).sum().backward()
    return time.process_time() - began


def send(rank: int, num_tokens: int, config: RunConfig) -> float:
    """Seconds in which states of neighbors go to the other stage and gradients come back."""
    states = torch.zeros(num_tokens, config.model.hidden_size)
    dist.barrier()
    began = time.perf_counter()
    for source in (0, 1):
        if rank == source:
            dist.send(states, 1 - source)
        else:
            dist.recv(states, source)
    return time.perf_counter() - began


def on_gpus(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Arithmetic for rows of 4,096 tokens in bf16: what the second side saves and what it pays, in a row."""
    machine, tokens, found = Machine(), 4096, []
    for width in WIDTHS:
        config = RunConfig(model=shape_of(width, num_layers=24))
        config.model.retro = RetroConfig(num_neighbors=arguments.neighbors, chunk_length=arguments.chunk_length)
        saved = 2 * 2 * width * tokens * (read_tokens(config.model) - 1)  # 2 bytes, both directions
        seconds = 3 * tokens * encoding_flops(config) / (machine.peak_tflops * 1e12 * machine.efficiency)
        found.append(
            {
                "hidden_size": width,
                "saved_mb": saved / 1e6,
                "network_ms": 1e3 * saved / (machine.network_gbs * 1e9),
                "link_ms": 1e3 * saved / (machine.link_gbs * 1e9),
                "encoder_ms": 1e3 * seconds,
                "equal_gbs": saved / seconds / 1e9,
            }
        )
    return found


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Measure, print."""
    stages = run_on_ranks(on_stage, 2, folder, arguments)
    problem = max(stage["problem"] for stage in stages)
    if problem > TOLERANCE:
        raise DataError(f"the two sides differ by {problem:.2g} in their losses or gradients")
    numbers: dict[str, Any] = {"arguments": vars(arguments) | {"json": None}, "problem": problem}
    for name in ("sent", "again"):
        walls = [max(both) for both in zip(*(stage[name]["wall"] for stage in stages), strict=True)]
        cpu = [sum(both) for both in zip(*(stage[name]["cpu"] for stage in stages), strict=True)]
        sent = [stage[name]["sent_bytes"] for stage in stages]
        numbers[name] = {"seconds": min(walls), "cpu_seconds": min(cpu), "sent_bytes": sent}
        print(
            f"{name:>6} {min(walls):8.3f} s a step, {min(cpu):8.3f} processor s, "
            f"{sent[0] / 1e6:7.2f} MB forward, {sent[1] / 1e6:7.2f} MB back"
        )
    numbers["encoder_seconds"] = min(time for stage in stages for time in stage["encoder"])
    numbers["send_seconds"] = min(map(max, zip(*(stage["send"] for stage in stages), strict=True)))
    print(f"a row: encoder {1e3 * numbers['encoder_seconds']:.1f} ms, send {1e3 * numbers['send_seconds']:.1f} ms")
    numbers["gpus"] = on_gpus(arguments)
    print("hidden_size  saved MB  at 50 GB/s, ms  at 450 GB/s, ms  encoder, ms  as long at GB/s")
    for line in numbers["gpus"]:
        print(
            f"{line['hidden_size']:11.0f} {line['saved_mb']:9.0f} {line['network_ms']:15.2f} {line['link_ms']:16.2f} "
            f"{line['encoder_ms']:12.1f} {line['equal_gbs']:16.1f}"
        )
    return numbers, True


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure. Returns the exit status."""
    parser = harness.parser(__doc__)
    for name, default in (
        ("num-layers", 4),
        ("hidden-size", 256),
        ("vocab-size", 4096),
        ("length", 512),
        ("chunk-length", 64),
        ("neighbors", 2),
        ("rows", 4),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args(argv)
    return harness.run("retro_stages", arguments, lambda folder: measure(arguments, folder))


if __name__ == "__main__":
    sys.exit(main())
