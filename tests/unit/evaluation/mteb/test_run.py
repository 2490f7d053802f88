"""mteb's tasks on local data: our checkpoint, its export through mteb's own wrapper, and the figures by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.errors import ConfigError, DataError
from megatron_grit.evaluation.mteb.options import MtebOptions
from megatron_grit.evaluation.mteb.run import evaluate_mteb, format_scores
from megatron_grit.evaluation.tasks.task import Lengths
from tests.corpus import sentences, write_jsonl

mteb = pytest.importorskip("mteb")
OPTIONS = MtebOptions(tasks=["STSBenchmark", "SciFact"], instructions="none")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in the layout of Hugging Face, questions in that of BEIR."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    pairs = sentences(40, seed=3)
    (folder / "STSBenchmark").mkdir()
    rows: list[dict[str, object]] = [
        {"sentence1": q, "sentence2": a, "score": float(random.integers(0, 6))} for q, a in pairs
    ]
    write_jsonl(folder / "STSBenchmark" / "test.jsonl", rows)
    (folder / "SciFact" / "qrels").mkdir(parents=True)
    write_jsonl(
        folder / "SciFact" / "corpus.jsonl",
        [{"_id": f"d{i}", "title": "", "text": a} for i, (_, a) in enumerate(pairs)],
    )
    write_jsonl(folder / "SciFact" / "queries.jsonl", [{"_id": f"q{i}", "text": q} for i, (q, _) in enumerate(pairs)])
    lines = [f"q{i}\td{j}\t{1 + (i == j)}" for i in range(20) for j in (i, i + 1)]
    (folder / "SciFact" / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def evaluated(trained_run: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("results")
    options = replace(OPTIONS, data_folder=str(data))
    return folder, evaluate_mteb(trained_run.output_dir, folder, options, Lengths(max_length=64), device="cpu")


def test_the_same_by_hand_and_through_the_export(
    trained_run: Any, data: Path, evaluated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from scipy.stats import spearmanr

    from megatron_grit.convert.hf_out.convert import export_checkpoint
    from megatron_grit.evaluation.mteb.tasks import load_tasks, use_folder
    from megatron_grit.inference.model import GritModel

    _, contents = evaluated
    model = GritModel.load(trained_run.output_dir, device="cpu")
    rows = [json.loads(line) for line in (data / "STSBenchmark" / "test.jsonl").read_text().splitlines()]
    first, second = (model.encode([row[side] for row in rows], max_length=64) for side in ("sentence1", "sentence2"))
    by_hand = spearmanr((first * second).sum(1), [row["score"] for row in rows]).statistic
    assert contents["results"]["STSBenchmark"]["main_score"] == pytest.approx(by_hand, abs=1e-6)
    peer = sentence_transformers.SentenceTransformer(str(export_checkpoint(trained_run.output_dir, tmp_path / "out")))
    tasks = load_tasks(OPTIONS.tasks, ["eng"])
    for task in tasks:
        use_folder(task, data)
    theirs = mteb.evaluate(peer, tasks, cache=None, co2_tracker=False, show_progress_bar=False).task_results
    for result in theirs:
        assert contents["results"][result.task_name]["main_score"] == pytest.approx(result.get_score(), abs=1e-4)
    assert contents["mean"] == np.mean([each["main_score"] for each in contents["results"].values()])
    assert set(contents["by_type"]) == {"STS", "Retrieval"}
    assert "mean over tasks" in format_scores(contents)


def test_what_is_there_is_kept_and_a_damaged_result_is_made_again(
    trained_run: Any, data: Path, evaluated: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_grit.inference.model import GritModel

    folder, contents = evaluated
    asked: list[int] = []
    encode = GritModel.encode

    def counted(self: GritModel, texts: list[str], *arguments: Any, **keywords: Any) -> np.ndarray:
        asked.append(len(texts))
        return encode(self, texts, *arguments, **keywords)

    monkeypatch.setattr(GritModel, "encode", counted)
    options, lengths = replace(OPTIONS, data_folder=str(data)), Lengths(max_length=64)
    assert evaluate_mteb(trained_run.output_dir, folder, options, lengths, device="cpu") == contents
    assert not asked
    (path,) = folder.glob("results/*/*/STSBenchmark.json")
    path.write_bytes(path.read_bytes()[:100])  # as a kill leaves it
    assert evaluate_mteb(trained_run.output_dir, folder, options, lengths, device="cpu") == contents
    assert sum(asked) == 80  # of this task alone
    with pytest.raises(ConfigError, match=r"other max_length; give another --output-dir$"):
        evaluate_mteb(trained_run.output_dir, folder, options, Lengths(max_length=32), device="cpu")
    identity = json.loads((folder / "evaluation.json").read_bytes())
    (folder / "evaluation.json").write_text(json.dumps(identity | {"weights": "0", "model": "another_run"}))
    with pytest.raises(ConfigError, match=r"holds results of another model, another_run; give another --output-dir$"):
        evaluate_mteb(trained_run.output_dir, folder, options, lengths, device="cpu")
    (folder / "evaluation.json").write_text(json.dumps(identity))


def test_results_of_other_data_are_refused(
    trained_run: Any, data: Path, evaluated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, contents = evaluated
    other = tmp_path / "data"
    shutil.copytree(data, other)
    path = other / "STSBenchmark" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]

    def run(data_folder: Path | None) -> dict[str, Any]:
        options = replace(OPTIONS, data_folder=None if data_folder is None else str(data_folder))
        return evaluate_mteb(trained_run.output_dir, folder, options, Lengths(max_length=64), device="cpu")

    (other / "STSBenchmark" / ".hidden").write_text("not data")
    assert run(other)["results"] == contents["results"]  # the same content elsewhere
    write_jsonl(path, [row | {"score": 5 - row["score"]} for row in rows])
    refusal = r"holds results of STSBenchmark on other data; give another --output-dir$"
    with pytest.raises(ConfigError, match=refusal):
        run(other)
    with pytest.raises(ConfigError, match=r"holds results of STSBenchmark, SciFact on other data"):  # sorted
        run(None)
    (result,) = folder.glob("results/*/*/STSBenchmark.json")
    result.rename(tmp_path / "away.json")  # without a result the task's data are free
    kept = (folder / "evaluation.json").read_bytes()
    score = contents["results"]["STSBenchmark"]["main_score"]
    assert run(other)["results"]["STSBenchmark"]["main_score"] == pytest.approx(-score, abs=1e-6)
    with pytest.raises(ConfigError, match=refusal):
        run(data)
    (tmp_path / "away.json").rename(result)
    (folder / "evaluation.json").write_bytes(kept)


def test_wrong_input_is_one_line(trained_run: Any, data: Path, tmp_path: Path) -> None:
    def run(**changes: Any) -> None:
        options = replace(OPTIONS, **{"data_folder": str(data), **changes})
        evaluate_mteb(trained_run.output_dir, tmp_path / "out", options, Lengths(), device="cpu")

    with pytest.raises(ConfigError, match=r"unknown task STSBenchmarc \(did you mean STSBenchmark\?\)"):
        run(tasks=["STSBenchmarc"])
    with pytest.raises(DataError, match="BIOSSES: is missing; put the data set there"):
        run(tasks=["BIOSSES"])
    with pytest.raises(ConfigError, match="instructions e6: no set and no file of this name; sets are e5, medi2, none"):
        run(instructions="e6")
    with pytest.raises(ConfigError, match="no example of SICK-R"):
        run(tasks=["SICK-R"], instructions="e5", num_shots=1)
    with pytest.raises(ConfigError, match="template must be one of own, instruct, or hold {instruction} once"):
        run(template="Query:")
    (tmp_path / "STSBenchmark").mkdir()
    (tmp_path / "STSBenchmark" / "test.jsonl").write_text("{")
    with pytest.raises(DataError, match="STSBenchmark: cannot be read as the task's data set") as raised:
        run(tasks=["STSBenchmark"], data_folder=str(tmp_path))
    assert "\n" not in str(raised.value)
