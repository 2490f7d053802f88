"""The command line of tools/retro/build_db.py."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.errors import ConfigError


@dataclass(kw_only=True)
class RetroArguments:
    """A parsed command line."""

    project_dir: Path
    tasks: str
    overwrite: str
    validate: float | None
    tombstone: str
    dry_run: bool
    given: dict[str, Any]
    """Settings that were given, and only those."""


def parse_retro_arguments(argv: list[str], description: str) -> RetroArguments:
    """Read options; those of :class:`RetroDbConfig` may also be spelled with hyphens.

    Raises:
        ConfigError: an unknown option or a value of the wrong type.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="build_db",
        description=description,
        exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--project-dir", type=Path, required=True, help="directory of the database")
    parser.add_argument("--tasks", default="build", help="comma list of tasks (default: build)")
    parser.add_argument(
        "--overwrite", default="", help="comma list of tasks to do again from nothing, with what follows from them"
    )
    parser.add_argument(
        "--validate",
        type=float | None,
        default=None,
        help="compute this share of the blocks again and compare bit for bit, instead of building",
    )
    parser.add_argument(
        "--tombstone",
        default="",
        help="documents that the task tombstone removes: DATASET:DOCUMENT[,...], or a file with one of them a line; a "
        "dataset is its prefix, the last part of it, or its number",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, data, tokenizer, embedder and index in this process, say what would be done, and change "
        "nothing",
    )
    parser.add_class_arguments(RetroDbConfig)
    names = {field.name for field in dataclasses.fields(RetroDbConfig)}
    argv = [_spelled(argument, names) for argument in argv]
    try:
        values = parser.parse_args(argv, defaults=True)
    except argparse.ArgumentError as error:
        raise ConfigError(f"command line: {' '.join(str(error).split())}") from None
    on_command_line = {argument[2:].partition("=")[0].removesuffix("+") for argument in argv if argument[:2] == "--"}
    given = {name: values[name] for name in names & on_command_line}
    return RetroArguments(
        project_dir=values["project_dir"],
        tasks=values["tasks"],
        overwrite=values["overwrite"],
        validate=values["validate"],
        tombstone=values["tombstone"],
        dry_run=values["dry_run"],
        given=given,
    )


def _spelled(argument: str, names: set[str]) -> str:
    option, equals, value = argument.partition("=")
    name = option[2:].replace("-", "_")
    return f"--{name}{equals}{value}" if option.startswith("--") and name in names else argument
