"""Time to an answer, and to its first token, with the document's cache and without.

A document of --lengths tokens, a question of --question, an answer of --new tokens, greedily, one at a time. Sides:

- without: document and question are read, then the answer is drawn;
- memory: the document's cache, made before by the causal pass, is in memory;
- disk: it is a file that this process has compared with its checksum before; it is mapped and read.

Both sides have the same tokens and logits, which is checked. Processor time of one thread counts, so other work on the
machine does not; sides take turns for --rounds rounds, of which the fastest is taken. Fresh weights of one seed, fp32.

For int8 and int4 it is told how many of --questions greedy answers change by them, and how far the logits of first
tokens are from those of the cache that loses nothing. Fresh weights choose among nearly equal tokens, so answers of a
trained model change less often.

Targets at the largest length: saved_share, of the time to the whole answer, at least 0.65, and first_token_ratio,
without over memory, at least 10. Exit status 1 where one is missed.

Example:
    python -m benchmarks.rag_cache --json rag_cache.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from megatron_grit.config.options import CacheUse, SamplingOptions
from megatron_grit.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_grit.errors import DataError
from megatron_grit.inference.document_cache.document_cache import DocumentCache
from megatron_grit.inference.document_cache.identity import CacheIdentity
from megatron_grit.inference.document_cache.join import JoinedCaches
from megatron_grit.inference.document_cache.make import make_caches
from megatron_grit.inference.document_cache.store import load_cache, save_cache
from megatron_grit.inference.generation.generate import Generation
from megatron_grit.models.decoder import GritDecoder, build_model
from megatron_grit.parallel.launch import parallel_job

LEAST_SAVED, LEAST_FIRST = 0.65, 10.0
TOLERANCE = 1e-4
IDENTITY = CacheIdentity(weights="", adapters="", settings="", tokenizer="", template="", attention="causal")


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Build, compare, time and print."""
    torch.set_num_threads(1)
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        model = build_model(run_config(arguments), arguments.vocab_size, context).eval()
        lengths = {}
        for length in arguments.lengths:
            lengths[str(length)] = compare(model, arguments, length, folder / f"{length}.safetensors")
            shown = ", ".join(f"{name} {value:.3g}" for name, value in lengths[str(length)].items())
            print(f"{length:>6} tokens: {shown}", flush=True)
        fewer_bits = {storage: changed(model, arguments, storage) for storage in ("int8", "int4")}
        print(f"fewer bits: {fewer_bits}")
    largest = lengths[str(max(arguments.lengths))]
    numbers = {
        "saved_share": largest["saved_share"],
        "first_token_ratio": largest["first_token_ratio"],
        "lengths": lengths,
        "fewer_bits": fewer_bits,
    }
    met = largest["saved_share"] >= LEAST_SAVED and largest["first_token_ratio"] >= LEAST_FIRST
    return vars(arguments) | {"json": None} | numbers, met


def run_config(arguments: argparse.Namespace) -> RunConfig:
    """A decoder of Llama's kind."""
    config = RunConfig(
        model=ModelConfig(
            num_layers=arguments.num_layers,
            hidden_size=arguments.hidden_size,
            ffn_hidden_size=arguments.hidden_size * 8 // 3 // 64 * 64,
            num_attention_heads=max(1, arguments.hidden_size // 64),
            num_query_groups=max(1, arguments.hidden_size // 256),
            kv_channels=64,
            max_position_embeddings=2 * max(arguments.lengths),
        )
    )
    config.training.precision = "fp32"
    return config


def drawn(arguments: argparse.Namespace, length: int, seed: int) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, arguments.vocab_size, length).tolist()


def cached(model: GritDecoder, document: list[int], storage: Any) -> DocumentCache:
    """The cache of a document, by the causal pass."""
    (cache,), _ = make_caches(model, [([], document)], IDENTITY, storage, embeds=False, batch_tokens=len(document))
    return cache


def answer(
    model: GritDecoder,
    prompt: list[int],
    num_new: int,
    cache: Callable[[], DocumentCache] | None,
) -> tuple[list[int], list[float], float, float]:
    """Tokens and their log-probabilities, and seconds of processor time to the first token and to the last."""
    began, tokens, log_probs, first = time.process_time(), [], [], 0.0
    past = None if cache is None else JoinedCaches(model, [cache()], CacheUse(repair="none"))
    generation = Generation(model, stop_ids=(), max_positions=len(prompt) + num_new)
    generation.add(prompt, SamplingOptions(max_new_tokens=num_new), past=past)
    while generation.active:
        (new,) = generation.step()
        tokens.append(new.token)
        log_probs.append(new.log_prob)
        first = first or time.process_time() - began
    return tokens, log_probs, first, time.process_time() - began


def compare(model: GritDecoder, arguments: argparse.Namespace, length: int, path: Path) -> dict[str, float]:
    """The figures of one length."""
    document, question = drawn(arguments, length, 1), drawn(arguments, arguments.question, 2)
    cache = cached(model, document, "fp32")
    save_cache(path, cache)
    load_cache(path)
    sides: dict[str, Callable[[], DocumentCache] | None] = {
        "without": None,
        "memory": lambda: cache,
        "disk": lambda: load_cache(path),
    }
    firsts: dict[str, list[float]] = {name: [] for name in sides}
    wholes: dict[str, list[float]] = {name: [] for name in sides}
    expected: tuple[list[int], list[float]] | None = None
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            tokens, log_probs, first, whole = answer(model, [*document, *question], arguments.new, side)
            expected = expected or (tokens, log_probs)
            difference = float(np.abs(np.subtract(log_probs, expected[1])).max())
            if tokens != expected[0] or difference > TOLERANCE:
                raise DataError(
                    f"the answer of side {name} is another one: log-probabilities differ by {difference:.2g}"
                )
            firsts[name].append(first)
            wholes[name].append(whole)
    path.unlink()
    best_first, best_whole = ({name: min(found) for name, found in times.items()} for times in (firsts, wholes))
    return {
        "saved_share": 1 - best_whole["memory"] / best_whole["without"],
        "first_token_ratio": best_first["without"] / best_first["memory"],
        "saved_share_disk": 1 - best_whole["disk"] / best_whole["without"],
        "first_token_ratio_disk": best_first["without"] / best_first["disk"],
        **{f"first_token_{name}_ms": 1000 * value for name, value in best_first.items()},
        **{f"whole_{name}_ms": 1000 * value for name, value in best_whole.items()},
        "cache_mib": cache.num_bytes / 2**20,
    }


def changed(model: GritDecoder, arguments: argparse.Namespace, storage: str) -> dict[str, float]:
    """What fewer bits change, at the smallest length."""
    document = drawn(arguments, min(arguments.lengths), 1)
    exact, fewer = cached(model, document, "fp32"), cached(model, document, storage)
    answers, tokens, differences = 0, 0, []
    for number in range(arguments.questions):
        prompt = [*document, *drawn(arguments, arguments.question, 100 + number)]
        ours = answer(model, prompt, arguments.new, lambda: fewer)
        theirs = answer(model, prompt, arguments.new, lambda: exact)
        answers += ours[0] != theirs[0]
        tokens += sum(one != other for one, other in zip(ours[0], theirs[0], strict=True))
        differences.append(abs(ours[1][0] - theirs[1][0]))
    return {
        "answers_changed": answers / arguments.questions,
        "tokens_changed": tokens / (arguments.questions * arguments.new),
        "first_log_prob_difference": float(np.mean(differences)),
        "size_over_fp32": fewer.num_bytes / exact.num_bytes,
    }


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure. Returns the exit status."""
    parser = harness.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[250, 500, 1000, 2000])
    for name, default in (
        ("num-layers", 16),
        ("hidden-size", 768),
        ("vocab-size", 32000),
        ("question", 24),
        ("new", 16),
        ("questions", 8),
        ("rounds", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args(argv)

    def measured(folder: Path) -> tuple[dict[str, Any], bool]:
        return measure(arguments, folder)

    return harness.run("rag_cache", arguments, measured)


if __name__ == "__main__":
    sys.exit(main())
