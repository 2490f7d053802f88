"""Tables of neighbors: written, read, and refused when they are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_grit.data.chunks import neighbor_table
from megatron_grit.data.chunks.chunk_db import sources_of
from megatron_grit.data.chunks.neighbor_table import (
    NeighborTable,
    TableManifest,
    write_starts,
    write_table,
)
from megatron_grit.data.chunks.versions import source_of
from megatron_grit.data.indexed.reader import HEADER, MAGIC, IndexedFile
from megatron_grit.errors import DataError

EOD, CHUNK = 3, 4
ROWS = np.stack([np.arange(18) // 9, np.arange(18) % 9 // 3, np.arange(18)], axis=1).astype(np.uint32)


def write_file(prefix: Path, documents: list[list[list[int]]]) -> Path:
    """Documents of sequences of tokens: as Megatron's tools write them, with any number of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], dtype="<i4")
    tokens = np.array([token for sequence in sequences for token in sequence], dtype="<u2")
    ends = np.cumsum([0, *(len(document) for document in documents)], dtype="<i8")
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    header = HEADER.pack(MAGIC, 1, 8, len(sequences), len(ends))
    pointers = (2 * (np.cumsum(lengths) - lengths)).astype("<i8")
    prefix.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + ends.tobytes())
    return prefix


def manifest_of(prefix: Path, num_places: int, num_neighbors: int = 3) -> TableManifest:
    return TableManifest(
        source=source_of(str(prefix), prefix),
        datasets=[0],
        settings="s",
        chunk_length=CHUNK,
        num_neighbors=num_neighbors,
        num_places=num_places,
        version=1,
        database="d",
        embedder="e",
        nprobe=None,
        ef_search=None,
        recall=1.0,
    )


def make_table(
    folder: Path, rows: np.ndarray, neighbors: np.ndarray, documents: list[list[list[int]]]
) -> NeighborTable:
    prefix = write_file(folder / "corpus", documents)
    write_starts(folder / "table" / "starts.npy", IndexedFile(prefix), CHUNK, EOD)
    columns = {"neighbors": neighbors, "scores": neighbors / 2, "sources": sources_of(rows, neighbors)}
    parts = [{name: column[run] for name, column in columns.items()} for run in (slice(2), slice(2, None))]
    width = neighbors.shape[1]
    write_table(folder / "table", parts, manifest_of(prefix, len(neighbors), width))
    return NeighborTable(folder / "table")


@pytest.mark.parametrize("at_a_time", [1, 3, 1 << 16])
def test_starts_count_chunks_without_the_closing_token(
    tmp_path: Path, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbor_table, "_DOCUMENTS_AT_A_TIME", at_a_time)
    documents = [[[9] * 4 + [EOD]], [[9] * 5], [[9], [8, 7], [6, EOD]], [[EOD]], [[EOD, 9]], [[9] * 12 + [EOD]], [[5]]]
    write_starts(tmp_path / "starts.npy", IndexedFile(write_file(tmp_path / "c", documents)), CHUNK, EOD)
    assert np.load(tmp_path / "starts.npy").tolist() == [0, 1, 3, 4, 4, 5, 8, 9]


@pytest.fixture
def table(tmp_path: Path) -> NeighborTable:
    documents = [[[9] * 9], [[9] * 4], [[9] * 5 + [EOD]]]
    neighbors = np.arange(18).reshape(6, 3)
    neighbors[4, 1:] = -1
    return make_table(tmp_path, ROWS, neighbors, documents)


def test_places_of_chunks(table: NeighborTable) -> None:
    chunks = [(0, 0), (0, 4), (0, 8), (1, 0), (2, 0), (2, 4)]
    assert table.places(chunks).tolist() == [0, 1, 2, 3, 4, 5]
    assert table.read(chunks, [], 2).tolist() == table.neighbors[:, :2].tolist()
    assert table.places([]).shape == (0,) and table.read([], [(0, 0)], 2).shape == (0, 2)


@pytest.mark.parametrize("chunk", [(0, 2), (0, 12), (1, 4), (3, 0), (-1, 0), (2, -4)])
def test_a_place_that_is_none_is_named(table: NeighborTable, chunk: tuple[int, int]) -> None:
    why = "" if chunk[0] in range(3) else ", documents are 0 to 2"
    with pytest.raises(IndexError, match=f"document {chunk[0]} has no chunk at token {chunk[1]}{why}$"):
        table.read([(0, 0), chunk, (1, 0)], [], 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    data=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    excluded=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), max_size=6),
    k=st.integers(1, 6),
)
def test_the_filter_is_the_plain_one(
    tmp_path_factory: pytest.TempPathFactory, data: list[int], seed: int, excluded: list[tuple[int, int]], k: int
) -> None:
    """Rows of 0 to 4 neighbors, as a table has them: none stands before a neighbor. A table without documents gives the
    same with those of the chunks."""
    random = np.random.default_rng(seed)
    neighbors = np.full((6, 4), -1)
    for row, count in zip(neighbors, data, strict=True):
        row[:count] = random.permutation(18)[:count]
    folder = tmp_path_factory.mktemp("filter")
    table = make_table(folder, ROWS, neighbors, [[[9] * 24]])
    chunks = [(0, CHUNK * place) for place in range(6)]
    found, sources = table.read_sources(chunks, excluded, k)
    for row, got, where in zip(neighbors.tolist(), found.tolist(), sources.tolist(), strict=True):
        allowed = [i for i in row if i >= 0 and tuple(ROWS[i, :2].tolist()) not in excluded][:k]
        assert got == allowed + [-1] * (k - len(allowed))
        assert where == [ROWS[i].tolist() if i >= 0 else [0, 0, 0] for i in got]
    manifest = table.folder / "table.json"
    old = {"scores_sha256", "sources_sha256", "checksum"}
    manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k not in old}))
    for name in ("scores", "sources"):
        (table.folder / f"{name}.npy").unlink()
    assert NeighborTable(table.folder, ROWS).read(chunks, excluded, k).tolist() == found.tolist()
    with pytest.raises(DataError, match="says nothing of documents"):
        NeighborTable(table.folder).read(chunks, excluded, k)


def test_documents_of_another_dataset_with_the_same_number_stay(table: NeighborTable) -> None:
    """Chunks 0 to 2 are of document 0 of dataset 0, chunks 9 to 11 of document 0 of dataset 1."""
    assert table.read([(0, 0)], [(1, 0)], 3).tolist() == [[0, 1, 2]]
    assert table.read([(0, 0)], [(0, 0)], 3).tolist() == [[-1, -1, -1]]
    assert table.read([(1, 0)], [(1, 0)], 3).tolist() == [[-1, -1, -1]]


def test_nothing_is_loaded(table: NeighborTable) -> None:
    for array in (table.neighbors, table.scores, table.sources, table.starts):
        assert array is not None and isinstance(array.base, np.memmap)


def test_damage_is_found(table: NeighborTable) -> None:
    table.verify()
    for name in ("scores", "sources"):
        path = table.folder / f"{name}.npy"
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(DataError, match=f"{name}.npy.*does not match its checksum"):
            NeighborTable(table.folder).verify()
        path.write_bytes(whole)
    path = table.folder / "neighbors.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"x" + whole[-2:])
    with pytest.raises(DataError, match="does not match its checksum"):
        NeighborTable(table.folder).verify()
    for content in (whole[:-8], b"nothing", whole.replace(b"(6, 3)", b"(3, 6)")):
        path.write_bytes(content)
        with pytest.raises(DataError, match="run --tasks query-neighbors again"):
            NeighborTable(table.folder)
    path.write_bytes(whole)
    manifest = table.folder / "table.json"
    values = json.loads(manifest.read_text())
    for broken in ("{", "{}", json.dumps(values | {"source": 3}), json.dumps(values | {"unknown": 1})):
        manifest.write_text(broken)
        with pytest.raises(DataError, match="cannot be read"):
            NeighborTable(table.folder)


def test_the_file_may_grow_and_not_change(table: NeighborTable, tmp_path: Path) -> None:
    prefix = tmp_path / "corpus"
    table.check_source(prefix)
    documents = [[[9] * 9], [[9] * 4], [[9] * 5 + [EOD]]]
    table.check_source(write_file(prefix, [*documents, [[1, 2]]]))
    for changed in ([*documents[:2], [[9] * 4 + [1, EOD]]], documents[:2], [[[9] * 8], [[9] * 5], documents[2]]):
        with pytest.raises(DataError, match="has changed since its neighbors were searched"):
            table.check_source(write_file(prefix, changed))
