"""Flip bits in a retrieval database and read all of it: each time what was written, or an error that names a file.

The database has two datasets, one of them without a ``.json`` and added later, a removed document, validation
documents, vectors, an index with lists, tables of neighbors, and all blocks. A flip is of any bit of any of its files,
those of its indexed files included; the time of the file stays as it was, as where a disk fails. Then everything is
read as a new process would:

  right      every reader finds what was written
  refused    a reader raises an error that names a file; all others find what was written
  repaired   of some that were refused: the tasks of the build ran again, and every reader finds what was written

Anything else fails the run: other rows, tokens, neighbors, scores or settings, or another exception.

Readers that a file does not reach are known beforehand: those that find the same with it missing, emptied and half of
it inverted. They are not asked, and what only they opened stays open from one flip to the next.

:mod:`fault_injection` runs it: ``python -m benchmarks.fault_injection --flips 100000``.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig, load_project_config, save_project_config
from megatron_grit.data.chunks.chunk_db import map_dataset
from megatron_grit.data.chunks.neighbor_table import NeighborTable
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import TableDb, VersionedDb, check_stored, read_version
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import DataError, GritError
from megatron_grit.retrieval.database.index_files import IndexFiles
from megatron_grit.retrieval.database.queried import QueriedFile, tables_of
from megatron_grit.retrieval.database.vectors import ChunkVectors, embed_chunks, open_vectors
from megatron_grit.retrieval.database.versions import nearest_chunks, open_index, record_version
from megatron_grit.retrieval.index.faiss_index import VectorIndex
from megatron_grit.retrieval.index.manifest import read_manifest
from megatron_grit.retrieval.index.recall import read_search
from megatron_grit.retrieval.stages.add import add_documents
from megatron_grit.retrieval.stages.db_build import DbBuild, build_chunks
from megatron_grit.retrieval.stages.index_add import add_to_index
from megatron_grit.retrieval.stages.index_train import train_index
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.stages.restore import restore_index, restore_tables
from megatron_grit.retrieval.stages.tombstone import remove_documents
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.blocks import read_arrays
from megatron_grit.store.content import forget_opened
from tests.unit.retrieval.databases import WordEmbedder, make_project, make_texts, tokenizer_of, write_documents

Content = Any


class WrongContentError(Exception):
    """Something else than what was written was read without a word."""


@dataclass(frozen=True)
class Flip:
    """One bit of a file."""

    name: str
    byte: int
    bit: int


def build_database(folder: Path) -> None:
    """Write the database into ``folder / "db"``, and its documents beside it."""
    tokenizer, embedder, worker = tokenizer_of(folder), WordEmbedder(), Worker()
    first = write_documents(folder / "first", make_texts(24), tokenizer)
    second = write_documents(folder / "second", make_texts(9, seed=2), tokenizer)
    (folder / "second.json").unlink()
    settings = {"index": "IVF4,SQ8", "valid_fraction": 0.15, "block_size": 128, "doc_block_size": 20}
    project = make_project(folder / "db", [first], folder, **settings)
    build_chunks(project, worker)
    embed_chunks(open_vectors(project, worker, embedder), worker)
    train_index(project, worker, embedder)
    add_to_index(project, worker, embedder)
    record_version(project, worker, embedder)
    project = Project(project.folder, replace(project.config, data_paths=[first, second]))
    add_documents(project, worker, embedder)
    remove_documents(project, worker, "first:3")
    query_neighbors(project, worker, embedder)
    save_project_config(project.config, project.folder)


class Reading:
    """A database as a process opens it. Readers are its methods; each opens what it needs.

    Args:
        folder: of :func:`build_database`.
        tokenizer: loaded, for it takes longer than all the rest.
        config: the settings, where config.json is as it was. None: they are read.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, config: RetroDbConfig | None = None) -> None:
        self._config = config
        self._db: VersionedDb | GritError | None = None
        self.folder, self._tokenizer, self._embedder = folder / "db", tokenizer, WordEmbedder()

    def take_over(self, other: Reading, readers: Sequence[str]) -> None:
        """Have what another one opened, but for what any of some readers opens."""
        if "tokens" not in readers:
            self.project, self._db = other.project, other.db
        if "first_version" not in readers:
            self.first = other.first

    @cached_property
    def project(self) -> Project:
        """The database's folder and settings."""
        config = self._config or load_project_config(self.folder)
        if config is None:
            raise DataError("is missing", path=self.folder / "config.json")
        project = Project(self.folder, config)
        project._tokenizer = self._tokenizer
        return project

    @property
    def db(self) -> VersionedDb:
        """The newest version; what refused it is raised again for each reader."""
        if self._db is None:
            try:
                self._db = VersionedDb(self.project, read_version(self.folder, self.project.config.version))
            except GritError as error:
                self._db = error
        if isinstance(self._db, GritError):
            raise self._db
        return self._db

    @cached_property
    def first(self) -> VersionedDb:
        """The first version."""
        return VersionedDb(self.project, read_version(self.folder, 1))

    def settings(self) -> Content:
        """What is asked for, and with what the index is searched."""
        found = read_search(self.folder / self.db.version.search)
        return self.project.config, found, self.db.version

    def tokens(self) -> Content:
        """Chunks and what follows them, those of removed documents too."""
        tokens, mask = self.db.read_tokens(np.arange(len(self.db)))
        texts = self.db.texts(np.arange(0, len(self.db), 7))
        return self.db.rows[:].tobytes(), self.db.tombstones.tobytes(), tokens.tobytes(), mask.tobytes(), texts

    def first_version(self) -> Content:
        """The database before it grew."""
        return np.asarray(self.first.rows).tobytes(), self.first.read_tokens(np.arange(0, len(self.first), 5))[
            0
        ].tobytes()

    def neighbors(self, name: str) -> Content:
        """Of all chunks of a dataset, without those of their documents."""
        found = []
        for folder in (folder for prefix, folder in tables_of(self.project).items() if Path(prefix).name == name):
            table = NeighborTable(folder, self.db.rows, read_version(self.folder, self.db.version.number).chunks)
            table.check_source(self.project.resolve(table.manifest.source.prefix))
            starts = np.asarray(table.starts)
            documents = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            places = np.stack([documents, (np.arange(starts[-1]) - starts[documents]) * table.manifest.chunk_length], 1)
            found.append((table.read(places, [(0, 1)], 4).tobytes(), table.manifest.recall))
        return found

    def search(self) -> Content:
        """With vectors."""
        index = open_index(self.project, self.db.version)
        vectors = np.random.default_rng(0).standard_normal((5, index.dim)).astype(np.float32)
        scores, ids = nearest_chunks(self.db, index, vectors, 8)
        return scores.tobytes(), ids.tobytes(), [read_manifest(self.folder / file.path) for file in _indexes(self.db)]

    def trained(self) -> Content:
        """Codes of vectors."""
        index = VectorIndex.load(check_stored(self.folder, self.db.version.trained))
        return index.encode(np.random.default_rng(1).standard_normal((3, index.dim)).astype(np.float32)).tobytes()

    def resumption(self, name: str) -> Content:
        """What a search of a dataset's neighbors resumes from."""
        (prefix,) = (prefix for prefix in self.project.config.data_paths if Path(prefix).name == name)
        plan = QueriedFile(self.project, self.db, prefix, Worker()).open()
        return plan.table, plan.first, plan.again.tobytes(), [len(plan.blocks.read(b)) for b in plan.blocks.blocks]

    def vectors(self) -> Content:
        """Those that were stored, of some chunks."""
        first = self.db.version.segments[0]
        table = TableDb(self.project, self.folder / first.table.path, self.db.infos)
        chunks = read_manifest(self.folder / first.index[0].path).chunks
        vectors = ChunkVectors(self.project, table, self._embedder, chunks)
        vectors.look(Worker())
        return vectors.of(np.arange(0, len(table), 9)).tobytes()

    def kept_out(self) -> Content:
        """Validation and training chunks."""
        tables = (map_dataset(self.project.merged / f"{name}.hdf5", "chunks") for name in ("valid", "sampled"))
        return [table.tobytes() for table in tables], self.project.listed()

    def block(self, name: str) -> Content:
        """The arrays of a block of chunks, vectors or neighbors."""
        path = self.folder.parent / name
        return {name: array.tobytes() for name, array in read_arrays(path).items()}

    def report(self) -> Content:
        """What became of the chunks."""
        return DbBuild().describe(self.db, self.db.version, verify=False)

    def recall(self) -> Content:
        """What measured the recall."""
        db = copy(self.first)
        db.infos = self.project.listed()
        files = IndexFiles(self.project, db, self._embedder.fingerprint, self._embedder.dim)
        ids, vectors = files.queries.read()
        return ids.tobytes(), vectors.tobytes(), files.queries.drawn, read_arrays(files.exact)["exact"].tobytes()


READERS = (
    *("settings", "tokens", "first_version", "neighbors:first", "neighbors:second", "search", "trained", "vectors"),
    *("kept_out", "report", "recall", "resumption:first", "resumption:second"),
)
"""Methods of :class:`Reading`, with the dataset that they are of."""


_BLOCK = re.compile(r"/\d+-\d+\.hdf5$")


def _is_same(found: Content, written: Content) -> bool:
    return not isinstance(found, GritError) and found == written


def _indexes(db: VersionedDb) -> Iterator[Any]:
    for segment in db.version.segments:
        yield from segment.index


class Campaign:
    """Flips of one database, which is as it was after each.

    Args:
        folder: of :func:`build_database`.
        seed: of the flips.
    """

    def __init__(self, folder: Path, seed: int | str) -> None:
        self.folder = folder
        self.tokenizer = tokenizer_of(folder)
        self._random = random.Random(seed)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        self.files = {name: content for name, content in self.files.items() if content and "tokenizer" not in name}
        blocks = [name for name in self.files if _BLOCK.search(name)]
        self._config = load_project_config(folder / "db")
        self.written = self.read([*READERS, *blocks], Reading(folder, self.tokenizer))
        refused = [name for name, found in self.written.items() if isinstance(found, GritError)]
        assert not refused, f"the database is damaged: {refused}"
        self._whole = Reading(folder, self.tokenizer, self._config)
        assert self._whole.db.version.number > self._whole.first.version.number == 1  # both are open
        self.readers = {name: self._readers_of(name) for name in self.files}
        """Of each file: those that find something else, or nothing, where it is missing, empty or half of it is
        inverted; all where none does."""

    def _readers_of(self, name: str) -> list[str]:
        path = self.folder / name
        aside = path.with_name(f".{path.name}.aside")
        path.rename(aside)
        forget_opened(path)
        try:
            missing = self.read(READERS)
            found = [missing]
            half = len(self.files[name]) // 2
            for content in (b"", self.files[name][:half] + bytes(byte ^ 255 for byte in self.files[name][half:])):
                path.write_bytes(content)
                forget_opened(path)
                found.append(self.read(READERS))
        finally:
            aside.replace(path)
            forget_opened(path)
        readers = [name for name in READERS if any(not _is_same(each[name], self.written[name]) for each in found)]
        if "/query/" not in name:
            # It takes longer than the others.
            readers = [reader for reader in readers if not reader.startswith("resumption")]
        return [name] * (name in self.written) + readers or list(READERS)

    def read(self, readers: Sequence[str], reading: Reading | None = None) -> dict[str, Content]:
        """What each reader finds, or the error that it raises.

        Args:
            readers: names, and those of blocks.
            reading: None: of a process that looks at everything anew.
        """
        if reading is None:
            forget_opened()
            reading = Reading(self.folder, self.tokenizer)
        found = dict[str, Content]()
        for name in readers:
            method, _, dataset = name.partition(":")
            try:
                of = (dataset,) if dataset else ()
                found[name] = reading.block(name) if name in self.files else getattr(reading, method)(*of)
            except GritError as error:
                found[name] = error
        return found

    def draw(self) -> Flip:
        """A bit: each file as likely as any other, so that small ones are not left out."""
        name = self._random.choice(list(self.files))
        return Flip(name, self._random.randrange(len(self.files[name])), self._random.randrange(8))

    def run(self, flip: Flip, *, repair: bool = False) -> str:
        """Flip, read, judge, and put the file back. Returns "right", "refused" or "repaired".

        Raises:
            WrongContentError: none of these.
        """
        with self.flipped(flip):
            found = self._judged(flip)
            if found and repair:
                return self._repaired(flip)
            return "refused" if found else "right"

    @contextmanager
    def flipped(self, flip: Flip) -> Iterator[None]:
        """The database while a bit is another one; the time of the file stays."""
        damaged = self.files[flip.name][flip.byte] ^ 1 << flip.bit
        self._write(flip, damaged)
        try:
            yield
        finally:
            self._write(flip, self.files[flip.name][flip.byte])

    def _write(self, flip: Flip, value: int) -> None:
        path = self.folder / flip.name
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(flip.byte)
            file.write(bytes([value]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        forget_opened(path)  # the clock of a file's times may not have moved since it was last written

    def _blocks(self) -> list[str]:
        return [name for name in self.written if name in self.files]

    def _judged(self, flip: Flip, *, everything: bool = False) -> list[GritError]:
        """The errors of readers; what the others found is right."""
        try:
            if everything:
                found = self.read([*READERS, *self._blocks()])
            else:
                readers = self.readers[flip.name]
                config = None if flip.name == "db/config.json" else self._config
                reading = Reading(self.folder, self.tokenizer, config)
                reading.take_over(self._whole, readers)
                found = self.read(readers, reading)
        except Exception as error:
            raise WrongContentError(f"{flip}: {type(error).__name__}: {error}") from error
        errors = [error for error in found.values() if isinstance(error, GritError)]
        for name, content in found.items():
            if not isinstance(content, GritError) and content != self.written[name]:
                raise WrongContentError(f"{flip}: {name} read something else without a word")
        for error in errors:
            if str(self.folder) not in str(error):
                raise WrongContentError(f"{flip}: the error names no file: {error}")
        return errors

    def _repaired(self, flip: Flip) -> str:
        """Run the tasks on a copy that is damaged in the same way."""
        twin = self.folder.with_name(f"{self.folder.name}.repaired")
        shutil.rmtree(twin, ignore_errors=True)
        # Paths in config.json are absolute: the copy takes the place of the original meanwhile.
        shutil.copytree(self.folder, twin, symlinks=True)
        try:
            repair(self.folder, self.tokenizer)
            errors = self._judged(flip, everything=True)
        except GritError:
            errors = [GritError("not repaired")]
        finally:
            shutil.rmtree(self.folder)
            twin.rename(self.folder)
            forget_opened()
        return "refused" if errors else "repaired"


def repair(folder: Path, tokenizer: Tokenizer) -> None:
    """Run the tasks that make what is missing or damaged.

    Raises:
        GritError: something cannot be made again.
    """
    reading, worker, embedder = Reading(folder, tokenizer), Worker(), WordEmbedder()
    restore_tables(reading.project, worker)
    restore_index(reading.project, worker, embedder)
    query_neighbors(reading.project, worker, embedder)


def run_flips(num_flips: int, seed: int, one_in: int = 100, kept: Path | None = None) -> int:
    """Build a database, flip, and print what came of it by folder. Returns the exit status.

    Args:
        num_flips: how many, those of an earlier run included that ``kept`` tells of.
        seed: of them; those after an earlier run are others.
        one_in: of so many flips that are refused one is repaired.
        kept: JSON file of the counts, written after each thousand, so that a run that was stopped goes on.
    """
    from tqdm import tqdm

    logging.disable(logging.WARNING)  # what is made again
    counts: Counter[tuple[str, str]] = Counter()
    if kept is not None and kept.is_file():
        counts.update({tuple(name.split(" / ")): count for name, count in json.loads(kept.read_text()).items()})
    started, done = time.perf_counter(), sum(counts.values())
    with tempfile.TemporaryDirectory(prefix="database_flips_") as parent:
        folder = Path(parent) / "here"
        folder.mkdir()
        build_database(folder)
        campaign, num_refused = Campaign(folder, f"{seed} after {done}"), 0
        try:
            for number in tqdm(range(done, num_flips), unit="flip", mininterval=2, initial=done, total=num_flips):
                flip = campaign.draw()
                outcome = campaign.run(flip, repair=num_refused % one_in == one_in - 1)
                num_refused += outcome != "right"
                counts[_group(flip.name), outcome] += 1
                if kept is not None and (number % 1000 == 999 or number == num_flips - 1):
                    kept.write_text(json.dumps({" / ".join(each): n for each, n in sorted(counts.items())}, indent=2))
        except WrongContentError as error:
            print(f"fault_injection: error: flip {sum(counts.values())}: {error}", file=sys.stderr)
            return 1
    print(f"{'files':40s}{'right':>10s}{'refused':>10s}{'repaired':>10s}")
    for name in [*sorted({name for name, _ in counts}), ""]:
        row = [sum(n for (group, found), n in counts.items() if name in (group, "") and found == o) for o in OUTCOMES]
        print(f"{name or 'all':40s}{row[0]:10d}{row[1]:10d}{row[2]:10d}")
    seconds = time.perf_counter() - started
    print(f"{sum(counts.values())} flips, {sum(counts.values()) - done} of them in {seconds:.0f} s, none believed")
    return 0


OUTCOMES = ("right", "refused", "repaired")


def _group(name: str) -> str:
    """Kind of a file, by its folder and ending."""
    parts = name.split("/")
    if len(parts) == 1:
        return f"indexed files {Path(name).suffix}"
    folder = "/".join(parts[1:3]) if len(parts) > 3 and parts[1] == "db" else parts[1]
    return f"{folder} {Path(name).suffix}"
