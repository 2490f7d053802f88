"""Configurations are read as they are written, and every mistake is one line that says where it is."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.config.parse import (
    dump_config,
    known_keys,
    load_config,
    parse_run_config,
    parse_train_arguments,
    preset_names,
    save_config,
)
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return _write


def test_defaults_are_those_of_the_dataclasses() -> None:
    assert parse_run_config([]) == RunConfig()


def test_later_files_and_options_win(write) -> None:
    first = write("training: {steps: 3, seed: 1}\noptimizer:\n  lr: 1e-4\n", "a.yaml")
    second = write("training:\n  steps: 4\n", "b.yaml")
    config = parse_run_config(["--config", first, f"--config={second}", "--training.seed", "2"])
    assert (config.training.steps, config.training.seed, config.optimizer.lr) == (4, 2, 1e-4)


def test_lists_and_null_on_the_command_line(write) -> None:
    path = write("data:\n  embedding: [a]\n")
    assert parse_run_config(["--config", path, "--data.embedding", "[b, c]"]).data.embedding == ["b", "c"]
    more = parse_run_config(["--config", path, "--data.embedding+", "b", "--data.embedding+=c"])
    assert more.data.embedding == ["a", "b", "c"]
    assert parse_run_config(["--model.num_query_groups", "null"]).model.num_query_groups is None
    assert parse_run_config(["--optimizer.min_lr", "-1e-3"]).optimizer.min_lr == -1e-3


def test_two_configurations_share_nothing() -> None:
    parse_run_config([]).data.embedding.append("a")
    assert parse_run_config([]).data.embedding == []


@pytest.mark.parametrize("name", preset_names())
def test_presets(name: str, write) -> None:
    by_option = parse_run_config(["--model", name])
    assert by_option.model != RunConfig().model or name == "mistral_7b"
    assert by_option == parse_run_config(["--config", write(f"model: {name}\n")])
    changed = parse_run_config(["--config", write(f"model:\n  num_layers: 7\n  preset: {name}\n")])
    assert changed.model == dataclasses.replace(by_option.model, num_layers=7)


def test_a_preset_starts_the_model_anew(write) -> None:
    path = write("model: tiny_mixtral\n")
    assert parse_run_config(["--config", path]).model.num_experts == 4
    assert parse_run_config(["--config", path, "--model", "tiny_mistral"]).model.num_experts is None


def test_an_empty_section_and_an_empty_file_are_defaults(write) -> None:
    assert parse_run_config(["--config", write("training:\n  # steps: 1\nmodel:\n")]) == RunConfig()
    assert parse_run_config(["--config", write("# nothing\n")]) == RunConfig()


def test_save_and_load(tmp_path: Path) -> None:
    config = parse_run_config(
        ["--model", "tiny_mixtral", "--data.embedding", "[a b, 'c: #d']", "--optimizer.lr", "1e-7"]
    )
    path = tmp_path / "config.yaml"
    path.write_text("old")
    save_config(config, path)
    assert load_config(path) == config
    assert list(tmp_path.iterdir()) == [path], "a temporary file was left"
    save_config(load_config(path), path)
    assert path.read_text() == dump_config(config)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(RunConfig(), path)
    before = path.read_text()
    broken = RunConfig(output_dir=object())  # type: ignore[arg-type]
    with pytest.raises(Exception, match="cannot represent"):
        save_config(broken, path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_origins(write) -> None:
    path = write("model: tiny_mistral\ntraining:\n\n  steps: 3\n")
    origins = parse_train_arguments(["--config", path, "--optimizer.lr=1"]).origins
    assert origins["training.steps"] == f"{path}:4"
    assert origins["optimizer.lr"] == "command line"
    assert origins["model.num_layers"].endswith("tiny_mistral.yaml:2")
    assert "training.seed" not in origins


BAD_FILES = [
    ("training:\n  seed: 1\n  stepz: 1\n", 3, "unknown key training.stepz (did you mean training.steps?)"),
    ("lr: 1\n", 1, "unknown key lr (did you mean optimizer.lr?)"),
    ("nothing_like_it: 1\n", 1, "unknown key nothing_like_it"),
    ("training:\n  steps: 1.5\n", 2, "training.steps must be int, not 1.5"),
    ("training:\n  steps: many\n", 2, "training.steps must be int, not 'many'"),
    ("training:\n  steps: true\n", 2, "training.steps must be int, not true"),
    ("training:\n  steps: null\n", 2, "training.steps must be int, not null"),
    (
        "training:\n  objective: all\n",
        2,
        "must be one of unified, embedding, generative, preference, reward, rollout, or a list of kinds such as [",
    ),
    (
        "training:\n  objective: [embedding, all]\n",
        2,
        "embedding, generative, preference, reward, rollout], not ['embedding', 'all']",
    ),
    ("parallel:\n  sequence_parallel: 1\n", 2, "must be true or false, not 1"),
    ("data:\n  embedding: a\n", 2, "data.embedding must be a list such as [a, b], not 'a'"),
    ("data:\n  embedding: [a, 1]\n", 2, "data.embedding must be a list such as [a, b]"),
    ("data:\n  tokenizer:\n    path: a\n", 3, "unknown key data.tokenizer.path"),
    ("optimizer: 3\n", 1, "optimizer is a section"),
    ("training:\n  steps: 1\n  steps: 2\n", 3, "steps is given twice, first in line 2"),
    ("training: [1,\n  b\n", 3, "not valid YAML"),
    ("training:\n\tsteps: 2\n", 2, "not valid YAML"),
    ("a: 1\n---\nb: 1\n", 2, "not valid YAML"),
    ("- a\n", 1, "expected 'key: value' lines"),
    ("? [a]\n: b\n", 1, "a key must be a word"),
    ("\n\nmodel: mistral\n", 3, "no model preset 'mistral' (did you mean mistral_7b?)"),
    ("model:\n  preset: gpt\n", 2, "no model preset 'gpt'; there are mistral_7b"),
    ("training: {<<: {steps: 3}}\n", 1, "unknown key training.<<.steps"),
    ("optimizer: &x {lr: *x}\n", 1, "optimizer.lr holds itself, by an alias"),
]


@pytest.mark.parametrize(("text", "line", "message"), BAD_FILES)
def test_mistakes_in_a_file(write, text: str, line: int, message: str) -> None:
    path = write(text)
    for read in (lambda: parse_run_config(["--config", path]), lambda: load_config(path)):
        with pytest.raises(ConfigError) as error:
            read()
        assert str(error.value).startswith(f"{path}:{line}: ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)


BAD_COMMAND_LINES = [
    (["--model.num_leyers", "3"], "unknown option --model.num_leyers (did you mean --model.num_layers?)"),
    (["--lr", "3"], "unknown option --lr (did you mean --optimizer.lr?)"),
    (["--model.num_layers"], "--model.num_layers needs a value: int"),
    (["--model.num_layers", "--training.steps", "3"], "--model.num_layers needs a value"),
    (["--model.num_layers", "x"], "--model.num_layers must be int, at least 1, not 'x'"),
    (["--training.steps", "null"], "--training.steps must be int, at least 0, not null"),
    (
        ["--loss.loss_gen_type=x"],
        "--loss.loss_gen_type must be one of token, mixed, sequence, microbatch_mean, sum, not 'x'",
    ),
    (["--data", "a.yaml"], "--data is a section"),
    (["stray"], "'stray' belongs to no option"),
    (["--model", "tiny_mistrl"], "no model preset 'tiny_mistrl' (did you mean tiny_mistral?)"),
    (["--config"], "--config needs a value"),
    (["--model.tie_embeddings", "1"], "--model.tie_embeddings must be true or false, not '1'"),
    (["--training.objective", "null"], "--training.objective must be one of unified, embedding, generative"),
    (["--training.objective", "[generative, generative]"], "not ['generative', 'generative']"),
    (["--data.embedding="], "--data.embedding must not be empty; give a path, or leave it out"),
    (["--data.embedding=[a"], "--data.embedding must be a list such as [a, b], not '[a'"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_COMMAND_LINES)
def test_mistakes_on_the_command_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_run_config(argv)
    assert str(error.value).startswith("command line: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: cannot read .*No such file"):
        parse_run_config(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(ConfigError, match="cannot read .*Is a directory"):
        parse_run_config(["--config", str(tmp_path)])
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="byte 3 is not UTF-8"):
        parse_run_config(["--config", str(tmp_path / "binary.yaml")])
    (tmp_path / "control.yaml").write_bytes(b"a: \x01")
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_run_config(["--config", str(tmp_path / "control.yaml")])


def test_help_shows_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_run_config(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert [key for key in known_keys() if f"--{key}" not in text] == []
    assert "Peak learning rate." in text


def test_every_key_is_documented(repository: Path) -> None:
    """docs/configuration.md is what the dataclasses say."""
    command = [sys.executable, "-m", "megatron_grit.config.reference"]
    page = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout
    assert (repository / "docs" / "configuration.md").read_text() == page, f"run {' '.join(command[1:])}"
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(known_keys()) + len(dataclasses.fields(RetroDbConfig))
    assert all(row.split("|")[4].strip() for row in rows), "a field without a docstring"
