"""Damage files in a million ways and read them: each time the right content, or an error that names the file.

Subjects: indexed files of every kind with and without their ``.json``, JSONL plain and compressed, and index caches.
Faults: cut short, emptied, missing, bytes added, one bit flipped, a stretch zeroed, repeated or exchanged, another
subject's file in its place.

Each case is read as training reads it, without checksums, and must end in one of these ways:

  right      what was written comes back
  refused    DataError, naming the damaged file or one that it belongs to; for .bin and .idx the byte as well
  unnoticed  other content comes back. Allowed only for what no header, size or pointer tells: token ids, roles,
             boundaries of records. With checksums each of these must then be refused

Anything else (another exception, a case over --limit seconds) fails the run. A process that is killed by a signal
fails it by itself. Damaged text is compared with a plain parser's reading of the same bytes.

With --flips the subject is a retrieval database instead, in whose files single bits are flipped
(benchmarks/database_flips.py); there nothing may go unnoticed.

Example:
    python -m benchmarks.fault_injection --cases 1000000
    python -m benchmarks.fault_injection --flips 100000
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.indexed.writer import IndexedFacts, IndexedStream, IndexedWriter, TokenBlock
from megatron_grit.data.text.line_blocks import find_inputs, iterate_blocks, partition_files
from megatron_grit.data.text.records import BadLine, Record, read_records
from megatron_grit.errors import DataError
from megatron_grit.store import cache as index_cache

Content = Any
"""What a reader got out of a subject; compared with ==."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Files that are damaged, and how they are read."""

    name: str
    files: dict[str, bytes]
    read: Callable[[Path], Content]
    """Everything in the folder, as training or a build reads it."""
    verify: Callable[[Path], Content] | None = None
    """The same with checksums; None for files that carry none, or always check theirs."""
    expected: Callable[[Path], Content] | None = None
    """What a plain parser finds in the damaged files. None: what was written."""
    may_go_unnoticed: Callable[[str, int], bool] = lambda name, byte: False
    """Whether no header, size or pointer can tell damage at this byte of this file."""


@dataclass(frozen=True)
class Fault:
    """One way to damage one file."""

    kind: str
    name: str
    content: bytes | None
    """What the file holds afterwards; None: it is missing."""
    first: int
    """First byte that differs."""


class UnsafeError(Exception):
    """A case that ended in none of the allowed ways."""


FAULTS = ("cut", "empty", "missing", "added", "flipped", "zeroed", "repeated", "exchanged", "foreign")


def make_fault(rng: random.Random, subject: Subject, subjects: list[Subject]) -> Fault:
    """A fault drawn from ``rng``."""
    name = rng.choice(list(subject.files))
    before, kind = subject.files[name], rng.choices(FAULTS, (4, 1, 1, 2, 12, 2, 2, 2, 2))[0]
    size = len(before)
    place = rng.randrange(size)
    length = 1 + rng.randrange(min(64, size - place))
    after: bytes | None = before
    if kind == "cut":
        after = before[:place]
    elif kind == "empty":
        after = b""
    elif kind == "missing":
        after = None
    elif kind == "added":
        after = before + rng.randbytes(length)
    elif kind == "flipped":
        after = before[:place] + bytes([before[place] ^ 1 << rng.randrange(8)]) + before[place + 1 :]
    elif kind == "zeroed":
        after = before[:place] + bytes(length) + before[place + length :]
    elif kind == "repeated":
        after = before[: place + length] + before[place:]
    elif kind == "exchanged":
        other = rng.randrange(size - length + 1)
        first, second = sorted((place, other))
        if first + length <= second:
            after = (
                before[:first]
                + before[second : second + length]
                + before[first + length : second]
                + before[first : first + length]
                + before[second + length :]
            )
    else:
        other_subject = rng.choice(subjects)
        after = other_subject.files[rng.choice(list(other_subject.files))]
    if after is None:
        return Fault(kind, name, None, 0)
    differs = (index for index, (old, new) in enumerate(zip(before, after, strict=False)) if old != new)
    return Fault(kind, name, after, next(differs, min(size, len(after))))


def run_case(subject: Subject, written: Content, fault: Fault, folder: Path) -> str:
    """Damage, read, judge, repair. Returns "right", "refused" or "unnoticed".

    Raises:
        UnsafeError: neither.
    """
    path = folder / fault.name
    if fault.content is None:
        path.unlink()
    else:
        path.write_bytes(fault.content)
    try:
        expected = written if subject.expected is None else subject.expected(folder)
        outcome, found = _attempt(subject, subject.read, fault, folder)
        if outcome == "refused" or found == expected:
            return outcome
        if not subject.may_go_unnoticed(fault.name, fault.first):
            raise UnsafeError(f"{subject.name}, {fault}: other content was read without a word")
        if subject.verify is not None and _attempt(subject, subject.verify, fault, folder)[0] != "refused":
            raise UnsafeError(f"{subject.name}, {fault}: not even the checksums noticed")
        return "unnoticed"
    finally:
        path.write_bytes(subject.files[fault.name])


def _attempt(
    subject: Subject, read: Callable[[Path], Content], fault: Fault, folder: Path
) -> tuple[str, Content | None]:
    try:
        return "right", read(folder)
    except DataError as error:
        named = None if error.path is None else Path(error.path)
        if named is None or named.parent != folder or not str(error):
            raise UnsafeError(f"{subject.name}, {fault}: the error names no file: {error}") from error
        if named.suffix in (".bin", ".idx") and error.byte is None and fault.kind != "missing":
            raise UnsafeError(f"{subject.name}, {fault}: the error names no byte: {error}") from error
        return "refused", None
    except Exception as error:
        raise UnsafeError(f"{subject.name}, {fault}: {type(error).__name__}: {error}") from error


def run_cases(subjects: list[Subject], num_cases: int, seed: int, limit: float = 5.0) -> Iterator[tuple[str, str, str]]:
    """(subject, fault, outcome) of each case.

    Raises:
        UnsafeError: a case that ended in none of the allowed ways, or took longer than ``limit`` seconds.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="fault_injection_") as parent:
        folders, written = [], []
        for number, subject in enumerate(subjects):
            folder = Path(parent) / str(number)
            folder.mkdir()
            for name, content in subject.files.items():
                (folder / name).write_bytes(content)
            folders.append(folder)
            written.append(subject.read(folder))
        for _ in range(num_cases):
            chosen = rng.randrange(len(subjects))
            subject = subjects[chosen]
            fault = make_fault(rng, subject, subjects)
            started = time.perf_counter()
            outcome = run_case(subject, written[chosen], fault, folders[chosen])
            if time.perf_counter() - started > limit:
                raise UnsafeError(f"{subject.name}, {fault}: took {time.perf_counter() - started:.1f} s")
            yield subject.name, fault.kind, outcome


def read_all_records(folder: Path) -> Content:
    records = IndexedRecords(folder / "data")
    return [[(role, ids.tolist()) for role, ids in records.get(index)] for index in range(len(records))]


def verify_records(folder: Path) -> Content:
    IndexedRecords(folder / "data").verify()
    return read_all_records(folder)


def read_all_documents(folder: Path) -> Content:
    file = IndexedFile(folder / "data")
    return [file.read(*file.sequences(index)).tolist() for index in range(file.num_documents)]


def indexed_subjects(seed: int) -> list[Subject]:
    """Files of 40 records of each kind, two of each kind and size so that swapped files fit."""
    rng = random.Random(seed)

    def ids(longest: int = 9) -> list[int]:
        return [rng.randrange(1000) for _ in range(rng.randint(1, longest))]

    def chat() -> list[tuple[Role, list[int]]]:
        turns = [[(Role.TEMPLATE, ids(3)), (Role.USER, ids()), (Role.ANSWER, ids())] for _ in range(rng.randint(1, 3))]
        return [span for turn in turns for span in turn]

    def pair() -> list[tuple[Role, list[int]]]:
        negatives = [(Role.NEGATIVE, ids()) for _ in range(rng.randint(0, 2))]
        return [(Role.QUERY_INSTRUCTION, ids(3)), (Role.QUERY, ids()), (Role.POSITIVE, ids()), *negatives]

    subjects = []
    for number, (kind, make) in enumerate(
        ((RowKind.GENERATIVE, chat), (RowKind.EMBEDDING, pair), (RowKind.GENERATIVE, chat))
    ):
        for vocab_size in (1000, 70_000):
            records = [make() for _ in range(40)]
            files = _written(lambda prefix, k=kind, r=records, v=vocab_size: _write_records(prefix, k, r, v))
            subjects.append(_indexed_subject(f"{kind.value}{number}, vocabulary {vocab_size}", files))
    documents = [[ids() for _ in range(rng.randint(1, 3))] for _ in range(40)]
    files = _written(lambda prefix: _write_documents(prefix, documents))
    subjects.append(_indexed_subject("documents", files))
    subjects.append(_indexed_subject("documents without .json", {n: files[n] for n in ("data.bin", "data.idx")}))
    return subjects


def _indexed_subject(name: str, files: dict[str, bytes]) -> Subject:
    num_sequences = int.from_bytes(files["data.idx"][18:26], "little")
    content_starts = 34 + 12 * num_sequences

    def may_go_unnoticed(file: str, byte: int) -> bool:
        # Header, lengths and pointers are checked against each other; boundaries, roles and ids are content.
        return file == "data.bin" or (file == "data.idx" and byte >= content_starts)

    described = "data.json" in files
    return Subject(
        name=name,
        files=files,
        read=read_all_records if described else read_all_documents,
        verify=verify_records if described else None,
        may_go_unnoticed=may_go_unnoticed,
    )


def _written(write: Callable[[Path], None]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "data")
        return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("data.*"))}


def _write_records(prefix: Path, kind: RowKind, records: list, vocab_size: int) -> None:
    with IndexedWriter(prefix, kind, vocab_size) as writer:
        for record in records:
            writer.add(record)
        writer.finalize(tokenizer_fingerprint="f" * 64, template="t", limits={"query": 8})


def _write_documents(prefix: Path, documents: list[list[list[int]]]) -> None:
    stream = IndexedStream(prefix.parent / "work", "s", np.uint16, with_modes=False)
    sequences = [sequence for document in documents for sequence in document]
    stream.append(
        TokenBlock(
            tokens=np.array([token for sequence in sequences for token in sequence], dtype=np.uint16),
            lengths=np.array([len(sequence) for sequence in sequences], dtype=np.int32),
            documents=np.array([len(document) for document in documents], dtype=np.int32),
        )
    )
    facts = IndexedFacts(kind="documents", tokenizer_fingerprint="f" * 64, vocab_size=1000)
    stream.finalize(prefix, lambda: facts)
    (prefix.parent / "work").rmdir()


def read_lines(name: str, folder: Path) -> Content:
    """Lines of a file, in blocks as the workers of a build get them."""
    inputs = find_inputs([folder / name])
    segments = [segment for part in partition_files(inputs, 3) for segment in part]
    return [line for ref in iterate_blocks(inputs, segments, block_bytes=256) for line in ref.read().lines()]


def plain_lines(folder: Path) -> Content:
    content = (folder / "data.jsonl").read_bytes() if (folder / "data.jsonl").exists() else b""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return lines[:-1] if not lines[-1] else lines


def read_jsonl(folder: Path) -> Content:
    return [_plain_record(item) for item in read_records(folder / "data.jsonl")]


def _plain_record(item: Record | BadLine) -> Content:
    if isinstance(item, BadLine):
        if item.error.line is None:
            raise UnsafeError(f"no line in {item.error}")
        return item.error.line, None
    if item.query is None:
        return item.line, item.text
    texts = [item.query, *item.positives, *item.negatives]
    return item.line, [len(item.positives), *((text.instruction, text.text) for text in texts)]


def plain_jsonl(folder: Path) -> Content:
    """What a parser written here makes of embedding and text records; None for a line that is neither."""
    path = folder / "data.jsonl"
    lines = (path.read_bytes() if path.exists() else b"").split(b"\n")
    return [(number, _plain_value(line, number)) for number, line in enumerate(lines, 1) if line.strip()]


def _plain_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _plain_value(line: bytes, number: int) -> Content:
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_plain_object)
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    if "query" not in value:
        return value["text"] if isinstance(value.get("text"), str) else None

    def pair(text: object) -> Content:
        if isinstance(text, str):
            return (None, text)
        if isinstance(text, list) and len(text) == 2 and all(isinstance(part, str) for part in text):
            return tuple(text)
        raise ValueError

    try:
        positives, negatives = value.get("pos"), value.get("neg", [])
        if not isinstance(positives, list) or not positives or not isinstance(negatives, list):
            return None
        return [len(positives), pair(value["query"]), *map(pair, positives), *map(pair, negatives)]
    except ValueError:
        return None


def text_subjects(seed: int) -> list[Subject]:
    """The same JSONL as it is, in gzip and in zstd."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, 12)))

    words = "one two drei quatre π 五 \t \\ \" 'x'".split(" ")
    lines = []
    for number in range(30):
        pairs: Any = {"query": text(), "pos": [text()], "neg": [["instruction", text()], text()]}
        lines.append(json.dumps(pairs if number % 2 else {"text": text(), "source": number}, ensure_ascii=False))
    content = ("\n".join(lines) + "\n").encode()
    plain, zipped, zstd = "data.jsonl", "data.jsonl.gz", "data.jsonl.zst"
    in_blocks = partial(read_lines, plain)
    subjects = [
        Subject(name="JSONL", files={plain: content}, read=read_jsonl, expected=plain_jsonl),
        Subject(name="JSONL in blocks", files={plain: content}, read=in_blocks, expected=plain_lines),
        Subject(name="gzip", files={zipped: gzip.compress(content, mtime=0)}, read=partial(read_lines, zipped)),
    ]
    try:
        import zstandard
    except ImportError:
        return subjects
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    return [*subjects, Subject(name="zstd", files={zstd: frame}, read=partial(read_lines, zstd))]


def all_subjects(seed: int) -> list[Subject]:
    """Every kind of file."""
    return indexed_subjects(seed) + text_subjects(seed) + cache_subjects(seed)


CACHE_KEY = {"source": "f" * 64, "window": 7}


def cache_subjects(seed: int) -> list[Subject]:
    """An index cache. One that is damaged is built again, so that the right arrays come out in every case."""
    rng = np.random.default_rng(seed)
    arrays = {"records": rng.integers(0, 99, 50), "starts": np.empty(0, dtype=np.int32), "bytes": rng.bytes(33)}
    arrays["bytes"] = np.frombuffer(arrays["bytes"], dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = index_cache.cache_path(folder, "rows", CACHE_KEY)
        index_cache.store(path, CACHE_KEY, arrays)
        files = {path.name: path.read_bytes()}

    def read(folder: Path) -> Content:
        found = index_cache.cached(folder, "rows", CACHE_KEY, lambda: arrays)
        return {name: (array.dtype.str, array.tolist()) for name, array in found.items()}

    return [Subject(name="index cache", files=files, read=read)]


def main() -> int:
    """Parse the command line, run and print a table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument(
        "--flips", type=int, default=0, help="bits to flip in a retrieval database, in place of the cases"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=5.0, help="seconds that a case may take")
    parser.add_argument("--json", type=Path, help="write the table there too; flips that it counts are not made again")
    arguments = parser.parse_args()
    if arguments.flips:
        from benchmarks.database_flips import run_flips

        return run_flips(arguments.flips, arguments.seed, kept=arguments.json)
    from tqdm import tqdm

    logging.disable(logging.WARNING)  # one for each damaged cache
    subjects = all_subjects(arguments.seed)
    counts: Counter[tuple[str, str, str]] = Counter()
    started = time.perf_counter()
    try:
        cases = run_cases(subjects, arguments.cases, arguments.seed, arguments.limit)
        for case in tqdm(cases, total=arguments.cases, unit="case", mininterval=2):
            counts[case] += 1
    except UnsafeError as error:
        print(f"fault_injection: error: case {sum(counts.values())}: {error}", file=sys.stderr)
        return 1
    for index, title in ((0, "subject"), (1, "fault")):
        print(f"{title:40s}{'right':>10s}{'refused':>10s}{'unnoticed':>11s}")
        for name in sorted({case[index] for case in counts}):
            row = [
                sum(n for case, n in counts.items() if case[index] == name and case[2] == outcome)
                for outcome in OUTCOMES
            ]
            print(f"{name:40s}{row[0]:10d}{row[1]:10d}{row[2]:11d}")
    print(f"{sum(counts.values())} cases in {time.perf_counter() - started:.0f} s, none unsafe")
    if arguments.json:
        arguments.json.write_text(json.dumps({" / ".join(case): n for case, n in sorted(counts.items())}, indent=2))
    return 0


OUTCOMES = ("right", "refused", "unnoticed")

if __name__ == "__main__":
    sys.exit(main())
