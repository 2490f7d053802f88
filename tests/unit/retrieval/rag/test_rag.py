"""From a folder of documents to scored answers, by the three commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.cli import main as cli
from megatron_grit.config.options import SamplingOptions
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.text.records import Message
from megatron_grit.errors import DataError
from megatron_grit.evaluation.qa.scores import SCORERS, matches
from megatron_grit.inference.model import GritModel
from megatron_grit.retrieval.rag.answer import Context, RagModel
from megatron_grit.retrieval.rag.options import ContextOptions
from tests.corpus import sentences

pytest.importorskip("faiss")

FACTS = list(dict.fromkeys(answer for _, answer in sentences(30, seed=5)))[:12]


@pytest.fixture(scope="module")
def database(trained_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rag")
    (folder / "docs").mkdir()
    for number, fact in enumerate(FACTS[:8]):
        (folder / "docs" / f"{number}.txt").write_text(fact)
    lines = [json.dumps({"text": fact, "title": f"T{number}", "id": number}) for number, fact in enumerate(FACTS[8:])]
    (folder / "docs" / "more.jsonl").write_text("\n".join(lines))
    assert build(folder, trained_run) == 0
    return folder


def build(folder: Path, run: RunConfig, *more: str) -> int:
    where = [f"--input={folder / 'docs'}", f"--project-dir={folder / 'db'}", f"--checkpoint={run.output_dir}"]
    return cli.main(["rag", "build", *where, "--device=cpu", "--chunk-length=32", "--workers=1", *more])


@pytest.fixture(scope="module")
def model(trained_run: RunConfig) -> GritModel:
    return GritModel.load(trained_run.output_dir, device="cpu")


def rag_of(model: GritModel, run: RunConfig, database: Path, **options: Any) -> RagModel:
    return RagModel(model, run.output_dir, ContextOptions(project_dir=str(database / "db"), **options))


def test_what_is_nearest_is_found_with_its_source(database: Path, model: GritModel, trained_run: RunConfig) -> None:
    rag = rag_of(model, trained_run, database, num_contexts=4)
    questions = ["what does the parser do?", FACTS[2]]
    vectors = model.encode(FACTS, "", side="passage", max_length=64)
    scores = model.encode(questions, "", side="query", max_length=64) @ vectors.T
    for contexts, row in zip(rag.search(questions), scores, strict=True):
        best = np.argsort(-row)[:4]
        np.testing.assert_allclose([context.score for context in contexts], row[best], atol=1e-5)
        for context, number in zip(contexts, best.tolist(), strict=True):
            assert context.text.strip() == FACTS[number] and context.start == 0
            source = (f"{number}.txt", str(number)) if number < 8 else (f"more.jsonl:{number - 8}", f"T{number - 8}")
            assert (context.source, context.title) == source
    assert rag.search([FACTS[2]])[0][0].text.strip() == FACTS[2]
    (by_words,) = rag_of(model, trained_run, database, num_contexts=1, mode="lexical").search([FACTS[3]])
    assert by_words[0].text.strip() == FACTS[3]


def test_an_answer_reads_its_passages(database: Path, model: GritModel, trained_run: RunConfig) -> None:
    rag = rag_of(model, trained_run, database, prompt="{question}\nSee: {contexts}.")
    contexts = [
        Context(text=f" {text} ", source="a", title="", score=1.0, start=0) for text in ("One {question}", "Two")
    ]
    said = "Why?\nSee: [1] One {question}\n\n[2] Two."
    assert rag.prompt("Why?", contexts, 8) == model.prompt_tokens([Message("user", said)])
    assert rag.prompt("Why?", [], 8) == model.prompt_tokens([Message("user", "Why?")])
    expected = model.generate(said, max_new_tokens=8)
    assert rag.answer("Why?", contexts, SamplingOptions(max_new_tokens=8)) == expected
    long = [Context(text=f"{number} " + "file " * 200, source="a", title="", score=1.0, start=0) for number in range(9)]
    ids = rag.prompt("Why?", long, 100)
    text = model.tokenizer.decode(ids)
    assert 380 < len(ids) <= 412 and "Why?" in text and "[1] 0 file" in text and "[9]" not in text
    with pytest.raises(DataError, match="the question takes"):
        rag.prompt("why " * 600, long, 100)


def test_ask(database: Path, trained_run: RunConfig, model: GritModel, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["rag", "ask", f"--checkpoint={trained_run.output_dir}", f"--project-dir={database / 'db'}"]
    asked += ["--question", FACTS[2], "--device=cpu", "--max-new-tokens=6", "--num-contexts=2"]
    assert cli.main(asked) == 0
    told = capsys.readouterr().out
    assert cli.main([*asked, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert told.startswith(f"{answer['answer']}\n\n[1] 2.txt (2), token 0, score ") and told.count("\n[") == 2
    rag = rag_of(model, trained_run, database, num_contexts=2)
    (contexts,) = rag.search([FACTS[2]])
    assert answer["contexts"][0]["source"] == contexts[0].source == "2.txt"
    assert answer["answer"] == rag.answer(FACTS[2], contexts, SamplingOptions(max_new_tokens=6))
    assert cli.main([*asked[:3], f"--project-dir={database / 'docs'}", *asked[4:]]) == 2
    assert "holds no database; make one with megatron-grit rag build" in capsys.readouterr().err


def test_eval(database: Path, trained_run: RunConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    word = FACTS[2].split()[2]
    questions = [{"question": fact, "answers": [word, "never there"]} for fact in FACTS[:5]]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    asked = ["rag", "eval", f"--checkpoint={trained_run.output_dir}", f"--project-dir={database / 'db'}"]
    asked += [f"--input={tmp_path / 'questions.jsonl'}", "--device=cpu", "--max-new-tokens=4", "--num-contexts=1"]
    assert cli.main([*asked, f"--output={tmp_path / 'out.jsonl'}"]) == 0
    assert "found" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert [line["question"] for line in lines] == FACTS[:5] and summary["num_questions"] == 5
    for line, fact in zip(lines, FACTS, strict=False):
        score = SCORERS["squad1"].score(line["prediction"], line["answers"])
        assert score is not None and (line["em"], line["f1"]) == (score.em, score.f1)
        assert line["match"] == matches(line["prediction"], line["answers"])
        assert [context["text"].strip() for context in line["contexts"]] == [fact]
        assert line["found"] == float(word.lower() in fact.lower().rstrip(".").split())
    for name in ("em", "match", "f1", "found"):
        assert summary[name] == pytest.approx(np.mean([line[name] for line in lines]))
    assert 0 < summary["found"] <= 1
    assert cli.main([*asked[:-1], "--num-contexts=0", "--limit=2", f"--output={tmp_path / 'none.jsonl'}"]) == 0
    alone = json.loads((tmp_path / "none.summary.json").read_text())
    assert alone["num_questions"] == 2 and "found" not in alone
    (tmp_path / "questions.jsonl").write_text('{"question": "a", "answers": []}')
    assert cli.main([*asked, f"--output={tmp_path / 'no.jsonl'}"]) == 2
    assert "has no answer" in capsys.readouterr().err


def test_an_answer_stands_in_a_text() -> None:
    """Words are compared, whole and in their order, without case, articles and punctuation."""
    assert matches("It was the Eiffel Tower, in Paris.", ["london", "eiffel tower"]) == 1
    assert matches("Parisian", ["Paris"]) == matches("tower Eiffel", ["Eiffel tower"]) == matches("", ["a"]) == 0
    assert matches("anything", ["the", ""]) == matches("anything", []) == 0


def test_the_same_command_again(
    database: Path, trained_run: RunConfig, model: GritModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """Computes nothing, refuses other documents, and makes another database of them if it is told to."""
    before = {path: path.stat().st_mtime_ns for path in (database / "db").rglob("*.hdf5")}
    assert before and build(database, trained_run) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (database / "db").rglob("*.hdf5")}
    (database / "docs" / "9.txt").write_text("A new fact about a zebra.")
    capsys.readouterr()
    assert build(database, trained_run) == 2
    assert "was built of other documents; give another --project-dir, or --overwrite" in capsys.readouterr().err
    assert build(database, trained_run, "--overwrite") == 0
    assert capsys.readouterr().out == f"13 documents in {database / 'db'}\n"
    rag = rag_of(model, trained_run, database, num_contexts=1)
    assert rag.search(["A new fact about a zebra."])[0][0].source == "9.txt"
