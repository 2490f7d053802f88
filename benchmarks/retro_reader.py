"""How fast the rows of a run get their neighbors: against what a small model reads, and over the size of a database.

Databases of made-up documents, cut into chunks by the task db-build, with a version and a table of neighbors drawn at
random, so that every one that is read lies elsewhere.

1. Neighbor tokens that the loader makes in a CPU second, rows included, against those that training steps of the
   preset tiny_mistral consume in one, with two neighbors of 128 tokens for each chunk of 64; one thread. At least 20
   times as many.
2. Memory that a process takes to open the data and read rows, of databases of different sizes, each in a process of its
   own. Mapped files are not counted: the system gives their pages back. At most 8 MiB more for the largest than for the
   smallest.
3. Files that are opened while rows are read, after the first step: none.

Example:
    python -m benchmarks.retro_reader --json retro_reader.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from megatron_grit.config.database.run import resolve_retro_project
from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.config.parse import parse_run_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.chunks.chunk_db import ChunkDb, sources_of
from megatron_grit.data.chunks.neighbor_table import COLUMNS, TableManifest, write_starts, write_table
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import AddedChunks, Version, source_of, stored_file, write_version
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.indexed.writer import IndexedFacts, IndexedStream, TokenBlock
from megatron_grit.data.rows.batch import StepBatch
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.work import Worker
from megatron_grit.training.optimizer import build_optimizer, build_schedule, set_learning_rate, wrap_model
from megatron_grit.training.step import TrainStep

VOCAB, CHUNK, SAVED, TOKENS_PER_ROW = 512, 64, 4, 2049
SHORTEST, LONGEST = 40, 600
"""Tokens of a document."""
TARGET, MOST_MORE = 20.0, 8.0


def write_database(folder: Path, num_documents: int) -> Project:
    """Documents of random tokens, their chunks, and a table of random neighbors."""
    folder.mkdir()
    draw = np.random.default_rng(num_documents)
    words = ["".join(draw.choice(list("aeikmnorst"), 5)) for _ in range(2000)]
    tokenizer = load_tokenizer(train_sentencepiece([" ".join(words)] * 3, folder / "tokenizer", VOCAB))
    facts = IndexedFacts(kind="generative", tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=VOCAB)
    stream = IndexedStream(folder / "work", "corpus", np.uint16, with_modes=True)
    for start in range(0, num_documents, 1 << 15):
        lengths = draw.integers(SHORTEST, LONGEST, size=min(1 << 15, num_documents - start), dtype=np.int32)
        tokens = draw.integers(4, VOCAB, size=int(lengths.sum()), dtype=np.uint16)
        tokens[np.cumsum(lengths) - 1] = tokenizer.eos_id
        modes = np.full(len(lengths), Role.TEXT, dtype=np.int8)
        documents = np.ones(len(lengths), dtype=np.int32)
        stream.append(TokenBlock(tokens=tokens, lengths=lengths, documents=documents, modes=modes))
    stream.finalize(folder / "corpus", lambda: facts)
    config = RetroDbConfig(
        data_paths=[str(folder / "corpus")],
        tokenizer=str(folder / "tokenizer.model"),
        chunk_length=CHUNK,
        duplicates="keep",
        num_neighbors_save=SAVED,
    )
    project = Project(folder / "db", config)
    build_chunks(project, Worker())
    (project.folder / "config.json").write_text(json.dumps(asdict(config)))
    write_neighbors(project, draw)
    return project


def write_neighbors(project: Project, draw: np.random.Generator) -> None:
    """A version and its table, as index-add and query-neighbors leave them."""
    db, prefix = ChunkDb(project), project.resolve(project.config.data_paths[0])
    trained = project.folder / "trained"
    trained.touch()
    table = AddedChunks(table=stored_file(project.folder, db.path), num_chunks=len(db), index=[])
    source = source_of(str(prefix), prefix)
    version = Version(
        number=1,
        sources=[source],
        segments=[table],
        trained=stored_file(project.folder, trained),
        search="",
        embedder="random",
        chunks=table.table.sha256,
    )
    write_version(project.folder, version)
    folder = project.folder / "query" / "corpus"
    folder.mkdir(parents=True)
    file = IndexedFile(prefix)
    write_starts(folder / "starts.npy", file, CHUNK, project.tokenizer.eos_id)
    num_places = int(np.load(folder / "starts.npy", mmap_mode="r")[-1])

    def parts() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, num_places, 1 << 16):
            shape = (min(1 << 16, num_places - start), SAVED)
            ids = draw.integers(0, len(db), size=shape)
            yield dict(zip(COLUMNS, (ids, np.zeros(shape, np.float32), sources_of(db.rows, ids)), strict=True))

    manifest = TableManifest(
        source=source,
        datasets=[0],
        settings="random",
        chunk_length=CHUNK,
        num_neighbors=SAVED,
        num_places=num_places,
        version=1,
        database=version.chunks,
        embedder="random",
        nprobe=None,
        ef_search=None,
        recall=None,
    )
    write_table(folder, parts(), manifest)


def run_config(project_folder: Path) -> RunConfig:
    """The run that is measured: tiny_mistral in fp32, whose second layer reads two neighbors a chunk."""
    settings = {
        "data.retro_project": project_folder,
        "data.over_long": "split",
        "data.tokens_per_row": TOKENS_PER_ROW,
        "data.packing": "window",
        "data.cache_dir": project_folder / "cache",
        "training.objective": "generative",
        "training.generative_rows": 4,
        "training.precision": "fp32",
        "model.retro.num_neighbors": 2,
        "model.retro.layers": "[1]",
        "parallel.device": "cpu",
    }
    config = parse_run_config(["--model", "tiny_mistral", *(f"--{key}={value}" for key, value in settings.items())])
    return resolve_retro_project(config, {"model.retro": ""})


def open_loader(config: RunConfig) -> GritDataLoader:
    """The loader of one process."""
    return GritDataLoader(config, load_tokenizer(str(config.data.tokenizer)))


def num_read(batch: StepBatch) -> int:
    """Tokens of all neighbors of a step."""
    return sum(row.neighbors.tokens_1N.shape[1] for row in batch.rows if row.neighbors is not None)


def measure_speed(project: Project, steps: int, loader_steps: int) -> dict[str, float]:
    """Neighbor tokens in a CPU second of the loader and of training steps."""
    config = run_config(project.folder)
    with parallel_job(config.parallel, config.training.seed) as context:
        torch.set_num_threads(1)
        loader = open_loader(config)
        model = wrap_model(build_model(config, VOCAB, context))
        optimizer = build_optimizer(config, model)
        schedule, step = build_schedule(config, optimizer), TrainStep(config, context, model, optimizer)

        def train(batch: StepBatch) -> float:
            set_learning_rate(schedule, batch.step)
            began = time.process_time()
            step(batch)
            return num_read(batch) / (time.process_time() - began)

        def load(number: int) -> float:
            began = time.process_time()
            batch = loader.batch(number)
            return num_read(batch) / (time.process_time() - began)

        train(loader.batch(0))  # to warm up
        consumed = statistics.median(train(loader.batch(1 + number)) for number in range(steps))
        made = statistics.median(load(1 + steps + number) for number in range(loader_steps))
    return {"loader": made, "model": consumed, "ratio": made / consumed}


def read_rows(folder: Path, num_steps: int) -> dict[str, float]:
    """In a process of its own: memory to open the data and read rows, and files that reading opened."""
    config = run_config(folder)
    before, opened = own_memory(), [0]
    loader = open_loader(config)
    num_tokens = num_read(loader.batch(0))
    sys.addaudithook(lambda event, _: opened.__setitem__(0, opened[0] + (event == "open")))
    peak = 0.0
    for number in range(1, num_steps):
        num_tokens += num_read(loader.batch(number))
        peak = max(peak, own_memory())
    return {"tokens": num_tokens, "mib": peak - before, "opens": opened[0] - (num_steps - 1)}


def own_memory() -> float:
    """Memory of this process that no file backs, in MiB. Opens one file."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def run(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """All measurements, and whether the targets are met."""
    projects = {number: write_database(folder / str(number), number) for number in sorted(arguments.documents)}
    speed = measure_speed(next(iter(projects.values())), arguments.steps, arguments.loader_steps)
    print(
        f"neighbor tokens in a CPU second: loader {speed['loader']:,.0f}, model {speed['model']:,.0f}, "
        f"ratio {speed['ratio']:.0f}"
    )
    sizes: dict[int, dict[str, float]] = {}
    for number, project in projects.items():
        command = [sys.executable, "-m", "benchmarks.retro_reader", "--read", str(project.folder)]
        command += ["--loader-steps", str(arguments.loader_steps)]
        sizes[number] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found = sizes[number]
        print(f"{number:,} documents: {found['mib']:.1f} MiB, {found['opens']} files opened by reading")
    memory = [found["mib"] for found in sizes.values()]
    opens = max(found["opens"] for found in sizes.values())
    met = speed["ratio"] >= TARGET and max(memory) - memory[0] <= MOST_MORE and not opens
    return {"speed": speed, "documents": sizes, "ratio": speed["ratio"], "opens": opens, "met": met}, met


def main() -> int:
    """Parse the command line, measure, print. Returns the exit status."""
    parser = harness.parser(__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[2_000, 20_000, 200_000], help="database sizes")
    parser.add_argument("--steps", type=int, default=5, help="measured training steps, after one to warm up")
    parser.add_argument("--loader-steps", type=int, default=50, help="measured steps of the loader")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read is not None:
        print(json.dumps(read_rows(arguments.read, arguments.loader_steps)))
        return 0
    return harness.run("retro_reader", arguments, lambda folder: run(arguments, folder))


if __name__ == "__main__":
    sys.exit(main())
