"""Speed of the stages of a retrieval database, each against the plain way to do it, in one run.

(a) Chunks. "Classic" is what Retro's tools do: cut the tokens, turn each piece back into text, split that into
    WordPieces and keep it if there are any, documents shared out over a pool of processes (its start is not counted,
    and it writes nothing). Ours is the whole stage db-build in one process, checksums and files included.
(b) Embeddings of the same chunks with the same directory (all-MiniLM-L6-v2): sentence-transformers' encode at its
    defaults, ours in fp32 and in bf16. Text to vectors in memory, all of this machine's threads on each side.
(c) Neighbors: the stage query-neighbors with everything it does to a chunk (read, make text, filter, write, join)
    except embedding, against one bare faiss search of the same vectors in the same index file.
(d) Memory: what query-neighbors adds, at its peak, to a process that runs it for few and for many documents of one
    chunk each, against the same index and in blocks of 1,000 chunks. Pages of mapped files count apart. Linux only.

(e) Readers. Everything that training does for the neighbors of its rows of 2,048 tokens, in CPU seconds: of each of
    the 32 chunks the first two that are in no document of the row, with what follows them; a row at a time, and the
    rows that a rank has of a step at once. Bare: one numpy gather of as many tokens at random places of the same file,
    for processors differ.
(f) Growth. Query-neighbors after the last 5% of the documents were added, against a search for everything: comparisons
    of a query with a vector, and CPU seconds without embedding.

For (c) and (d) vectors are random numbers: a search takes as long. Rounds alternate; medians are printed.

Example:
    python -m benchmarks.retro_db --data ../shared/data --json retro_db.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.preprocess import wiki_documents
from benchmarks.retrieval_quality import index_texts, make_tokenizer, minilm_folder
from megatron_grit.config.database.run import resolve_retro_project
from megatron_grit.config.database.schema import CONFIG_FILE, RetroDbConfig
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.kinds.generative import GenerativeStream
from megatron_grit.data.order.sources import OpenFiles
from megatron_grit.data.rows.neighbor_reader import NeighborReader
from megatron_grit.data.text.markers import Side
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.inference.encoders.load import load_embedder
from megatron_grit.inference.encoders.protocol import EmbedderOptions
from megatron_grit.retrieval.database.versions import record_version
from megatron_grit.retrieval.index.faiss_index import VectorIndex
from megatron_grit.retrieval.index.search import ShardedIndex
from megatron_grit.retrieval.stages.add import add_documents
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.stages.index_add import add_to_index
from megatron_grit.retrieval.stages.index_train import train_index
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.work import Worker

TARGETS = {"chunks": 8.0, "embeddings": 1.5, "neighbors": 1.3, "memory": 1.5, "readers": 300_000, "growth": 8.0}
DIM = 384
ROWS_AT_ONCE, AT_ONCE = (1, 8, 32), 8
"""Rows of a rank and step, and the one of these numbers that the target is for."""
BARE = "bare"


class RandomEmbedder:
    """Vectors of random numbers, the same for the same text."""

    dim, fingerprint, sides_alike, model_group = DIM, "random numbers", True, None
    seconds = 0.0

    def embed(self, texts: Sequence[str], side: Side = "passage") -> np.ndarray:
        """Numbers drawn from a table by the text's checksum, which is fast."""
        began = time.perf_counter()
        keys = np.array([zlib.crc32(text.encode()) for text in texts], dtype=np.int64)
        table = np.random.default_rng(0).standard_normal((4096, DIM), dtype=np.float32)
        vectors = table[keys % 4096] + np.roll(table, 1, axis=1)[(keys >> 12) % 4096]
        self.seconds += time.perf_counter() - began
        return vectors.reshape(len(texts), DIM)


class ClassicChunks:
    """A process of the classic way."""

    def __init__(self, prefix: Path, tokenizer: Path, chunk_length: int) -> None:
        self._paths, self._length = (prefix, tokenizer), chunk_length
        self._tokenizer: Tokenizer | None = None

    def start(self) -> None:
        """Open files, once in each process."""
        global _classic
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from transformers import AutoTokenizer

        self._file, self._tokenizer = IndexedFile(self._paths[0]), load_tokenizer(self._paths[1])
        self._wordpiece = AutoTokenizer.from_pretrained(str(minilm_folder()))
        _classic = self

    def cut(self, document: int) -> list[tuple[int, int, int, int]]:
        """Rows of a document's chunks."""
        assert self._tokenizer is not None
        tokens = self._file.read(*self._file.sequences(document))
        if len(tokens) and tokens[-1] == self._tokenizer.eos_id:
            tokens = tokens[:-1]
        rows = []
        for start in range(0, len(tokens), self._length):
            stop = min(start + self._length, len(tokens))
            text = self._tokenizer.decode(tokens[start:stop].tolist())
            pieces = self._wordpiece(text, add_special_tokens=False, return_attention_mask=False).input_ids
            if pieces:
                rows.append((document, start, stop, len(pieces)))
        return rows


_classic: ClassicChunks | None = None


def _cut(document: int) -> list[tuple[int, int, int, int]]:
    assert _classic is not None
    return _classic.cut(document)


def alternate(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each side; the sides take turns."""
    return {name: statistics.median(values) for name, values in harness.in_turn(sides, rounds).items()}


def project_of(folder: Path, prefix: Path, tokenizer: Path, **settings: Any) -> Project:
    """An empty project directory."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Project(folder, RetroDbConfig(data_paths=[str(prefix)], tokenizer=str(tokenizer), **settings))


def measure_chunks(prefix: Path, tokenizer: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """(a)."""
    num_documents, length = IndexedFile(prefix).num_documents, RetroDbConfig().chunk_length
    found: dict[str, int] = {}

    def ours() -> float:
        project = project_of(folder / "chunks", prefix, tokenizer, duplicates="keep")
        seconds = harness.seconds(lambda: build_chunks(project, Worker()))
        found["ours"] = len(ChunkDb(project))
        return seconds

    context = multiprocessing.get_context("spawn")
    with context.Pool(2, initializer=ClassicChunks(prefix, tokenizer, length).start) as pool:
        pool.map(_cut, [0] * 16, 1)  # every process is up

        def classic() -> float:
            def run() -> None:
                found["classic"] = sum(len(rows) for rows in pool.imap(_cut, range(num_documents), 32))

            return harness.seconds(run)

        seconds = alternate({"classic": classic, "ours": ours}, rounds)
    return {"seconds": seconds, "chunks": found, "ratio": seconds["classic"] / seconds["ours"]}


def measure_embeddings(texts: list[str], rounds: int) -> dict[str, Any]:
    """(b)."""
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(minilm_folder()), device="cpu")
    ours = {
        name: load_embedder(str(minilm_folder()), EmbedderOptions(precision=name, device="cpu"))
        for name in ("fp32", "bf16")
    }
    vectors: dict[str, np.ndarray] = {}

    def side(name: str, encode: Callable[[list[str]], np.ndarray]) -> Callable[[], float]:
        def run() -> None:
            vectors[name] = encode(texts)

        encode(texts[:64])
        return lambda: harness.seconds(run)

    sides = {"sentence-transformers": side("sentence-transformers", peer.encode)}
    sides |= {name: side(name, embedder.embed) for name, embedder in ours.items()}
    seconds = alternate(sides, rounds)
    expected = vectors["sentence-transformers"]
    return {
        "seconds": seconds,
        "chunks": len(texts),
        "difference": {name: float(abs(vectors[name] - expected).max()) for name in ours},
        "ratio": {name: seconds["sentence-transformers"] / seconds[name] for name in ours},
    }


def measure_neighbors(prefix: Path, tokenizer: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """(c)."""
    project = project_of(folder / "neighbors", prefix, tokenizer, duplicates="keep", index="Flat")
    embedder, alone = RandomEmbedder(), Worker()
    build_chunks(project, alone)
    train_index(project, alone, embedder)
    add_to_index(project, alone, embedder)
    db = ChunkDb(project)
    index = ShardedIndex.load(sorted(project.folder.glob("index/*/*/added*.faissindex")), mapped=True)
    vectors = embedder.embed(db.texts(np.arange(len(db))), "query")

    def stage() -> float:
        shutil.rmtree(project.folder / "query", ignore_errors=True)
        embedder.seconds = 0.0
        return harness.seconds(lambda: query_neighbors(project, alone, embedder)) - embedder.seconds

    k = project.config.num_neighbors_query
    seconds = alternate({"faiss": lambda: harness.seconds(lambda: index.search(vectors, k)), "stage": stage}, rounds)
    return {"seconds": seconds, "chunks": len(db), "ratio": seconds["stage"] / seconds["faiss"]}


def measure_memory(prefix: Path, tokenizer: Path, folder: Path, sizes: list[int]) -> dict[str, Any]:
    """(d)."""
    peaks = {}
    for size in sizes:
        queries = index_texts(folder, f"queries{size}", [f"number {number}" for number in range(size)], tokenizer)
        command = [sys.executable, "-m", "benchmarks.retro_db", "--measure-query"]
        paths = [str(folder / "memory"), str(prefix), str(queries), str(tokenizer)]
        done = subprocess.run([*command, *paths], capture_output=True, text=True, check=True)
        own, mapped = (float(word) for word in done.stdout.split()[-2:])
        peaks[size] = {"own": own, "mapped": mapped}
    return {"megabytes": peaks, "ratio": peaks[sizes[-1]]["own"] / peaks[sizes[0]]["own"]}


def measure_query(folder: Path, prefix: Path, queries: Path, tokenizer: Path) -> None:
    """Body of a process whose peak memory is measured."""
    settings = {"query_paths": [str(queries)], "index": "Flat", "block_size": 1000, "num_neighbors_save": 2}
    project, embedder = project_of(folder, prefix, tokenizer, **settings), RandomEmbedder()
    build_chunks(project, Worker())
    train_index(project, Worker(), embedder)
    add_to_index(project, Worker(), embedder)
    stage = lambda: query_neighbors(project, Worker(), embedder)  # noqa: E731
    print(*harness.growth(stage, lambda: [_status("RssAnon"), _status("RssFile")]))


def _status(name: str) -> float:
    """A figure of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) / 1e3


def measure_readers(project: Project, rounds: int) -> dict[str, Any]:
    """(e)."""
    (project.folder / CONFIG_FILE).write_text(json.dumps(asdict(project.config)))
    config = RunConfig()
    config.data.retro_project, config.data.over_long, config.data.tokens_per_row = str(project.folder), "split", 2048
    config.training.objective, config.training.generative_batch_size = "generative", 512
    config.model.retro = RetroConfig(num_neighbors=2)
    config = resolve_retro_project(config, {})
    stream = GenerativeStream(config, project.tokenizer, OpenFiles())
    reader = NeighborReader(config, stream.sources)
    rows = [row.segments for row in stream.rows(0)]

    def side(at_once: int) -> Callable[[], float]:
        def run() -> float:
            began, count = time.process_time(), 0
            for first in range(0, len(rows), at_once):
                count += sum(len(row.lengths_U) for row in reader.read(rows[first : first + at_once]))
            return count / (time.process_time() - began)

        return run

    tokens = np.memmap(stream.sources[0].file.bin_path, dtype=stream.sources[0].file.dtype, mode="r")
    length = 2 * project.config.chunk_length

    def bare() -> float:
        began = time.process_time()
        starts = np.random.default_rng(0).integers(len(tokens) - length, size=64 * len(rows))
        gathered = tokens[starts[:, None] + np.arange(length)].astype(np.int64)
        return len(gathered) / (time.process_time() - began)

    rates = alternate({str(number): side(number) for number in ROWS_AT_ONCE} | {BARE: bare}, 5 * rounds)
    return {"rows": len(rows), "per CPU second": rates}


def measure_growth(texts: list[str], tokenizer: Path, folder: Path) -> dict[str, Any]:
    """(f)."""
    embedder, alone, compared = RandomEmbedder(), Worker(), [0]
    search = VectorIndex.search

    def counting(index: VectorIndex, vectors_ND: np.ndarray, *options: Any) -> tuple[np.ndarray, np.ndarray]:
        compared[0] += len(vectors_ND) * len(index)
        return search(index, vectors_ND, *options)

    def table_of(project: Project) -> tuple[float, int]:
        compared[0], embedder.seconds, began = 0, 0.0, time.process_time()
        query_neighbors(Project(project.folder, project.config), alone, embedder)
        return time.process_time() - began - embedder.seconds, compared[0]

    def built(name: str, part: list[str]) -> Project:
        prefix = index_texts(folder, name, part, tokenizer)
        project = project_of(folder / f"{name}_db", prefix, tokenizer, duplicates="keep", index="Flat")
        build_chunks(project, alone)
        train_index(project, alone, embedder)
        add_to_index(project, alone, embedder)
        record_version(project, alone, embedder)
        return project

    count = int(0.95 * len(texts))
    grown = built("grown", texts[:count])
    VectorIndex.search = counting  # type: ignore[method-assign]
    try:
        table_of(grown)
        index_texts(folder, "grown", texts, tokenizer)
        add_documents(Project(grown.folder, grown.config), alone, embedder)
        seconds, pairs = table_of(grown)
        whole_seconds, whole_pairs = table_of(built("whole", texts))
    finally:
        VectorIndex.search = search  # type: ignore[method-assign]
    return {
        "CPU seconds": {"grown": seconds, "whole": whole_seconds},
        "comparisons": {"grown": pairs, "whole": whole_pairs},
        "ratio": whole_pairs / pairs,
    }


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """All figures, printed as they come, and whether all targets are met."""
    texts = list(wiki_documents(arguments.data, arguments.mb * 1e6, 1))
    tokenizer = folder / "tokenizer.json"
    make_tokenizer(texts[:2000], tokenizer)
    prefix = index_texts(folder, "corpus", texts, tokenizer)
    small = index_texts(folder, "small", texts[:200], tokenizer)
    chunks = measure_chunks(prefix, tokenizer, folder, arguments.rounds)
    met = report_chunks(chunks)
    db = ChunkDb(project_of_built(folder / "chunks", prefix, tokenizer))
    chosen = np.random.default_rng(0).choice(len(db), min(arguments.embedded, len(db)), replace=False)
    embeddings = measure_embeddings(db.texts(chosen), arguments.rounds)
    met &= report_embeddings(embeddings)
    neighbors = measure_neighbors(prefix, tokenizer, folder, arguments.rounds)
    met &= report_neighbors(neighbors)
    memory = measure_memory(small, tokenizer, folder, arguments.documents)
    met &= report_memory(memory)
    readers = measure_readers(project_of_built(folder / "neighbors", prefix, tokenizer), arguments.rounds)
    met &= report_readers(readers)
    growth = measure_growth(texts, tokenizer, folder)
    met &= report_growth(growth)
    figures = {"chunks": chunks, "embeddings": embeddings, "neighbors": neighbors, "memory": memory, "readers": readers}
    return figures | {"growth": growth}, met


def project_of_built(folder: Path, prefix: Path, tokenizer: Path) -> Project:
    """A project directory that was built by one of the functions above."""
    settings: dict[str, Any] = {"duplicates": "keep", "index": "Flat"}
    return Project(folder, RetroDbConfig(data_paths=[str(prefix)], tokenizer=str(tokenizer), **settings))


def report_chunks(result: dict[str, Any]) -> bool:
    """Print (a). Returns whether the target is met."""
    counts = result["chunks"]
    print(f"chunks: {counts['ours']:,} by ours, {counts['classic']:,} by the classic way")
    for name, seconds in result["seconds"].items():
        print(f"  {name:22s} {seconds:8.2f} s {counts[name] / seconds:10,.0f} chunks/s")
    print(f"  {result['ratio']:.1f} times (target {TARGETS['chunks']})", flush=True)
    return bool(result["ratio"] >= TARGETS["chunks"])


def report_embeddings(result: dict[str, Any]) -> bool:
    """Print (b)."""
    print(f"embeddings of {result['chunks']:,} chunks")
    for name, seconds in result["seconds"].items():
        difference = result["difference"].get(name)
        extra = "" if difference is None else f", largest difference {difference:.1e}"
        print(f"  {name:22s} {seconds:8.2f} s {result['chunks'] / seconds:10,.0f} chunks/s{extra}")
    fp32, bf16 = result["ratio"]["fp32"], result["ratio"]["bf16"]
    print(f"  {fp32:.2f} times in fp32, {bf16:.2f} times in bf16 (target {TARGETS['embeddings']})", flush=True)
    return bool(fp32 >= TARGETS["embeddings"])


def report_neighbors(result: dict[str, Any]) -> bool:
    """Print (c)."""
    print(f"neighbors of {result['chunks']:,} chunks")
    for name, seconds in result["seconds"].items():
        print(f"  {name:22s} {seconds:8.2f} s {1e3 * seconds / result['chunks']:10.3f} ms/chunk")
    print(f"  {result['ratio']:.2f} of the bare search (target at most {TARGETS['neighbors']})", flush=True)
    return bool(result["ratio"] <= TARGETS["neighbors"])


def report_memory(result: dict[str, Any]) -> bool:
    """Print (d)."""
    for size, peak in result["megabytes"].items():
        print(
            f"memory that query-neighbors adds, {size:9,} documents: {peak['own']:8.1f} MB of its own, "
            f"{peak['mapped']:.1f} MB of mapped files, which the system takes back when it needs them"
        )
    print(f"  {result['ratio']:.2f} times (target at most {TARGETS['memory']})", flush=True)
    return bool(result["ratio"] <= TARGETS["memory"])


def report_readers(result: dict[str, Any]) -> bool:
    """Print (e)."""
    rates = dict(result["per CPU second"])
    bare = rates.pop(BARE)
    print(
        f"neighbors of training rows with what follows them, a CPU second (target {TARGETS['readers']:,} of {AT_ONCE})"
    )
    for number, rate in rates.items():
        print(f"  {int(number):2d} rows at once {rate:12,.0f}, {rate / bare:.2f} of a bare gather", flush=True)
    return bool(rates[str(AT_ONCE)] >= TARGETS["readers"])


def report_growth(result: dict[str, Any]) -> bool:
    """Print (f)."""
    seconds, pairs = result["CPU seconds"], result["comparisons"]
    print("neighbors after 5% of the documents came")
    for name in ("grown", "whole"):
        print(f"  {name:22s} {seconds[name]:8.2f} CPU s {pairs[name]:16,} comparisons")
    print(f"  {result['ratio']:.1f} times as many for everything (target {TARGETS['growth']})", flush=True)
    return bool(result["ratio"] >= TARGETS["growth"])


def main() -> int:
    """Parse the command line and measure. Status 1 where a target is missed."""
    parser = harness.parser(__doc__, data="wikitext2_valid.txt")
    parser.add_argument("--mb", type=float, default=5.0, help="size of the corpus")
    parser.add_argument("--embedded", type=int, default=1000, help="chunks that are embedded, drawn at random")
    parser.add_argument("--documents", type=int, nargs=2, default=[20_000, 400_000], help="of the memory's measurement")
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is measured")
    parser.add_argument("--measure-query", nargs=4, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_query:
        measure_query(*arguments.measure_query)
        return 0
    return harness.run("retro_db", arguments, lambda folder: measure(arguments, folder))


if __name__ == "__main__":
    sys.exit(main())
