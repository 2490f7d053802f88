"""Contexts beside questions: what is built, and that rows read them where generation does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.config.checks.run import find_errors
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.indexed.reader import file_paths
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.kinds.generative import GenerativeStream
from megatron_grit.data.order.sources import OpenFiles
from megatron_grit.data.qa import builder
from megatron_grit.data.qa.builder import build_blend, build_qa
from megatron_grit.data.qa.options import QaTraining
from megatron_grit.data.qa.prompts import encode_example, encode_question
from megatron_grit.data.qa.records import read_records
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.rows.neighbors import Neighbors
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError, GritError
from megatron_grit.inference.reading import GivenNeighbors, Passage, Reader
from tests.corpus import sentences

CHUNK = 8
QUESTIONS = [
    {"question": question, "answers": [answer], "ctxs": [other for _, other in sentences(5, number)][: number % 4]}
    for number, (question, answer) in enumerate(sentences(12, 3))
]


def build(folder: Path, tokenizer: Tokenizer, **options: object) -> Path:
    (folder / "in.json").write_text(json.dumps(QUESTIONS))
    how = {"prompt_template": "short", "encoder_neighbours": 2, "neighbour_len": 11, "max_len": 400} | options
    build_qa(folder / "in.json", folder / "q", QaTraining(tokenizer=str(tokenizer.path), **how))  # type: ignore[arg-type]
    return folder / "q"


def run_of(folder: Path, **retro: object) -> RunConfig:
    config = RunConfig()
    config.data.generative, config.data.neighbors = [str(folder / "q")], "contexts"
    config.data.tokenizer = str(folder / "tokenizer")
    config.data.tokens_per_row = 400
    config.training.objective, config.training.generative_batch_size = "generative", 12
    config.model.retro = RetroConfig(**{"num_neighbors": 2, "layers": [0], "chunk_length": CHUNK} | retro)  # type: ignore[arg-type]
    return config


def read_by_generation(tokens: Sequence[int], prompt: int, contexts: list[list[int]]) -> dict[int, list[list[int]]]:
    """What is read from which token on, where an answer is generated."""
    reader = Reader(GivenNeighbors([[Passage(ids) for ids in contexts]]), CHUNK, CHUNK, [prompt])
    return texts_by_stop(reader.read([0], [tokens], [0]), 0, len(tokens))


def texts_by_stop(neighbors: Neighbors, first: int, last: int) -> dict[int, list[list[int]]]:
    """The texts of the chunks of a segment, by where the chunk ends in it."""
    texts = np.split(neighbors.tokens_1N[0].numpy(), np.cumsum(neighbors.lengths_U)[:-1])
    return {
        int(stop) - first: [texts[text].tolist() for text in row if text >= 0]
        for (_, stop), end, row in zip(
            neighbors.chunk_bounds_C2, neighbors.segment_ends_C, neighbors.text_of_Ck, strict=True
        )
        if first < stop <= last and end == last and (row >= 0).any()
    }


@pytest.mark.parametrize("conditioning", ["chunk", "none"])
def test_rows_read_where_generation_does(conditioning: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    build(tmp_path, tokenizer)
    config = run_of(tmp_path, encoder_conditioning=conditioning)
    loader = GritDataLoader(config, tokenizer)
    rows = loader.batch(0).parts["generative"].rows
    how = QaTraining(tokenizer=str(tokenizer.path), prompt_template="short")
    records = list(read_records(tmp_path / "in.json"))
    prompts = [encode_question(tokenizer, record, how, 400) for record in records]
    seen, shortest = 0, min(map(len, prompts))
    for row in rows:
        assert row.neighbors is not None
        bounds = row.cu_seqlens.tolist()
        for (first, last), name in zip(zip(bounds, bounds[1:], strict=False), row.record_ids, strict=False):
            number = int(str(name).rsplit("#")[-1])
            tokens = row.tokens_1T[0, first:last].tolist()
            contexts = [tokenizer.encode(text)[:11] for text in records[number].contexts[1:3]]
            expected = read_by_generation(tokens, len(prompts[number]), contexts)
            assert texts_by_stop(row.neighbors, first, last) == expected
            assert bool(expected) == bool(contexts) and (not contexts or len(prompts[number]) in expected)
            seen += 1
        if conditioning == "none":
            assert len(row.neighbors.lengths_U) <= 2 * (len(bounds) - 1), "a text is encoded once for each question"
    assert seen == len(QUESTIONS) and shortest > CHUNK
    assert loader.versions_read()[0]["identity"] == IndexedRecords(f"{tmp_path / 'q'}_contexts").meta.bin_sha256


def test_records_and_contexts_on_disk(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = build(tmp_path, tokenizer)
    records, how = IndexedRecords(prefix), QaTraining(tokenizer=str(tokenizer.path), prompt_template="short")
    for number, record in enumerate(read_records(tmp_path / "in.json")):
        assert [(role, ids.tolist()) for role, ids in records.get(number)] == encode_example(
            tokenizer, record, how, 400
        )
    # Without any context there is no file of them, and nothing of an earlier build stays.
    build(tmp_path, tokenizer, encoder_neighbours=0, overwrite=True)
    assert not any(path.exists() for path in file_paths(f"{prefix}_contexts"))
    config = run_of(tmp_path)
    row = GritDataLoader(config, tokenizer).batch(0).parts["generative"].rows[0]
    assert row.neighbors is not None and not len(row.neighbors.lengths_U)


def test_a_gate_of_0_reads_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    build(tmp_path, tokenizer)
    config = run_of(tmp_path, gate=0.0)
    config.data.neighbors = "database"  # of which there is none
    row = GritDataLoader(config, tokenizer).batch(0).parts["generative"].rows[0]
    assert row.neighbors is None
    assert not [error for error in find_errors(config, 1) if "retro_project" in str(error)]
    config.model.retro.gate = 1.0
    assert [error for error in find_errors(config, 1) if "data.retro_project is not set" in str(error)]


def test_questions_that_are_not_fit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, how = tmp_path / "in.json", {"tokenizer": str(tokenizer.path), "prompt_template": "short"}
    path.write_text(json.dumps([{"question": "who?", "answers": []}, {"question": "where?", "answer": "there"}]))
    counts = build_qa(path, tmp_path / "q", QaTraining(**how))  # type: ignore[arg-type]
    assert (counts["records"], counts["dropped"]) == (1, 1)
    (line,) = (tmp_path / "q.rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["item"] == 1 and "item 1: has no answer" in json.loads(line)["message"]
    with pytest.raises(DataError, match="item 1: has no answer"):
        build_qa(path, tmp_path / "q", QaTraining(**how, on_filtered="stop", overwrite=True))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="exists already"):
        build_qa(path, tmp_path / "q", QaTraining(**how))  # type: ignore[arg-type]
    with pytest.raises(GritError, match="in.json"):
        build_qa(path, tmp_path / "in", QaTraining(**how, overwrite=True))  # type: ignore[arg-type]
    said = QaTraining(**how, no_answer="nobody knows", overwrite=True)  # type: ignore[arg-type]
    assert build_qa(path, tmp_path / "q", said)["records"] == 2
    assert not (tmp_path / "q.rejected.jsonl").exists()
    answers = [ids for role, ids in IndexedRecords(tmp_path / "q").get(0) if role is Role.ANSWER]
    assert tokenizer.decode(answers[0].tolist()).strip() == "nobody knows"
    with pytest.raises(DataError, match=r"no question to train on; of 2 the first: .*item 1: has no answer"):
        build_qa(path, tmp_path / "q", QaTraining(**how, max_len=10, overwrite=True))  # type: ignore[arg-type]


def test_contexts_of_another_file_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = build(tmp_path, tokenizer)
    build_qa(tmp_path / "in.json", tmp_path / "r", QaTraining(tokenizer=str(tokenizer.path), reuse_top=True))
    for own, other in zip(file_paths(f"{prefix}_contexts"), file_paths(tmp_path / "r_contexts"), strict=True):
        own.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"contexts of 12 records, and .*q.json says .* of 12; build .* again"):
        GritDataLoader(run_of(tmp_path), tokenizer)
    for path in file_paths(f"{prefix}_contexts"):
        path.unlink()
    with pytest.raises(DataError, match="q_contexts"):
        GritDataLoader(run_of(tmp_path), tokenizer)


def test_blends_are_built_once(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("blend.sh").write_text('DATA_BLEND="0.7 a 0.3 b"')
    for name, splits in (("a", ("train", "dev")), ("b", ("train",))):
        Path("data", name).mkdir(parents=True)
        for split in splits:
            Path("data", name, f"{name}_QA_{split}.json").write_text(json.dumps(QUESTIONS[: 3 + len(name + split)]))
    how = QaTraining(tokenizer=str(tokenizer.path), prompt_template="short")
    build_blend("blend.sh", "data", "out", how)
    config = RunConfig()
    config.data.generative, config.data.valid = ["out/train.yaml"], ["out/valid.yaml"]
    stream = GenerativeStream(config, tokenizer, OpenFiles())
    entries = [(entry.path, entry.weight) for entry in stream.sources.entries]
    assert entries == [("out/a_train", 0.7), ("out/b_train", 0.3)]
    assert Path("out/valid.yaml").read_text().count("path") == 1
    times = {path: path.stat().st_mtime_ns for path in Path("out").glob("*[nv].bin")}
    Path("data/b/b_QA_train.json").write_text(json.dumps(QUESTIONS[:2]))
    build_blend("blend.sh", "data", "out", how)
    changed = [path.name for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == ["b_train.bin"]
    Path("data/b/b_QA_train.json").unlink()
    with pytest.raises(ConfigError, match=r"^blend.sh: entry 2: there is no data/b/b_QA_train.json; put the data set"):
        build_blend("blend.sh", "data", "out", how)


def test_a_build_that_was_killed_is_not_taken_for_an_earlier_one(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for one of the options that were there before it."""
    monkeypatch.chdir(tmp_path)
    Path("blend.sh").write_text('DATA_BLEND="1 a"')
    Path("data", "a").mkdir(parents=True)
    Path("data", "a", "a_QA_train.json").write_text(json.dumps(QUESTIONS))
    first, other = (
        QaTraining(tokenizer=str(tokenizer.path), prompt_template="short", ft_neighbours=count) for count in (1, 2)
    )
    build_blend("blend.sh", "data", "out", first)
    expected = Path("out/a_train.bin").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(builder, "write_json", _interrupted)
        build_blend("blend.sh", "data", "out", other)
    build_blend("blend.sh", "data", "out", first)
    assert Path("out/a_train.bin").read_bytes() == expected


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
