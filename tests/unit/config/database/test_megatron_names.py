"""Options and projects of Megatron-LM's Retro tools: those that mean the same work, the others say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_grit.cli.retro.build_db import BuildDbOptions
from megatron_grit.config.commands import options_of, parse_command
from megatron_grit.config.database.megatron_names import MEGATRON_NAMES
from megatron_grit.config.database.schema import load_project_config
from megatron_grit.errors import ConfigError

THEIRS = """--retro-project-dir db --retro-tasks index-build --retro-block-size 10
--retro-gpt-data-path a b --retro-gpt-chunk-length 32 --retro-index-str IVF8,Flat
--retro-index-no-delete-added-codes --retro-query-nprobe 4""".split()
OURS = """--project-dir db --tasks index-build --block-size 10 --data-paths a b --chunk-length 32 --index IVF8,Flat
--keep-embeddings --nprobe 4""".split()


def parse(words: list[str]) -> BuildDbOptions:
    return parse_command(BuildDbOptions, words, prog="build-db", description="")


def test_their_options_are_ours() -> None:
    assert parse(THEIRS) == parse(OURS)
    assert parse(OURS).given["keep_embeddings"] is True


def test_every_name_is_an_option_or_says_what_to_do() -> None:
    options = options_of(BuildDbOptions)
    for name, said in MEGATRON_NAMES.items():
        if said in options:
            continue
        with pytest.raises(ConfigError) as caught:
            parse(["--project-dir", "db", f"--{name.replace('_', '-')}", "1"])
        assert str(caught.value) == f"--{name.replace('_', '-')} is no option here: {said}" and " " in said
        for word in (word.strip(",:") for word in said.split() if word.startswith("--")):
            assert word[2:].replace("-", "_") in options, f"{name}: {word}"


def test_a_project_of_theirs_names_the_options(tmp_path: Path) -> None:
    theirs = {"retro_gpt_chunk_length": 32, "retro_gpt_data_path": ["a", "b"], "retro_gpt_split": "98,2,0"}
    theirs |= {"retro_neighbor_dirs": {}, "retro_gpt_tokenizer_model": None, "retro_block_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(ConfigError, match="is a project of Megatron-LM's Retro tools") as caught:
        load_project_config(tmp_path)
    assert str(caught.value).endswith('with: --chunk-length 32 --data-paths ["a", "b"] --block-size 7')
