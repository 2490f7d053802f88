"""Seconds that the start-up audit takes on a stage of Mistral-7B.

Example:
    python benchmarks/audit.py                       # 32 layers' worth of work, 4 layers in memory at a time
    python benchmarks/audit.py --layers-at-once 32   # a whole model in memory, as on a GPU

Layers that do not fit in memory together are audited one group after another with the same weights, so what is
printed as measured took so long; a figure for another number of layers is marked as projected.
"""

from __future__ import annotations

import argparse
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

from megatron_grit.config.parse import parse_train_arguments
from megatron_grit.config.schema import RunConfig
from megatron_grit.models.decoder import build_chunks
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.store.logs import configure_logging
from megatron_grit.training.audit.run import audit_model, audit_weights

VOCAB = 32000


def main() -> int:
    """Parse, measure, print. Returns the exit status: 1 above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="layers of the stage")
    parser.add_argument("--layers-at-once", type=int, default=4, help="layers in memory together")
    parser.add_argument("--model", default="mistral_7b", help="preset of the model's shape")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds that the stage may take")
    options = parser.parse_args()
    if options.layers % options.layers_at_once:
        parser.error("--layers must be a multiple of --layers-at-once")
    configure_logging()
    config = parse_train_arguments(["--model", options.model]).config
    config.training.precision = options.precision
    config.parallel.device = options.device
    with parallel_job(config.parallel, seed=1) as context:
        device = "CPU" if context.device.type == "cpu" else torch.cuda.get_device_name(context.device)
        print(
            f"{options.model}, {options.precision}, {device}, {torch.get_num_threads()} threads, "
            f"sliding window {config.model.sliding_window}"
        )
        began = time.process_time()
        layers, ends = measure(config, context, options.layers, options.layers_at_once)
    total = layers + ends
    cpu_seconds = time.process_time() - began
    each = layers / options.layers
    print(f"{options.layers} layers and their weights: {layers:.1f} s measured, {each:.2f} s a layer")
    print(f"embedding, final norm, pooling and losses of {VOCAB} words: {ends:.1f} s measured")
    for stages in (1, 2, 4, 8):
        count = config.model.num_layers // stages
        seconds, how = each * count + ends, "projected"
        if count == options.layers:
            seconds, how = total, "measured"
        print(f"a stage of {count} layers with both ends (pipeline {stages}): {seconds:.1f} s {how}")
    if device == "CPU":
        print(f"processor time of this process, building models and warming up included: {cpu_seconds:.1f} s")
    return int(total > options.limit)


def measure(config: RunConfig, context: ParallelContext, num_layers: int, at_once: int) -> tuple[float, float]:
    """Seconds of so many layers, and of what is below and above them."""
    groups = timed(config, context, at_once, vocab_size=64, repeats=num_layers // at_once)
    with_ends = timed(config, context, 1, VOCAB, repeats=1) - timed(config, context, 1, 64, repeats=1)
    return groups, max(with_ends, 0.0)


def timed(config: RunConfig, context: ParallelContext, num_layers: int, vocab_size: int, repeats: int) -> float:
    """Seconds of ``repeats`` audits of a model, after one that warms up."""
    configured, config.model.num_layers = config.model.num_layers, num_layers
    chunks = build_chunks(config, vocab_size, context)
    config.model.num_layers = configured
    # Without gradient buffers, which an audit does not touch and which are twice as large as the weights.
    no_overlap = SimpleNamespace(overlap_param_gather=False)
    wrapped: list[Any] = [SimpleNamespace(module=chunk, ddp_config=no_overlap) for chunk in chunks]
    seconds = 0.0
    for repeat in range(repeats + 1):
        synchronize(context.device)
        began = time.perf_counter()
        audit_weights(chunks, context)
        audit_model(config, context, wrapped, pad_id=0)
        synchronize(context.device)
        seconds += (time.perf_counter() - began) if repeat else 0.0
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
