"""The chunks of a database: cut, filtered, and merged into the tables that training and the index read."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.config.database.stages import setting_in_use
from megatron_grit.data.chunks.chunk_db import map_dataset
from megatron_grit.data.chunks.chunking import VISIBLE, ChunkRules, chunk_documents, visible_tokens
from megatron_grit.data.chunks.project import DatasetInfo, Project, sha256_of_bin
from megatron_grit.data.chunks.versions import begins_with, is_damaged, is_unchanged, read_version, version_numbers
from megatron_grit.data.indexed.reader import IndexedFile, file_paths
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.dedup.buckets import mix64
from megatron_grit.retrieval.dedup.duplicates import EQUAL, SIMILAR, ChunkBlock, DuplicateSearch
from megatron_grit.retrieval.stages.work import Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder, cannot_write, signature_of
from megatron_grit.store.digest import digest_of_rows, digest_of_settings
from megatron_grit.store.files import replacing_path, write_json
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_MARGIN = 1 << 20
"""Bytes of a table file that are not rows, generously."""
_NUM_EXAMPLES = 5
_ELSE = "or build another database, in another --project-dir or with --overwrite db-build"
_ROWS_AT_A_TIME = 1 << 20
REPORT_FILE = "report.json"
COUNTS = ("empty", "too_short", "exact_duplicates", "near_duplicates", "validation", "train")
"""What becomes of the chunks of a dataset, in ``db/report.json``."""


def build_chunks(project: Project, worker: Worker) -> list[DatasetInfo]:
    """The stage db-build. All processes call it.

    Raises:
        ConfigError: settings that do not go together.
        DataError: an input that is missing or damaged, or, once there is a version of the database, another one.
    """
    config = project.config
    if not config.data_paths:
        raise ConfigError("data_paths is empty; give the prefixes of indexed files")
    datasets = recompute_chunks(project)
    folders = [folder for _, folder, _ in datasets]
    if worker.is_first:
        _refuse_other_chunks(project, folders)
    worker.barrier()
    for what, folder, compute in datasets:
        compute_blocks(folder, compute, worker, what, "document")
    between = project.folder / "db" / "duplicates"
    if worker.from_first(lambda: _is_stale(project, folders)):
        _find_and_merge(project, folders, between, worker)
    if worker.is_first:
        shutil.rmtree(between, ignore_errors=True)
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


def _refuse_other_chunks(project: Project, folders: list[BlockFolder]) -> None:
    """See that the files which versions are made of would be made again as they were."""
    if not version_numbers(project.folder):
        return
    refuse_other_sources(project)
    table, version = project.merged / "train.hdf5", read_version(project.folder)
    if len(version.segments) > 1 or signature_of(table) not in (None, _merge_signature(project, folders)):
        raise DataError(
            f"is part of version {version.number} of the database, and would be made of other documents, with another "
            f"tokenizer or other settings; put back what was changed, {_ELSE}",
            path=table,
        )


def _find_and_merge(project: Project, folders: list[BlockFolder], between: Path, worker: Worker) -> None:
    search = DuplicateSearch(project.config, between, [block for _, block in _all_blocks(folders)])
    search.run(worker)
    if worker.is_first:
        merge_chunks(project, folders, search)


def _all_blocks(folders: list[BlockFolder]) -> list[tuple[int, ChunkBlock]]:
    """Blocks of chunks in their order, each with the number of its dataset."""
    return [
        (number, ChunkBlock(block.path, f"{folder.signature} {block.path.name}"))
        for number, folder in enumerate(folders)
        for block in folder.blocks
    ]


def recompute_chunks(project: Project) -> list[tuple[str, BlockFolder, Callable[[Block], Arrays]]]:
    """For each dataset its name, the blocks of its chunks, and what makes one again."""
    visible, rules = visible_tokens(project.tokenizer), chunk_rules(project)

    def compute(file: IndexedFile) -> Callable[[Block], Arrays]:
        return lambda block: cut_documents(file, block.start, block.stop, rules, visible)

    return [
        (f"chunks of {prefix}", chunk_blocks(project, number), compute(project.file(number)))
        for number, prefix in enumerate(project.config.data_paths)
    ]


def cut_documents(file: IndexedFile, first: int, last: int, rules: ChunkRules, visible: np.ndarray) -> Arrays:
    """:func:`~megatron_grit.data.chunks.chunking.chunk_documents`.

    Raises:
        ConfigError: near duplicates are wanted and datasketch is not installed.
        DataError: as said there.
    """
    try:
        return chunk_documents(file, first, last, rules, visible)
    except ModuleNotFoundError as error:
        raise ConfigError(f"duplicates near needs {error.name}: pip install 'megatron-grit[retro]'") from None


def chunk_rules(project: Project) -> ChunkRules:
    """How the documents of a project are cut."""
    config = project.config
    return ChunkRules(
        chunk_length=config.chunk_length,
        min_tokens=config.min_chunk_tokens,
        eod_id=project.tokenizer.eos_id,
        minhash=config.minhash_permutations if config.duplicates == "near" else 0,
    )


def chunk_blocks(project: Project, number: int) -> BlockFolder:
    """The blocks of a dataset's chunks."""
    signature = {
        "task": "chunks",
        "tokens": project.fingerprint(number),
        "tokenizer": project.tokenizer.fingerprint,
        **vars(chunk_rules(project)),
    }
    num_documents = project.file(number).num_documents
    return BlockFolder(project.chunk_folder(number), num_documents, project.config.doc_block_size, signature)


def is_validation(prefix: str, documents: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Whether documents are kept out of the database for validation, by a hash of dataset, number and seed, so that
    documents which are added later change nothing.

    Args:
        prefix: of the dataset.
        documents: int [n], their numbers.
        fraction: share that is.
        seed: another one gives other documents.

    Returns:
        bool [n].
    """
    salt = int.from_bytes(hashlib.sha256(f"{seed} {Path(prefix).name}".encode()).digest()[:8], "little")
    return mix64(documents.astype(np.uint64) ^ np.uint64(salt)).astype(np.float64) / 2.0**64 < fraction


def _is_stale(project: Project, folders: list[BlockFolder]) -> bool:
    """Whether the merged tables are not those of these blocks and settings."""
    wanted = _merge_signature(project, folders)
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
    # A version knows the whole file; before there is one the rows are compared with what was written.
    return is_damaged(project.folder, path) or (not version_numbers(project.folder) and not _holds_its_rows(path))


def _holds_its_rows(path: Path) -> bool:
    import h5py

    with h5py.File(path, "r") as file:
        written = file.attrs.get("rows_sha256")
    return bool(written == digest_of_rows(map_dataset(path, "chunks")))


def _merge_signature(project: Project, folders: list[BlockFolder]) -> str:
    names = ("duplicates", "near_threshold", "valid_fraction", "seed")
    settings = {name: setting_in_use(project.config, name) for name in names}
    return digest_of_settings({"blocks": [folder.signature for folder in folders], **settings})


def merge_chunks(project: Project, folders: list[BlockFolder], search: DuplicateSearch) -> None:
    """Leave out duplicates, part validation from the rest, and write the merged tables, the datasets and the report. In
    one process, which holds a byte for each chunk.

    Args:
        project: the database.
        folders: blocks of chunks of each dataset.
        search: for duplicates among them; it has run.

    Raises:
        DataError: no chunk is left.
    """
    state = search.state()
    infos: list[DatasetInfo] = []
    report: list[dict[str, Any]] = []
    for number, folder in enumerate(folders):
        path = project.resolve(project.config.data_paths[number])
        stat = file_paths(path)[0].stat()
        info = DatasetInfo(
            prefix=project.config.data_paths[number],
            fingerprint=project.fingerprint(number),
            bin_sha256=sha256_of_bin(path),
            bin_bytes=stat.st_size,
            bin_mtime_ns=stat.st_mtime_ns,
            n_docs=folder.num_items,
        )
        infos.append(info)
        report.append({"prefix": info.prefix, "documents": info.n_docs} | dict.fromkeys(COUNTS, 0))
    num_valid = 0
    for part in _parts(project, folders, state):
        info, counts = infos[part.number], report[part.number]
        info.n_docs_train += int((~part.held_out).sum())
        info.n_chunks += len(part.train) + len(part.valid)
        info.n_chunks_train += len(part.train)
        info.n_chunks_invalid += len(part.invalid)
        info.n_chunks_duplicate += int((part.state > 0).sum())
        num_valid += len(part.valid)
        empty = int((part.invalid[:, VISIBLE] == 0).sum())
        added = [empty, len(part.invalid) - empty, *((part.state == kind).sum() for kind in (EQUAL, SIMILAR))]
        for name, count in zip(COUNTS, [*added, len(part.valid), len(part.train)], strict=True):
            counts[name] += int(count)
    total = sum(info.n_chunks_train for info in infos)
    if not total:
        raise DataError("no chunk is left; see how chunks are filtered", path=project.folder)
    for info in infos:
        info.ratio = info.n_chunks_train / total
    signature = _merge_signature(project, folders)
    train, valid = (project.merged / f"{name}.hdf5" for name in ("train", "valid"))
    num_documents = sum(info.n_docs_train for info in infos)
    with (
        writing_table(train, total, signature, num_documents) as of_train,
        writing_table(valid, num_valid, signature) as of_valid,
    ):
        for part in _parts(project, folders, state):
            of_train.add(part.train, part.doc_offsets)
            of_valid.add(part.valid)
    examples = _examples(project, folders, search, state)
    write_json(project.merged.parent / REPORT_FILE, {"datasets": report, "near_duplicates": examples})
    # The last, for it says that the others are there.
    project.save_infos(infos)
    for line in report_lines(report):
        log.info(line)


def report_lines(report: list[dict[str, Any]]) -> list[str]:
    """What the filters did, a line for each dataset."""
    return [
        f"{counts['prefix']}: {counts['documents']:,} documents; "
        + ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in COUNTS)
        for counts in report
    ]


@dataclass(kw_only=True)
class _Part:
    """The chunks of a block, parted."""

    number: int
    """Of the dataset."""
    invalid: np.ndarray
    state: np.ndarray
    """uint8 [valid chunks]: 0, EQUAL or SIMILAR."""
    held_out: np.ndarray
    """bool [documents]: kept for validation."""
    train: np.ndarray
    valid: np.ndarray
    doc_offsets: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.uint64))


def _parts(project: Project, folders: list[BlockFolder], states: np.ndarray) -> Iterator[_Part]:
    config, place, num_train = project.config, 0, 0
    for number, folder in enumerate(folders):
        for block in folder.blocks:
            arrays = folder.read(block, "chunks_valid", "chunks_invalid")
            rows = arrays["chunks_valid"]
            state = states[place : place + len(rows)]
            place += len(rows)
            documents = np.arange(block.start, block.stop)
            held_out = is_validation(config.data_paths[number], documents, config.valid_fraction, config.seed)
            in_valid = held_out[rows[:, 0].astype(np.int64) - block.start]
            named = np.concatenate([np.full((len(rows), 1), number, np.uint32), rows], axis=1)
            train, valid = named[(state == 0) & ~in_valid], named[(state == 0) & in_valid]
            per_document = np.bincount(train[:, 1].astype(np.int64) - block.start, minlength=len(block))
            columns = [np.full(len(block), number), documents, num_train + np.cumsum(per_document)]
            offsets = np.stack(columns, axis=1).astype(np.uint64)[~held_out]
            num_train += len(train)
            yield _Part(
                number=number,
                invalid=arrays["chunks_invalid"],
                state=state,
                held_out=held_out,
                train=train,
                valid=valid,
                doc_offsets=offsets,
            )


def _examples(
    project: Project, folders: list[BlockFolder], search: DuplicateSearch, state: np.ndarray
) -> list[dict[str, str]]:
    """Texts of a few near duplicates, with those that they are like."""
    examples, blocks = [], _all_blocks(folders)
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


class _Tables:
    def __init__(self, rows: Any, offsets: Any) -> None:
        self._rows, self._offsets, self._row, self._offset = rows, offsets, 0, 0
        self.digest = hashlib.sha256()

    def add(self, rows: np.ndarray, offsets: np.ndarray | None = None) -> None:
        self._rows[self._row : self._row + len(rows)] = rows
        self._row += len(rows)
        self.digest.update(np.ascontiguousarray(rows, dtype="<u4").tobytes())
        if offsets is not None:
            self._offsets[self._offset : self._offset + len(offsets)] = offsets
            self._offset += len(offsets)


@contextmanager
def writing_table(path: Path, num_rows: int, signature: str, num_documents: int | None = None) -> Iterator[_Tables]:
    """A merged table to fill in order: ``chunks``, uint32 [rows, 5], and ``doc_offsets``, uint64 [documents, 3].

    Raises:
        DataError: the disk is full.
    """
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes, free = 20 * num_rows + 24 * (num_documents or 0), shutil.disk_usage(path.parent).free
    # Asked before: where a disk fills up under HDF5 the process crashes.
    if num_bytes + _MARGIN > free:
        raise cannot_write(path, f"it takes {num_bytes + _MARGIN:,} bytes, {free:,} are free")
    with replacing_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["signature"] = signature
        rows = file.create_dataset("chunks", (num_rows, 5), dtype="u4")
        file.create_dataset("n_written", data=np.array([num_rows], dtype=np.uint64))
        offsets = None
        if num_documents is not None:
            offsets = file.create_dataset("doc_offsets", (num_documents, 3), dtype="u8")
        tables = _Tables(rows, offsets)
        yield tables
        file.attrs["rows_sha256"] = tables.digest.hexdigest()
