"""The chunks of a database: cut, filtered, and merged into the tables that training and the index read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_grit.data.block_files import Arrays, Block, BlockFolder
from megatron_grit.data.chunking import ChunkRules, chunk_documents, visible_tokens
from megatron_grit.data.retro_project import DatasetInfo, Project
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.files import replacing_path
from megatron_grit.parallel.logs import get_logger
from megatron_grit.retrieval.work import Worker, compute_blocks

log = get_logger(__name__)

_HASHES_IN_MEMORY = 1 << 27
"""Chunk hashes that are compared at a time; with more chunks the comparison takes several passes over them."""


def build_chunks(project: Project, worker: Worker) -> list[DatasetInfo]:
    """The stage db-build. All processes call it.

    Raises:
        ConfigError: settings that do not go together.
        DataError: an input that is missing or damaged.
    """
    config = project.config
    if not config.data_paths:
        raise ConfigError("data_paths is empty; give the prefixes of indexed files")
    folders = [chunk_blocks(project, number) for number in range(len(config.data_paths))]
    visible = visible_tokens(project.tokenizer)
    rules = chunk_rules(project)
    for number, folder in enumerate(folders):
        file = project.file(number)

        def compute(block: Block, file: Any = file) -> Arrays:
            return chunk_documents(file, block.start, block.stop, rules, visible)

        compute_blocks(folder, compute, worker, f"chunks of {config.data_paths[number]}", "document")
    if worker.is_first:
        project.save_infos(_merge(project, folders))
    worker.barrier()
    return project.infos()


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
    return _mix(documents.astype(np.uint64) ^ np.uint64(salt)).astype(np.float64) / 2.0**64 < fraction


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al., 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _merge(project: Project, folders: list[BlockFolder]) -> list[DatasetInfo]:
    """Leave out duplicates, part validation from the rest, and write the merged tables. In one process."""
    config = project.config
    keep = _kept_chunks(project, folders)
    infos: list[DatasetInfo] = []
    parts: dict[str, list[np.ndarray]] = {"train": [], "valid": []}
    offsets: list[np.ndarray] = []
    num_train = place = 0
    for number, folder in enumerate(folders):
        info = DatasetInfo(prefix=config.data_paths[number], fingerprint=project.fingerprint(number))
        info.n_docs = folder.num_items
        for block in folder.blocks:
            arrays = folder.read(block, "chunks_valid", "chunks_invalid")
            rows = arrays["chunks_valid"]
            kept = keep[place : place + len(rows)]
            place += len(rows)
            documents = np.arange(block.start, block.stop)
            held_out = is_validation(info.prefix, documents, config.valid_fraction, config.seed)
            in_valid = held_out[rows[:, 0] - block.start]
            named = np.concatenate([np.full((len(rows), 1), number, np.uint32), rows], axis=1)
            train, valid = named[kept & ~in_valid], named[kept & in_valid]
            parts["train"].append(train)
            parts["valid"].append(valid)
            per_document = np.bincount(train[:, 1].astype(np.int64) - block.start, minlength=len(block))
            ends = num_train + np.cumsum(per_document)
            of_training = ~held_out
            columns = [np.full(len(block), number), documents, ends]
            offsets.append(np.stack(columns, axis=1).astype(np.uint64)[of_training])
            num_train += len(train)
            info.n_docs_train += int(of_training.sum())
            info.n_chunks += int(kept.sum())
            info.n_chunks_train += len(train)
            info.n_chunks_invalid += len(arrays["chunks_invalid"])
            info.n_chunks_duplicate += int((~kept).sum())
        infos.append(info)
    if not num_train:
        raise DataError("no chunk is left; see how chunks are filtered", path=project.folder)
    total = sum(info.n_chunks_train for info in infos)
    for info in infos:
        info.ratio = info.n_chunks_train / total
    _write_table(project.merged / "train.hdf5", parts["train"], np.concatenate(offsets))
    _write_table(project.merged / "valid.hdf5", parts["valid"])
    return infos


def _write_table(path: Path, parts: list[np.ndarray], offsets: np.ndarray | None = None) -> None:
    import h5py

    num_rows = sum(len(part) for part in parts)
    with replacing_path(path) as temporary, h5py.File(temporary, "w") as file:
        table = file.create_dataset("chunks", (num_rows, 5), dtype="u4")
        place = 0
        for part in parts:
            table[place : place + len(part)] = part
            place += len(part)
        file.create_dataset("n_written", data=np.array([num_rows], dtype=np.uint64))
        if offsets is not None:
            file.create_dataset("doc_offsets", data=offsets)


def _kept_chunks(project: Project, folders: list[BlockFolder]) -> np.ndarray:
    """Which valid chunks of all datasets, in their order, are no duplicate of one before them."""
    counts = [len(rows) for _, _, rows in _arrays(folders, "chunks_valid")]
    keep = np.ones(sum(counts), dtype=bool)
    if project.config.duplicates != "keep":
        _drop_equal(keep, folders)
    if project.config.duplicates == "near":
        _drop_similar(keep, folders, project.config.near_threshold)
    return keep


def _arrays(folders: list[BlockFolder], name: str) -> Iterator[tuple[int, Block, np.ndarray]]:
    """An array of every block, with the number of chunks before it."""
    place = 0
    for folder in folders:
        for block in folder.blocks:
            array = folder.read(block, name)[name]
            yield place, block, array
            place += len(array)


def _drop_equal(keep: np.ndarray, folders: list[BlockFolder]) -> None:
    passes = -(-len(keep) // _HASHES_IN_MEMORY)
    for number in range(passes):
        hashes, places = [], []
        for place, _, array in _arrays(folders, "hashes"):
            mine = np.flatnonzero(array[:, 0] % np.uint64(passes) == number)
            hashes.append(array[mine])
            places.append(mine + place)
        pairs, where = np.concatenate(hashes), np.concatenate(places)
        order = np.lexsort((where, pairs[:, 1], pairs[:, 0]))
        pairs, where = pairs[order], where[order]
        repeated = np.concatenate(([False], (pairs[1:] == pairs[:-1]).all(axis=1)))
        keep[where[repeated]] = False


def _drop_similar(keep: np.ndarray, folders: list[BlockFolder], threshold: float) -> None:
    """Leave out chunks whose signature is like that of one that is kept. In memory: about 1 KB a chunk."""
    from datasketch import LeanMinHash, MinHashLSH

    index: Any = None
    kept: dict[int, np.ndarray] = {}
    with tqdm(total=len(keep), unit="chunk", unit_scale=True, desc="near duplicates") as bar:
        for place, _, signatures in _arrays(folders, "minhashes"):
            if index is None:
                index = MinHashLSH(threshold=threshold, num_perm=signatures.shape[1])
            for row, signature in enumerate(signatures):
                if keep[place + row]:
                    sketch = LeanMinHash(seed=1, hashvalues=signature.astype(np.uint64))
                    # The index finds candidates; their signatures decide.
                    if any((kept[key] == signature).mean() >= threshold for key in index.query(sketch)):
                        keep[place + row] = False
                    else:
                        index.insert(place + row, sketch)
                        kept[place + row] = signature
            bar.update(len(signatures))
