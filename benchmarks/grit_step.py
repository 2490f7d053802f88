"""Real tokens per second of the unified step, against the GritLM step in plain transformers.

Both train the same small Mistral from the same weights on the same texts in the same run, fp32, on the same number of
threads of one process, with AdamW and clipping. Texts are real: questions with their paragraph, and another paragraph
of the same article as the negative (XQuAD); instructions and answers (Dolly). Batches are one GPU's share of the
published 7B recipe: 256 queries, 512 passages and 32 conversations, lengths up to 256, 2048 and 2048 tokens, GradCache
in chunks of 32. --scale divides these numbers; beyond 2, whether a batch holds one of the longest paragraphs, and with
it the padding of the reference, is left to chance. Tokens that are not padding count; preparing batches is not timed.

Steps alternate between the two. Printed: the losses of both, which have to agree, the padding of each, tokens per
second, their ratio, and where the time goes. Neither recomputes activations; both embed twice, as GradCache does.

Example:
    python -m benchmarks.grit_step --data ../shared/data --json grit_step.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from megatron_grit.config.schema import RunConfig
from megatron_grit.convert.families import mistral
from megatron_grit.convert.families.registry import hf_state_dict_to_megatron
from megatron_grit.data.builders.grit_builder import build_grit, read_texts
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece
from megatron_grit.errors import ConfigError, GritError
from megatron_grit.parallel.launch import parallel_job
from tests.parity.gritlm_reference import GritBatch, Sequence, Text, adamw, collate, grit_step

PAIRS, CHATS = "xquad_en_part1.json", "alpagasus_3k_dolly.jsonl"
INSTRUCTION = "Given a question, retrieve the paragraph of Wikipedia that answers it"
GROUP_SIZE, TEMPERATURE, LR, CLIP_GRAD = 2, 0.02, 2e-5, 1.0
QUERIES, SEQUENCES, CHUNK = 256, 32, 32
TOLERANCE = 1e-3


class Profile:
    """Seconds spent in named phases of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.steps[-1][name] += time.perf_counter() - began

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` within the phase ``name``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return call

    def step(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a step and keep its time as "total"."""
        self.steps.append(defaultdict(float))
        with self("total"):
            return function(*args)

    def report(self) -> dict[str, float]:
        """Median seconds of every phase, the first step left out."""
        return {name: statistics.median(step[name] for step in self.steps[1:]) for name in self.steps[-1]}


def write_records(data: Path, target: Path, seed: int) -> tuple[Path, Path]:
    """The two sources as GRIT records in JSONL."""
    questions, conversations = (harness.data_file(data, name) for name in (PAIRS, CHATS))
    draw = random.Random(seed)
    pairs = []
    for article in json.loads(questions.read_text(encoding="utf-8"))["data"]:
        paragraphs = [paragraph["context"] for paragraph in article["paragraphs"]]
        for own, paragraph in enumerate(article["paragraphs"]):
            others = paragraphs[:own] + paragraphs[own + 1 :]
            for question in paragraph["qas"]:
                query = [INSTRUCTION, question["question"]]
                pairs.append({"query": query, "pos": [["", paragraphs[own]]], "neg": [["", draw.choice(others)]]})
    embedding, generative = target / "pairs.jsonl", target / "chats.jsonl"
    embedding.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    generative.write_text(conversations.read_text(encoding="utf-8"), encoding="utf-8")
    return embedding, generative


def prepare_data(arguments: argparse.Namespace, target: Path) -> RunConfig:
    """Tokenizer and indexed files under ``target``, and the configuration of our run."""
    embedding, generative = write_records(arguments.data, target, arguments.seed)
    model = train_sentencepiece(read_texts([embedding, generative]), target / "tokenizer", arguments.vocab_size)
    for path in (embedding, generative):
        build_grit([path], path.with_suffix(""), model)
    config = RunConfig()
    config.data.tokenizer = str(model)
    config.data.embedding, config.data.generative = [str(embedding.with_suffix(""))], [str(generative.with_suffix(""))]
    config.data.train_group_size = GROUP_SIZE
    config.data.allow_shared_texts = True  # XQuAD asks several questions of one paragraph, and GritLM keeps them
    config.data.tokens_per_row = arguments.tokens_per_row
    config.training.embedding_batch_size = QUERIES // arguments.scale
    config.training.generative_batch_size = SEQUENCES // arguments.scale
    config.training.precision = "fp32"
    config.training.seed = arguments.seed
    config.training.steps = arguments.steps + 1
    config.loss.temperature = TEMPERATURE
    config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup_ratio = LR, "constant", 0.0
    config.optimizer.clip_grad = CLIP_GRAD
    config.parallel.device = "cpu"
    return config


def reference_model(arguments: argparse.Namespace, vocab_size: int) -> Any:
    """A small Mistral of transformers with random weights."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(arguments.seed)
    heads = arguments.hidden_size // 32
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": arguments.hidden_size,
        "intermediate_size": arguments.hidden_size * 7 // 2,
        "num_hidden_layers": arguments.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4 or 1,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "sliding_window": None,
        "attn_implementation": "sdpa",
    }
    return MistralForCausalLM(MistralConfig(**settings))


def segments_of(row: PackedRow) -> Iterator[slice]:
    """Places of a row's segments, padding left out."""
    bounds = row.cu_seqlens.tolist()
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        if not row.padding_mask_1T[0, start]:
            yield slice(start, stop)


def reference_batch(batch: StepBatch) -> GritBatch:
    """The same texts, one a row and padded."""
    texts: dict[int, Text] = {}
    for row in batch.rows_of("embedding"):
        assert row.slots_S is not None and row.pool_mask_T is not None
        for slot, place in zip(row.slots_S.tolist(), segments_of(row), strict=True):
            num_instruction = int((row.pool_mask_T[place] == 0).sum())
            texts[slot] = Text(row.tokens_1T[0, place].tolist(), num_instruction)
    sequences = []
    for row in batch.rows_of("generative"):
        assert row.loss_mask_1T is not None
        for place in segments_of(row):
            # The mask tells of the next token; the first token is never predicted.
            supervised = [False, *(row.loss_mask_1T[0, place] > 0).tolist()[:-1]]
            sequences.append(Sequence(row.tokens_1T[0, place].tolist(), supervised))
    ordered = [texts[slot] for slot in range(len(texts))]
    counts = batch.counts_of("embedding")
    return collate(ordered[: counts.num_queries], ordered[counts.num_queries :], sequences, counts.group_size)


def build_ours(config: RunConfig, weights: dict[str, torch.Tensor], context: Any, profile: Profile) -> Callable:
    """Our training step with the given weights, its phases timed."""
    from megatron_grit.models.decoder import build_model
    from megatron_grit.training.optimizer import build_optimizer, build_schedule, set_learning_rate, wrap_model
    from megatron_grit.training.step import TrainStep

    assert config.model.vocab_size is not None
    model = build_model(config, config.model.vocab_size, context)
    model.load_state_dict(hf_state_dict_to_megatron(weights, config.model), strict=False)
    wrapped = wrap_model(model)
    optimizer = build_optimizer(config, wrapped)
    optimizer.reload_model_params()
    schedule = build_schedule(config, optimizer)
    step = TrainStep(config, context, wrapped, optimizer)
    embedding = step.objectives[0]
    embedding.prepare = profile.timed("embedding, first pass", embedding.prepare)  # type: ignore[method-assign]
    step.accumulate_gradients = profile.timed("all forward and backward", step.accumulate_gradients)  # type: ignore[method-assign]
    optimizer.step = profile.timed("optimizer", optimizer.step)

    def run(batch: StepBatch) -> dict[str, float]:
        set_learning_rate(schedule, batch.step)
        return step(batch)

    return run


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train both for ``arguments.steps`` steps after one to warm up; returns what was measured."""
    torch.set_num_threads(arguments.threads)
    ours, theirs = Profile(), Profile()
    config = prepare_data(arguments, folder)
    assert config.data.tokenizer is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    reference = reference_model(arguments, tokenizer.vocab_size)
    config.model = mistral.model_config(reference.config.to_dict())
    with parallel_job(config.parallel, config.training.seed) as context:
        our_step = build_ours(config, reference.state_dict(), context, ours)
        optimizer = adamw(reference, LR)
        loader = GritDataLoader(config, tokenizer, row_multiple=context.row_multiple)
        batches = []
        for number in range(arguments.steps + 1):
            batch = loader.batch(number)
            padded = reference_batch(batch)
            batches.append((batch, padded))
            sides = [
                lambda batch=batch: ours.step(our_step, batch),
                lambda padded=padded: theirs.step(_their_step, arguments, reference, padded, optimizer, theirs),
            ]
            # The order turns with each step, so that neither always runs on what the other left in the caches.
            order = (0, 1) if number % 2 == 0 else (1, 0)
            got = {side: sides[side]() for side in order}
            _check_losses(number, got[0], got[1])
            seconds = [profile.steps[-1]["total"] for profile in (ours, theirs)]
            note = " (warm-up)" if number == 0 else ""
            print(f"step {number}{note}: {seconds[0]:.2f} s here, {seconds[1]:.2f} s there", flush=True)
    return _summary(arguments, batches, ours, theirs)


def _their_step(
    arguments: argparse.Namespace, model: Any, batch: GritBatch, optimizer: torch.optim.Optimizer, profile: Profile
) -> tuple[float, float, float]:
    return grit_step(
        model,
        batch,
        optimizer,
        temperature=TEMPERATURE,
        chunk_size=CHUNK // arguments.scale,
        clip_grad=CLIP_GRAD,
        phase=profile,
    )


def _check_losses(number: int, ours: dict[str, float], theirs: tuple[float, float, float]) -> None:
    """Both train on the same texts from the same weights, so their losses agree or one of them is wrong."""
    for name, expected in zip(("loss_emb", "loss_gen"), theirs[:2], strict=True):
        print(f"step {number}: {name} {ours[name]:.6f} here, {expected:.6f} there")
        if abs(ours[name] - expected) > TOLERANCE * abs(expected):
            raise GritError(f"step {number}: {name} is {ours[name]} here and {expected} in the reference")


def _summary(
    arguments: argparse.Namespace, batches: list[tuple[StepBatch, GritBatch]], ours: Profile, theirs: Profile
) -> dict[str, Any]:
    measured = batches[1:]
    summary: dict[str, Any] = {
        "steps": arguments.steps,
        "threads": arguments.threads,
        "queries": measured[0][0].counts_of("embedding").num_queries,
        "passages": measured[0][0].counts_of("embedding").num_queries * GROUP_SIZE,
        "sequences": measured[0][0].counts_of("generative").num_sequences,
        "tokens_per_step": statistics.mean(batch.num_tokens for batch, _ in measured),
    }
    for name, profile, padded in (
        ("megatron_grit", ours, [batch.num_padded_tokens for batch, _ in measured]),
        ("reference", theirs, [reference.num_padded_tokens for _, reference in measured]),
    ):
        speeds = [
            batch.num_tokens / step["total"] for (batch, _), step in zip(measured, profile.steps[1:], strict=True)
        ]
        summary[name] = {
            "padding_fraction": 1 - sum(batch.num_tokens for batch, _ in measured) / sum(padded),
            "tokens_per_second": statistics.median(speeds),
            "tokens_per_second_by_step": speeds,
            "seconds": profile.report(),
        }
    by_step = [summary[name]["tokens_per_second_by_step"] for name in ("megatron_grit", "reference")]
    summary["ratio_by_step"] = [here / there for here, there in zip(*by_step, strict=True)]
    summary["ratio"] = statistics.median(summary["ratio_by_step"])
    return summary


def _print_summary(summary: dict[str, Any]) -> None:
    print(
        f"\n{summary['queries']} queries, {summary['passages']} passages, {summary['sequences']} conversations, "
        f"{summary['tokens_per_step']:,.0f} tokens a step; medians of {summary['steps']} steps, "
        f"{summary['threads']} threads"
    )
    for name in ("reference", "megatron_grit"):
        part = summary[name]
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in part["seconds"].items())
        print(f"{name:14s} {part['tokens_per_second']:9,.0f} tokens/s  padding {part['padding_fraction']:.1%}")
        print(f"{'':14s} seconds: {phases}")
    ratios = summary["ratio_by_step"]
    print(f"ratio {summary['ratio']:.2f} (median of the steps' ratios, {min(ratios):.2f} to {max(ratios):.2f})")


def main() -> int:
    """Parse the command line, measure, print. Returns the exit status."""
    parser = harness.parser(__doc__, data=f"{PAIRS} and {CHATS}")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of each, after one to warm up")
    parser.add_argument("--scale", type=int, default=2, help="divides the numbers of the recipe")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the one process")
    parser.add_argument("--tokens-per-row", type=int, default=2048, help="token budget of our packed rows")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-least", type=float, help="exit with status 1 where the ratio is lower")
    arguments = parser.parse_args()

    def measure(folder: Path) -> tuple[dict[str, Any], bool]:
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError("the reference is transformers: pip install 'megatron-grit[dev]'")
        summary = run(arguments, folder)
        _print_summary(summary)
        return summary, arguments.at_least is None or summary["ratio"] >= arguments.at_least

    return harness.run("grit_step", arguments, measure)


if __name__ == "__main__":
    sys.exit(main())
