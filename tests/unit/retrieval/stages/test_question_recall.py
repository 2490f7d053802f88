"""Recall for questions: measured beside that for chunks, or at any time later, and used where questions are asked."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss")

from megatron_grit.config.database.schema import load_project_config  # noqa: E402
from megatron_grit.data.chunks.neighbor_table import read_table_manifest  # noqa: E402
from megatron_grit.data.chunks.project import Project  # noqa: E402
from megatron_grit.data.chunks.versions import read_version, version_numbers  # noqa: E402
from megatron_grit.errors import ConfigError, DataError  # noqa: E402
from megatron_grit.retrieval.index.recall import QUESTIONS_FILE, RECALL_AT, SearchSettings, read_search  # noqa: E402
from megatron_grit.retrieval.index.recall_queries import RecallQuestions  # noqa: E402
from megatron_grit.retrieval.retriever import Retriever  # noqa: E402
from megatron_grit.retrieval.stages import inspect, run  # noqa: E402
from megatron_grit.retrieval.stages.inspect import inspect_database, report_lines  # noqa: E402
from megatron_grit.retrieval.stages.preparation import Preparation  # noqa: E402
from megatron_grit.retrieval.stages.run import dry_run, run_tasks  # noqa: E402
from megatron_grit.store.sealed import write_sealed  # noqa: E402
from tests.corpus import sentences  # noqa: E402
from tests.unit.retrieval.databases import WordEmbedder, make_texts, tokenizer_of, write_documents  # noqa: E402

Given = dict[str, Any]


@pytest.fixture
def embedders(monkeypatch: pytest.MonkeyPatch) -> list[WordEmbedder]:
    """Every embedder that a command loads."""
    loaded: list[WordEmbedder] = []

    def load(*_: object, **__: object) -> WordEmbedder:
        loaded.append(WordEmbedder())
        return loaded[-1]

    for module in (run, inspect):
        monkeypatch.setattr(module, "project_embedder", load)
    return loaded


@pytest.fixture
def given(tmp_path: Path, embedders: list[WordEmbedder]) -> Given:
    return {
        "data_paths": [write_documents(tmp_path / "a", make_texts(60), tokenizer_of(tmp_path))],
        "tokenizer": str(tmp_path / "tokenizer.model"),
        "embedder": "words",
        "chunk_length": 8,
        "block_size": 64,
        "index": "IVF16,Flat",
        "recall": 0.7,
        "num_neighbors_query": 10,
        "num_neighbors_save": 3,
    }


def build(folder: Path, given: Given, tasks: str = "db-build,index-build", **options: Any) -> Path:
    run_tasks(Preparation(folder, tasks, given, **options))
    return folder


def questions_of(count: int, seed: int = 3) -> list[str]:
    return [question for question, _ in sentences(count, seed=seed)][:count]


def write_questions(path: Path, texts: list[str]) -> str:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


def searches(folder: Path) -> tuple[Path, Path]:
    (chunks,) = folder.glob("index/*/*/search.json")
    return chunks, chunks.with_name(QUESTIONS_FILE)


def found_by(retriever: Retriever, texts: list[str]) -> np.ndarray:
    """Recall of each text: what the retriever finds, against a comparison with all live chunks in numpy."""
    db, embedder = retriever._opened.db, WordEmbedder()
    vectors = embedder.embed(db.texts(range(len(db)))).astype(np.float64)
    distances = (vectors**2).sum(1) - 2 * embedder.embed(texts).astype(np.float64) @ vectors.T
    distances[:, np.isin(db.keys(np.arange(len(db))), db.tombstones)] = np.inf
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :RECALL_AT]
    hits = retriever.search(texts, k=RECALL_AT).ids
    return (nearest[:, :, None] == hits[:, None, :]).any(2).mean(1)


def test_both_populations_are_measured_in_one_pass(tmp_path: Path, given: Given, embedders: list[WordEmbedder]) -> None:
    """With questions a build embeds them and nothing else in addition; what chunks find is what it was without."""
    plain = build(tmp_path / "plain", given)
    path = write_questions(tmp_path / "q.txt", [*questions_of(90), "", *questions_of(3)])
    folder = build(tmp_path / "db", given | {"recall_queries": path})
    without, both = (embedder.num_embedded for embedder in embedders)
    assert both - without == len(set(questions_of(90)))
    (chunks, questions), (alone, nothing) = searches(folder), searches(plain)
    assert chunks.read_bytes() == alone.read_bytes() and not nothing.exists()
    assert read_search(chunks).population == "chunks"
    found = read_search(questions)
    assert (found.population, found.queries, found.version) == ("questions", f"texts of {path}", 1)
    assert found.queries_sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert not (folder / "index" / "recall_queries" / "questions" / "exact").exists()


def test_questions_are_measured_at_any_time(
    tmp_path: Path, given: Given, embedders: list[WordEmbedder], caplog: pytest.LogCaptureFixture
) -> None:
    """Of a database that was built without them; again where the questions differ, and not otherwise."""
    folder = build(tmp_path / "db", given)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "config.json"}
    path = tmp_path / "q.jsonl"
    lines = [{"query": text, "pos": ["x"]} for text in questions_of(40)] + [{"query": ["find it", "who"]}, "what is"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (line,) = [
        line for line in dry_run(Preparation(folder, "recall", {"recall_queries": str(path)})) if "asked" in line
    ]
    count = len(set(questions_of(40))) + 2
    assert line == f"recall_queries: {count} questions of {path}, {count} of them are asked"
    build(folder, {"recall_queries": str(path)}, "recall")
    assert {path: path.read_bytes() for path in before} == before, "what was built was changed"
    beside = searches(folder)[1]
    first = read_search(beside)
    assert first.num_queries == count - count // 4 and first.signature
    config = load_project_config(folder)
    assert config is not None and config.recall_queries == str(path)
    stamp = beside.stat().st_mtime_ns
    build(folder, {}, "recall")
    assert beside.stat().st_mtime_ns == stamp and embedders[-1].num_embedded == 0
    text = write_questions(tmp_path / "other.txt", questions_of(80, seed=8))
    build(folder, {"recall_queries": text}, "recall")
    again = read_search(beside)
    assert again.signature != first.signature and again.queries == f"texts of {text}"
    beside.write_text("{")
    build(folder, {}, "recall")
    assert read_search(beside) == again, "damaged, and measured again"
    assert version_numbers(folder) == [1]
    # The vectors of questions are compared like any others.
    assert (
        run.validate_task(run.TASKS["recall"], run.Job(Project(folder, config), run.Worker(), WordEmbedder()), 1.0) == 1
    )


def test_a_database_that_has_grown_is_measured_whole(tmp_path: Path, given: Given) -> None:
    """Chunks that came count, removed ones do not; what was promised is what a retriever then finds."""
    folder = build(tmp_path / "db", given)
    added = write_documents(tmp_path / "b", make_texts(50, seed=9), tokenizer_of(tmp_path))
    build(folder, {"data_paths": [*given["data_paths"], added]}, "add")
    build(folder, {}, "tombstone", tombstone="a:0,a:7,b:3")
    build(folder, {"recall_queries": write_questions(tmp_path / "q.txt", questions_of(100))}, "recall")
    settings = read_search(searches(folder)[1])
    assert settings.version == 3 == read_version(folder).number
    retriever = Retriever(folder, WordEmbedder())
    drawn = RecallQuestions(retriever._opened.db.project, WordEmbedder().fingerprint).drawn.texts
    found = found_by(retriever, drawn)[len(drawn) // 4 :]
    assert len(found) == settings.num_queries and settings.recall < 1
    assert settings.recall == pytest.approx(found.mean(), abs=1e-9)
    assert settings.recall_low < settings.recall < settings.recall_high
    summary = list(report_lines(inspect_database(folder)))
    assert any(line.startswith("search for chunks: nprobe") for line in summary)
    assert any(line.startswith("search for questions: nprobe") and "in version 3" in line for line in summary)


def test_each_population_gets_its_own_search(tmp_path: Path, given: Given, caplog: pytest.LogCaptureFixture) -> None:
    folder = build(tmp_path / "db", given)
    chunks, questions = searches(folder)
    Retriever(folder, WordEmbedder())
    Retriever(folder, WordEmbedder())
    inspect_database(folder, inspect.Questions(searches=["what is a file"]))
    (warning,) = [record.message for record in caplog.records if "was not measured" in record.message]
    assert f"{read_search(chunks).recall:.3f} was measured on chunks of the database; what questions find" in warning
    assert warning.endswith(f"build-db --project-dir {folder} --tasks recall --recall_queries FILE")
    caplog.clear()
    build(folder, {"recall_queries": write_questions(tmp_path / "q.txt", questions_of(30))}, "recall")
    settings = read_search(questions)
    nprobe = read_search(chunks).nprobe
    assert nprobe is not None
    write_sealed(questions, dataclasses.asdict(dataclasses.replace(settings, nprobe=nprobe + 3)))
    retriever = Retriever(folder, WordEmbedder())
    assert retriever._opened.index.nprobe == nprobe + 3
    assert Retriever(folder, WordEmbedder(), population="chunks")._opened.index.nprobe == nprobe
    with pytest.raises(ConfigError, match="population must be one of chunks, questions, not 'prompts'"):
        Retriever(folder, WordEmbedder(), population="prompts")  # type: ignore[arg-type]
    build(folder, {}, "query-neighbors")
    (table,) = folder.glob("query/*/table.json")
    manifest = read_table_manifest(table.parent)
    assert manifest.nprobe == nprobe and manifest.recall == read_search(chunks).recall
    assert not [record for record in caplog.records if "was not measured" in record.message]


def test_where_all_are_compared_nothing_is_promised_to_anybody(
    tmp_path: Path, given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build(tmp_path / "db", given | {"index": "Flat"})
    Retriever(folder, WordEmbedder()).search("what")
    assert not [record for record in caplog.records if "not measured" in record.message]


def test_a_database_of_an_earlier_release(tmp_path: Path, given: Given, caplog: pytest.LogCaptureFixture) -> None:
    """Its search.json does not name the population: chunks, or the texts that it was measured on."""
    folder = build(tmp_path / "db", given)
    (path, _), new = searches(folder), {"population", "queries_sha256", "version"}
    old = {name: value for name, value in dataclasses.asdict(read_search(path)).items() if name not in new}
    write_sealed(path, old)
    assert read_search(path).population == "chunks"
    write_sealed(path, old | {"queries": "texts of q.txt"})
    assert read_search(path).population == "questions"
    Retriever(folder, WordEmbedder())
    assert not [record for record in caplog.records if "was not measured" in record.message]
    build(folder, {}, "query-neighbors")
    (warning,) = [record.message for record in caplog.records if "was not measured" in record.message]
    assert "measured on texts of q.txt; what chunks find" in warning
    assert warning.endswith("--tasks index-add --overwrite index-add")
    (table,) = folder.glob("query/*/table.json")
    assert read_table_manifest(table.parent).recall is None
    build(folder, {}, "index-add", overwrite="index-add")
    assert read_search(path).population == "chunks"


def test_what_is_no_file_of_questions(tmp_path: Path, given: Given, embedders: list[WordEmbedder]) -> None:
    folder = build(tmp_path / "db", given)
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="recall_queries is null; give --recall_queries FILE"):
        build(folder, {}, "recall")
    path = tmp_path / "q.jsonl"
    for content, words in (
        ("\n", "q.jsonl: holds no question"),
        ('"a"\n{"answer": "b"}\n', "q.jsonl:2: holds none of the keys query, question, prompt, text"),
        ('{"query": 3}\n', "q.jsonl:1: a question must be a string, not 3"),
        ("what\n", "q.jsonl:1: .*JSON"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            build(folder, {"recall_queries": str(path)}, "recall")
    with pytest.raises(DataError, match="no.txt: no such file; recall_queries is a text file"):
        build(folder, {"recall_queries": "no.txt"}, "recall")
    with pytest.raises(DataError, match=f"{tmp_path}: is a folder; recall_queries is a text file"):
        build(folder, {"recall_queries": str(tmp_path)}, "recall")
    assert len(embedders) == 1, "an embedder was loaded for what is known to be wrong"
    assert (folder / "config.json").read_bytes() == before, "what was refused is not kept"
    packed = tmp_path / "q.txt.gz"
    packed.write_bytes(gzip.compress(b'who wrote it\n\n{"query": "x"}\nwho wrote it\n'))
    config = dataclasses.replace(load_project_config(folder), recall_queries=str(packed))  # type: ignore[type-var]
    assert RecallQuestions(Project(folder, config), "").texts() == ["who wrote it", '{"query": "x"}']


@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF16,PQ8x6"])
def test_what_is_promised_is_found_by_questions_that_chose_nothing(tmp_path: Path, given: Given, factory: str) -> None:
    """By each population: half of the questions promise, the other half are asked."""
    texts = make_texts(500, seed=4)
    given |= {"data_paths": [write_documents(tmp_path / "c", texts, tokenizer_of(tmp_path))], "index": factory}
    asked = sorted(map(" ".join, zip(questions_of(900, 11), questions_of(900, 12), strict=False)))
    asked = list(dict.fromkeys(asked))
    path = write_questions(tmp_path / "q.txt", asked[::2])
    folder = build(tmp_path / "db", given | {"recall_queries": path, "block_size": 2000})
    promised: SearchSettings = read_search(searches(folder)[1])
    found = found_by(Retriever(folder, WordEmbedder()), asked[1::2]).mean()
    interval = f"[{promised.recall_low:.4f}, {promised.recall_high:.4f}]"
    print(f"{factory}, questions: promised {promised.recall:.4f} {interval}, found {found:.4f} by {len(asked[1::2])}")
    print(f"chunks: promised {read_search(searches(folder)[0]).recall:.4f}")
    assert promised.population == "questions"
    assert abs(found - promised.recall) <= 0.01 or promised.recall_low <= found <= promised.recall_high
