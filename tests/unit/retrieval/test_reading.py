"""Answers that read a database: the same neighbors given by hand give the same answer, and their sources are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.cli import main as cli
from megatron_grit.config.database.schema import save_project_config
from megatron_grit.config.options import SamplingOptions
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.text.tokenizer import train_sentencepiece
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.messages import read_conversations
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.reading import sources_of
from megatron_grit.retrieval import retriever as retrievers
from megatron_grit.retrieval.retriever import Retriever
from megatron_grit.serving.service import Service
from tests.corpus import sentences, tiny_run
from tests.unit.retrieval.databases import CHUNK, WordEmbedder, build, make_project, make_texts, write_documents

pytest.importorskip("faiss")

QUESTION = "what does the parser do when it opens a file?"


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model that reads, and ``db``, a database of its tokenizer."""
    from megatron_grit.training.trainer import train

    config = tiny_run(tmp_path_factory.mktemp("reads"))
    config.training.objective, config.training.steps = "embedding", 1  # no neighbors are needed
    config.model.retro = RetroConfig(num_neighbors=2, chunk_length=CHUNK, layers=[1])
    config.model.init_std = 0.3  # random answers that change with what is read
    train(config)
    folder = Path(config.output_dir)
    tokenizer = GritModel.load(folder, device="cpu").tokenizer
    documents = write_documents(folder.parent / "documents", make_texts(12), tokenizer)
    project = make_project(folder.parent / "db", [documents], folder.parent)
    save_project_config(project.config, project.folder)
    build(project, WordEmbedder(), query=False)
    return folder


@pytest.fixture
def database(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(retrievers, "project_embedder", lambda *_, **__: WordEmbedder())
    return run_directory.parent / "db"


@pytest.fixture
def model(run_directory: Path) -> GritModel:
    return GritModel.load(run_directory, device="cpu")


def test_what_is_found_is_read(model: GritModel, database: Path) -> None:
    alone = model.generate(QUESTION, max_new_tokens=4)
    retriever = Retriever(database)
    model.read_from(retriever)
    conversation, _ = read_conversations(QUESTION)
    (answer,) = model.answer(conversation, SamplingOptions(max_new_tokens=4))
    assert answer.text != alone
    prompt = model.prompt_tokens(conversation[0])
    windows = [prompt[stop - CHUNK : stop] for stop in range(len(prompt), CHUNK - 1, -CHUNK)][::-1]
    assert [reading.token for reading in answer.readings] == [CHUNK * i for i in range(1 - len(windows), 1)]
    hits = retriever.search([model.tokenizer.decode(window) for window in windows], 2, length=2 * CHUNK)
    for row, reading in enumerate(answer.readings):
        expected = [tokens[there].tolist() for tokens, there in zip(hits.tokens[row], hits.mask[row], strict=True)]
        assert [passage.tokens for passage in reading.passages] == expected
    first = sources_of(answer.readings)[0]
    place = hits.sources[0][0]
    assert (first["document"], first["start"], first["stop"]) == (place.document, place.start, place.stop)
    assert first["metric"] == "l2" and first["score"] == pytest.approx(float(hits.scores[0, 0]))


def test_it_retrieves_as_often_as_is_asked(model: GritModel, database: Path) -> None:
    conversation, _ = read_conversations(QUESTION)
    for every in (1, 3, CHUNK):
        model.read_from(Retriever(database), every)
        (answer,) = model.answer(conversation, SamplingOptions(max_new_tokens=10))
        assert answer.num_tokens == 10
        assert [reading.token for reading in answer.readings if reading.token > 0] == list(range(every, 10, every))


def test_a_refused_database_is_not_read(model: GritModel, database: Path) -> None:
    alone = model.generate(QUESTION, max_new_tokens=4)
    with pytest.raises(ConfigError, match="must be at least 1, not 0"):
        model.read_from(Retriever(database), 0)
    for given in ("db", None):
        with pytest.raises(ConfigError, match=r'must be an open database, such as Retriever\("db"\), not'):
            model.read_from(given)  # type: ignore[arg-type]
    assert model.generate(QUESTION, max_new_tokens=4) == alone


def test_given_neighbors(model: GritModel) -> None:
    read = "The cursor sorts every byte."
    alone, texts = (
        model.generate(QUESTION, max_new_tokens=8),
        model.generate(QUESTION, max_new_tokens=8, neighbors=[read]),
    )
    ids = model.tokenizer.encode(read)
    assert texts != alone and model.generate(QUESTION, max_new_tokens=8, neighbors=[ids]) == texts
    several = [[read], [], ["Two lists.", "A queue."]]
    together = model.generate([QUESTION, "again", QUESTION], max_new_tokens=8, neighbors=several)
    assert together[0] == texts and together[1] == model.generate("again", max_new_tokens=8)
    assert model.generate(QUESTION, max_new_tokens=8, neighbors=["Two lists.", "A queue."]) == together[2]
    sampled = {model.generate(QUESTION, neighbors=[read], max_new_tokens=8, temperature=2, top_k=1, top_p=0.9)}
    assert sampled == {texts}, "the likeliest token alone"


def test_a_gate_that_is_closed_reads_nothing(
    model: GritModel, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = [model.generate(QUESTION, max_new_tokens=6) for _ in range(2)]
    assert [record.message for record in caplog.records if "generates without" in record.message] == [
        "this model was trained to read neighbors, and generates without them: give neighbors, or a database "
        "(--retro-project)"
    ]
    model.config.model.retro.gate = 0.0
    model.read_from(Retriever(database))
    assert model.generate(QUESTION, max_new_tokens=6) == alone[0]


def test_the_command_names_its_sources(
    run_directory: Path, database: Path, capsys: pytest.CaptureFixture[str], model: GritModel
) -> None:
    argv = ["generate", f"--checkpoint={run_directory}", "--device=cpu", f"--prompt={QUESTION}", "--max-new-tokens=6"]
    argv += [f"--retro-project={database}", "--retrieve-every=4"]
    assert cli.main(argv) == 0
    text, told = capsys.readouterr()
    lines = [line for line in told.splitlines() if line.startswith("source: ")]
    assert cli.main([*argv, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] + "\n" == text and len(answer["sources"]) == len(lines) > 1
    source = answer["sources"][0]
    place = f"document {source['document']}, tokens {source['start']}-{source['stop']}, l2 {source['score']:.4g}"
    assert f"source: {source['prefix']} {place}, read in the prompt" in lines
    # The server says the same.
    model.read_from(Retriever(database), 4)
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 6}
    served = Service(model, "tiny").chat(body)()
    assert served["choices"][0]["message"]["content"] == answer["text"] and served["sources"] == answer["sources"]


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("megatron-grit generate: error: ")


def test_what_cannot_be_read(
    run_directory: Path, database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], trained_run: Any
) -> None:
    argv = ["generate", f"--checkpoint={run_directory}", "--device=cpu", "--prompt=a"]
    assert refusal([*argv, f"--retro-project={tmp_path}"], capsys) == (
        f"retro_project {tmp_path}: holds no config.json; give the --project-dir of tools/retro/build_db.py"
    )
    alone = "retrieve_every is of retro_project, which is not given; give it, or leave retrieve_every out"
    assert refusal([*argv, "--retrieve-every=2"], capsys) == alone
    long = refusal([*argv, f"--retro-project={database}", "--retrieve-every=9"], capsys)
    assert long == f"retrieve_every must be at most the model's chunk_length {CHUNK}, not 9"

    def other_database(name: str, **settings: Any) -> str:
        config = replace(Project(database, retrievers.load_project_config(database)).config, **settings)  # type: ignore[arg-type, type-var]
        save_project_config(config, tmp_path / name)
        return refusal([*argv, f"--retro-project={tmp_path / name}"], capsys)

    (tmp_path / "chunks").mkdir()
    assert other_database("chunks", chunk_length=16).startswith(
        f"the database has chunks of 16 tokens, and the model was trained with model.retro.chunk_length {CHUNK}; give"
    )
    train_sentencepiece([text for pair in sentences(200, seed=8) for text in pair], tmp_path / "other", 300)
    (tmp_path / "tokens").mkdir()
    message = "the database was built with another tokenizer than the model's, "
    assert other_database("tokens", tokenizer=str(tmp_path / "other.model")).startswith(message)
    argv[1] = f"--checkpoint={trained_run.output_dir}"
    assert refusal([*argv, f"--retro-project={database}"], capsys).startswith("neighbors are for a model that was")


def test_neighbors_that_cannot_be(model: GritModel, trained_run: Any) -> None:
    for given, message in (
        (["a", "b", "c"], "neighbors must be a list of at most 2 texts"),
        ("a", "neighbors must be a list of at most 2 texts"),
        (5, "neighbors must be a list of at most 2 texts"),
        ([" "], "a neighbor is empty; leave it out"),
        ([[]], "a neighbor is empty; leave it out"),
        ([[1, 10**6]], "text 0 holds 1000000; ids of tokens are from 0 to"),
    ):
        with pytest.raises(DataError, match=message):
            model.generate(QUESTION, neighbors=given)  # type: ignore[arg-type]
    for given in ([["a"]], 5):
        with pytest.raises(DataError, match="a list for each of the 2 conversations"):
            model.generate([QUESTION, QUESTION], neighbors=given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="put their text into the prompt"):
        GritModel.load(trained_run.output_dir, device="cpu").generate(QUESTION, neighbors=["a"])
    assert np.isfinite(model.encode("a queue")).all(), "it embeds without"
