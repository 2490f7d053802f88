"""Speed and memory of preprocess_data.py, against the classic loop and against the bare tokenizer.

All of them tokenise the same JSONL documents with the same byte-level BPE tokenizer, which is trained in the run. Two
corpora: "wiki" repeats the paragraphs of WikiText-2's validation set in new combinations, so that its words repeat more
than those of a large corpus; "code" is the source of Python's standard library, each file once, which is as hard as it
gets for a cache of words.

(a) The classic loop is what Megatron's preprocess_data.py does: multiprocessing.Pool(workers).imap with 32 lines at a
    time; in the workers json.loads, then the tokens of transformers' fast tokenizer and their ids, one document per
    call, as megatron-core's HuggingFaceTokenizer does; in the parent one IndexedDatasetBuilder.add_document a document.
    "one call" is the same with the shorter tokenizer(text).input_ids instead.
(b) The bare tokenizer is encode_batch of the tokenizers library, one thread, over texts that are in memory. Nothing is
    parsed or written.

The targets hold for "wiki". "code" shows what is left where words do not repeat; there (b) has to be kept.

Ours is timed from the call to the finished files, the start of processes, checksums and syncing to disk included; (a)
without the start of its processes. Rounds alternate; the medians are printed. Outputs are compared byte by byte.

--memory-mb N instead measures the peak memory of a build of N MB, and of 10 MB, in processes of their own.

Example:
    python -m benchmarks.preprocess --data ../shared/data --json preprocess.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks import harness
from megatron_grit.data.builders.documents import DocumentOptions, preprocess

WIKI = "wikitext2_valid.txt"
TARGET_CLASSIC, TARGET_BARE, TARGET_MEMORY = 3.0, 0.85, 1.1
LINES_PER_TASK = 32


def paragraphs(data: Path) -> list[str]:
    """Paragraphs of the real text that the corpus is made of."""
    return [line for line in harness.data_file(data, WIKI).read_text(encoding="utf-8").split("\n") if line.strip()]


def wiki_documents(data: Path, num_bytes: float, seed: int) -> Iterator[str]:
    """Documents of one to six paragraphs, each with a number of its own."""
    draw, pool = random.Random(seed), paragraphs(data)
    number = 0
    while num_bytes > 0:
        start = draw.randrange(len(pool))
        text = f"Document {number}\n" + "\n".join(pool[start : start + draw.randint(1, 6)])
        num_bytes -= len(text.encode())
        number += 1
        yield text


def code_documents(num_bytes: float, seed: int = 0) -> Iterator[str]:
    """Python's standard library in pieces of at most 4 KB."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    random.Random(seed).shuffle(paths)
    for path in paths:
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a test of other encodings
        for start in range(0, len(text), 4096):
            if num_bytes <= 0:
                return
            num_bytes -= len(text[start : start + 4096].encode())
            yield text[start : start + 4096]


def write_corpus(path: Path, documents: Iterator[str]) -> int:
    """Write JSONL; returns the number of documents."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for text in documents:
            file.write(json.dumps({"text": text}) + "\n")
            count += 1
    return count


def train_tokenizer(documents: Iterator[str], path: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path))


class ClassicEncoder:
    """Worker of the classic loop."""

    def __init__(self, tokenizer_path: Path, one_call: bool) -> None:
        self._path, self._one_call = tokenizer_path, one_call
        self._tokenizer: Any = None

    def start(self) -> None:
        """Load the tokenizer, once in each process."""
        global _encoder
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from transformers import PreTrainedTokenizerFast

        self._tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(self._path))
        self._tokenizer("")
        _encoder = self

    def encode(self, line: str) -> tuple[list[int], list[int]]:
        """Ids of a document with the end of the document, and their number."""
        text = json.loads(line)["text"]
        if self._one_call:
            ids = self._tokenizer(text).input_ids
        else:
            ids = self._tokenizer.convert_tokens_to_ids(self._tokenizer.tokenize(text))
        if ids:
            ids.append(0)
        return ids, [len(ids)]


_encoder: ClassicEncoder | None = None


def _encode_line(line: str) -> tuple[list[int], list[int]]:
    assert _encoder is not None
    return _encoder.encode(line)


def classic_loop(source: Path, target: Path, tokenizer: Path, workers: int, one_call: bool) -> float:
    """Seconds of (a), once its processes are up."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=ClassicEncoder(tokenizer, one_call).start) as pool:
        pool.map(_encode_line, [json.dumps({"text": ""})] * (8 * workers), 1)  # every process is up
        began = time.perf_counter()
        builder = IndexedDatasetBuilder(f"{target}.bin", dtype=np.uint16)
        with source.open(encoding="utf-8") as file:
            for ids, lengths in pool.imap(_encode_line, file, LINES_PER_TASK):
                builder.add_document(ids, lengths)
        builder.finalize(f"{target}.idx")
        return time.perf_counter() - began


def bare_tokenizer(source: Path, tokenizer: Path) -> float:
    """Seconds of (b)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    with source.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    bare = Tokenizer.from_file(str(tokenizer))
    began = time.perf_counter()
    for start in range(0, len(texts), 1000):
        bare.encode_batch(texts[start : start + 1000], add_special_tokens=False)
    return time.perf_counter() - began


def ours(source: Path, target: Path, tokenizer: Path, workers: int) -> float:
    """Seconds of preprocess_data, from the call to the finished files."""
    options = DocumentOptions(tokenizer=str(tokenizer), append_eod=True)
    return harness.seconds(lambda: preprocess([source], target, options, workers=workers, overwrite=True))


def same_output(target: Path, classic: Path) -> bool:
    """Whether both wrote the same bytes."""
    return all(
        Path(f"{target}_text_document{extension}").read_bytes() == Path(f"{classic}{extension}").read_bytes()
        for extension in (".bin", ".idx")
    )


def measure(arguments: argparse.Namespace, corpus: str, folder: Path) -> dict[str, Any]:
    """Times of one corpus, medians over the rounds, and whether all outputs were equal."""
    source, tokenizer = folder / f"{corpus}.jsonl", folder / "tokenizer.json"
    num_bytes = arguments.mb * 1e6
    documents = code_documents(num_bytes) if corpus == "code" else wiki_documents(arguments.data, num_bytes, 1)
    count = write_corpus(source, documents)
    seconds: dict[str, list[float]] = {}
    equal = True

    def timed(name: str, function: Callable[..., float], *values: Any) -> None:
        seconds.setdefault(name, []).append(function(*values))

    for _ in range(arguments.rounds):
        timed("bare", bare_tokenizer, source, tokenizer)
        for workers in arguments.workers:
            timed(f"ours, {workers}", ours, source, folder / "ours", tokenizer, workers)
            for name, one_call in (("classic", False), ("one call", True)):
                timed(f"{name}, {workers}", classic_loop, source, folder / "classic", tokenizer, workers, one_call)
                equal &= same_output(folder / "ours", folder / "classic")
    megabytes = source.stat().st_size / 1e6
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"documents": count, "megabytes": megabytes, "seconds": medians, "equal": equal}


def report(corpus: str, result: dict[str, Any], workers: list[int]) -> bool:
    """Print one corpus. Returns whether the targets are met."""
    seconds, megabytes, documents = result["seconds"], result["megabytes"], result["documents"]
    print(f"{corpus}: {documents} documents, {megabytes:.1f} MB of JSONL")
    for name, value in seconds.items():
        label = name if name == "bare" else f"{name} worker{'s' * (not name.endswith(' 1'))}"
        print(f"  {label:22s} {value:8.2f} s {documents / value:10.0f} documents/s {megabytes / value:8.2f} MB/s")
    met = result["equal"]
    for count in workers:
        mine = seconds[f"ours, {count}"]
        classic, one_call = seconds[f"classic, {count}"] / mine, seconds[f"one call, {count}"] / mine
        bare = seconds["bare"] / mine / count
        met &= (classic >= TARGET_CLASSIC or corpus == "code") and bare >= TARGET_BARE
        print(
            f"  {count} worker{'s' * (count > 1)}: {classic:.2f} x the classic loop (target {TARGET_CLASSIC}), "
            f"{one_call:.2f} x with one call a document; {bare:.2f} of the bare tokenizer a core (target {TARGET_BARE})"
        )
    print(f"  outputs are {'byte-identical' if result['equal'] else 'DIFFERENT'}")
    return met


def peak_memory(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Peak MB of this process and its largest worker, for 10 MB and for ``arguments.memory_mb`` of input."""
    peaks = {}
    for megabytes in (10, arguments.memory_mb):
        source = folder / f"memory{megabytes}.jsonl"
        write_corpus(source, wiki_documents(arguments.data, megabytes * 1e6, 2))
        command = [sys.executable, "-m", "benchmarks.preprocess", "--measure-build", str(source), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[str(megabytes)] = float(done.stdout.split()[-1])
        source.unlink()
        print(f"peak memory for {megabytes} MB of input: {peaks[str(megabytes)]:.1f} MB")
    return peaks


def measure_build(source: Path, folder: Path) -> None:
    """Body of a process whose peak memory is measured."""
    ours(source, folder / "memory", folder / "tokenizer.json", workers=2)
    kilobytes = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(kilobytes / 1e3)


def main() -> int:
    """Parse the command line and measure. Status 1 where a target is missed."""
    parser = harness.parser(__doc__, data=WIKI)
    parser.add_argument("--mb", type=float, default=30.0, help="size of each corpus")
    parser.add_argument("--corpora", nargs="+", choices=("wiki", "code"), default=["wiki", "code"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is measured")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--memory-mb", type=int, help="measure peak memory instead, with this much input")
    parser.add_argument("--measure-build", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_build:
        measure_build(*arguments.measure_build)
        return 0

    def measured(folder: Path) -> tuple[dict[str, Any], bool]:
        texts = chain(wiki_documents(arguments.data, 2e6, 0), code_documents(2e6))
        train_tokenizer(texts, folder / "tokenizer.json", arguments.vocab_size)
        if arguments.memory_mb:
            peaks = peak_memory(arguments, folder)
            return peaks, max(peaks.values()) <= TARGET_MEMORY * peaks["10"]
        results = {corpus: measure(arguments, corpus, folder) for corpus in arguments.corpora}
        return results, all([report(corpus, result, arguments.workers) for corpus, result in results.items()])

    return harness.run("preprocess", arguments, measured)


if __name__ == "__main__":
    sys.exit(main())
