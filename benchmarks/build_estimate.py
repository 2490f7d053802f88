"""What a dry run says that a build takes, against what it takes: CPU seconds, disk and memory of each task.

Documents are paragraphs of WikiText-2 with their words shuffled, so that none is a copy of another; the embedder is a
BERT of one layer with random weights. Chunks and vectors are made once for all indexes. The dry run and each task are
processes of their own, of one thread, which hold the embedder; memory is the most that one has, without the pages of
files that the system takes back. Linux only.

The speed of a machine that does other work as well changes in minutes. So the dry run is made before the build and
after it, and the mean of both is compared.

Example:
    python -m benchmarks.build_estimate --indexes Flat IVF1024,PQ32 IVF1024,SQ8 --nprobe 32 --json build_estimate.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.preprocess import wiki_documents
from benchmarks.retrieval_quality import index_texts, make_tokenizer, minilm_folder
from megatron_grit.config.database.schema import RetroDbConfig, load_project_config, save_project_config
from megatron_grit.data.chunks.project import Project
from megatron_grit.inference.encoders.load import load_embedder
from megatron_grit.inference.encoders.protocol import Embedder, EmbedderOptions
from megatron_grit.retrieval.database.vectors import embed_chunks, open_vectors
from megatron_grit.retrieval.database.versions import record_version
from megatron_grit.retrieval.estimate.lines import estimate_build
from megatron_grit.retrieval.estimate.rates import most_beyond, own_bytes
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.stages.index_add import add_to_index
from megatron_grit.retrieval.stages.index_train import train_index
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.work import Worker

TASKS = ("db-build", "embed", "index-train", "index-add", "query-neighbors")
TOLERANCE = 0.2
SMALL = {"cpu": 1.5, "disk": 1e6, "memory": 0.0}
"""Seconds and bytes below which a difference is not counted as a miss. A process of one task imports for a second."""
FIGURES = ("cpu", "disk", "memory")
SHARED = {"db-build": "db", "embed": "embeddings"}
"""Tasks that do not depend on the index, and their folders."""


def shuffled(texts: Iterator[str]) -> Iterator[str]:
    """Texts with their words in another order."""
    draw = random.Random(0)
    for text in texts:
        words = text.split()
        draw.shuffle(words)
        yield " ".join(words)


def make_embedder(folder: Path) -> Path:
    """A BERT of one layer of 128 channels with random weights, and MiniLM's vocabulary."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 512}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def said(project: Project, embedder: Embedder) -> dict[str, dict[str, float]]:
    """Of each task, what the dry run says."""
    began = time.process_time()
    estimate, found = estimate_build(project, embedder, TASKS, 1), {}
    for task in TASKS:
        cost = estimate.of(task)
        assert cost is not None
        found[task] = {"cpu": cost.spent.cpu, "disk": cost.disk, "memory": cost.memory}
    found["all"] = {"cpu": time.process_time() - began}
    return found


def took(project: Project, embedder: Embedder, task: str) -> dict[str, float]:
    """What a task takes."""
    alone = Worker()

    def index_add() -> None:
        add_to_index(project, alone, embedder)
        record_version(project, alone, embedder)

    tasks: dict[str, Callable[[], object]] = {
        "db-build": lambda: build_chunks(project, alone),
        "embed": lambda: embed_chunks(open_vectors(project, alone, embedder), alone),
        "index-train": lambda: train_index(project, alone, embedder),
        "index-add": index_add,
        "query-neighbors": lambda: query_neighbors(project, alone, embedder),
    }
    disk, held, began = _bytes_in(project.folder), own_bytes(), time.process_time()
    with most_beyond() as grown:
        tasks[task]()
    cpu = time.process_time() - began
    return {"cpu": cpu, "disk": _bytes_in(project.folder) - disk, "memory": held + grown[0]}


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and ".digests" not in path.parts)


def in_process(what: str, folder: Path, embedder: Path) -> Any:
    """What the dry run says of all tasks ("said"), or what a task of this name takes, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.build_estimate", "--run", what, str(folder), str(embedder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """A table for each index."""
    texts = list(shuffled(wiki_documents(arguments.data, arguments.mb * 1e6, 1)))
    tokenizer = folder / "tokenizer.json"
    make_tokenizer(texts[:2000], tokenizer)
    prefix, embedder = index_texts(folder, "corpus", texts, tokenizer), make_embedder(folder / "embedder")
    rows, found, met = dict[str, Any](), dict[str, Any](), True
    for number, index in enumerate(arguments.indexes):
        config = RetroDbConfig(data_paths=[str(prefix)], tokenizer=str(tokenizer), index=index, nprobe=arguments.nprobe)
        here = folder / str(number)
        here.mkdir()
        save_project_config(config, here)
        before = in_process("said", here, embedder)
        for task in TASKS:
            if number and task in SHARED:
                name = SHARED[task]
                sampled = shutil.ignore_patterns("sampled.hdf5")  # by index-train
                shutil.copytree(folder / "0" / name, here / name, copy_function=os.link, ignore=sampled)
            else:
                found[task] = in_process(task, here, embedder)
        rows[index] = {"said": [before, in_process("said", here, embedder)], "took": dict(found)}
        met &= report(index, *rows[index]["said"], found)
    return rows, met


def report(index: str, before: dict[str, Any], after: dict[str, Any], found: dict[str, Any]) -> bool:
    """Print what was said beside what it took. Returns whether all of it is within the tolerance."""
    cpu = before["all"]["cpu"]
    print(f"{index}, said in {cpu:.0f} CPU s: CPU s said before, after, taken; MB of disk and of memory said, taken")
    met = True
    for task in TASKS:
        line = f"  {task:16s}"
        for figure, unit in zip(FIGURES, (1, 1e6, 1e6), strict=True):
            each, other = [said[task][figure] for said in (before, after)], found[task][figure]
            missed = abs(sum(each) / 2 - other) > max(TOLERANCE * other, SMALL[figure])
            met &= not missed
            shown = each if figure == "cpu" else each[:1]
            line += "".join(f"{value / unit:9.2f}" for value in (*shown, other)) + ("  !" if missed else "   ")
        print(line, flush=True)
    return met


def main() -> int:
    """Parse the command line, measure, print. Returns the exit status: 1 where anything is further off than 20 %."""
    parser = harness.parser(__doc__, data="wikitext2_valid.txt")
    parser.add_argument("--mb", type=float, default=22.5, help="size of the corpus")
    parser.add_argument("--indexes", nargs="+", default=["Flat", "IVF1024,PQ32", "IVF1024,SQ8"], help="factory strings")
    parser.add_argument("--nprobe", type=int, help="of indexes with lists; by default index-add chooses it")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        what, folder = arguments.run[0], Path(arguments.run[1])
        config = load_project_config(folder)
        assert config is not None
        project = Project(folder, config)
        embedder = load_embedder(arguments.run[2], EmbedderOptions(device="cpu"))
        print(json.dumps(said(project, embedder) if what == "said" else took(project, embedder, what)))
        return 0
    return harness.run("build_estimate", arguments, lambda folder: measure(arguments, folder))


if __name__ == "__main__":
    sys.exit(main())
