"""Writes docs/configuration.md from the dataclasses.

Example:
    python -m megatron_grit.config.reference > docs/configuration.md
"""

from __future__ import annotations

import dataclasses
import inspect
import typing

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.config.parse import describe_type, preset_names
from megatron_grit.config.schema import RunConfig

HEADER = """# Configuration

Written by `python -m megatron_grit.config.reference > docs/configuration.md`; change megatron_grit/config/schema/.

A run is described by YAML files and options. Later ones win: the defaults below, each `--config FILE` in turn, the
preset of `--model NAME`, options such as `--optimizer.lr 1e-5`. Presets of a model's shape: {presets}. A file may say
`model: NAME`, or give `preset: NAME` among the keys of `model` and change some of them. `--data.embedding+ PREFIX` adds
to a list.

- `--print_config` checks everything but files, prints the resolved configuration, and ends.
- `--dry-run` checks files as well.

The resolved configuration is written to `output_dir/config.yaml` and into every checkpoint.
"""


RETRO = """## Retrieval databases

{meaning} These are options of `tools/retro/build_db.py` ([retro.md](retro.md)), kept in the database's `config.json`,
and no part of a run.

"""


def render() -> str:
    """The whole page."""
    parts = [HEADER.format(presets=", ".join(f"`{name}`" for name in preset_names()))]
    parts.append("## Top level\n\n" + _table(RunConfig, ""))
    for name, hint in typing.get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(hint):
            section = typing.cast(type, hint)
            parts.append(f"## {name}\n\n{inspect.getdoc(section)}\n\n{_table(section, f'{name}.')}")
    parts.append(RETRO.format(meaning=inspect.getdoc(RetroDbConfig)) + _table(RetroDbConfig, ""))
    return "\n".join(parts)


def _table(cls: type, prefix: str) -> str:
    from docstring_parser import parse_from_object

    documents = {parameter.arg_name: parameter.description or "" for parameter in parse_from_object(cls).params}
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            continue
        meaning = " ".join(documents[field.name].split())
        rows.append(f"| `{prefix}{field.name}` | {describe_type(hint)} | {_default(field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


if __name__ == "__main__":
    print(render(), end="")
