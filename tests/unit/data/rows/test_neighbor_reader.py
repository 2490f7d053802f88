"""Rows with their neighbors, against the table and the database read by hand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_grit.config.checks.run import find_errors
from megatron_grit.config.database.run import resolve_retro_project
from megatron_grit.config.parse import parse_train_arguments
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.neighbor_table import NeighborTable, TableManifest, read_table_manifest
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.kinds.generative import GenerativeStream
from megatron_grit.data.order.sources import OpenFiles
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.rows.neighbor_reader import NeighborReader
from megatron_grit.data.rows.prospects import look_ahead
from megatron_grit.data.rows.segments import Segment
from megatron_grit.errors import ConfigError, DataError
from tests.unit.retrieval.databases import CHUNK, database_of, make_texts, write_documents

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A database of a file of 30 documents and another of 12."""
    files = {name: make_texts(size, size) for name, size in (("a", 30), ("b", 12))}
    return database_of(tmp_path_factory.mktemp("neighbors"), files)


def run_of(project: Project, **settings: object) -> RunConfig:
    config = RunConfig()
    config.data.retro_project = str(project.folder)
    config.data.over_long, config.data.tokens_per_row = "split", 50
    config.training.objective, config.training.generative_batch_size = "generative", 6
    config.model.retro = RetroConfig(num_neighbors=2, layers=[0])
    for key, value in settings.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    return resolve_retro_project(config, {})


def loader_of(config: RunConfig, project: Project) -> GritDataLoader:
    return GritDataLoader(config, project.tokenizer)


def expected_texts(
    project: Project, row: PackedRow, segment: tuple[str, int, int, int], start: int, k: int
) -> list[list[int]] | None:
    """Tokens of the neighbors of the chunk that begins at a token of the row. None: the chunk is cut off."""
    prefix, document, first, begin = segment
    db = ChunkDb(project)
    dataset = project.config.data_paths.index(prefix)
    (folder,) = [
        path
        for path in (project.folder / "query").glob("*")
        if json.loads((path / "table.json").read_text())["datasets"] == [dataset]
    ]
    neighbors, starts = np.load(folder / "neighbors.npy"), np.load(folder / "starts.npy")
    chunk = (first + start - begin) // CHUNK
    file = project.file(dataset)
    length = int(file.lengths[document])
    stop = first + segment_length(row, begin)
    if (chunk + 1) * CHUNK > stop and stop < length:
        return None
    if starts[document] + chunk >= starts[document + 1]:
        return []
    held = {(project.config.data_paths.index(name), number) for name, number in map(record_of, row.record_ids)}
    ids = [int(one) for one in neighbors[starts[document] + chunk] if one >= 0]
    ids = [one for one in ids if tuple(db.rows[one][:2].tolist()) not in held]
    return [db.tokens(one, num_tokens=2 * CHUNK).tolist() for one in ids[:k]]


def record_of(name: str) -> tuple[str, int]:
    prefix, number = name.rsplit("#", 1)
    return prefix, int(number)


def segment_length(row: PackedRow, begin: int) -> int:
    bounds = row.cu_seqlens.tolist()
    return bounds[bounds.index(begin) + 1] - begin


def check_row(project: Project, loader: GritDataLoader, row: PackedRow, k: int) -> int:
    """Every chunk of the row; returns how many neighbors it reads."""
    neighbors = row.neighbors
    assert neighbors is not None
    bounds = row.cu_seqlens.tolist()
    ends = np.cumsum(neighbors.lengths_U)
    texts = [part.tolist() for part in np.split(neighbors.tokens_1N[0].numpy(), ends)[:-1]] if len(ends) else []
    covered: list[int] = []
    count = 0
    for (start, stop), places in zip(neighbors.chunk_bounds_C2.tolist(), neighbors.text_of_Ck, strict=True):
        covered += range(start, stop)
        index = int(np.searchsorted(bounds, start, side="right")) - 1
        prefix, document = record_of(row.record_ids[index])
        first = first_token(project, row, index)
        assert (first + stop - bounds[index]) % CHUNK == 0 or stop == bounds[index + 1]
        expected = expected_texts(project, row, (prefix, document, first, bounds[index]), start, k)
        assert [texts[place] for place in places if place >= 0] == (expected or [])
        count += len(expected or [])
    assert covered == list(range(bounds[len(row.record_ids)]))
    return count


def first_token(project: Project, row: PackedRow, index: int) -> int:
    """Where a segment begins in its document, by its tokens."""
    prefix, document = record_of(row.record_ids[index])
    bounds = row.cu_seqlens.tolist()
    piece = row.tokens_1T[0, bounds[index] : bounds[index + 1]].numpy()
    file = project.open(prefix)
    tokens = np.asarray(file.read(*file.sequences(document)))
    (first,) = [at for at in range(len(tokens) - len(piece) + 1) if (tokens[at : at + len(piece)] == piece).all()][:1]
    return first


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    multiple=st.sampled_from([8, 16]),
    row=st.integers(20, 90),
    k=st.integers(1, 5),
    conditioning=st.sampled_from(["chunk", "none"]),
)
def test_rows_read_what_the_table_says(project: Project, multiple: int, row: int, k: int, conditioning: str) -> None:
    retro = RetroConfig(num_neighbors=k, layers=[0], encoder_conditioning=conditioning)  # type: ignore[arg-type]
    config = run_of(project, data__tokens_per_row=row, data__split_multiple=multiple, model__retro=retro)
    loader = loader_of(config, project)
    counts = [check_row(project, loader, made, k) for step in range(2) for made in loader.batch(step).rows]
    assert sum(counts) > 0


def test_pieces_that_begin_inside_a_chunk_have_its_rest(project: Project) -> None:
    config = run_of(project)
    config.data.split_multiple = 5
    loader = loader_of(config, project)
    rows = [row for step in range(4) for row in loader.batch(step).rows]
    inside = [
        row for row in rows if any(first_token(project, row, index) % CHUNK for index in range(len(row.record_ids)))
    ]
    assert inside and sum(check_row(project, loader, row, 2) for row in inside) > 0


@pytest.mark.parametrize("conditioning", ["chunk", "none"])
def test_rows_read_at_once_read_what_each_reads_alone(project: Project, conditioning: str) -> None:
    """Rows of one or two documents, so that what one row leaves out another one reads."""
    retro = RetroConfig(num_neighbors=2, layers=[0], encoder_conditioning=conditioning)  # type: ignore[arg-type]
    config = run_of(project, model__retro=retro, data__tokens_per_row=40)
    stream = GenerativeStream(config, project.tokenizer, OpenFiles())
    reader = NeighborReader(config, stream.sources)
    rows = [row.segments for row in stream.rows(0)]
    assert len(rows) > 3
    for together, row in zip(reader.read(rows), rows, strict=True):
        (alone,) = reader.read([row])
        for name, value in vars(alone).items():
            assert np.array_equal(np.asarray(getattr(together, name)), np.asarray(value)), name
    assert reader.read([]) == []


def test_shuffled_neighbors_are_those_of_other_chunks(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place of the table is read once in place of another one, in an order that follows from the seed."""
    places: list[np.ndarray] = []
    nearest = NeighborTable.nearest

    def recording(table: NeighborTable, places_N: np.ndarray, *rest: Any) -> tuple[np.ndarray, np.ndarray]:
        places.append(places_N)
        return nearest(table, places_N, *rest)

    monkeypatch.setattr(NeighborTable, "nearest", recording)
    runs = [run_of(project, data__tokens_per_row=4096)]
    runs += [run_of(project, data__retro_shuffle=True, training__seed=seed) for seed in (1, 1, 2)]
    stream = GenerativeStream(runs[0], project.tokenizer, OpenFiles())
    sources, lengths = stream.sources, stream.sources[0].file.lengths.tolist()
    whole = [
        Segment(sources=sources, source=0, record=record, start=0, stop=length, roles=[0], lengths=[length])
        for record, length in enumerate(lengths)
    ]
    readers = [NeighborReader(config, stream.sources) for config in runs]
    for reader in readers:
        reader.read([[segment] for segment in whole])
    plain, first, again, other = places
    table = readers[0].tables[0]
    assert plain.tolist() == list(range(table.manifest.num_places)) == sorted(first.tolist())
    assert (first == again).all() and (first == plain).mean() < 0.1 and (first == other).mean() < 0.1
    assert readers[0].identity() != readers[1].identity() == readers[2].identity() != readers[3].identity()


def test_manifests_are_read_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sources there are."""
    read: list[Path] = []

    def counting(folder: Path) -> TableManifest:
        read.append(folder)
        return read_table_manifest(folder)

    monkeypatch.setattr("megatron_grit.data.rows.neighbor_reader.read_table_manifest", counting)
    (stream,) = loader_of(run_of(project), project).streams.values()
    assert len(stream.sources) == 2 and len(read) == len(set(read)) == 2


def test_the_order_of_the_data_is_that_of_the_decoder_alone(project: Project) -> None:
    reads, alone = run_of(project), run_of(project, model__retro=RetroConfig())
    with_them, without = loader_of(reads, project), loader_of(alone, project)
    for step in range(3):
        pairs = zip(with_them.batch(step).rows, without.batch(step).rows, strict=True)
        assert all(a.tokens_1T.equal(b.tokens_1T) and b.neighbors is None for a, b in pairs)
    assert with_them.fingerprint(0) != without.fingerprint(0)


def remove_table(project: Project) -> None:
    shutil.rmtree(project.folder / "query")


def shorten_table(project: Project) -> None:
    for path in (project.folder / "query").glob("*/neighbors.npy"):
        path.write_bytes(path.read_bytes()[:-8])


def flip_table(project: Project) -> None:
    for path in (project.folder / "query").glob("*/sources.npy"):
        path.write_bytes(path.read_bytes()[:-1] + b"\1")


def garble_manifest(project: Project) -> None:
    for path in (project.folder / "query").glob("*/table.json"):
        path.write_text("{")


def other_chunks(project: Project) -> None:
    (project.folder / "config.json").write_text(json.dumps(asdict(project.config) | {"chunk_length": 16}))


def garble_config(project: Project) -> None:
    (project.folder / "config.json").write_text("{")


def without_versions(project: Project) -> None:
    shutil.rmtree(project.folder / "db" / "versions")


def untouched(project: Project) -> None:
    pass


# What is done to the database, options of the run, and the message: the file or option, and what to do.
BAD: dict[str, tuple[Callable[[Project], None], list[str], str]] = {
    "other corpus": (
        untouched,
        ["--data.generative", "[OTHER]"],
        r"other: has no neighbors in version 1 of .*; add it to its query_paths and run .* --tasks query-neighbors",
    ),
    "other version": (untouched, ["--data.retro_version", "7"], r"0007.json: is missing; versions that are there: 1"),
    "version alone": (
        untouched,
        ["--data.retro_project", "null", "--data.retro_version", "1", "--model.retro.num_neighbors", "0"],
        r"data.retro_version is 1, but data.retro_project is not set; .* or leave it out",
    ),
    "other tokenizer": (
        untouched,
        ["--data.tokenizer", "x.model"],
        r"data.tokenizer x.model is not that of data.retro_project .*; leave it out",
    ),
    "other chunk length": (
        untouched,
        ["--model.retro.chunk_length", "16"],
        r"chunk_length 16 is not that of data.retro_project .*, 8; leave it out",
    ),
    "too many neighbors": (
        untouched,
        ["--model.retro.num_neighbors", "6"],
        r"num_neighbors 6 is above the 5 that .* has for each chunk; lower it, or run .* --num_neighbors_save 6",
    ),
    "no database": (
        untouched,
        ["--data.retro_project", "null"],
        r"data.retro_project is not set; give the --project-dir",
    ),
    "no directory": (
        untouched,
        ["--data.retro_project", "x"],
        r"data.retro_project x: holds no config.json; give the one",
    ),
    "two databases": (untouched, ["--data.retro_project", "[x, y]"], r"\[x, y\]: holds no config.json; give the one"),
    "half built": (without_versions, [], r"0001.json: is missing; versions that are there: none, run --tasks build"),
    "no table": (remove_table, [], r"/a: has no neighbors in version 1 of .*; run .* --tasks query-neighbors$"),
    "short table": (shorten_table, [], r"neighbors.npy: cannot be read .*; run --tasks query-neighbors"),
    "flipped table": (flip_table, [], r"sources.npy: does not match its checksum; run --tasks query-neighbors"),
    "garbled manifest": (garble_manifest, [], r"table.json: cannot be read .*; run --tasks query-neighbors"),
    "edited config": (other_chunks, [], r"table.json: is of chunks of 8 tokens, and .* 16; put config.json back"),
    "garbled config": (garble_config, [], r"config.json: cannot be read .*; put it back from a copy"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(name: str, project: Project, tmp_path: Path) -> None:
    damage, options, message = BAD[name]
    shutil.copytree(project.folder, tmp_path / "db")
    copy = Project(tmp_path / "db", project.config)
    damage(copy)
    other = write_documents(tmp_path / "other", make_texts(5, 9), project.tokenizer)
    words = [
        "--data.retro_project",
        str(copy.folder),
        "--model.retro.num_neighbors",
        "2",
        "--model.retro.layers",
        "[0]",
    ]
    words += ["--training.objective", "generative", "--data.tokens_per_row", "50", "--data.over_long", "split"]
    words += [word.replace("OTHER", other) for word in options]
    told_ahead: list[str] | None = None
    with pytest.raises((ConfigError, DataError)) as caught:
        arguments = parse_train_arguments(words)
        config = resolve_retro_project(arguments.config, arguments.origins)
        problems = [problem for problem in find_errors(config, 1) if "data.tokenizer" not in str(problem)]
        if problems:
            raise problems[0]
        told_ahead = [str(error) for error in look_ahead(config)[0]]
        loader_of(config, project)
    assert told_ahead in (None, [str(caught.value)])
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value), str(caught.value)


def test_no_file_is_opened_for_a_chunk(project: Project) -> None:
    loader = loader_of(run_of(project), project)
    loader.batch(0)
    with (
        mock.patch("builtins.open") as opened,
        mock.patch("os.open") as opened_too,
        mock.patch("numpy.memmap.__new__") as mapped,
    ):
        assert sum(len(row.neighbors.lengths_U) for step in range(1, 4) for row in loader.batch(step).rows)
    assert not opened.called and not opened_too.called and not mapped.called
