"""How much faster the loader makes rows than a small model consumes them, and how soon a large blend starts.

1. Tokens per second of the loader (its thread alone) against tokens per second of training steps of the preset
   tiny_mistral on the same rows, in the same process, on one thread each: for packing step, packing window, and the
   unified objective with its embedding batches. Texts: Dolly, as conversations and as pairs of a request and an answer.
2. Seconds from nothing to the first step of a blend of 100 million samples (a source of 100 million short records and
   ten of a thousand), without and with the index cache, at the start of the run and at a step far along. Its files,
   about 3.3 GB, are made in a temporary folder and removed.
3. The same for 1,000 sources.

Example:
    python -m benchmarks.loader --data ../shared/data --json loader.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from megatron_grit.config.parse import parse_run_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.indexed.writer import IndexedFacts, IndexedStream, IndexedWriter, TokenBlock
from megatron_grit.data.rows.batch import StepBatch
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.training.optimizer import build_optimizer, build_schedule, set_learning_rate, wrap_model
from megatron_grit.training.step import TrainStep

FILE = "alpagasus_3k_dolly.jsonl"
VOCAB, TOKENS_PER_ROW = 2048, 2048
PACKINGS: dict[str, dict[str, Any]] = {
    "packing step": {"training.objective": "generative"},
    "packing window": {"training.objective": "generative", "data.packing": "window", "training.generative_rows": 4},
    "unified": {"training.objective": "unified"},
}


def write_texts(data: Path, folder: Path) -> None:
    """Dolly as ``gen`` and ``emb`` under ``folder``, and a tokenizer."""
    lines = harness.data_file(data, FILE).read_text(encoding="utf-8").splitlines()
    texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    tokenizer = load_tokenizer(train_sentencepiece(texts[:2000], folder / "tokenizer", VOCAB))
    encoded = tokenizer.encode_batch(texts)
    with (
        IndexedWriter(folder / "gen", RowKind.GENERATIVE, VOCAB) as chats,
        IndexedWriter(folder / "emb", RowKind.EMBEDDING, VOCAB) as pairs,
    ):
        for request, answer in zip(encoded[::2], encoded[1::2], strict=True):
            prompt = [tokenizer.bos_id, *request[-1500:]]
            chats.add([(Role.TEMPLATE, prompt), (Role.ANSWER, [*answer[:400], tokenizer.eos_id])])
            pairs.add(
                [(Role.QUERY_INSTRUCTION, prompt[:4]), (Role.QUERY, request[:256]), (Role.POSITIVE, answer[:400])]
            )
        for writer in (chats, pairs):
            writer.finalize(tokenizer_fingerprint=tokenizer.fingerprint, template="none", limits={})


def run_config(folder: Path, **options: Any) -> RunConfig:
    """The run that is measured: tiny_mistral in fp32."""
    settings = {
        "data.tokenizer": folder / "tokenizer.model",
        "data.generative": f"[{folder / 'gen'}]",
        "data.embedding": f"[{folder / 'emb'}]",
        "data.tokens_per_row": TOKENS_PER_ROW,
        "data.train_group_size": 1,
        "data.cache_dir": folder / "cache",
        "training.embedding_batch_size": 64,
        "training.generative_batch_size": 32,
        "training.precision": "fp32",
        "parallel.device": "cpu",
    }
    given = [f"--{key}={value}" for key, value in (settings | options).items()]
    return parse_run_config(["--model", "tiny_mistral", *given])


def measure_speed(folder: Path, steps: int, loader_steps: int) -> dict[str, dict[str, float]]:
    """Tokens per second of the loader and of training, for each way of packing."""
    found = {}
    for name, options in PACKINGS.items():
        config = run_config(folder, **options)
        tokenizer = load_tokenizer(str(config.data.tokenizer))
        with parallel_job(config.parallel, config.training.seed) as context:
            loader = GritDataLoader(config, tokenizer, row_multiple=context.row_multiple, equal_rows=False)
            model = wrap_model(build_model(config, tokenizer.vocab_size, context))
            optimizer = build_optimizer(config, model)
            schedule, step = build_schedule(config, optimizer), TrainStep(config, context, model, optimizer)

            def train(batch: StepBatch, step: TrainStep = step, schedule: Any = schedule) -> None:
                set_learning_rate(schedule, batch.step)
                step(batch)

            batches = [loader.batch(number) for number in range(steps + 1)]
            train(batches[0])  # to warm up
            consumed = statistics.median(batch.num_tokens / harness.seconds(train, batch) for batch in batches[1:])
            speeds = []
            for number in range(loader_steps):
                began = time.perf_counter()
                batch = loader.batch(steps + 1 + number)
                speeds.append(batch.num_tokens / (time.perf_counter() - began))
            made = statistics.median(speeds)
        found[name] = {"loader": made, "model": consumed, "ratio": made / consumed}
        print(f"{name:15s} loader {made:12,.0f} tokens/s, model {consumed:9,.0f} tokens/s, ratio {made / consumed:.0f}")
    return found


def write_blend(folder: Path, num_records: int, num_small: int) -> list[str]:
    """A source of short conversations, and small ones; their prefixes."""
    facts = IndexedFacts(kind="generative", tokenizer_fingerprint="0" * 64, vocab_size=VOCAB)
    names = [("large", num_records)] + [(f"small{number}", 1000) for number in range(num_small)]
    draw = np.random.default_rng(0)
    for name, count in names:
        stream = IndexedStream(folder / "work", name, np.uint16, with_modes=True)
        for start in range(0, count, 1 << 22):
            size = min(1 << 22, count - start)
            lengths = draw.integers(2, 7, size=2 * size, dtype=np.int32)
            stream.append(
                TokenBlock(
                    tokens=draw.integers(3, VOCAB, size=int(lengths.sum()), dtype=np.uint16),
                    lengths=lengths,
                    documents=np.full(size, 2, dtype=np.int32),
                    modes=np.tile(np.array([Role.TEMPLATE, Role.ANSWER], dtype=np.int8), size),
                )
            )
        stream.finalize(folder / name, lambda: facts)
    return [str(folder / name) for name, _ in names]


def measure_start(folder: Path, prefixes: list[str], packing: str, far_step: int) -> dict[str, float]:
    """Seconds from nothing to the first step, and to a step far along, without and with the index cache."""
    options: dict[str, Any] = {
        "training.objective": "generative",
        "data.generative": "[" + ", ".join(prefixes) + "]",
        "data.cache_dir": folder / "cache_of_blend",
        "training.generative_batch_size": 256,
    }
    if packing == "window":
        options |= {"data.packing": "window", "training.generative_rows": 4}
    config = run_config(folder, **options)
    tokenizer: Any = SimpleNamespace(fingerprint="0" * 64, path="none", pad_id=0)

    def start(step: int) -> None:
        GritDataLoader(config, tokenizer).batch(step)

    found = {}
    for state in ("without cache", "with cache"):
        found[f"first step {state}"] = harness.seconds(start, 0)
        found[f"step {far_step} {state}"] = harness.seconds(start, far_step)
    shutil.rmtree(folder / "cache_of_blend", ignore_errors=True)
    return found


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements."""
    torch.set_num_threads(1)
    summary: dict[str, Any] = {}
    write_texts(arguments.data, folder)
    summary["speed"] = measure_speed(folder, arguments.steps, arguments.loader_steps)
    summary["start"] = {}
    for title, num_records, num_small in (
        (f"{arguments.samples:,} samples", arguments.samples, 10),
        ("1,000 sources", 1000, 999),
    ):
        blend = folder / "blend"
        blend.mkdir()
        prefixes = write_blend(blend, num_records, num_small)
        for packing in ("step", "window"):
            far_step = arguments.far_step if packing == "step" else arguments.far_step // 100
            found = measure_start(folder, prefixes, packing, far_step)
            summary["start"][f"{title}, packing {packing}"] = found
            print(f"{title}, packing {packing}: " + ", ".join(f"{k} {v:.2f} s" for k, v in found.items()))
        shutil.rmtree(blend)
    summary["ratio"] = min(speed["ratio"] for speed in summary["speed"].values())
    cached = [value for found in summary["start"].values() for name, value in found.items() if "with cache" in name]
    summary["slowest_start_with_cache"] = max(cached)
    return summary


def main() -> int:
    """Parse the command line, measure, print. Returns the exit status."""
    parser = harness.parser(__doc__, data=FILE)
    parser.add_argument("--steps", type=int, default=3, help="measured training steps, after one to warm up")
    parser.add_argument("--loader-steps", type=int, default=50, help="measured steps of the loader")
    parser.add_argument("--samples", type=int, default=100_000_000, help="records of the large blend")
    parser.add_argument(
        "--far-step",
        type=int,
        default=5000,
        help="step from which a run resumes; a hundredth of it with packing window, whose rows are planned in order",
    )
    parser.add_argument("--check", action="store_true", help="exit with status 1 below 20 times, or above 5 s")
    arguments = parser.parse_args()

    def measure(folder: Path) -> tuple[dict[str, Any], bool]:
        summary = run(arguments, folder)
        print(f"ratio {summary['ratio']:.0f} at least, start {summary['slowest_start_with_cache']:.2f} s at most")
        return summary, not arguments.check or (summary["ratio"] >= 20 and summary["slowest_start_with_cache"] <= 5)

    return harness.run("loader", arguments, measure)


if __name__ == "__main__":
    sys.exit(main())
