"""The launcher of database builds resolves, refuses what it cannot run, and runs in miniature."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.harness import command
from tests.unit.retrieval.databases import make_texts, tokenizer_of, write_documents

PATHS = {"DATA": "a_text_document b_text_document", "TOKENIZER": "t", "EMBEDDER": "e"}


def launch(repository: Path, cwd: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = {*PATHS, "PROJECT_DIR", "TASKS", "PROCESSES", "SCALE", "DRY_RUN", "NNODES", "RDZV_ENDPOINT"}
    clean = {key: value for key, value in os.environ.items() if key not in names and not key.startswith("SLURM")}
    return subprocess.run(
        ["bash", str(repository / "examples" / "build_retro_db.sh"), *options],
        cwd=cwd,
        env=clean | command.environment() | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("environment", [{}, PATHS, {"SCALE": "tiny"}], ids=["nothing set", "paths set", "tiny"])
def test_dry_run(environment: dict[str, str], repository: Path, tmp_path: Path) -> None:
    result = launch(repository, tmp_path, "--chunk_length", "32", DRY_RUN="1", TASKS="embed", **environment)
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    value_of = dict(zip(words, words[1:], strict=False))
    assert value_of["--tasks"] == "embed" and value_of["--chunk_length"] == "32"
    assert value_of["--nproc-per-node"] == ("2" if "SCALE" in environment else "8")
    if "SCALE" not in environment:
        assert json.loads(value_of["--data_paths"]) == environment.get("DATA", "DATA").split()
        assert value_of["--embedder"] == environment.get("EMBEDDER", "EMBEDDER")
    assert list(tmp_path.iterdir()) == [], "a dry run wrote something"


def test_several_nodes(repository: Path, tmp_path: Path) -> None:
    result = launch(repository, tmp_path, DRY_RUN="1", NNODES="4", RDZV_ENDPOINT="node0:29400", **PATHS)
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    value_of = dict(zip(words, words[1:], strict=False))
    assert (value_of["--nnodes"], value_of["--rdzv-endpoint"]) == ("4", "node0:29400")
    assert "--standalone" not in words and words.index("--nnodes") < words.index("--project-dir")
    pytest.importorskip("faiss")
    data = write_documents(tmp_path / "a", make_texts(3), tokenizer_of(tmp_path))
    inputs = {"DATA": data, "TOKENIZER": str(tmp_path / "tokenizer.model"), "EMBEDDER": "e", "TASKS": "db-build"}
    result = launch(repository, tmp_path, NNODES="4", **inputs)
    assert "documents: " in result.stdout and "task db-build: to do" in result.stdout
    assert result.returncode == 2 and "4 nodes: submit this script with sbatch" in result.stderr


@pytest.mark.parametrize("missing", PATHS)
def test_a_missing_path_is_named(missing: str, repository: Path, tmp_path: Path) -> None:
    result = launch(repository, tmp_path, **{key: value for key, value in PATHS.items() if key != missing})
    assert result.returncode == 2
    assert result.stderr.startswith(f"build_retro_db.sh: error: set {missing} to ")
    assert len(result.stderr.splitlines()) == 1


def test_a_mistake_is_one_line(repository: Path, tmp_path: Path) -> None:
    """Before processes are started, each of which would say it."""
    for name in PATHS:
        (tmp_path / PATHS[name]).mkdir()
    for options in ((), ("--dry-run",)):
        result = launch(repository, tmp_path, *options, PROJECT_DIR="db", PROCESSES="2", **PATHS)
        assert result.returncode == 2
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("build_db: error: embedder e: holds neither"), result.stderr
        assert not (tmp_path / "db").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.processes(2)
def test_the_build_in_miniature(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    real = {"PYTHON": sys.executable, "PYTHON_EXEC": sys.executable}
    result = launch(repository, tmp_path, SCALE="tiny", PROJECT_DIR=str(tmp_path / "db"), **real)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "version 1: " in result.stdout and "recall@10" in result.stdout
    (table,) = (tmp_path / "db" / "query").glob("*/table.json")
    content = table.with_name("neighbors.npy").read_bytes()
    said = launch(repository, tmp_path, "--dry-run", SCALE="tiny", PROJECT_DIR=str(tmp_path / "db")).stdout
    assert "task query-neighbors: there" in said and "recall@10" not in said
    # Again: nothing is left to do.
    again = launch(repository, tmp_path, SCALE="tiny", PROJECT_DIR=str(tmp_path / "db"))
    assert again.returncode == 0, again.stderr
    assert table.with_name("neighbors.npy").read_bytes() == content
    train_on_the_same_documents(repository, tmp_path)


def test_the_recipe_that_reads(repository: Path, tmp_path: Path) -> None:
    """What it would train; without a database, placeholders stand for what that decides."""
    script = str(repository / "examples" / "pretrain_retro.sh")
    environment = command.environment() | {"DRY_RUN": "1"}
    done = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["model"]["retro"]["num_neighbors"] == 2 and config["model"]["num_layers"] == 24
    assert config["data"]["retro_project"] == "PROJECT_DIR" and config["data"]["split_multiple"] == 1
    environment["DRY_RUN"] = "0"
    done = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("pretrain_retro.sh: error: set PROJECT_DIR to the directory")


def test_the_options_of_megatrons_script(repository: Path, tmp_path: Path) -> None:
    script = ["bash", str(repository / "tools" / "retro" / "examples" / "pretrain_model.sh"), "--lr", "3e-4"]
    environment = command.environment() | {"DRY_RUN": "1", "SCALE": "tiny"}

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        words = [*script, *options]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    done = run("--micro-batch-size", "4", "--model.retro.gate", "null")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["optimizer"]["lr"] == 3e-4 and config["model"]["retro"]["num_neighbors"] == 2
    assert config["model"]["retro"]["gate"] is None and config["data"]["tokens_per_row"] == 513
    assert "without meaning here: --micro-batch-size" in done.stderr
    (tmp_path / "db").mkdir()  # a database that is there decides itself what a dry run does without
    (tmp_path / "db" / "config.json").write_text(json.dumps({"data_paths": ["texts"], "tokenizer": "pieces.model"}))
    done = run("--retro-project-dir", "db")
    assert done.returncode == 0, done.stderr
    data = yaml.safe_load(done.stdout)["data"]
    assert (data["retro_project"], data["generative"], data["tokenizer"]) == ("db", ["texts"], "pieces.model")
    refused = run("--fp16")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        "pretrain_model.sh: error: --fp16: write --bf16, or leave it out for fp32",
    ]


def train_on_the_same_documents(repository: Path, tmp_path: Path) -> None:
    """A run that names the database trains on its documents with its tokenizer."""
    arguments = ["-m", "megatron_grit.cli.train", "--model", "tiny_mistral", "--parallel.device", "cpu"]
    arguments += ["--config", str(repository / "examples" / "configs" / "tiny.yaml"), "--training.steps", "2"]
    arguments += ["--data.retro_project", str(tmp_path / "db"), "--data.over_long", "split"]
    arguments += ["--training.objective", "generative", "--output_dir", str(tmp_path / "run")]
    done = command.cli(arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2] and all(step["loss_gen"] > 0 for step in steps)
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert f"{tmp_path}/db/data/corpus_text_document" in config and f"{tmp_path}/db/data/tokenizer.model" in config
    read_their_neighbors(arguments, tmp_path)


def read_their_neighbors(arguments: list[str], tmp_path: Path) -> None:
    """The same run with a model that reads: it resumes, says so where the database is another, and is exported."""
    arguments = [*arguments, "--output_dir", str(tmp_path / "reads"), "--checkpoint.save_interval", "2"]
    arguments += ["--model.retro.num_neighbors", "2", "--model.retro.layers", "[1]"]
    first = [json.loads(line)["loss_gen"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    done = command.cli([*arguments, "--model.retro.gate", "null"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "reads" / "metrics.jsonl").read_text().splitlines()]
    # A learned gate is closed at the first step: the samples and the decoder are those of the run before.
    assert steps[0]["loss_gen"] != steps[1]["loss_gen"] and len(first) == len(steps) == 2
    config = (tmp_path / "reads" / "config.yaml").read_text()
    assert "retro_version: 1" in config and "num_neighbors: 2" in config
    (tmp_path / "db" / "db" / "versions" / "0001.json").rename(tmp_path / "0001.json")
    gone = command.cli([*arguments, "--training.steps", "4"], cwd=tmp_path)
    assert gone.returncode == 2 and "megatron-grit: error: " in gone.stderr.splitlines()[-1]
    (tmp_path / "0001.json").rename(tmp_path / "db" / "db" / "versions" / "0001.json")
    resumed = command.cli([*arguments, "--model.retro.gate", "null", "--training.steps", "4"], cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    steps = [json.loads(line) for line in (tmp_path / "reads" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    export = ["-m", "megatron_grit.cli.convert", "--from", str(tmp_path / "reads"), "--to", str(tmp_path / "hf")]
    exported = command.cli(export, cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert "without what reads neighbors" in exported.stderr
    assert "without what reads neighbors" in (tmp_path / "hf" / "README.md").read_text()
