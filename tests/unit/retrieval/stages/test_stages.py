"""Tasks of a build: which settings may still change, what is done again, and what is computed twice on demand."""

from __future__ import annotations

import dataclasses
import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.cli.retro.build_db import BuildDbOptions
from megatron_grit.config.commands import parse_command
from megatron_grit.config.database.schema import RetroDbConfig, config_problems, load_project_config
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.stages import run as stages
from megatron_grit.retrieval.stages.preparation import Preparation
from megatron_grit.retrieval.stages.run import run_tasks
from megatron_grit.retrieval.stages.tasks import GROUPS, changed_settings, expand_tasks, with_following
from megatron_grit.store.blocks import read_arrays, text_of, write_arrays
from tests.unit.retrieval.databases import WordEmbedder, make_texts, tokenizer_of, write_documents


class Words(WordEmbedder):
    sides_alike = True


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a small build, whose embedder needs no model."""
    tokenizer = tokenizer_of(tmp_path)
    monkeypatch.setattr(stages, "project_embedder", lambda config, **_: Words(name=str(config.embedder)))
    return {
        "data_paths": [write_documents(tmp_path / "a", make_texts(25), tokenizer)],
        "tokenizer": str(tmp_path / "tokenizer.model"),
        "embedder": "words",
        "chunk_length": 8,
        "doc_block_size": 7,
        "block_size": 32,
        "index": "IVF4,Flat",
        "num_neighbors_query": 10,
        "num_neighbors_save": 3,
        "keep_embeddings": True,
    }


@pytest.fixture
def project(tmp_path: Path, given: dict[str, Any]) -> Path:
    run_tasks(Preparation(tmp_path / "db", "build", given))
    return tmp_path / "db"


def files_of(project: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns for path in project.rglob("*.*") if path.name not in (".lock", "config.json")
    }


def test_a_build_that_is_done_does_nothing(project: Path) -> None:
    before = files_of(project)
    run_tasks(Preparation(project, "build", {}))
    assert files_of(project) == before


def test_an_index_that_was_given_is_compared_with_the_memory(
    tmp_path: Path, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A build says it before anything is embedded, a dry run as well."""
    caplog.set_level("INFO")
    given |= {"index_memory_gb": 1e-6}
    (said,) = [
        line for line in stages.dry_run(Preparation(tmp_path / "db", "build", given)) if line.startswith("warning: ")
    ]
    assert "e-05 GiB of index IVF4,Flat are above index_memory_gb, 1e-06; give an index with shorter codes" in said
    run_tasks(Preparation(tmp_path / "db", "db-build,index-train", given))
    records = [(record.levelname, record.message) for record in caplog.records]
    warnings = [message for level, message in records if level == "WARNING" and "index_memory_gb" in message]
    assert warnings == [said.removeprefix("warning: ")]
    assert records.index(("WARNING", warnings[0])) < records.index(("INFO", "task db-build"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_length": 16}, r"chunk_length is 8 .*by db-build.* now 16; .*--overwrite db-build"),
        ({"duplicates": "keep"}, "duplicates is 'exact' .* now 'keep'.*--overwrite db-build"),
        ({"embedder": "others"}, r"embedder is 'words' .*by embed, index-train.*--overwrite embed,index-train"),
        ({"index": "Flat"}, "index is 'IVF4,Flat' .* now 'Flat'.*--overwrite index-train"),
        ({"ntrain": 77}, "ntrain is None .* now 77"),
        ({"add_load_fraction": 0.5}, "add_load_fraction is 1.0 .*by index-add.*--overwrite index-add"),
    ],
)
def test_what_was_built_keeps_its_settings(project: Path, change: dict[str, Any], words: str) -> None:
    before, config = files_of(project), (project / "config.json").read_text()
    with pytest.raises(ConfigError, match=words):
        run_tasks(Preparation(project, "build", change))
    assert files_of(project) == before
    assert (project / "config.json").read_text() == config


def test_settings_that_may_change(project: Path, given: dict[str, Any]) -> None:
    tables = set(project.glob("query/*"))
    before = {path: path.stat().st_mtime_ns for path in [*project.glob("db/merged/*"), *project.glob("index/*/*/*")]}
    run_tasks(Preparation(project, "build", {"num_neighbors_save": 2, "doc_block_size": 7, "near_threshold": 0.5}))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(set(project.glob("query/*")) - tables) == 1
    config = load_project_config(project)
    assert config is not None and config.num_neighbors_save == 2


def test_overwriting_makes_anew_what_follows(project: Path) -> None:
    trained = {path: path.stat().st_mtime_ns for path in project.glob("embeddings/*")}
    run_tasks(Preparation(project, "index-build", {"index": "Flat"}, overwrite="index-train"))
    assert [path.name for path in project.glob("index/faiss-par-add/*")] == ["Flat"]
    assert {path: path.stat().st_mtime_ns for path in project.glob("embeddings/*")} == trained
    run_tasks(Preparation(project, "db-build", {"chunk_length": 16}, overwrite="db-build"))
    assert not list(project.glob("index/*")) + list(project.glob("embeddings/*")) + list(project.glob("query/*"))
    with pytest.raises(ConfigError, match="overwrite names embed, which is not among the tasks db-build"):
        run_tasks(Preparation(project, "db-build", {}, overwrite="embed"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"index": "IVF4,Flat", "ntrain": 10**6}, "ntrain 1,000,000 is above"),
        ({"index": "IVF100000,Flat"}, "is below the 100000 lists"),
        ({"index": "NSG32"}, "more than codes"),
        ({"embedder": None}, "embedder is not set"),
        ({"embedder": "no/such"}, r"embedder no/such: is not there \(/.*/no/such\)"),
        ({"data_paths": ["typo"]}, r"typo: no such indexed file.*; looked for /.*/typo.idx and /.*/typo.idx: a rel"),
        ({"tokenizer": "typo.model"}, r"typo.model: no such tokenizer; looked for /.*/typo.model and /.*: a rel"),
        ({"num_shards": 10**5}, "num_shards 100000 is above the at most"),
        ({"index": "IVF4,PQ7"}, "index 'IVF4,PQ7': faiss does not make one"),
        ({"version": 7}, "would make anew what version 7 is made of"),
        ({"recall_queries": "typo.txt"}, "typo.txt: no such file; recall_queries"),
        ({"query_paths": ["typo"]}, "typo: no such indexed file"),
    ],
)
def test_what_cannot_be_made_destroys_nothing(
    project: Path, change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (project / "config.json").read_text()
    monkeypatch.undo()
    if "embedder" not in change:
        monkeypatch.setattr(stages, "project_embedder", lambda config, **_: Words(name=str(config.embedder)))
    before = files_of(project)
    with pytest.raises((ConfigError, DataError), match=words):
        run_tasks(Preparation(project, "build", change, overwrite="db-build,embed,index-train"))
    assert files_of(project) == before and (project / "config.json").read_text() == config
    # Nor is anything begun in a new directory.
    if "version" not in change:
        built = json.loads(config)
        given = {name: built[name] for name in ("data_paths", "tokenizer", "chunk_length")}
        with pytest.raises((ConfigError, DataError), match=words):
            run_tasks(Preparation(project.parent / "new", "build", {"embedder": "words"} | given | change))
        assert [path.name for path in (project.parent / "new").glob("*") if path.name != ".lock"] == []


def test_validation_compares_every_stage(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "megatron_grit")
    run_tasks(Preparation(project, "build", {}, validate=1.0))
    said = "\n".join(record.message for record in caplog.records)
    for what in ("chunks of", "embeddings", "codes", "neighbors for"):
        assert f"{what}" in said
    assert said.count("blocks are equal, bit for bit") == 4
    for validate, words in ((0.0, "above 0"), (1.5, "at most 1")):
        with pytest.raises(ConfigError, match=words):
            run_tasks(Preparation(project, "build", {}, validate=validate))


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("db/individual/*/*.hdf5", "chunks_valid"),
        ("embeddings/*.hdf5", "data"),
        ("index/*/*/add_codes/*.hdf5", "codes"),
        ("query/*/*.hdf5", "neighbors"),
    ],
)
def test_validation_finds_a_changed_block(project: Path, pattern: str, name: str) -> None:
    """A block with a right checksum and one wrong number."""
    import h5py

    path = sorted(project.glob(pattern))[0]
    with h5py.File(path) as file:
        signature = text_of(file, "signature")
    arrays = read_arrays(path)
    arrays[name].ravel()[0] += 1
    write_arrays(path, arrays, signature)
    with pytest.raises(DataError, match=f"{path.name}: {name} differs from what is computed now"):
        run_tasks(Preparation(project, "build", {}, validate=1.0))


def test_a_missing_block_is_refused_or_made_again(project: Path) -> None:
    path = sorted(project.glob("embeddings/*.hdf5"))[0]
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name}: is missing"):
        run_tasks(Preparation(project, "embed", {}, validate=1.0))
    run_tasks(Preparation(project, "embed", {}))
    run_tasks(Preparation(project, "embed", {}, validate=1.0))


def test_a_changed_corpus_is_refused(project: Path, given: dict[str, Any]) -> None:
    path = Path(f"{given['data_paths'][0]}.bin")
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="a.bin: is damaged: it does not match the checksum in its .json"):
        run_tasks(Preparation(project, "embed", {}))


def test_another_tokenizer_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    from megatron_grit.data.text.tokenizer import train_sentencepiece

    train_sentencepiece(make_texts(50, seed=8), tmp_path / "other", 380)
    with pytest.raises(DataError, match="built with another tokenizer"):
        run_tasks(Preparation(tmp_path / "db", "db-build", given | {"tokenizer": str(tmp_path / "other.model")}))


def test_what_is_no_indexed_file(tmp_path: Path, given: dict[str, Any]) -> None:
    for ending in ("bin", "idx"):
        (tmp_path / f"text.{ending}").write_text("plain text that is long enough for a header\n")
    with pytest.raises(DataError, match="text.idx.*not a Megatron index"):
        run_tasks(Preparation(tmp_path / "db", "db-build", given | {"data_paths": [str(tmp_path / "text")]}))


def test_only_one_command_at_a_time(project: Path) -> None:
    with (project / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing it"):
            run_tasks(Preparation(project, "build", {}))
    run_tasks(Preparation(project, "build", {}))


def test_unknown_keys_are_refused(project: Path) -> None:
    path = project / "config.json"
    values = json.loads(path.read_text())
    for changed, words in (
        (values | {"chunk_lenght": 8}, "unknown key 'chunk_lenght' \\(did you mean chunk_length"),
        (values | {"chunk_length": "many"}, "config.json: .*chunk_length"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=words):
            run_tasks(Preparation(project, "build", {}))
    path.write_text("{")
    with pytest.raises(ConfigError, match="config.json: cannot be read"):
        run_tasks(Preparation(project, "build", {}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "holds no settings"),
        ("null", "holds no settings"),
        ('"x"', "holds no settings"),
        ('{"chunk_length": null}', "chunk_length must not be null"),
        ('{"data_paths": null}', "data_paths must not be null"),
        ('{"index_memory_gb": Infinity}', "index_memory_gb must be a finite number, not inf"),
        (None, "cannot be read .*directory"),
    ],
)
def test_what_is_no_configuration(content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match=f"config.json: {words}"):
        run_tasks(Preparation(tmp_path, "build", {}))
    with pytest.raises(ConfigError, match=f"config.json: {words}"):
        load_project_config(tmp_path)


def test_tasks_in_their_order() -> None:
    assert expand_tasks("index-add, db-build,index-train") == ["db-build", "index-train", "index-add"]
    assert expand_tasks("build") == list(GROUPS["build"])
    assert expand_tasks("query-pretraining-neighbors") == ["query-neighbors"]
    with pytest.raises(ConfigError, match="no task 'index'; there are build, "):
        expand_tasks("index")
    assert with_following(["index-train"]) == {"index-train", "index-add"}


def test_a_moved_path_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = RetroDbConfig(embedder="model"), RetroDbConfig(embedder=str(tmp_path / "model"))
    assert list(changed_settings(old, new, GROUPS["build"], [])) == []
    more = dataclasses.replace(old, data_paths=["a"])
    assert any("--tasks add" in line for line in changed_settings(old, more, GROUPS["build"], []))


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_length": 0},
        {"recall": 0.0},
        {"valid_fraction": 1.0},
        {"num_neighbors_save": 300},
        {"min_chunk_tokens": 65},
        {"index_memory_gb": 0.0},
        {"ntrain": 0},
        {"max_overlap": 1.5},
        {"minhash_permutations": 2},
        {"data_paths": ["a", "a"]},
        {"data_paths": ["a", "./a"]},
        {"index_memory_gb": float("inf")},
        {"index_memory_gb": float("nan")},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_wrong_settings(change: dict[str, Any]) -> None:
    assert list(config_problems(RetroDbConfig())) == []
    problem, *_ = config_problems(dataclasses.replace(RetroDbConfig(), **change))
    assert next(iter(change)) in problem


def test_the_command_line() -> None:
    line = ["--project-dir", "db", "--chunk-length", "32", "--data_paths", "[a,b]", "--validate=0.1"]
    arguments = parse_command(BuildDbOptions, line, prog="build_db", description="")
    assert arguments.given == {"chunk_length": 32, "data_paths": ["a", "b"]}
    assert (arguments.tasks, arguments.validate, arguments.overwrite) == ("build", 0.1, "")
    for wrong in (["--chunk-lengths", "3"], ["--chunk-length", "three"], ["--metric", "cosine"]):
        with pytest.raises(ConfigError, match=wrong[0]):
            parse_command(BuildDbOptions, ["--project-dir", "db", *wrong], prog="build_db", description="")
