"""A run takes documents and tokenizer from a retrieval database."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megatron_grit.config.database.run import resolve_retro_project
from megatron_grit.config.database.schema import RetroDbConfig, save_project_config
from megatron_grit.config.parse import parse_train_arguments
from megatron_grit.errors import ConfigError


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "db"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "own.idx").touch()
    config = RetroDbConfig(data_paths=["data/own", "elsewhere/other"], tokenizer="elsewhere/tokenizer.model")
    save_project_config(config, folder)
    return folder


def resolve(project: Path, *options: str, files: bool = True):
    arguments = parse_train_arguments(["--data.retro_project", str(project), *options])
    return resolve_retro_project(arguments.config, arguments.origins, files=files).data


def test_documents_and_tokenizer_are_those_of_the_database(project: Path) -> None:
    data = resolve(project)
    # Below the project directory where it is there, else as it was given.
    assert data.generative == [str(project / "data" / "own"), "elsewhere/other"]
    assert data.tokenizer == "elsewhere/tokenizer.model"


def test_documents_that_get_neighbors_come_first(project: Path) -> None:
    config = RetroDbConfig(data_paths=["data/own"], query_paths=["trained/on"], tokenizer="t.model")
    save_project_config(config, project)
    assert resolve(project).generative == ["trained/on"]


def test_what_is_given_stays(project: Path) -> None:
    data = resolve(project, "--data.generative", "[mine]", "--data.tokenizer", "./elsewhere/tokenizer.model")
    assert (data.generative, data.tokenizer) == (["mine"], "./elsewhere/tokenizer.model")
    with pytest.raises(ConfigError, match=r"command line: data.tokenizer x.model is not that of data.retro_project"):
        resolve(project, "--data.tokenizer", "x.model")


def test_pieces_begin_at_chunks(project: Path) -> None:
    assert resolve(project).split_multiple == RetroDbConfig().chunk_length == 64
    assert resolve(project, "--data.split_multiple", "128").split_multiple == 128
    assert resolve(project, "--data.split_multiple", "96").split_multiple == 64


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no config.json; give the one --project-dir"):
        resolve(tmp_path / "nowhere")
    assert resolve(tmp_path / "nowhere", files=False).generative == []
    arguments = parse_train_arguments([])
    assert resolve_retro_project(arguments.config, arguments.origins) == arguments.config


def test_held_out_documents_are_not_trained_on(
    project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RetroDbConfig(data_paths=["data/own"], query_paths=["data/own", "held/out"], tokenizer="t.model")
    save_project_config(config, project)
    assert resolve(project, "--data.valid", "[./held/out]").generative == [str(project / "data" / "own")]
    monkeypatch.setattr(logging.getLogger("megatron_grit"), "propagate", True)
    new = ["--output_dir", str(tmp_path / "run")]
    assert resolve(project, "--data.valid", "[./held/out]", *new) and resolve(project, "--data.generative", "[x]", *new)
    assert not caplog.messages
    assert "held/out" in resolve(project, *new).generative
    (line,) = set(caplog.messages)
    assert f"{project}: trains on held/out too, of its query_paths and not of its data_paths" in line
    assert line.endswith("if they are held out, give them as data.valid")
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000001" / "state.json").touch()
    save_project_config(
        RetroDbConfig(data_paths=["data/own"], query_paths=["a"], tokenizer="t.model"), tmp_path / "all"
    )
    assert resolve(project, *new) and resolve(tmp_path / "all", "--output_dir", "x") and set(caplog.messages) == {line}
