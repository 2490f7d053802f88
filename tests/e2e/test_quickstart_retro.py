"""Retro's whole path in one command: in miniature, stopped and started again; and the texts that it makes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.harness.quickstart import refused, run, start

SCRIPT = "quickstart_retro.sh"
ARMS = {"gpt", "retro", "retro_shuffled"}


def texts(repository: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "examples" / "retro_texts.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_files(output: Path, steps: int) -> dict:
    """What the report has to say, and what says it. Returns report.json."""
    report = json.loads((output / "report.json").read_text())
    assert set(report["arms"]) == ARMS and all(0 < loss < 9 for loss in report["arms"].values())
    assert set(report["by_overlap"]) == {"gpt", "retro"}
    weights = report["tokens_by_overlap"]
    for name, losses in report["by_overlap"].items():
        mean = math.fsum(losses[bucket] * tokens for bucket, tokens in weights.items()) / sum(weights.values())
        assert mean == pytest.approx(report["arms"][name], abs=1e-4)
    assert 0 <= report["em"] <= report["f1"] <= 1
    questions = json.loads((output / "corpus" / "squad" / "squad_QA_dev.json").read_text())
    assert report["num_questions"] == len(questions) == len((output / "answers.txt").read_text().splitlines())
    assert report["world_size"] == 2 and report["steps"] == steps
    assert report["seconds"] == pytest.approx(sum(report["stage_seconds"].values()))
    samples = {name: [line for line in lines(output / name / "metrics.jsonl") if "loss" in line] for name in ARMS}
    assert all([line["step"] for line in found] == list(range(1, steps + 1)) for found in samples.values())
    # The same samples: each decoder has seen as many tokens at each step.
    tokens = {name: [line["tokens"] for line in found] for name, found in samples.items()}
    assert tokens["gpt"] == tokens["retro"] == tokens["retro_shuffled"]
    assert samples["retro"][0]["loss"] != samples["retro_shuffled"][0]["loss"] != samples["gpt"][0]["loss"]
    markdown = (output / "report.md").read_text()
    assert "| Retro, neighbors of other chunks |" in markdown and questions[0]["question"] in markdown
    for name in ("loss.png", "overlap.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    return report


@pytest.mark.timeout(3600)
@pytest.mark.processes(2)
def test_in_miniature(repository: Path, tmp_path: Path) -> None:
    """Stopped while a decoder trains, and started again."""
    pytest.importorskip("faiss")
    output = tmp_path / "out dir"
    environment = {"SCALE": "tiny", "QUICKSTART_DATA": "none"}
    process = start(repository, SCRIPT, output, **environment)
    metrics = output / "retro" / "metrics.jsonl"
    deadline = time.monotonic() + 3000
    while not metrics.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=600)
    assert not (output / "report.json").exists()
    database = (output / "db" / "config.json").stat().st_mtime_ns
    printed = run(repository, SCRIPT, output, 3000, **environment)
    assert "database: done before" in printed and "retro: done before" not in printed
    assert (output / "db" / "config.json").stat().st_mtime_ns == database
    check_files(output, 4)
    config = yaml.safe_load((output / "retro_shuffled" / "config.yaml").read_text())
    assert config["data"]["retro_shuffle"] is True and config["checkpoint"]["load"] == str(output / "grit")


def test_dry_run(repository: Path, tmp_path: Path) -> None:
    printed = run(repository, SCRIPT, tmp_path / "out", 600, DRY_RUN="1")
    config = yaml.safe_load(printed)
    assert config["model"]["retro"]["num_neighbors"] == 1 and config["training"]["steps"] > 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "environment", "message"),
    [
        ("out", {"QUICKSTART_STEPS": "0"}, "QUICKSTART_STEPS"),
        ("out", {"SCALE": "huge"}, "SCALE"),
        ("out", {"QUICKSTART_DATA": "nowhere"}, "nowhere has no xquad_en_part1.json"),
        ("--help", {}, "usage"),
    ],
)
def test_wrong_use(repository: Path, tmp_path: Path, output: str, environment: dict[str, str], message: str) -> None:
    assert message in refused(repository, SCRIPT, output, tmp_path, **environment)


def test_texts_of_squads_form(repository: Path, tmp_path: Path) -> None:
    """A question is trained on or asked in the end, never both; its passage stands in what is asked."""
    asked = [{"question": f"Who is {n}?", "answers": [{"text": f"name {n}"}]} for n in range(15)]
    paragraphs = [{"context": f"Passage {n}.", "qas": asked[5 * n : 5 * n + 5]} for n in range(3)]
    (tmp_path / "xquad_en_part1.json").write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    words = [" ".join(f"w{n}x{m}" for m in range(60)) for n in range(12)]
    (tmp_path / "wikitext2_valid.txt").write_text("\n".join([" = Title = ", *words, "too short"]))
    done = texts(repository, "--data", str(tmp_path), "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    test = json.loads((tmp_path / "out" / "squad" / "squad_QA_dev.json").read_text())
    train = json.loads((tmp_path / "out" / "squad" / "squad_QA_train.json").read_text())
    assert [record["question"] for record in test] == ["Who is 0?", "Who is 10?"] and len(train) == 13
    assert test[1] == {
        "question": "Who is 10?",
        "answers": ["name 10"],
        "ctxs": [{"title": "T", "text": "Passage 2."}],
    }
    documents = [record["text"] for record in lines(tmp_path / "out" / "documents.jsonl")]
    held_out = [record["text"] for record in lines(tmp_path / "out" / "heldout.jsonl")]
    assert held_out == [
        "Passage 0.\nQuestion: Who is 0?\nAnswer: name 0",
        "Passage 2.\nQuestion: Who is 10?\nAnswer: name 10",
        words[0],
        words[10],
    ]
    assert len(documents) == 13 + 10 and not set(documents) & set(held_out)
    pairs = lines(tmp_path / "out" / "pairs.jsonl")
    assert pairs[0] == {"query": ["Find the passage", "Who is 1?"], "pos": [["", "Passage 0."]]} and len(pairs) == 13
    fewer = texts(repository, "--data", str(tmp_path), "--output-dir", str(tmp_path / "few"), "--num-passages", "2")
    assert fewer.returncode == 0 and len(lines(tmp_path / "few" / "pairs.jsonl")) == 9


def test_texts_of_docstrings(repository: Path, tmp_path: Path) -> None:
    text = " ".join(["Return the sum. It", *["adds"] * 70])
    pair = {"query": ["Find", "math.fsum(seq, start=0)"], "pos": [["", text]], "module": "math"}
    short = {"query": ["Find", "math.gcd(a)"], "pos": [["", "Too short."]], "module": "math"}
    (tmp_path / "train_embedding.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps(short) + "\n")
    (tmp_path / "train_generative.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": [text]}))
    done = texts(repository, "--pydoc", str(tmp_path), "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (first,) = json.loads((tmp_path / "out" / "squad" / "squad_QA_dev.json").read_text())
    others = json.loads((tmp_path / "out" / "squad" / "squad_QA_train.json").read_text())
    assert {record["question"]: record["answers"] for record in [first, *others]} == {
        "What does math.fsum do?": ["Return the sum."],
        "Which module has fsum?": ["math"],
        "Which parameters does math.fsum take?": ["seq, start=0"],
    }
    assert first["ctxs"][0]["text"] == f"math.fsum(seq, start=0): {text}"


def test_texts_that_cannot_be_read(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "xquad_en_part1.json").write_text('{"data": [{"title": "T"}]}')
    (tmp_path / "wikitext2_valid.txt").write_text("")
    for options, message in (
        (["--data", str(tmp_path)], "xquad_en_part1.json: is no file of SQuAD's form"),
        ([], "give one of --data and --pydoc"),
    ):
        done = texts(repository, *options, "--output-dir", str(tmp_path / "out"))
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
