"""Builds indexed files from text files in parallel, block by block; a killed build resumes.

An encoder turns a block of lines into token blocks. This module splits the input into blocks, hands them to worker
processes, appends the results in the order of the input, and keeps a journal. The output never depends on the number of
workers or partitions, on the size of blocks, or on where a build was interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.config.knob import Checked, knob
from megatron_grit.data.builders.block_encoder import BlockEncoder, EncodedBlock, Rejection
from megatron_grit.data.builders.block_join import (
    DUPLICATE,
    find_duplicates,
    join_pieces,
    merge_rejected,
    write_rejected,
)
from megatron_grit.data.builders.build_folder import (
    JOURNAL_NAME,
    PLACE_DTYPE,
    BuildFolder,
    StreamSpec,
    remove_folder,
)
from megatron_grit.data.builders.work_pool import map_ordered
from megatron_grit.data.indexed.reader import IndexedMeta, file_paths
from megatron_grit.data.indexed.writer import IndexedFacts, refuse_existing
from megatron_grit.data.text.line_blocks import (
    BLOCK_BYTES,
    BlockRef,
    FilePart,
    InputFile,
    count_lines,
    find_inputs,
    iterate_blocks,
    partition_files,
)
from megatron_grit.errors import ConfigError, DataError, GritError
from megatron_grit.store.files import check_output
from megatron_grit.store.lock import locked
from megatron_grit.store.progress import Progress

JOURNAL_SECONDS = 5.0
"""Seconds of work that a kill loses at most."""
_ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",  # the number of workers says how many cores are used
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """An indexed file that a build writes."""

    prefix: Path
    dtype: Any
    with_modes: bool
    facts: IndexedFacts | Callable[[dict[str, int]], IndexedFacts]
    """Contents of the ``.json``; a function is called with the counters of the whole build."""


@dataclass(frozen=True, kw_only=True)
class BuildSpec:
    """What a build makes."""

    outputs: Mapping[str, OutputSpec]
    """By the names that the encoder uses."""
    factory: Callable[[], BlockEncoder]
    """Makes an encoder; picklable, because it is called in each worker."""
    signature: Mapping[str, Any]
    """What the output depends on besides the inputs: JSON values. A journal of another signature is not used."""
    work_prefix: Path
    """Names the working folder and the list of rejected lines."""
    deduplicate: bool = False
    """Keep the first of the documents with equal fingerprints. Needs exactly one output."""
    stop_on: Collection[str] = ()
    """Reasons of rejection that stop the build."""
    reads: Collection[str | os.PathLike[str]] = ()
    """Further files that are read, such as the tokenizer: no output may take their place."""
    reports: Collection[str] = ()
    """Further files that the caller writes: what follows the ``work_prefix``."""


@dataclass(frozen=True, kw_only=True)
class BuildRun(Checked):
    """How a build runs. Only ``checksum`` changes what is written."""

    workers: int = knob(1, at_least=1)
    """Processes that encode. 1 encodes in this process."""
    partitions: int = knob(1, at_least=1)
    """Split the input into this many ranges, each with a journal of its own, and join them at the end."""
    partition: int | None = knob(None, at_least=0)
    """Build only this one of them, 0-based; a call without it builds what is missing and joins."""
    overwrite: bool = False
    """Replace outputs that exist."""
    checksum: bool = True
    """Write checksums into the ``.json`` of the outputs."""
    progress: bool = False
    """Show progress on stderr."""
    description: str = "build"
    """Name on the progress bar."""
    log_interval: int | None = knob(None, at_least=1)
    """Where stderr is not a terminal, log a line every so many documents. None: every 30 seconds."""
    block_bytes: int = knob(BLOCK_BYTES, at_least=1)
    """About how much of the input a worker is given at a time."""
    journal_seconds: float = knob(JOURNAL_SECONDS, at_least=0)
    """Time between two entries of the journal."""


@dataclass(kw_only=True)
class BuildTotals:
    """Counts of a build."""

    num_lines: int = 0
    num_records: int = 0
    num_documents: dict[str, int] = field(default_factory=dict)
    """Of each output; of this partition where only one was built."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Lines by the reason for which they gave no document."""
    first_rejection: str | None = None
    counters: dict[str, int] = field(default_factory=dict)
    metas: dict[str, IndexedMeta] = field(default_factory=dict)
    """Of each output; empty where only one partition was built."""

    def add(self, state: Mapping[str, Any]) -> None:
        """Add the totals of a piece, as its journal holds them."""
        self.num_lines += state["num_lines"]
        self.num_records += state["num_records"]
        self.first_rejection = self.first_rejection or state["first_rejection"]
        self.rejected = dict(Counter(self.rejected) + Counter(state["rejected"]))
        self.counters = dict(sum((Counter(self.counters), Counter(state["counters"])), Counter()))


def build_blocks(inputs: Sequence[str | os.PathLike[str]], spec: BuildSpec, run: BuildRun) -> BuildTotals:
    """Build indexed files from text files.

    After a kill the same call resumes from the journal in ``.<name of work_prefix>.build``; the folder is removed at
    the end. Rejected lines are listed in ``<work_prefix>.rejected.jsonl``, which exists where there are any.

    Args:
        inputs: files and glob patterns; ``.gz`` and ``.zst`` are decompressed.
        spec: what is built.
        run: how.

    Returns:
        Counts, and the metadata of the outputs.

    Raises:
        DataError: an input that cannot be read, a line that stops the build, nothing kept, outputs that exist, or a
            worker that died.
        OutputError: another process builds this output.
        ConfigError: numbers that make no sense, or an output that is read.
    """
    if run.workers < 1 or run.partitions < 1:
        raise ConfigError(f"workers ({run.workers}) and partitions ({run.partitions}) must be at least 1")
    if run.partition is not None and not 0 <= run.partition < run.partitions:
        raise ConfigError(f"there is no partition {run.partition}: {run.partitions} are numbered from 0")
    if spec.deduplicate and len(spec.outputs) != 1:
        raise ValueError("duplicates can be removed from one output only")
    files = find_inputs(inputs)
    build = _Build(files, partition_files(files, run.partitions), spec, run)
    chosen = range(run.partitions) if run.partition is None else [run.partition]
    size = sum(build.disk_bytes(index) for index in chosen)
    build.check_outputs()
    if not build.work.exists():
        build.refuse_existing()  # and leave no folder behind
    with (
        locked(build.work / "lock", spec.work_prefix, shared=run.partition is not None),
        Progress(size, run.description, "B", enabled=run.progress, also="document", log_each=run.log_interval) as bar,
    ):
        return build.build_all(bar) if run.partition is None else build.build_one(run.partition, bar)


class _EncodeBlock:
    """What runs in a worker: reads a block and encodes it."""

    def __init__(self, factory: Callable[[], BlockEncoder]) -> None:
        self._encoder = factory()

    def __call__(self, ref: BlockRef) -> EncodedBlock:
        try:
            return self._encoder.encode(ref.read())
        except Exception as error:
            error.add_note(f"while encoding {ref.path}, bytes {ref.start} to {ref.stop}")
            raise


@dataclass
class _Build:
    """A build and its steps."""

    files: list[InputFile]
    segments: list[list[FilePart]]
    """Of each partition."""
    spec: BuildSpec
    run: BuildRun

    @property
    def signature(self) -> dict[str, Any]:
        inputs = [[os.fspath(file.path), file.size, file.mtime_ns] for file in self.files]
        return {"inputs": inputs, "deduplicate": self.spec.deduplicate, **self.spec.signature}

    @property
    def work(self) -> Path:
        return self.spec.work_prefix.with_name(f".{self.spec.work_prefix.name}.build")

    @property
    def trash(self) -> Path:
        return self.spec.work_prefix.with_name(f".{self.spec.work_prefix.name}.build.old")

    @property
    def streams(self) -> dict[str, StreamSpec]:
        return {name: StreamSpec(output.dtype, output.with_modes) for name, output in self.spec.outputs.items()}

    def piece_name(self, index: int) -> str:
        return f"piece-{index:05d}-of-{len(self.segments):05d}"

    def piece_targets(self, piece: BuildFolder) -> dict[str, Path]:
        return {name: piece.folder / f"{name}.piece" for name in self.spec.outputs}

    def disk_bytes(self, index: int) -> int:
        return sum(
            self.files[segment.file].size if segment.stop is None else segment.stop - segment.start
            for segment in self.segments[index]
        )

    def remove_other_folders(self) -> None:
        """Remove pieces of a build with another number of partitions."""
        shutil.rmtree(self.trash, ignore_errors=True)  # of a build that was killed at its very end
        known = {self.piece_name(index) for index in range(len(self.segments))} | {"joined"}
        for entry in self.work.iterdir():
            if entry.is_dir() and entry.name not in known:
                remove_folder(entry)

    def has_begun(self) -> bool:
        """Whether there is anything to resume from."""
        return any(self.work.glob(f"*/{JOURNAL_NAME}"))

    def remove_work(self) -> None:
        """Rename the working folder, then remove it: a kill leaves none that holds less than its journals say."""
        if not self.work.exists():
            return
        os.replace(self.work, self.trash)
        shutil.rmtree(self.trash)

    def check_outputs(self) -> None:
        """Raise where an output cannot be written, or would take the place of what is read."""
        reads = [*(file.path for file in self.files), *self.spec.reads]
        outputs = [path for output in self.spec.outputs.values() for path in file_paths(output.prefix)]
        names = (".rejected.jsonl", *self.spec.reports)
        for path in [*outputs, *(Path(f"{self.spec.work_prefix}{name}") for name in names)]:
            check_output(path, reads)

    def refuse_existing(self) -> None:
        """Raise where an output exists that may not be replaced."""
        for output in self.spec.outputs.values():
            refuse_existing(output.prefix, self.run.overwrite)

    def build_one(self, index: int, bar: Progress) -> BuildTotals:
        """Build one partition, unless it is finished."""
        name = self.piece_name(index)
        with locked(self.work / f"{name}.lock", self.work / name):
            piece = self.build_piece(index, bar, alone=False)
        totals = BuildTotals(num_documents=dict(piece.num_documents))
        totals.add(piece.state)
        return totals

    def build_all(self, bar: Progress) -> BuildTotals:
        """Build the missing partitions, then the outputs."""
        self.remove_other_folders()
        alone = len(self.segments) == 1 and not self.spec.deduplicate
        try:
            pieces = [self.build_piece(index, bar, alone=alone) for index in range(len(self.segments))]
        except GritError:
            if not self.has_begun():
                self.remove_work()
            raise
        totals = BuildTotals()
        for piece in pieces:
            totals.add(piece.state)
        with ExitStack() as stack:
            for piece in pieces:
                stack.callback(piece.close)
            self.finish(pieces, totals, alone=alone)
        self.remove_work()
        return totals

    def build_piece(self, index: int, bar: Progress, *, alone: bool) -> BuildFolder:
        """Encode the rest of a piece. If there are others, it becomes an indexed file of its own and is closed."""
        piece = self.open_piece(index)
        try:
            if piece.building:
                self.refuse_existing()
            self.fill_piece(index, piece, bar)
            if not alone:
                piece.finish(self.piece_targets(piece), {}, overwrite=True, checksum=False)
        except BaseException:
            piece.close()
            raise
        if not alone:
            piece.close()
        return piece

    def open_piece(self, index: int) -> BuildFolder:
        piece = BuildFolder(self.work / self.piece_name(index), self.streams, self.signature)
        if not piece.state:
            piece.state = {
                "next": None,
                "num_file_lines": 0,
                "num_lines": 0,
                "num_records": 0,
                "num_disk_bytes": 0,
                "rejected": {},
                "first_rejection": None,
                "counters": {},
            }
        return piece

    def fill_piece(self, index: int, piece: BuildFolder, bar: Progress) -> None:
        """Encode the blocks that a piece does not have yet."""
        bar.skip(piece.state["num_disk_bytes"])
        if not piece.building:
            return
        place = piece.state["next"]
        refs = iterate_blocks(
            self.files, self.segments[index], skip_to=place and tuple(place), block_bytes=self.run.block_bytes
        )
        filler = _PieceFiller(self, index, piece)
        committed = time.monotonic()
        try:
            with (
                _one_thread(),
                closing(map_ordered(refs, partial(_EncodeBlock, self.spec.factory), self.run.workers)) as results,
            ):
                for ref, block in results:
                    filler.add(ref, block)
                    num_documents = max(len(tokens.documents) for tokens in block.outputs.values())
                    bar.update(ref.num_disk_bytes, also=num_documents)
                    if time.monotonic() - committed > self.run.journal_seconds:
                        piece.commit()
                        committed = time.monotonic()
        except GritError:
            if filler.whole and piece.state["next"] is not None:
                piece.commit()  # a line that is repaired or skipped does not cost what came before it
            raise
        for segment in self.segments[index]:
            self.files[segment.file].check_unchanged()
        piece.complete()

    def first_line(self, index: int, file: int) -> int:
        """Lines of a file before the piece's part of it."""
        for segment in self.segments[index]:
            if segment.file == file and segment.start:
                return count_lines(self.files[file].path, segment.start)
        return 0

    def finish(self, pieces: Sequence[BuildFolder], totals: BuildTotals, *, alone: bool) -> None:
        """Join the pieces and give the outputs their names."""
        for name, output in self.spec.outputs.items():
            if not any(piece.num_bytes(name) for piece in pieces):
                self.remove_work()
                raise self._nothing_kept(output.prefix, totals)
        duplicates = find_duplicates(pieces) if self.spec.deduplicate else None
        if duplicates is not None and len(duplicates):
            totals.rejected[DUPLICATE] = totals.rejected.get(DUPLICATE, 0) + len(duplicates)
        rejected = merge_rejected([file.path for file in self.files], pieces, self.first_line, duplicates)
        write_rejected(Path(f"{self.spec.work_prefix}.rejected.jsonl"), rejected, self.work)
        final = pieces[0] if alone else BuildFolder(self.work / "joined", self.streams, self.signature)
        with closing(final):
            if final.building:
                join_pieces(final, [self.piece_targets(piece) for piece in pieces], pieces, duplicates)
                final.complete()
            metas = final.finish(
                {name: output.prefix for name, output in self.spec.outputs.items()},
                {name: partial(_facts_of, output, totals.counters) for name, output in self.spec.outputs.items()},
                overwrite=self.run.overwrite,
                checksum=self.run.checksum,
            )
        totals.num_documents = dict(final.num_documents)
        totals.metas = {name: meta for name, meta in metas.items() if meta is not None}

    def _nothing_kept(self, prefix: Path, totals: BuildTotals) -> DataError:
        if totals.first_rejection is None:
            what = f"all {totals.num_records} documents are empty" if totals.num_records else "no records"
            return DataError(f"{what} for {prefix} in the input", path=self.files[0].path)
        counts = sorted(totals.rejected.items(), key=lambda item: -item[1])
        told = ", ".join(
            f"{count} of {totals.num_records} records were dropped as {reason}" for reason, count in counts
        )
        return DataError(f"nothing is left for {prefix}: {told}; the first: {totals.first_rejection}")


class _PieceFiller:
    """Appends encoded blocks to a piece and keeps its position in the input files."""

    def __init__(self, build: _Build, index: int, piece: BuildFolder) -> None:
        self._build, self._index, self._piece = build, index, piece
        self.whole = True
        """Whether streams and state agree: false only while a block is being appended."""

    def add(self, ref: BlockRef, block: EncodedBlock) -> None:
        state = self._piece.state
        same_file = state["next"] is not None and state["next"][0] == ref.file
        file_lines = state["num_file_lines"] if same_file else 0  # lines of this piece's part of the file, so far
        self._stop_if_asked(ref, block, file_lines)
        rejected = [
            json.dumps(
                {"file": ref.file, "line": file_lines + item.line, "reason": item.reason, "message": item.message}
            )
            for item in block.rejections
        ]
        self.whole = False
        self._piece.append(block.outputs, rejected, self._places(ref, block, file_lines))
        if block.rejections and state["first_rejection"] is None:
            state["first_rejection"] = str(self._error(ref, block.rejections[0], file_lines))
        for item in block.rejections:
            state["rejected"][item.reason] = state["rejected"].get(item.reason, 0) + 1
        for name, count in block.counters.items():
            state["counters"][name] = state["counters"].get(name, 0) + count
        state["next"] = [ref.file, ref.stop]
        state["num_file_lines"] = file_lines + block.num_lines
        state["num_lines"] += block.num_lines
        state["num_records"] += block.num_records
        state["num_disk_bytes"] += ref.num_disk_bytes
        self.whole = True

    def _stop_if_asked(self, ref: BlockRef, block: EncodedBlock, file_lines: int) -> None:
        for item in block.rejections:
            if item.fatal or item.reason in self._build.spec.stop_on:
                raise self._error(ref, item, file_lines)

    def _error(self, ref: BlockRef, item: Rejection, file_lines: int) -> DataError:
        line = self._build.first_line(self._index, ref.file) + file_lines + item.line + 1
        return DataError(item.message, path=ref.path, line=line)

    def _places(self, ref: BlockRef, block: EncodedBlock, file_lines: int) -> np.ndarray | None:
        if not self._build.spec.deduplicate:
            return None
        (tokens,) = block.outputs.values()
        places = np.empty(len(tokens.documents), dtype=PLACE_DTYPE)
        places["fingerprint"] = np.frombuffer(block.fingerprints, dtype="V16")
        places["file"] = ref.file
        places["line"] = file_lines + block.lines.astype(np.int64)
        return places


def _facts_of(output: OutputSpec, counters: dict[str, int]) -> IndexedFacts:
    return output.facts if isinstance(output.facts, IndexedFacts) else output.facts(counters)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Libraries that read these variables use one thread, in this process and in those that it starts."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
