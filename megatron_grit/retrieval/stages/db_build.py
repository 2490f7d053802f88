"""The task db-build: documents cut into chunks, filtered, and merged into the tables that training and indexes read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.config.database.settings import setting_in_use
from megatron_grit.data.chunks.chunk_db import DATASET, DOCUMENT, ChunkDb, map_dataset
from megatron_grit.data.chunks.chunking import VISIBLE
from megatron_grit.data.chunks.project import DatasetInfo, Project, sha256_of_bin
from megatron_grit.data.chunks.versions import (
    Version,
    begins_with,
    built_chunks,
    built_datasets,
    check_stored,
    is_damaged,
    is_unchanged,
    read_version,
    version_numbers,
)
from megatron_grit.data.indexed.reader import file_paths
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.database.cuts import (
    Cut,
    blocks_of,
    chunk_blocks,
    clear_duplicates,
    cut_chunks,
    cuts_of,
    find_duplicates,
    parted,
    writing_table,
)
from megatron_grit.retrieval.database.vectors import find_chunks
from megatron_grit.retrieval.dedup.duplicates import EQUAL, SIMILAR, DuplicateSearch
from megatron_grit.retrieval.stages.task import Inputs, Job, Report, Task
from megatron_grit.retrieval.work import Check, Worker
from megatron_grit.store.blocks import signature_of
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.logs import get_logger
from megatron_grit.store.sealed import read_sealed, write_sealed

log = get_logger(__name__)

_NUM_EXAMPLES = 5
_NO_DATA = "data_paths is empty; give the prefixes of indexed files"
_DAMAGED = "holds rows that are no chunks of the documents; delete it and run --tasks db-build again"
_ELSE = "or build another database, in another --project-dir or with --overwrite db-build"
REPORT_FILE = "report.json"
COUNTS = ("empty", "too_short", "exact_duplicates", "near_duplicates", "validation", "train")
"""What becomes of the chunks of a dataset, in ``db/report.json``."""


class DbBuild(Task):
    """Cuts documents into chunks, leaves out empty and repeated ones, and merges the rest into one table."""

    name = "db-build"
    needs_embedder = False
    makes_versions = True
    settings = (
        *("data_paths", "tokenizer", "chunk_length", "min_chunk_tokens", "duplicates", "near_threshold"),
        *("minhash_permutations", "valid_fraction", "seed"),
    )
    voids = ("embed", "index-train", "index-add", "query-neighbors")
    makes = (
        *(
            f"db/{name}"
            for name in ("individual", "merged", "duplicates", "keys", REPORT_FILE, "indexed_dataset_infos.json")
        ),
        "db/versions/[0-9]*",
    )
    trace = "db/indexed_dataset_infos.json"

    def check(self, inputs: Inputs) -> Iterator[str]:
        """As :class:`Task` says: the documents are there, once each."""
        return check_documents(inputs)

    def run(self, job: Job) -> None:
        build_chunks(job.project, job.worker)

    def validate(self, job: Job) -> Iterator[Check]:
        cuts = cuts_of(job.project, built_datasets(job.project))
        yield from chunk_blocks(job.project, cuts)
        if job.worker.is_first:
            check_merged(job.project, cuts)
        job.worker.barrier()

    def describe(self, db: ChunkDb, version: Version | None, *, verify: bool) -> Report:
        """As :class:`Task` says: what it reported."""
        if verify and version is None:
            check_merged(db.project, cuts_of(db.project, built_datasets(db.project)))
        path = db.project.folder / "db" / REPORT_FILE
        if not path.is_file():
            return {"built": None}
        try:
            built: Report = read_sealed(path)
            report_lines(built["datasets"])
            if set(built) != {"datasets", "near_duplicates"}:
                raise ValueError(f"has keys {sorted(built)}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"cannot be read ({error}); delete it and run --tasks db-build", path=path) from None
        return {"built": built}


def check_documents(inputs: Inputs) -> Iterator[str]:
    """See that the datasets of a database that is built or added to are there, once each: a line for each."""
    project, unknown, paths = inputs.project, [], list[Path]()
    if not project.config.data_paths:
        raise ConfigError(_NO_DATA)
    for prefix in project.config.data_paths:
        path = project.resolve(prefix)
        if not file_paths(path)[2].is_file():
            unknown.append(str(path))
        if path.resolve() in paths:
            raise ConfigError(f"data_paths names {path.resolve()} more than once, the second time as {prefix}")
        paths.append(path.resolve())
        yield project.outline(prefix)
    if unknown:
        log.warning(
            f"without a .json nothing tells whether {', '.join(unknown)} was made with tokenizer "
            f"{project.tokenizer.path}"
        )


def build_chunks(project: Project, worker: Worker) -> list[DatasetInfo]:
    """Build the chunks of a database. All processes call it.

    Raises:
        ConfigError: settings that do not go together.
        DataError: an input that is missing or damaged, or, once there is a version of the database, another one.
    """
    config = project.config
    if not config.data_paths:
        raise ConfigError(_NO_DATA)
    cuts = cuts_of(project, project.datasets())
    if worker.is_first:
        _refuse_other_chunks(project, cuts)
    worker.barrier()
    cut_chunks(project, cuts, worker)
    root = project.folder / "db"
    if worker.from_first(lambda: _is_stale(project, cuts)):
        search = find_duplicates(project, cuts, root, worker)
        if worker.is_first:
            merge_chunks(project, cuts, search)
    if worker.is_first:
        clear_duplicates(root)
    worker.barrier()
    return project.infos()


def refuse_other_sources(project: Project) -> None:
    """See that the datasets are what the newest version holds, if there is one.

    Raises:
        DataError: documents were appended or changed.
    """
    if not version_numbers(project.folder):
        return
    version = read_version(project.folder)
    for source in version.sources:
        path = project.resolve(source.prefix)
        if is_unchanged(path, source):
            continue
        count = project.open(source.prefix).num_documents - source.num_documents
        if not begins_with(path, source):
            problem = f"no longer begins with the {source.num_documents} documents of"
            remedy = "put the old file back"
        elif count:
            problem = f"{count} documents were appended since"
            remedy = "add them with --tasks add"
        else:
            problem, remedy = "its .json was removed or made anew since", "put it back as it was"
        raise DataError(f"{problem} version {version.number} of the database; {remedy}, {_ELSE}", path=path)


def _refuse_other_chunks(project: Project, cuts: Sequence[Cut]) -> None:
    """See that the files which versions are made of would be made again as they were."""
    if not version_numbers(project.folder):
        return
    refuse_other_sources(project)
    table, version = project.merged / "train.hdf5", read_version(project.folder)
    if len(version.segments) > 1 or signature_of(table) not in (None, _merge_signature(project, cuts)):
        raise DataError(
            f"is part of version {version.number} of the database, and would be made of other documents, with another "
            f"tokenizer or other settings; put back what was changed, {_ELSE}",
            path=table,
        )


def _is_stale(project: Project, cuts: Sequence[Cut]) -> bool:
    """Whether the merged tables are not those of these blocks and settings."""
    wanted = _merge_signature(project, cuts)
    for path in (project.merged / "train.hdf5", project.merged / "valid.hdf5"):
        if not path.is_file() or signature_of(path) != wanted:
            return True
    try:
        infos = project.listed()
        counts = sum(info.n_chunks_train for info in infos), sum(info.n_chunks - info.n_chunks_train for info in infos)
        tables = (map_dataset(project.merged / name, "chunks") for name in ("train.hdf5", "valid.hdf5"))
        if [info.prefix for info in infos] != project.config.data_paths or counts != tuple(map(len, tables)):
            return True
    except (DataError, TypeError):
        return True
    if not (project.merged.parent / REPORT_FILE).is_file():
        return True
    path = project.merged / "train.hdf5"
    # The rows were compared with what was written when they were mapped; a version knows the whole file.
    return is_damaged(project.folder, project.merged / "train.hdf5")


def _merge_signature(project: Project, cuts: Sequence[Cut]) -> str:
    names = ("duplicates", "near_threshold", "valid_fraction", "seed")
    settings = {name: setting_in_use(project.config, name) for name in names}
    return digest_of_settings({"blocks": [cut.blocks.signature for cut in cuts], **settings})


def merge_chunks(project: Project, cuts: Sequence[Cut], search: DuplicateSearch) -> None:
    """Leave out duplicates, part validation from the rest, and write the merged tables, the datasets and the report. In
    one process, which holds a byte for each chunk.

    Args:
        project: the database.
        cuts: what was cut of each dataset.
        search: for duplicates among them; it has run.

    Raises:
        DataError: no chunk is left.
    """
    state = search.state()
    infos: list[DatasetInfo] = []
    report: list[dict[str, Any]] = []
    for cut in cuts:
        path = project.resolve(cut.dataset.prefix)
        stat = file_paths(path)[0].stat()
        size, changed = stat.st_size, stat.st_mtime_ns
        info = replace(cut.dataset, bin_sha256=sha256_of_bin(path), bin_bytes=size, bin_mtime_ns=changed)
        infos.append(info)
        report.append({"prefix": info.prefix, "documents": info.n_docs} | dict.fromkeys(COUNTS, 0))
    for part in parted(project, cuts, state):
        info, counts = infos[part.dataset], report[part.dataset]
        info.n_docs_train += int((~part.held_out).sum())
        info.n_chunks += len(part.train) + len(part.valid)
        info.n_chunks_train += len(part.train)
        info.n_chunks_invalid += len(part.invalid)
        info.n_chunks_duplicate += int((part.state > 0).sum())
        empty = int((part.invalid[:, VISIBLE] == 0).sum())
        added = [empty, len(part.invalid) - empty, *((part.state == kind).sum() for kind in (EQUAL, SIMILAR))]
        for name, count in zip(COUNTS, [*added, len(part.valid), len(part.train)], strict=True):
            counts[name] += int(count)
    total = sum(info.n_chunks_train for info in infos)
    if not total:
        raise DataError("no chunk is left; lower min_chunk_tokens or valid_fraction", path=project.folder)
    for info in infos:
        info.ratio = info.n_chunks_train / total
    write_tables(project, cuts, state)
    examples = _examples(project, cuts, search, state)
    write_sealed(project.merged.parent / REPORT_FILE, {"datasets": report, "near_duplicates": examples})
    # The last, for it says that the others are there.
    project.save_infos(infos)
    for line in report_lines(report):
        log.info(line)


def write_tables(project: Project, cuts: Sequence[Cut], state: np.ndarray) -> None:
    """Write ``db/merged/train.hdf5`` and ``valid.hdf5``. In one process.

    Args:
        project: the database.
        cuts: what was cut of each dataset.
        state: of the search for duplicates among them.
    """
    sizes = [(len(part.train), len(part.valid), len(part.doc_offsets)) for part in parted(project, cuts, state)]
    num_train, num_valid, num_documents = (sum(column) for column in zip(*sizes, strict=True))
    signature = _merge_signature(project, cuts)
    with (
        writing_table(project.merged / "train.hdf5", num_train, signature, num_documents) as of_train,
        writing_table(project.merged / "valid.hdf5", num_valid, signature) as of_valid,
    ):
        for part in parted(project, cuts, state):
            of_train.add(part.train, part.doc_offsets)
            of_valid.add(part.valid)


def report_lines(report: list[dict[str, Any]]) -> list[str]:
    """What the filters did, a line for each dataset."""
    return [
        f"{counts['prefix']}: {counts['documents']:,} documents; "
        + ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in COUNTS)
        for counts in report
    ]


def _examples(
    project: Project, cuts: Sequence[Cut], search: DuplicateSearch, state: np.ndarray
) -> list[dict[str, str]]:
    """Texts of a few near duplicates, with those that they are like."""
    examples, blocks = [], blocks_of(cuts)
    for pair in search.examples(state, _NUM_EXAMPLES):
        texts = []
        for chunk in pair:
            place, row = search.place(chunk)
            number, block = blocks[place]
            file = project.file(number)
            document, start, stop = map_dataset(block.path, "chunks_valid")[row, :3].tolist()
            tokens = file.read(*file.sequences(document), start, stop - start)
            texts.append(f"{project.config.data_paths[number]}#{document}:{start}-{stop}")
            texts.append(project.tokenizer.decode(tokens.tolist()))
        examples.append(dict(zip(("kept", "kept_text", "left_out", "left_out_text"), texts, strict=True)))
    return examples


def check_merged(project: Project, cuts: Sequence[Cut]) -> None:
    """Compare the merged tables with the blocks of chunks that they were made of, and with the newest version. In one
    process.

    Raises:
        DataError: a row is no chunk of its documents, or a file was changed.
    """
    if version_numbers(project.folder):
        check_stored(project.folder, read_version(project.folder).segments[0].table, thorough=True)
    for name in ("train", "valid"):
        db, found = built_chunks(project, name), 0
        for cut in cuts:
            for block in cut.blocks.blocks:
                rows = cut.blocks.read(block, "chunks_valid")["chunks_valid"]
                ids = find_chunks(db.rows, cut.number, rows[:, 0], rows[:, 1]) if len(rows) else np.empty(0, np.int64)
                there = ids >= 0
                found_rows = db.rows[ids[there]]
                same = (found_rows[:, DATASET] == cut.number).all() and (found_rows[:, DOCUMENT:] == rows[there]).all()
                if not same or not np.array_equal(ids[there], np.arange(found, found + there.sum())):
                    raise DataError(_DAMAGED, path=db.path)
                found += int(there.sum())
        if found != len(db):
            raise DataError(_DAMAGED, path=db.path)
