"""The recall that an index promises, against what is found for queries that it never saw.

Documents of four collections (WikiText-2, Cranfield, Dolly, XQuAD) are parted at random: one half is the database, a
quarter are the documents whose chunks choose how the index is searched and measure its recall, a quarter are asked
afterwards. all-MiniLM-L6-v2 embeds them, in chunks of 64 tokens. Each index is built by the stages of build_db.py, its
promises are read from search.json and search_questions.json, and what is found is counted against a comparison with all
vectors in numpy.

A promise is kept where what is found differs from it by at most 0.01, or by no more than chance: the interval of a
promise is that of the queries that measured it alone, and those that are asked have one as well, so the difference is
compared with the interval of differences.

Beside chunks, people's questions are asked (Cranfield's 225 and XQuAD's): half of them are recall_queries, which choose
and promise, the other half is asked, by the search that was chosen for questions, and by that for chunks.

"auto@M" is index auto with M megabytes of memory.

Example:
    python -m benchmarks.index_recall --data ../shared/data --json index_recall.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.preprocess import paragraphs
from benchmarks.retrieval_quality import Remembering, index_texts, make_tokenizer, minilm_folder, read_cranfield
from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import read_version
from megatron_grit.inference.encoders.load import load_embedder
from megatron_grit.inference.encoders.protocol import EmbedderOptions
from megatron_grit.retrieval.database.question_recall import measure_questions
from megatron_grit.retrieval.database.versions import open_index, record_version, searches_of
from megatron_grit.retrieval.index.recall import Population
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.stages.index_add import add_to_index
from megatron_grit.retrieval.stages.index_train import train_index
from megatron_grit.retrieval.work import Worker

TOLERANCE = 0.01
AT = 10
INDEXES = ("IVF64,Flat", "auto@10", "auto@2")
KINDS = ("chunks", "questions", "questions, as chunks are searched")


def read_documents(folder: Path) -> list[str]:
    """Texts of all collections, in an order that is always the same."""
    lines = paragraphs(folder)
    texts = ["\n".join(lines[start : start + 5]) for start in range(0, len(lines), 5)]
    texts += read_cranfield(folder).documents
    with (folder / "alpagasus_3k_dolly.jsonl").open(encoding="utf-8") as file:
        for line in file:
            texts.append("\n".join(turn["content"] for turn in json.loads(line)["messages"]))
    squad = json.loads((folder / "xquad_en_part1.json").read_text(encoding="utf-8"))
    texts += [part["context"] for article in squad["data"] for part in article["paragraphs"]]
    texts = list(dict.fromkeys(text for text in texts if text.strip()))
    return [texts[place] for place in np.random.default_rng(0).permutation(len(texts))]


def numpy_nearest(queries_QD: np.ndarray, vectors_ND: np.ndarray, k: int) -> np.ndarray:
    """Places of the ``k`` nearest by squared distance, in float64, by comparing all."""
    vectors = vectors_ND.astype(np.float64)
    sizes, out = (vectors**2).sum(1), []
    for start in range(0, len(queries_QD), 512):
        part = queries_QD[start : start + 512].astype(np.float64)
        out.append(np.argsort(sizes - 2 * part @ vectors.T, axis=1, kind="stable")[:, :k])
    return np.concatenate(out)


def found_shares(project: Project, population: Population, queries: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Share of its exact neighbors that a search finds as it was chosen for a population, of each query."""
    _, ids = open_index(project, read_version(project.folder), population=population).search(queries, AT)
    shares: np.ndarray = (exact[:, :, None] == ids[:, None, :]).any(2).mean(1)
    return shares


def widest_difference(interval: Sequence[float], shares: np.ndarray) -> float:
    """The largest difference of two measurements of one recall that is not surprising, at 95%.

    Args:
        interval: of the one, 95%.
        shares: of the queries of the other.
    """
    half = (interval[1] - interval[0]) / 2, 1.96 * float(shares.std()) / math.sqrt(len(shares))
    return math.hypot(*half)


def read_questions(folder: Path) -> list[str]:
    """Those of Cranfield and of XQuAD, in an order that is always the same."""
    squad = json.loads((folder / "xquad_en_part1.json").read_text(encoding="utf-8"))
    texts = [question["question"] for one in squad["data"] for part in one["paragraphs"] for question in part["qas"]]
    texts = list(dict.fromkeys(" ".join(text.split()) for text in [*read_cranfield(folder).queries, *texts]))
    return [texts[place] for place in np.random.default_rng(1).permutation(len(texts))]


def build(folder: Path, tokenizer: Path, documents: Path, embedder: Remembering, index: str, **given: Any) -> Project:
    """Chunks and index of a database."""
    factory, _, megabytes = index.partition("@")
    memory = {"index_memory_gb": float(megabytes) * 1e6 / 2**30} if megabytes else {}
    settings: dict[str, Any] = {"tokenizer": str(tokenizer), "data_paths": [str(documents)], "duplicates": "exact"}
    project, alone = Project(folder, RetroDbConfig(index=factory, **settings | memory | given)), Worker()
    folder.mkdir(parents=True)
    build_chunks(project, alone)
    train_index(project, alone, embedder)
    add_to_index(project, alone, embedder)
    record_version(project, alone, embedder)
    measure_questions(project, alone, embedder)
    return project


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each index and kind of query."""
    texts = read_documents(arguments.data)[: arguments.documents]
    tokenizer = folder / "tokenizer.json"
    make_tokenizer(texts[:3000], tokenizer)
    half, quarter = len(texts) // 2, 3 * len(texts) // 4
    parts = {"documents": texts[:half], "choosing": texts[half:quarter], "asked": texts[quarter:]}
    prefix = {name: index_texts(folder, name, part, tokenizer) for name, part in parts.items()}
    embedder = Remembering(load_embedder(str(minilm_folder()), EmbedderOptions()))
    questions, chosen = read_questions(arguments.data)[: arguments.questions], folder / "questions.txt"
    chosen.write_text("".join(f"{text}\n" for text in questions[::2]), encoding="utf-8")
    given = {"query_paths": [str(prefix["choosing"])], "recall_queries": str(chosen)}
    asked = {"chunks": chunk_texts(folder, tokenizer, prefix["asked"]), "questions": questions[1::2]}
    vectors = {kind: embedder.embed(texts, "query") for kind, texts in asked.items()}
    rows = []
    exact: dict[str, np.ndarray] = {}
    print(f"{'index':28s} {'queries':34s} {'chunks':>7s} {'promised':>8s} {'[95%]':>15s} {'found':>7s} {'diff':>7s}")
    for index in arguments.indexes:
        project = build(folder / index.replace(",", "_"), tokenizer, prefix["documents"], embedder, index, **given)
        db, searches = ChunkDb(project), searches_of(project.folder, read_version(project.folder))
        if not exact:
            passages = embedder.embed(db.texts(np.arange(len(db))))
            exact = {kind: numpy_nearest(queries, passages, AT) for kind, queries in vectors.items()}
        factory = next(project.folder.glob("index/faiss-par-add/*/search.json")).parent.name
        for name in KINDS:
            kind = name.partition(",")[0]
            population: Population = "questions" if name == "questions" else "chunks"
            search = searches[population]
            row = {"index": index, "factory": factory, "queries": name, "asked": len(asked[kind])}
            row |= {"chunks": len(db), "promised": search.recall, "interval": [search.recall_low, search.recall_high]}
            shares = found_shares(project, population, vectors[kind], exact[kind])
            row |= {"nprobe": search.nprobe, "found": float(shares.mean())}
            row["difference"] = row["found"] - row["promised"]
            row["by chance"] = widest_difference(row["interval"], shares)
            rows.append(row)
            print_row(row)
    return rows


def chunk_texts(folder: Path, tokenizer: Path, prefix: Path) -> list[str]:
    """Texts of the chunks of an indexed file."""
    config = RetroDbConfig(tokenizer=str(tokenizer), data_paths=[str(prefix)])
    project = Project(folder / "asked_chunks", config)
    build_chunks(project, Worker())
    db = ChunkDb(project)
    return db.texts(np.arange(len(db)))


def print_row(row: dict[str, Any]) -> None:
    """A line of the table."""
    low, high = row["interval"]
    what = f"{row['index']} = {row['factory']}" if "auto" in row["index"] else row["index"]
    print(
        f"{what:28s} {row['queries']:34s} {row['chunks']:7,} {row['promised']:8.4f} [{low:.3f}, {high:.3f}] "
        f"{row['found']:7.4f} {row['difference']:+7.4f} +-{row['by chance']:.4f}  "
        f"({row['asked']:,} asked, nprobe {row['nprobe']})",
        flush=True,
    )


def main() -> int:
    """Parse the command line and measure. Status 1 where a population finds less or more than it was promised."""
    parser = harness.parser(__doc__, data="the collections")
    parser.add_argument("--documents", type=int, help="keep only so many documents")
    parser.add_argument("--questions", type=int, help="keep only so many questions")
    parser.add_argument("--indexes", nargs="+", default=list(INDEXES), help="faiss factory strings, or auto@MEGABYTES")
    arguments = parser.parse_args()

    def measured(folder: Path) -> tuple[list[dict[str, Any]], bool]:
        rows = measure(arguments, folder)
        kept = [
            abs(row["difference"]) <= max(TOLERANCE, row["by chance"]) for row in rows if row["queries"] != KINDS[2]
        ]
        print(f"{sum(kept)} of {len(kept)} promises are kept, within {TOLERANCE} or what chance explains")
        return rows, all(kept)

    return harness.run("index_recall", arguments, measured)


if __name__ == "__main__":
    sys.exit(main())
