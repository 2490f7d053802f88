"""What a user gets for input that cannot be used: one line that says what, where and what to do; status 2; no files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_grit.config.parse import save_config
from megatron_grit.config.schema import RunConfig
from tests.corpus import tiny_run, write_jsonl
from tests.harness.command import cli, environment, python

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and indexed files that are in order."""
    directory = tmp_path_factory.mktemp("corpus")
    tiny_run(directory)
    return directory


PHASE = re.compile(r"\d\d:\d\d:\d\d (loading|reading|building) .*")
"""What a run says before each wait."""


def refused(arguments: list[str], **environment: str) -> str:
    """Run a command that has to fail as a user's error; returns its one line."""
    result = cli(arguments, environment, ROOT)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    *phases, line = [line for line in result.stderr.splitlines() if line.strip()]
    assert all(PHASE.fullmatch(phase) for phase in phases), result.stderr
    assert ": error: " in line
    return line


def train_arguments(directory: Path, corpus: Path, change: Callable[[RunConfig], None] | None = None) -> list[str]:
    config = tiny_run(corpus)
    config.output_dir = str(directory / "run")
    if change is not None:
        change(config)
    save_config(config, directory / "run.yaml")
    return ["-m", "megatron_grit.cli.train", "--config", str(directory / "run.yaml")]


def test_unknown_key(tmp_path: Path, corpus: Path) -> None:
    arguments = train_arguments(tmp_path, corpus)
    lines = (tmp_path / "run.yaml").read_text().replace("  temperature:", "  temprature:").splitlines()
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    number = next(i for i, line in enumerate(lines, 1) if "temprature" in line)
    line = refused(arguments)
    assert f"run.yaml:{number}" in line and "loss.temprature" in line and "temperature" in line
    assert not (tmp_path / "run").exists()


def test_wrong_type_and_unknown_option(tmp_path: Path, corpus: Path) -> None:
    arguments = train_arguments(tmp_path, corpus)
    assert "--training.steps" in refused([*arguments, "--training.steps", "many"])
    assert "--training.stepz" in refused([*arguments, "--training.stepz", "3"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["tokenizer", "embedding", "generative"])
def test_missing_file(tmp_path: Path, corpus: Path, key: str) -> None:
    missing = str(tmp_path / "nothing")
    value = missing if key == "tokenizer" else [missing]
    line = refused(train_arguments(tmp_path, corpus, lambda config: setattr(config.data, key, value)))
    assert missing in line
    assert not (tmp_path / "run").exists()


def test_impossible_mesh(tmp_path: Path, corpus: Path) -> None:
    line = refused([*train_arguments(tmp_path, corpus), "--parallel.tensor", "2"])
    assert "tensor 2" in line and "start a multiple of 2 processes" in line
    job = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    line = refused([*train_arguments(tmp_path, corpus), "--parallel.tensor", "3"], **job)
    assert "num_attention_heads" in line
    assert not (tmp_path / "run").exists()


def test_wrong_checkpoint(tmp_path: Path, corpus: Path) -> None:
    """None there; of another model; damaged."""
    arguments = train_arguments(tmp_path, corpus, lambda config: setattr(config.training, "steps", 0))
    cli(arguments, cwd=ROOT).check_returncode()
    load = ["--output_dir", str(tmp_path / "other"), "--checkpoint.load"]
    assert "there is no directory" in refused([*arguments, *load, str(tmp_path / "nothing")])
    shallower, projected = ["--model.num_layers", "1"], ["--embedding.projection_dim", "8"]
    assert "trained with model.num_layers" in refused([*arguments, *load, str(tmp_path / "run"), *shallower])
    assert "embedding_head" in refused([*arguments, *load, str(tmp_path / "run"), *projected])
    shard = max((tmp_path / "run" / "checkpoints").rglob("weights/*.distcp"), key=lambda path: path.stat().st_size)
    content = shard.read_bytes()
    shard.write_bytes(content[:20_000] + bytes([content[20_000] ^ 1]) + content[20_001:])
    assert f"{shard}: is damaged" in refused([*arguments, *load, str(tmp_path / "run")])
    assert not list((tmp_path / "other").rglob("step_*"))


def test_a_run_is_not_resumed_with_another_model(tmp_path: Path, corpus: Path) -> None:
    arguments = train_arguments(tmp_path, corpus, lambda config: setattr(config.training, "steps", 0))
    cli(arguments, cwd=ROOT).check_returncode()
    line = refused([*arguments, "--model.num_layers", "1"])
    assert "model.num_layers" in line and "checkpoint.resume" in line


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"query": "a", "pos": ["b"]}', '{"query": "a", "pos": ["b"'], "input.jsonl:2"),
        (['{"query": "a", "pos": ["b"]}', '{"query": 3, "pos": ["b"]}'], "input.jsonl:2"),
        (['{"query": ["i", ""], "pos": [["", "b"]]}'], "input.jsonl:1"),
        ([json.dumps({"query": ["long " * 400, "text"], "pos": [["", "b"]]})], "input.jsonl:1"),
        ([], "input.jsonl"),
    ],
    ids=["malformed", "wrong-type", "empty-text", "instruction-too-long", "no-lines"],
)
def test_bad_records(tmp_path: Path, corpus: Path, lines: list[str], expected: str) -> None:
    (tmp_path / "input.jsonl").write_text("".join(line + "\n" for line in lines))
    arguments = ["tools/preprocess/build_grit.py", "--tokenizer", str(corpus / "tokenizer.model")]
    arguments += ["--input", str(tmp_path / "input.jsonl"), "--output-prefix", str(tmp_path / "out")]
    assert expected in refused(arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"input.jsonl"}


def test_inference_commands(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "texts.txt").write_text("one\n\nthree\n")
    output = ["--output", str(tmp_path / "out.npy")]
    encode = ["-m", "megatron_grit.cli.encode", "--checkpoint", str(tmp_path / "nothing"), *output]
    assert "texts.txt:2" in refused([*encode, "--input", str(tmp_path / "texts.txt")])
    (tmp_path / "texts.txt").write_text("one\n")
    assert "no checkpoint" in refused([*encode, "--input", str(tmp_path / "texts.txt")])
    generate = ["-m", "megatron_grit.cli.generate", "--checkpoint", str(tmp_path / "nothing"), "--prompt", "x"]
    assert "no checkpoint" in refused(generate)
    assert {path.name for path in tmp_path.iterdir()} == {"texts.txt"}


def job(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Two processes, as the launchers of examples/ start them."""
    launch = [python(), "-m", "megatron_grit.parallel.torchrun", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launch, *arguments],
        cwd=ROOT,
        env=os.environ | environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.processes(2)
def test_a_job_that_does_not_start_is_one_line(tmp_path: Path, corpus: Path) -> None:
    """Of all its ranks and of the launcher together; nothing is written."""
    arguments = train_arguments(tmp_path, corpus)
    for options, message in (
        (["--parallel.pipeline", "4"], "start a multiple of 4 processes"),
        (["--training.stepz", "4"], "unknown option --training.stepz"),
        (["--data.tokenizer", "nothing"], "there is no file nothing"),
    ):
        result = job([*arguments, *options])
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith("megatron-grit: error: ") and message in result.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.processes(2)
@pytest.mark.parametrize(
    ("fault", "status", "lines"),
    [
        ("raise DataError('only here', path='shard')", 2, [r"megatron-grit: error: \[rank 1\] shard: only here"]),
        (
            "raise ValueError('a fault')",
            1,
            [r"\[rank 1\] Traceback.*", r"(\[rank 1\]   .*)+", r"\[rank 1\] ValueError: a fault"],
        ),
        ("os.kill(os.getpid(), 9)", 137, [r"torchrun: error: rank 1 \(process \d+\) was ended by SIGKILL; .*dmesg.*"]),
        ("os._exit(5)", 5, [r"torchrun: error: rank 1 \(process \d+\) ended with status 5; see what it printed above"]),
    ],
)
def test_what_one_rank_meets_is_told_once(tmp_path: Path, fault: str, status: int, lines: list[str]) -> None:
    """Rank 1 alone cannot go on; rank 0 waits for it in a collective and would never say why."""
    program = tmp_path / "one_rank.py"
    program.write_text(
        "import os, sys, time\n"
        "from megatron_grit.cli.main import guarded\n"
        "from megatron_grit.errors import DataError\n"
        "def command():\n"
        "    if os.environ['RANK'] == '1':\n"
        f"        {fault}\n"
        "    time.sleep(60)\n"
        "sys.exit(guarded(command))\n"
    )
    result = job([str(program)])
    assert result.returncode == status, result.stderr
    assert re.fullmatch("\n".join(lines), result.stderr.strip(), re.DOTALL), result.stderr


@pytest.mark.processes(2)
def test_a_rank_that_meets_it_later_speaks_for_both(tmp_path: Path) -> None:
    """Rank 1 was first, and is ended by the launcher while it waits: the status is that of rank 0, which speaks."""
    program = tmp_path / "later.py"
    program.write_text(
        "import os, sys, time\n"
        "from megatron_grit.cli.main import guarded\n"
        "from megatron_grit.errors import DataError\n"
        "def command():\n"
        "    time.sleep(1.5 * (os.environ['RANK'] == '0'))\n"
        "    raise DataError('all meet this')\n"
        "sys.exit(guarded(command, joins_job=True))\n"
    )
    result = job([str(program)])
    assert (result.returncode, result.stderr) == (2, "megatron-grit: error: all meet this\n")


def test_write_jsonl_is_what_the_builder_reads(tmp_path: Path, corpus: Path) -> None:
    """The control of this file: a good record passes where the bad ones were refused."""
    path = write_jsonl(tmp_path / "input.jsonl", [{"query": "a", "pos": ["b"]}])
    arguments = ["tools/preprocess/build_grit.py", "--tokenizer", str(corpus / "tokenizer.model")]
    arguments += ["--input", str(path), "--output-prefix", str(tmp_path / "out")]
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, timeout=600)
    assert (tmp_path / "out.idx").exists()
