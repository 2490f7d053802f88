"""From YAML files and command-line options to a :class:`RunConfig`, and back to a file.

Values are taken in this order, later ones winning: the defaults of the dataclasses, the files of ``--config`` as they
are given, the preset of ``--model NAME``, options such as ``--model.num_layers 2``. A file may itself say
``model: NAME``, or ``preset: NAME`` among the keys of ``model``, and change some of the preset's keys.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_grit.config.kinds import objective_problem
from megatron_grit.config.locate import Located, read_yaml
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError
from megatron_grit.store.files import replacing

PRESETS = Path(__file__).parent / "presets"


@dataclass(kw_only=True)
class TrainArguments:
    """A parsed command line."""

    config: RunConfig
    origins: dict[str, str] = field(default_factory=dict)
    """Where each key that is not a default was given: "file:line" or "command line"."""
    dry_run: bool = False
    """Check everything, print the resolved configuration, and end."""
    print_config: bool = False
    """Check all but files, print the resolved configuration, and end."""


def parse_run_config(argv: list[str] | None = None) -> RunConfig:
    """Resolve a command line, ``sys.argv`` where none is given.

    Raises:
        ConfigError: an unknown key or option, a value of the wrong type, a file that is missing or not valid YAML.
    """
    return parse_train_arguments(argv).config


def parse_train_arguments(argv: list[str] | None = None, prog: str = "megatron-grit train") -> TrainArguments:
    """As :func:`parse_run_config`, with the switches that are not part of the configuration."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _full_parser(prog, tuple(_sections()))
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        raise SystemExit(0)
    try:
        switches, options = _switch_parser().parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"command line: {error}") from None
    given = _read_options(options)
    located = Located()
    for path in switches.config:
        _read_config_file(path, located)
    if switches.model is not None:
        _apply_preset(located, switches.model, "command line")
    tree = _validated(parser, located)
    origins = located.origins | {name.removesuffix("+"): "command line" for name, _ in given}
    config = _run_config(_with_options(parser, tree, given), origins)
    return TrainArguments(config=config, origins=origins, dry_run=switches.dry_run, print_config=switches.print_config)


def load_config(path: str | Path) -> RunConfig:
    """Read a configuration that :func:`save_config` wrote, or any one configuration file.

    Raises:
        ConfigError: as for :func:`parse_run_config`.
    """
    located = Located()
    _read_config_file(path, located)
    return _run_config(_validated(_full_parser("load_config", tuple(_sections())), located), located.origins)


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML with every key."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the configuration as YAML. Readers see the old file or the whole new one."""
    with replacing(path) as file:
        file.write(dump_config(config))


def known_keys(cls: type = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Type of every dotted key, sections left out."""
    keys: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            keys |= known_keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            keys[prefix + name] = hint
    return keys


def describe_type(hint: Any) -> str:
    """A type in the words of a user: "int or null", "one of mean, cls"."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(describe_type(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list such as [a, b]"
    if hint is bool:
        return "true or false"
    return "null" if hint is type(None) else hint.__name__


def _switch_parser() -> argparse.ArgumentParser:
    """What jsonargparse does not see: files, the preset, and what to do with the result."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[], metavar="FILE")
    parser.add_argument("--model", metavar="NAME")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--print_config", "--print-config", action="store_true")
    return parser


@functools.cache
def _full_parser(prog: str, sections: tuple[str, ...]) -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        usage="%(prog)s [--config FILE]... [--model NAME] [--dry-run | --print_config] [--section.key VALUE]...",
        description="Train with the GRIT objectives. Run one process for each device, under torchrun or srun.",
    )
    names = ", ".join(preset_names())
    parser.add_argument("--config", metavar="FILE", help="YAML file of section.key values; later files override")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the configuration, and end")
    parser.add_argument("--print_config", action="store_true", help="as --dry-run, but files need not exist")
    parser.add_class_arguments(RunConfig)
    for action in parser._actions:
        # jsonargparse would read "--data FILE" into a section, and lose the line numbers.
        if action.dest in sections:
            action.help = argparse.SUPPRESS
        if action.dest == "model":
            action.help, action.metavar = f"preset of the model's shape: {names}, or a YAML file", "NAME"
    return parser


def preset_names() -> list[str]:
    """Names that ``--model`` takes."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _preset_path(name: Any, where: str) -> Path:
    names = preset_names()
    if str(name) in names:
        return PRESETS / f"{name}.yaml"
    if str(name).endswith((".yaml", ".yml")):
        return Path(name)
    raise ConfigError(f"{where}: no model preset {name!r}{_suggest(str(name), names)}; there are {', '.join(names)}")


def _apply_preset(located: Located, name: Any, where: str) -> None:
    """Start the model's shape anew from a preset."""
    for key in [key for key in located.values if key.startswith("model.")]:
        del located.values[key], located.origins[key]
    preset = read_yaml(_preset_path(name, where), prefix="model")
    _check_keys(preset)
    located.update(preset)


def _read_config_file(path: str | Path, located: Located) -> None:
    """Add one file to what was read before."""
    new = read_yaml(path)
    for key in ("model", "model.preset"):
        if new.values.get(key) is not None:
            _apply_preset(located, new.values.pop(key), new.origins.pop(key))
    for section in _sections():
        # "training:" with every line below it commented out.
        if section in new.values and new.values[section] is None:
            del new.values[section], new.origins[section]
    _check_keys(new)
    _restore_switches(new)
    located.update(new)


def _restore_switches(located: Located) -> None:
    """YAML reads a bare on or off as a boolean; a key that takes these words gets the word."""
    keys = known_keys()
    for key, value in located.values.items():
        if isinstance(value, bool) and {"on", "off"} <= set(typing.get_args(keys[key])):
            located.values[key] = "on" if value else "off"


def _check_keys(located: Located) -> None:
    keys = known_keys()
    for key, value in located.values.items():
        where = located.origins[key]
        if key in _sections():
            raise ConfigError(f"{where}: {key} is a section; give it 'key: value' lines")
        if key not in keys:
            raise ConfigError(f"{where}: unknown key {key}{_suggest(key, keys)}")
        # jsonargparse takes null for anything.
        if value is None and type(None) not in typing.get_args(keys[key]):
            raise ConfigError(f"{where}: {key} must be {describe_type(keys[key])}, not null")


def _sections() -> list[str]:
    return [name for name, hint in typing.get_type_hints(RunConfig).items() if dataclasses.is_dataclass(hint)]


def _suggest(word: str, candidates: typing.Iterable[str]) -> str:
    """The nearest valid word, as the end of a message. A key in the wrong section is found by its last part."""
    candidates = list(candidates)
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.75)
    if not near:
        leaf = {key.rpartition(".")[2]: key for key in reversed(candidates)}
        near = [leaf[name] for name in difflib.get_close_matches(word.rpartition(".")[2], leaf, n=1, cutoff=0.75)]
    return f" (did you mean {near[0]}?)" if near else ""


def _validated(parser: Any, located: Located) -> Any:
    """Check the types of what files say."""
    try:
        return parser.parse_object(located.nested())
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        key = _key_of(error)
        where = located.origins.get(key, "configuration")
        raise ConfigError(f"{where}: {_type_message(key, located.values.get(key), error)}") from None


def _read_options(options: list[str]) -> list[tuple[str, str]]:
    """Options as (key, text); a key that ends in + appends to a list.

    jsonargparse's own message for a wrong option names neither the nearest one nor the rule for sections.
    """
    keys = known_keys()
    given: list[tuple[str, str]] = []
    rest = list(options)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if not option.startswith("--"):
            raise ConfigError(f"command line: {option!r} belongs to no option")
        name = option[2:]
        key = name.removesuffix("+")
        if key in _sections():
            raise ConfigError(f"command line: {option} is a section; give {option}.KEY VALUE, or --config FILE")
        if key not in keys:
            near = _suggest(key, keys).replace("mean ", "mean --")
            raise ConfigError(f"command line: unknown option {option}{near}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"command line: {option} needs a value: {describe_type(keys[key])}")
            value = rest.pop(0)
        if value in ("null", "None") and type(None) not in typing.get_args(keys[key]):
            raise ConfigError(f"command line: {option} must be {describe_type(keys[key])}, not null")
        given.append((name, value))
    return given


def _with_options(parser: Any, tree: Any, given: list[tuple[str, str]]) -> Any:
    try:
        return parser.parse_args([f"--{name}={value}" for name, value in given], namespace=tree)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        key = _key_of(error)
        value = {name.removesuffix("+"): value for name, value in given}.get(key)
        raise ConfigError(f"command line: --{_type_message(key, value, error)}") from None


def _key_of(error: Exception) -> str:
    found = re.search(r'[Pp]arser key "([\w.]+)"', str(error))
    return found.group(1) if found else ""


def _type_message(key: str, value: Any, error: Exception) -> str:
    hint = known_keys().get(key)
    if hint is None:
        return " ".join(str(error).split())
    return f"{key} must be {describe_type(hint)}, not {value!r}"


def _run_config(tree: Any, origins: dict[str, str]) -> RunConfig:
    """A run from a namespace whose types were checked; names of kinds are checked here."""
    config = _from_tree(RunConfig, tree)
    if (problem := objective_problem(config)) is not None:
        where = origins.get("training.objective", "configuration")
        raise ConfigError(f"{where}: {'--' if where == 'command line' else ''}training.objective {problem}")
    return config


def _from_tree(cls: Any, tree: Any) -> Any:
    """Build nested dataclasses from a namespace whose types were checked."""
    return cls(
        **{
            name: _from_tree(hint, tree[name]) if dataclasses.is_dataclass(hint) else tree[name]
            for name, hint in typing.get_type_hints(cls).items()
        }
    )
