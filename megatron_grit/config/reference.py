"""Writes docs/configuration.md from the dataclasses.

Example:
    python -m megatron_grit.config.reference > docs/configuration.md
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Any

from megatron_grit.config.commands import options_of
from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.config.parse import preset_names, run_options
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.values import describe_type, documents

HEADER = """# Configuration

Written by `python -m megatron_grit.config.reference > docs/configuration.md`; change megatron_grit/config/schema/.

A run is described by YAML files and options. Later ones win: the defaults below, each `--config FILE` in turn, the
preset of `--model NAME`, options such as `--optimizer.lr 1e-5`. Presets of a model's shape: {presets}. A file may say
`model: NAME`, or give `preset: NAME` among the keys of `model` and change some of them. `--data.embedding+ PREFIX` adds
to a list.

Files are YAML 1.2: `010` is ten, `1e-5` a number; `1:30`, `no` and `2024-01-01` are texts. In paths `~`, `$NAME` and
`${{NAME}}` are replaced; a variable that is not set is refused.

- `--print_config` checks everything but files, prints the resolved configuration, and ends.
- `--dry-run` looks at files, at headers and lengths of the data, and at this node's GPUs and port as well, and tells
  everything that is wrong at once.

The resolved configuration is written to `output_dir/config.yaml` and into every checkpoint.
"""


RETRO = """## Retrieval databases

{meaning} These are options of `tools/retro/build_db.py` ([retro.md](retro.md)), kept in the database's `config.json`,
and no part of a run.

"""


def render() -> str:
    """The whole page."""
    parts = [HEADER.format(presets=", ".join(f"`{name}`" for name in preset_names()))]
    parts.append("## Top level\n\n" + _table(RunConfig))
    parts += _sections(RunConfig, "")
    parts.append(RETRO.format(meaning=inspect.getdoc(RetroDbConfig)) + _table(RetroDbConfig))
    return "\n".join(parts)


def _sections(cls: type, prefix: str) -> Iterator[str]:
    """A chapter for each section of a dataclass, and for each section in it."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield f"## {prefix}{name}\n\n{inspect.getdoc(hint)}\n\n{_table(typing.cast(type, hint))}"
            yield from _sections(typing.cast(type, hint), f"{prefix}{name}.")


def _table(cls: type) -> str:
    """Fields of a section that are no sections themselves."""
    meanings = documents(cls)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for option in (run_options() | options_of(RetroDbConfig)).values():
        if option.group is cls:
            meaning = meanings[option.field.name]
            rows.append(f"| `{option.key}` | {describe_type(option.hint)} | {_default(option.default)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


if __name__ == "__main__":
    print(render(), end="")
