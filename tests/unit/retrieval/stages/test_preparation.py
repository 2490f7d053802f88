"""What a build refuses before it changes anything, and what it never changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.database.schema import load_project_config, version_numbers
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import VersionedDb, check_stored, read_version
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.database import versions
from megatron_grit.retrieval.stages import add, index_add
from megatron_grit.retrieval.stages import run as stages
from megatron_grit.retrieval.stages.preparation import Preparation
from megatron_grit.retrieval.stages.run import run_tasks
from megatron_grit.store.sealed import read_sealed, write_sealed
from tests.unit.retrieval.databases import WordEmbedder, make_texts, tokenizer_of, write_documents

TEXTS = make_texts(25)
EVERYTHING = "db-build,embed,index-train,index-add,query-neighbors"


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a small build, whose embedder needs no model."""
    tokenizer = tokenizer_of(tmp_path)
    monkeypatch.setattr(stages, "project_embedder", lambda config, **_: WordEmbedder(name=str(config.embedder)))
    return {
        "data_paths": [write_documents(tmp_path / "a", TEXTS, tokenizer)],
        "tokenizer": str(tmp_path / "tokenizer.model"),
        "embedder": "words",
        "chunk_length": 8,
        "block_size": 32,
        "index": "Flat",
        "num_neighbors_query": 10,
        "num_neighbors_save": 3,
    }


@pytest.fixture
def project(tmp_path: Path, given: dict[str, Any]) -> Path:
    run_tasks(Preparation(tmp_path / "db", "build", given))
    return tmp_path / "db"


def content_of(project: Path) -> dict[str, bytes]:
    return {str(p.relative_to(project)): p.read_bytes() for p in sorted(project.rglob("*")) if p.is_file()}


def test_documents_are_given_as_a_run_takes_them(
    tmp_path: Path, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    other = write_documents(tmp_path / "b", make_texts(5, seed=3), tokenizer_of(tmp_path))
    blend = tmp_path / "blend.yaml"
    blend.write_text(f"- {given['data_paths'][0]}\n- {{path: {other}, epochs: 2}}\n")
    wanted = [*given["data_paths"], other]
    caplog.set_level("INFO")
    for said in ([f"0.7 {wanted[0]} 0.3 {other}"], ["0.7", wanted[0], "0.3", other], [str(blend)]):
        caplog.clear()
        assert Preparation(tmp_path / "db", "build", given | {"data_paths": said}).wanted.data_paths == wanted
        assert "weights and epochs are left aside" in caplog.text
    blend.write_text(f"- {{path: {other}, cap: 2}}\n")
    with pytest.raises(ConfigError, match="query_paths: a database has no cap of a source"):
        Preparation(tmp_path / "db", "build", given | {"query_paths": [str(blend)]})


def append(given: dict[str, Any], tmp_path: Path) -> None:
    write_documents(Path(given["data_paths"][0]), TEXTS + make_texts(9, seed=1), tokenizer_of(tmp_path))


def stop_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, *, after: bool = False) -> pytest.MonkeyPatch:
    """End the process at a function, or right after it, like a kill that nothing can clean up after."""
    function: Callable[..., Any] = getattr(module, name)

    def stopping(*arguments: Any, **options: Any) -> None:
        if after:
            function(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, stopping)
    return monkeypatch


@pytest.mark.parametrize("tasks", ["build", "db-build", "embed", "index-build"])
def test_appended_documents_never_change_a_version(
    project: Path, given: dict[str, Any], tmp_path: Path, tasks: str
) -> None:
    before = content_of(project)
    append(given, tmp_path)
    with pytest.raises(DataError, match="9 documents were appended since version 1 .*; add them with --tasks add"):
        run_tasks(Preparation(project, tasks, {}))
    assert content_of(project) == before
    run_tasks(Preparation(project, f"add,{tasks}", {}))
    assert version_numbers(project) == [1, 2]
    after = content_of(project)
    assert {name: after[name] for name in before} == before
    run_tasks(Preparation(project, tasks, {}))
    assert content_of(project).keys() >= after.keys()


@pytest.mark.parametrize("without_json", [True, False])
def test_another_tokenizer_in_the_same_place(project: Path, given: dict[str, Any], without_json: bool) -> None:
    from megatron_grit.data.text.tokenizer import train_sentencepiece

    path = Path(given["data_paths"][0] + ".json")
    if without_json:  # then nothing tells what the documents were made with
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError, match="its .json was removed or made anew since version 1"):
            run_tasks(Preparation(project, "build", {}))
        run_tasks(Preparation(project, "build", {}, overwrite="db-build"))
        path.write_bytes(content)
        path.unlink()
    before = content_of(project)
    train_sentencepiece(make_texts(50, seed=8), Path(given["tokenizer"]).with_suffix(""), 380)
    words = "train.hdf5: is part of version 2 of the database" if without_json else "built with another tokenizer"
    with pytest.raises(DataError, match=words):
        run_tasks(Preparation(project, "build", {}))
    assert content_of(project) == before


def test_an_addition_that_was_refused_leaves_no_trace(project: Path, given: dict[str, Any], tmp_path: Path) -> None:
    before, paths = content_of(project), given["data_paths"]
    with pytest.raises(DataError, match="typo: no such indexed file"):
        run_tasks(Preparation(project, "add", {"data_paths": [*paths, str(tmp_path / "typo")]}))
    assert content_of(project) == before
    with pytest.raises(ConfigError, match="to add documents, give the old paths and then the new ones"):
        run_tasks(Preparation(project, "add", {"data_paths": [str(tmp_path / "new")]}))
    run_tasks(Preparation(project, "build", {}))
    # Even if a command of before kept it.
    config = project / "config.json"
    write_sealed(config, read_sealed(config) | {"data_paths": [*paths, "typo"]})
    right = [*paths, write_documents(tmp_path / "b", make_texts(9, seed=1), tokenizer_of(tmp_path))]
    with pytest.raises(ConfigError, match="documents are added with --tasks add"):
        run_tasks(Preparation(project, "query-neighbors", {}))
    run_tasks(Preparation(project, "add,query-neighbors", {"data_paths": right}))
    assert [source.prefix for source in read_version(project).sources] == right


@pytest.mark.parametrize("moment", ["begun", "made", "written"])
def test_an_addition_that_was_killed(
    project: Path, given: dict[str, Any], tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = read_version(project)
    old = given["data_paths"]
    new = [*old, write_documents(tmp_path / "b", make_texts(9, seed=1), tokenizer_of(tmp_path))]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "begun":
            stop_at(patch, add, "writing_table")
        else:
            stop_at(patch, versions, "write_version", after=moment == "written")
        run_tasks(Preparation(project, "add", {"data_paths": new}))
    config = load_project_config(project)
    assert config is not None and config.data_paths == old
    run_tasks(Preparation(project, "build", {}))
    for file in version.files():
        check_stored(project, file, thorough=True)
    config = load_project_config(project)
    assert config is not None and config.data_paths == (new if moment == "written" else old)
    run_tasks(Preparation(project, "add", {"data_paths": new}))
    assert [source.prefix for source in read_version(project).sources] == new
    config = load_project_config(project)
    assert config is not None and config.data_paths == new


def test_paths_keep_the_spelling_of_versions(
    project: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(given["data_paths"][0])
    monkeypatch.chdir(path.parent)
    run_tasks(Preparation(project, "build", {"data_paths": ["./a"]}))
    config = load_project_config(project)
    assert config is not None and config.data_paths == [str(path)]
    VersionedDb(Project(project, config), read_version(project))


def test_a_directory_of_another_kind_is_left_alone(tmp_path: Path, given: dict[str, Any]) -> None:
    for name in ("db/x", "query/y", "index/z"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True)
        (tmp_path / "mine" / name).write_text("mine")
    for overwrite in ("", EVERYTHING):
        with pytest.raises(ConfigError, match="mine: holds db, index, query and no config.json"):
            run_tasks(Preparation(tmp_path / "mine", "build", given, overwrite=overwrite))
    assert sorted(content_of(tmp_path / "mine")) == ["db/x", "index/z", "query/y"]
    with pytest.raises(ConfigError, match="holds no config.json, so there is nothing to validate"):
        run_tasks(Preparation(tmp_path / "none", "build", {}, validate=0.5))
    assert not (tmp_path / "none").exists()


def test_a_file_is_no_directory(tmp_path: Path, given: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: is a file; give the directory of a database or a new one"):
        Preparation(tmp_path / "file", "build", given)


def test_only_leftovers_of_builds_are_removed(project: Path) -> None:
    left = [project / name for name in (".config.json.1.tmp", "db/merged/.train.hdf5.2.tmp", "index/.x.tmp")]
    others = [project / name for name in (".mine.tmp", "data/.corpus.bin.3.tmp")]
    for path in (*left, *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    run_tasks(Preparation(project, "db-build", {}))
    assert [path.exists() for path in (*left, *others)] == [False, False, False, True, True]


def test_the_number_of_a_version_is_used_once(
    project: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tasks(Preparation(project, "index-build", {"index": "IVF2,Flat"}, overwrite="index-train"))
    assert version_numbers(project) == [1, 2]
    with caplog.at_level("WARNING", "megatron_grit"):
        run_tasks(Preparation(project, "build", {"chunk_length": 16}, overwrite=EVERYTHING))
    said = "\n".join(record.message for record in caplog.records)
    assert "overwrite removes query" in said and "db/merged" in said
    assert "gives up versions 1, 2 of the database: whatever reads it cannot resume; the next one is 3" in said
    assert version_numbers(project) == [3]
    with pytest.raises(DataError, match="0001.json: was given up when the database was built again; .* there: 3"):
        read_version(project, 1)
    # Killed before the new one was written.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, versions, "write_version")
        run_tasks(Preparation(project, "build", {}, overwrite=EVERYTHING))
    run_tasks(Preparation(project, "build", {}))
    assert version_numbers(project) == [4]


def test_documents_are_not_lost_or_brought_back(project: Path, given: dict[str, Any], tmp_path: Path) -> None:
    run_tasks(Preparation(project, "tombstone", {}, tombstone="a:3"))
    before = content_of(project)
    with pytest.raises(ConfigError, match="--overwrite db-build would bring back 1 removed documents"):
        run_tasks(Preparation(project, "build", {}, overwrite="db-build"))
    assert content_of(project) == before
    # An index that is built again passes over them still.
    run_tasks(Preparation(project, "index-build", {"index": "IVF2,Flat"}, overwrite="index-train"))
    assert (read_version(project).number, read_version(project).num_tombstones) == (3, 1)
    append(given, tmp_path)
    run_tasks(Preparation(project, "add", {}))
    before = content_of(project)
    for stage in ("db-build", "embed", "index-train", "index-add"):
        with pytest.raises(ConfigError, match="would lose the documents that were added"):
            run_tasks(Preparation(project, "build", {}, overwrite=stage))
    assert content_of(project) == before


def test_a_version_in_use_is_not_made_anew(project: Path) -> None:
    run_tasks(Preparation(project, "query-neighbors", {"version": 1}))
    for stage in ("db-build", "index-train", "index-add"):
        with pytest.raises(ConfigError, match="what version 1 is made of, which config.json names; .*--version null"):
            run_tasks(Preparation(project, "build", {}, overwrite=stage))
    run_tasks(Preparation(project, "build", {}, overwrite="embed"))
    run_tasks(Preparation(project, "index-build", {"version": None}, overwrite="index-add"))


def test_a_version_that_is_not_there_is_not_kept(project: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    for tasks in ("query-neighbors", "db-build"):
        with pytest.raises(DataError, match="0007.json: is missing; versions that are there: 1"):
            run_tasks(Preparation(project, tasks, {"version": 7}))
    run_tasks(Preparation(project, "query-neighbors", {}))
    # The version that a build is about to make is there when it is needed.
    run_tasks(Preparation(tmp_path / "other", "build", given | {"version": 1}))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '[{"prefix": 3}]', '[{"prefix": "a", "n_docs": 1}]'])
def test_a_damaged_list_of_datasets_is_made_again(project: Path, given: dict[str, Any], content: str) -> None:
    before = content_of(project)
    (project / "db" / "indexed_dataset_infos.json").write_text(content)
    run_tasks(Preparation(project, "build", {}))
    after = content_of(project)
    assert {name for name in before if after[name] != before[name]} == set()


def test_the_sample_is_counted_again(tmp_path: Path, given: dict[str, Any]) -> None:
    path = tmp_path / "db" / "db" / "indexed_dataset_infos.json"
    run_tasks(Preparation(tmp_path / "db", "build", given | {"index": "IVF4,Flat"}))
    before = path.read_text()
    assert json.loads(before)[0]["n_chunks_sampled"] > 0
    path.unlink()
    run_tasks(Preparation(tmp_path / "db", "build", {}))
    assert path.read_text() == before


@pytest.mark.parametrize("tasks", ["embed", "index-train", "index-add", "query-neighbors", "build"])
def test_an_embedder_that_was_changed_in_place(project: Path, tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content_of(project)
    monkeypatch.setattr(stages, "project_embedder", lambda config, **_: WordEmbedder(name="changed"))
    with pytest.raises(DataError, match="words: is another embedder than that of version 1"):
        run_tasks(Preparation(project, tasks, {}))
    assert content_of(project) == before
    run_tasks(Preparation(project, "build", {}, overwrite="embed,index-train"))
    assert read_version(project).number == 2


def test_before_there_is_a_version(tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "db"
    run_tasks(Preparation(folder, "db-build,embed", given))
    before = {name: data for name, data in content_of(folder).items() if name.startswith("embeddings")}
    monkeypatch.setattr(stages, "project_embedder", lambda config, **_: WordEmbedder(name="changed"))
    with pytest.raises(DataError, match=r"blocks are of another embedder or of other chunks; .*--overwrite embed"):
        run_tasks(Preparation(folder, "embed", {}))
    assert {name: data for name, data in content_of(folder).items() if name.startswith("embeddings")} == before
    run_tasks(Preparation(folder, "embed", {}, overwrite="embed"))
    # A whole index, whose version was not written: an untrained file is the same for all embedders.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, index_add, "record_version")
        run_tasks(Preparation(folder, "build", {}))
    monkeypatch.setattr(stages, "project_embedder", lambda config, **_: WordEmbedder(name="again"))
    run_tasks(Preparation(folder, "index-build,query-neighbors", {}))
    assert read_version(folder).embedder == WordEmbedder(name="again").fingerprint


def test_too_few_chunks_are_known_before_they_are_embedded(tmp_path: Path, given: dict[str, Any]) -> None:
    """Upper bounds come from the files, the count from db-build."""
    run_tasks(Preparation(tmp_path / "db", "db-build", given))
    config = load_project_config(tmp_path / "db")
    assert config is not None
    count = len(ChunkDb(Project(tmp_path / "db", config)))
    with pytest.raises(ConfigError, match=f"ntrain {count + 1} is above the {count} chunks"):
        run_tasks(Preparation(tmp_path / "new", "build", given | {"ntrain": count + 1, "index": "IVF4,Flat"}))
    assert (tmp_path / "new" / "db").is_dir() and not (tmp_path / "new" / "embeddings").exists()


def test_the_same_file_twice(tmp_path: Path, given: dict[str, Any]) -> None:
    (tmp_path / "db").mkdir()
    path = Path(given["data_paths"][0])
    for end in (".bin", ".idx", ".json"):  # a relative path may be below the project directory
        (tmp_path / "db" / f"a{end}").symlink_to(f"{path}{end}")
    run_tasks(Preparation(tmp_path / "db", "db-build", given | {"data_paths": ["a"]}))
    with pytest.raises(ConfigError, match="data_paths names /.*/db/a more than once, the second time as ../db/a"):
        run_tasks(
            Preparation(tmp_path / "db2", "db-build", given | {"data_paths": [str(tmp_path / "db/a"), "../db/a"]})
        )


def test_documents_of_an_unknown_tokenizer(
    tmp_path: Path, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    other = write_documents(tmp_path / "b", make_texts(5, seed=1), tokenizer_of(tmp_path))
    for prefix in (given["data_paths"][0], other):
        Path(prefix + ".json").unlink()
    with caplog.at_level("WARNING", "megatron_grit"):
        run_tasks(Preparation(tmp_path / "db", "db-build", given | {"data_paths": [*given["data_paths"], other]}))
    (line,) = [record.message for record in caplog.records if "without a .json" in record.message]
    assert f"{given['data_paths'][0]}, {other} was made with tokenizer" in line


def test_a_dry_run_changes_nothing(
    project: Path, tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in [project, *project.rglob("*")]}
    lines = stages.dry_run(Preparation(project, "build", {"num_neighbors_save": 2}, overwrite="index-train"))
    said = "\n".join(lines)
    for words in (
        r"version 1, \d+ chunks",
        "task db-build: there",
        "task index-add: again, from nothing",
        "a, 25, [0-9,]+ tokens",
        "embedder: words, 16 channels",
        r"index: Flat of \d+ chunks",
        "overwrite removes index",
        "overwrite takes the index of version 1 of the database",
    ):
        assert re.search(words, said), (words, said)
    assert {path: path.stat().st_mtime_ns for path in [project, *project.rglob("*")]} == before
    lines = stages.dry_run(Preparation(tmp_path / "new", "build", given))
    assert not (tmp_path / "new").exists()
    assert any(line.endswith("new, new") for line in lines) and "task embed: to do" in lines
    assert any("index: Flat of at most" in line for line in lines) and not any("such codes" in line for line in lines)
    lines = stages.dry_run(Preparation(tmp_path / "new", "build", given | {"index": "SQ8"}))
    assert any(
        re.search(r"such codes .* recall 0.95 .*db-build,index-train, which embeds at most \d", x) for x in lines
    )
    with pytest.raises(DataError, match="typo: no such indexed file"):
        stages.dry_run(Preparation(tmp_path / "new", "build", given | {"data_paths": ["typo"]}))
    monkeypatch.setenv("WORLD_SIZE", "6")
    spread = given | {"embedder_tensor": 2, "embedder_context": 3}
    assert any("not loaded here" in line for line in stages.dry_run(Preparation(tmp_path / "new", "build", spread)))
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="embedder_context 3 .* need a multiple of 6 processes, not 8"):
        stages.dry_run(Preparation(tmp_path / "new", "build", spread))
