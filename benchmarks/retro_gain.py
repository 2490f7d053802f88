"""What neighbors are worth to a small decoder, and whether a prompt would do as well.

Text: questions with their passages (xquad_en_part1.json, several questions to each passage) and Cranfield's abstracts,
each tenth document held out for validation. The training part becomes a database with all-MiniLM-L6-v2 as embedder;
near copies among the neighbors stay in it, so that their share of a gain can be told. Five arms train on the same
samples in the same order:

    gpt             the decoder alone
    retro           with chunked cross-attention to the neighbors of each chunk
    retro_shuffled  the same model, which gets the neighbors of another chunk of the corpus, drawn at random
    gpt_prompt      the decoder alone; the neighbors of each chunk stand in its text, between the chunk and the next one
    retro_prompt    both

In a prompt neighbors are read and not predicted, so that every arm predicts the same tokens. Three seeds draw weights
and order; the loss is that of all held-out tokens (nats), with t intervals over the seeds, of paired differences too,
and by overlap: the longest run of tokens that a chunk shares with a neighbor read before it, as a share of the chunk.
With shuffled neighbors that is the overlap with these, so its buckets hold other tokens.

Fitting: the decoder alone of each seed goes on for a third of the steps, as it is (fitting.gpt), and with
cross-attention behind a gate that is 0 at the start (fitting.retro).

Targets: Retro is below GPT and below Retro with shuffled neighbors, by intervals of paired differences; shuffled it is
not below GPT; fitted, it starts with the loss of the decoder to 1e-6 and ends below it.

Example:
    python -m benchmarks.retro_gain --data ../shared/data --json retro_gain.json
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import t_interval
from benchmarks.retrieval_quality import Remembering, index_texts, make_tokenizer, minilm_folder, read_cranfield
from megatron_grit.config.database.run import resolve_retro_project
from megatron_grit.config.database.schema import RetroDbConfig, save_project_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.model import ModelConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.rows.batch import BatchPart, PackedRow, StepBatch
from megatron_grit.inference.encoders.load import load_embedder
from megatron_grit.inference.encoders.protocol import EmbedderOptions
from megatron_grit.retrieval.database.versions import record_version
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.stages.index_add import add_to_index
from megatron_grit.retrieval.stages.index_train import train_index
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.files import write_json

SEEDS = (1, 2, 3)
CHUNK, NEIGHBORS = 32, 1
VOCABULARY, NUM_ABSTRACTS = 2048, 400


@dataclass(frozen=True)
class Arm:
    """What a model is and gets."""

    reads: bool = False
    """It has cross-attention to the neighbors."""
    prompted: bool = False
    """They stand in its text."""
    shuffled: bool = False
    """They are those of another chunk."""
    start: str | None = None
    """Arm whose weights it starts from."""


ARMS = {
    "gpt": Arm(),
    "retro": Arm(reads=True),
    "retro_shuffled": Arm(reads=True, shuffled=True),
    "gpt_prompt": Arm(prompted=True),
    "retro_prompt": Arm(reads=True, prompted=True),
}
FITTED = {"fitting_gpt": Arm(start="gpt"), "fitting_retro": Arm(reads=True, start="gpt")}


def documents(folder: Path) -> list[str]:
    """Each question with its passage in front, so that a passage stands in as many documents as it has questions; then
    abstracts, which have little in common."""
    articles = json.loads(harness.data_file(folder, "xquad_en_part1.json").read_text(encoding="utf-8"))["data"]
    answered = [
        f"{passage['context']}\nQuestion: {asked['question']}\nAnswer: {asked['answers'][0]['text']}"
        for article in articles
        for passage in article["paragraphs"]
        for asked in passage["qas"]
    ]
    abstracts = [re.sub(r"\s+", " ", text) for text in read_cranfield(folder).documents]
    return answered + abstracts[:NUM_ABSTRACTS]


def prepare(data: Path, folder: Path) -> dict[str, Any]:
    """Tokenizer, indexed files and database. Returns what was made of the text, in numbers."""
    texts = documents(data)
    parts = {
        "train": [text for number, text in enumerate(texts) if number % 10],
        "valid": [text for number, text in enumerate(texts) if not number % 10],
    }
    tokenizer = folder / "tokenizer.json"
    make_tokenizer(parts["train"], tokenizer, VOCABULARY)
    prefixes = {name: index_texts(folder, name, part, tokenizer) for name, part in parts.items()}
    settings = RetroDbConfig(
        data_paths=[str(prefixes["train"])],
        query_paths=[str(prefixes[name]) for name in parts],
        tokenizer=str(tokenizer),
        chunk_length=CHUNK,
        min_chunk_tokens=CHUNK // 2,
        duplicates="keep",
        num_neighbors_query=50,
        num_neighbors_save=8,
        max_overlap=None,
    )
    (folder / "db").mkdir()
    save_project_config(settings, folder / "db")
    project, alone = Project(folder / "db", settings), Worker()
    embedder = Remembering(load_embedder(minilm_folder(), EmbedderOptions(batch_tokens=16384, max_length=256)))
    build_chunks(project, alone)
    train_index(project, alone, embedder)
    add_to_index(project, alone, embedder)
    record_version(project, alone, embedder)
    query_neighbors(project, alone, embedder)
    return {
        name: {"documents": len(part), "tokens": int(IndexedFile(prefixes[name]).lengths.sum())}
        for name, part in parts.items()
    }


def run_config(folder: Path, arm: Arm, seed: int, steps: int, lr: float) -> RunConfig:
    """The run of an arm. Rows get neighbors in every arm; who does not read them passes over them."""
    config = RunConfig(output_dir=str(folder / "runs"))
    config.model = ModelConfig(
        num_layers=2,
        hidden_size=96,
        ffn_hidden_size=288,
        num_attention_heads=3,
        num_query_groups=None,
        max_position_embeddings=4096,
        tie_embeddings=True,
        init_std=0.1,  # of a width of 96; with 0.02 what is read is too small to be learned from in so few steps
        sliding_window=None,
    )
    gate = None if arm.start else 1.0
    config.model.retro = RetroConfig(num_neighbors=NEIGHBORS, layers=[1], encoder_layers=1, gate=gate)
    config.parallel.device = "cpu"
    config.data.retro_project, config.data.valid = str(folder / "db"), [str(folder / "valid_text_document")]
    config.data.over_long, config.data.tokens_per_row, config.data.retro_shuffle = "split", 513, arm.shuffled
    config.optimizer.lr, config.optimizer.min_lr, config.optimizer.schedule = lr, lr / 10, "cosine"
    config.optimizer.warmup_ratio, config.optimizer.beta2, config.optimizer.weight_decay = 0.05, 0.98, 0.1
    config.training.objective, config.training.generative_batch_size = "generative", 4
    config.training.precision, config.training.steps, config.training.seed = "fp32", steps, seed
    return resolve_retro_project(config, {})


def with_prompts(row: PackedRow, delimiter: int) -> PackedRow:
    """The row with the neighbors of each chunk between it and the next one, each behind a delimiter and one at the end.

    A token keeps its label; the last one of a chunk hands it to the delimiter before the next chunk. Where chunks are
    read by cross-attention, too, what is inserted belongs to the chunk behind it.
    """
    import torch

    neighbors = row.neighbors
    assert neighbors is not None and row.labels_1T is not None and row.loss_mask_1T is not None
    texts = np.split(neighbors.tokens_1N[0].numpy(), np.cumsum(neighbors.lengths_U)[:-1])
    tokens_T, num_tokens = row.tokens_1T[0].numpy(), row.num_tokens
    pieces: list[np.ndarray] = []
    place_T = np.zeros(len(tokens_T), dtype=np.int64)  # of each token in the new row
    bounds_C2, ends_C, length = [], [], 0
    segment_ends = {0: 0}
    before = 0
    for (start, stop), end, which in zip(
        neighbors.chunk_bounds_C2.tolist(), neighbors.segment_ends_C.tolist(), neighbors.text_of_Ck, strict=True
    ):
        place_T[start:stop] = length + np.arange(stop - start)
        pieces.append(tokens_T[start:stop])
        length += stop - start
        bounds_C2.append((before, length))
        before = length
        if stop == end:
            ends_C += [length] * (len(bounds_C2) - len(ends_C))
            segment_ends[stop] = length
        elif (which >= 0).any():
            inserted = [np.array([delimiter])]
            inserted += [part for text in which[which >= 0] for part in (texts[text], np.array([delimiter]))]
            pieces += inserted
            length += sum(map(len, inserted))
    total = -(-length // 8) * 8
    pieces.append(np.full(total - length, tokens_T[-1]))
    from_T = np.flatnonzero(row.loss_mask_1T[0].numpy() > 0)
    to_T = place_T[from_T + 1] - 1
    labels_1T, mask_1T = torch.zeros(1, total, dtype=torch.int64), torch.zeros(1, total)
    labels_1T[0, to_T], mask_1T[0, to_T] = row.labels_1T[0, from_T], 1.0
    bounds = [segment_ends[end] for end in row.cu_seqlens.tolist() if end in segment_ends and end <= num_tokens]
    bounds += [total] * (total > length)
    every, sizes = np.arange(total), np.diff(bounds)
    return dataclasses.replace(
        row,
        tokens_1T=torch.from_numpy(np.concatenate(pieces))[None],
        positions_1T=torch.from_numpy(every - np.repeat(bounds[:-1], sizes))[None],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=int(sizes.max()),
        padding_mask_1T=torch.from_numpy(every >= length)[None],
        labels_1T=labels_1T,
        loss_mask_1T=mask_1T,
        neighbors=dataclasses.replace(neighbors, chunk_bounds_C2=np.array(bounds_C2), segment_ends_C=np.array(ends_C)),
    )


@dataclass(frozen=True)
class Job:
    """One training."""

    folder: Path
    name: str
    arm: Arm
    seed: int
    steps: int
    lr: float


def trained(job: Job) -> dict[str, Any]:
    """What :func:`train` found, now or when the folder was used before."""
    path = job.folder / f"{job.name}_{job.seed}_{job.steps}_{job.lr:g}.json"
    if path.exists():
        return json.loads(path.read_text())
    found = train(job)
    write_json(path, found)
    return found


def train(job: Job) -> dict[str, Any]:
    """Train and measure an arm, in a process of its own."""
    import torch

    from megatron_grit.data.rows.loader import GritDataLoader
    from megatron_grit.data.text.tokenizer import load_tokenizer
    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights, save_weights
    from megatron_grit.training.optimizer import build_optimizer, build_schedule, set_learning_rate, wrap_model
    from megatron_grit.training.step import TrainStep
    from megatron_grit.training.validation.loss import Validation

    torch.set_num_threads(1)
    began, arm = time.perf_counter(), job.arm
    config = run_config(job.folder, arm, job.seed, job.steps, job.lr)
    assert config.data.tokenizer is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    own = copy.deepcopy(config)
    own.model.retro.num_neighbors *= arm.reads
    change: Callable[[PackedRow], PackedRow] | None = None
    if arm.prompted:
        change = lambda row: with_prompts(row, tokenizer.eos_id)  # noqa: E731
    with parallel_job(config.parallel, job.seed) as context:
        loader = GritDataLoader(config, tokenizer, row_multiple=context.row_multiple, equal_rows=False)
        model = build_model(own, tokenizer.vocab_size, context)
        wrapped = wrap_model(model)
        if arm.start is not None:
            load_weights(job.folder / f"{arm.start}_{job.seed}", [model], context)
        optimizer = build_optimizer(own, wrapped)
        schedule = build_schedule(own, optimizer)
        step = TrainStep(own, context, wrapped, optimizer)
        validation = Validation(config, tokenizer, context, [wrapped], change)
        found: dict[str, Any] = {"at_step_0": validation()["valid_loss"] if arm.start else None, "curve": []}
        for batch in loader.iterate(0, job.steps):
            set_learning_rate(schedule, batch.step)
            found["curve"].append(step(changed(batch, change))["loss"])
        found["curve"] = [statistics.fmean(found["curve"][start : start + 50]) for start in range(0, job.steps, 50)]
        found |= validation()
        if any(fitted.start == job.name for fitted in FITTED.values()):
            save_weights([model], context, job.folder / f"{job.name}_{job.seed}")
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return found | {"seconds": time.perf_counter() - began}


def changed(batch: StepBatch, change: Callable[[PackedRow], PackedRow] | None) -> StepBatch:
    """A step with other rows."""
    if change is None:
        return batch
    ((kind, part),) = batch.parts.items()
    rows = [change(row) for row in part.rows]
    longest = max(row.tokens_1T.shape[1] for row in rows)
    return dataclasses.replace(batch, parts={kind: BatchPart(rows=rows, counts=part.counts)}, row_length=longest)


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """Build the database, train all, compare."""
    if arguments.folder is not None:
        folder = arguments.folder
        folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    made = folder / "text.json"
    if not made.exists():
        made.write_text(json.dumps(prepare(arguments.data, folder)))
    text = json.loads(made.read_text())
    print(f"text and database in {time.perf_counter() - began:.0f} s: {text}", flush=True)
    third = arguments.steps // 3
    rounds = [
        [(name, ARMS[name], arguments.steps, arguments.lr) for name in arguments.arms],
        [(name, arm, third, arguments.lr / 2) for name, arm in FITTED.items() if "gpt" in arguments.arms],
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    context = multiprocessing.get_context("spawn")
    for arms in rounds:
        jobs = [
            Job(folder, name, arm, seed, steps, lr)
            for seed in SEEDS[: arguments.seeds]
            for name, arm, steps, lr in arms
        ]
        with context.Pool(arguments.processes, maxtasksperchild=1) as pool:
            for job, numbers in zip(jobs, pool.imap(trained, jobs, chunksize=1), strict=True):
                found.setdefault(job.name, []).append(numbers)
                told = {name: value for name, value in numbers.items() if "perplexity" not in name}
                print(f"{job.name} seed {job.seed}: {told}", flush=True)
    return report(found, {"text": text, "options": {name: str(value) for name, value in vars(arguments).items()}})


def report(found: dict[str, list[dict[str, Any]]], about: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Print the tables. Returns the numbers, and whether all targets are met."""
    arms: dict[str, Any] = {}
    for name, runs in found.items():
        loss = [run["valid_loss"] for run in runs]
        overlaps = dict.fromkeys(key for run in runs for key in run if key.startswith("valid_loss_overlap/"))
        # Of shuffled neighbors, which each seed shuffles otherwise, a seed may have none in a bucket.
        by_overlap = {
            key.removeprefix("valid_loss_overlap/"): [run[key] for run in runs if key in run] for key in overlaps
        }
        arms[name] = {
            "loss": loss,
            **t_interval(loss),
            "without_copies": [run["valid_loss_without_copies"] for run in runs],
            "by_overlap": by_overlap,
            **{key: [run[key] for run in runs] for key in ("seconds", "curve", "at_step_0")},
            "parameters": runs[0]["parameters"],
        }
    buckets = [key for key in next(iter(arms.values()))["by_overlap"]]
    first = next(iter(found.values()))[0]
    tokens = {key: first[f"valid_tokens_overlap/{key}"] for key in buckets}
    print(f"\n  {'arm':16s} {'loss':>18s} {'no copies':>10s} " + " ".join(f"{key:>9s}" for key in buckets))
    for name, arm in arms.items():
        means = {key: f"{statistics.fmean(values):9.4f}" for key, values in arm["by_overlap"].items()}
        cells = " ".join(means.get(key, f"{'-':>9s}") for key in buckets)
        print(
            f"  {name:16s} {arm['mean']:8.4f} +- {arm['half_interval']:6.4f} "
            f"{statistics.fmean(arm['without_copies']):10.4f} {cells}"
        )
    print(
        f"  {'tokens':16s} {first['valid_tokens']:18,} {first['valid_tokens_without_copies']:10,} "
        + " ".join(f"{tokens[key]:9,}" for key in buckets)
    )
    gains = {
        f"{other} - {name}": t_interval([a - b for a, b in zip(arms[other]["loss"], arms[name]["loss"], strict=True)])
        for name, other in itertools.permutations(arms, 2)
        if (name, other) in COMPARED
    }
    for name, gain in gains.items():
        print(f"  {name}: {gain['mean']:+.4f} +- {gain['half_interval']:.4f}")
    numbers = {
        **about,
        "arms": {name: arm for name, arm in arms.items() if name in ARMS},
        "fitting": {name.removeprefix("fitting_"): arm for name, arm in arms.items() if name in FITTED},
        "tokens": tokens,
        "gains": gains,
    }
    return numbers, _met(numbers)


COMPARED = (
    ("retro", "gpt"),
    ("retro", "retro_shuffled"),
    ("retro_shuffled", "gpt"),
    ("gpt_prompt", "gpt"),
    ("retro", "gpt_prompt"),
    ("retro_prompt", "gpt_prompt"),
    ("fitting_retro", "fitting_gpt"),
)


def _met(numbers: dict[str, Any]) -> bool:
    """Say which targets are met."""
    gains, checks = numbers["gains"], {}

    def is_above_0(name: str) -> bool:
        return bool(gains[name]["mean"] - gains[name]["half_interval"] > 0)

    if "gpt - retro" in gains:
        checks["Retro is below GPT"] = is_above_0("gpt - retro")
    if "gpt - retro_shuffled" in gains:
        checks["shuffled it is not"] = not is_above_0("gpt - retro_shuffled")
        checks["Retro is below Retro with shuffled neighbors"] = is_above_0("retro_shuffled - retro")
    if "fitting_gpt - fitting_retro" in gains:
        fitting = numbers["fitting"]
        starts = zip(fitting["gpt"]["at_step_0"], fitting["retro"]["at_step_0"], strict=True)
        checks["a fitted model starts with GPT's loss"] = all(abs(a - b) < 1e-6 for a, b in starts)
        checks["and ends below it"] = is_above_0("fitting_gpt - fitting_retro")
    for what, met in checks.items():
        print(f"  {what}: {'yes' if met else 'NO'}")
    return all(checks.values())


def main() -> int:
    """Parse the command line and measure. Status 1 where a target is missed."""
    parser = harness.parser(__doc__, data="xquad_en_part1.json and the Cranfield files")
    parser.add_argument("--steps", type=int, default=400, help="of a training (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="the first so many (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="keep text, database and what each training found here, and take them from here"
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    return harness.run("retro_gain", arguments, lambda folder: measure(arguments, folder))


if __name__ == "__main__":
    sys.exit(main())
