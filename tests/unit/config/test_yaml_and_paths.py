"""Values as YAML 1.2 has them, in files as on command lines; home and variables in paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_grit.config.blend import read_blend
from megatron_grit.config.checks.run import find_problems
from megatron_grit.config.parse import dump_config, load_config, parse_run_config
from megatron_grit.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "written", "expected"),
    [
        ("training.steps", "010", 10),
        ("training.steps", "0o10", 8),
        ("training.steps", "0x10", 16),
        ("optimizer.lr", "1e-5", 1e-5),
        ("optimizer.lr", "5E-5", 5e-5),
        ("optimizer.lr", "1", 1.0),
        ("training.audit", "off", "off"),
        ("data.checksum", "yes", True),
        ("data.checksum", "False", False),
        ("data.tokenizer", "2024-01-01", "2024-01-01"),
        ("data.tokenizer", "no", "no"),
        ("data.tokenizer", "1:30", "1:30"),
        ("data.tokenizer", "null", None),
        ("data.tokenizer", "~", None),
        ("data.embedding", "[yes, 2024-01-01, 1:30]", ["yes", "2024-01-01", "1:30"]),
    ],
)
def test_files_and_command_lines_read_the_same_values(tmp_path: Path, key: str, written: str, expected: object) -> None:
    """Those of YAML 1.2: what YAML 1.1 makes of 010, 1:30, no and dates is nobody's intention."""
    path, (section, name) = tmp_path / "run.yaml", key.split(".")
    path.write_text(f"{section}:\n  {name}: {written}\n")
    for config in (load_config(path), parse_run_config([f"--{key}", written])):
        found = getattr(getattr(config, section), name)
        assert found == expected and type(found) is type(expected)
        path.write_text(dump_config(config))
        assert load_config(path) == config


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("training.steps", "1:30"),
        ("training.steps", "0b11"),
        ("training.steps", "2024-01-01"),
        ("training.steps", "1e3"),
        ("training.steps", "1" * 5000),
        ("optimizer.lr", "1:30.5"),
        ("data.checksum", "1"),
        ("data.checksum", "maybe"),
    ],
)
def test_files_and_command_lines_refuse_the_same_values(tmp_path: Path, key: str, written: str) -> None:
    path, (section, name) = tmp_path / "run.yaml", key.split(".")
    path.write_text(f"\n{section}:\n  {name}: {written}\n")
    with pytest.raises(ConfigError, match=f"^{path}:3: .*(must be|no number)"):
        load_config(path)
    with pytest.raises(ConfigError, match=f"^command line: --{key} must be"):
        parse_run_config([f"--{key}", written])


@pytest.mark.parametrize("text", ["010", "0o7", "1e5", "1:30", "yes", "2024-01-01", "~x", "null", ".5", ".inf", "0x1f"])
def test_texts_that_look_like_other_values_come_back(tmp_path: Path, text: str) -> None:
    config = parse_run_config([])
    config.logging.wandb_project = text
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.yaml").logging.wandb_project == text


def test_a_key_given_twice_below_a_list(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  embedding:\n  - a: 1\n    b: 2\n    a: 3\n")
    with pytest.raises(ConfigError, match=f"^{path}:5: not valid YAML: a key is given twice"):
        load_config(path)


def test_home_and_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    path = tmp_path / "run.yaml"
    for written, expected in (
        ("~/runs", "/people/me/runs"),
        ("$SCRATCH/a", "/scratch/a"),
        ("${SCRATCH}_b/$HOME", "/scratch_b//people/me"),
        ("./~", "./~"),
        ("a$", "a$"),
    ):
        path.write_text(f"output_dir: '{written}'\ndata:\n  generative: ['{written}']\n")
        for config in (load_config(path), parse_run_config(["--output_dir", written, "--data.generative", written])):
            assert (config.output_dir, config.data.generative) == (expected, [expected])
    (tmp_path / "blend.yaml").write_text("- ~/a\n- path: $SCRATCH/b\n")
    monkeypatch.setenv("BLENDS", str(tmp_path))
    monkeypatch.setenv("ODD", "/odd/$NOT_SET and more")
    for written, found in (
        (["$BLENDS/blend.yaml"], ["/people/me/a", "/scratch/b"]),
        (["1 ~/a 2 ~/b"], ["/people/me/a", "/people/me/b"]),
        (["1", "~/a", "2", "$ODD/b"], ["/people/me/a", "/odd/$NOT_SET and more/b"]),  # replaced once
        (["1 $ODD/a 2 b"], ["/odd/$NOT_SET and more/a", "b"]),
    ):
        config = parse_run_config(["--data.generative", json.dumps(written)])
        assert [entry.path for entry in read_blend(config.data.generative, "k")] == found


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("$NOT_SET/a", "output_dir '$NOT_SET/a' holds $NOT_SET, which is not set; set it, or write the path out"),
        ("${NOT_SET}", "output_dir '${NOT_SET}' holds $NOT_SET, which is not set"),
        ("~nobody-of-this-name/a", "output_dir '~nobody-of-this-name/a' begins with a user that is not known"),
        ("", "output_dir must not be empty; give a path"),
    ],
)
def test_paths_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, message: str) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: '{written}'\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:1: {message}")
    with pytest.raises(ConfigError) as caught:
        parse_run_config(["--output_dir", written])
    assert str(caught.value).startswith(f"command line: --{message}")


@pytest.mark.parametrize(
    "key", ["output_dir", "data.tokenizer", "data.cache_dir", "checkpoint.load", "model.pretrained"]
)
def test_empty_paths_of_a_run_from_a_program(key: str) -> None:
    config = parse_run_config(["--model", "tiny_mistral"])
    *section, name = key.split(".")
    setattr(getattr(config, section[0]) if section else config, name, "")
    assert next(find_problems(config, 1, files=False)).message.startswith(f"{key} must not be empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: \xff", "not a text file (byte 3 is not UTF-8)"),
        ("a: 1\n".encode("utf-16"), "not a text file (byte 0 is not UTF-8)"),
        (b"- a\0b", "not valid YAML: unacceptable character #x0000"),
        (b"- " + b"[" * 5000, "not valid YAML: nested too deeply"),
        (b"- [a", "not valid YAML: expected ',' or ']'"),
        (b"- {path: a, weight: 0x" + b"f" * 5000 + b"}", "not valid YAML: no number: 0xfff"),
    ],
)
def test_configurations_and_blends_refuse_what_is_no_yaml(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "in.yaml"
    path.write_bytes(content)
    for read in (load_config, lambda path: read_blend([str(path)], "data.embedding")):
        path.write_bytes(content if read is not load_config else content.replace(b"- ", b"data: ", 1))
        with pytest.raises(ConfigError) as caught:
            read(path)
        assert message in str(caught.value) and "\n" not in str(caught.value)
