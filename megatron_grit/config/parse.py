"""From YAML files and command-line options to a :class:`RunConfig`, and back to a file.

Values are taken in this order, later ones winning: the defaults of the dataclasses, the files of ``--config`` as they
are given, the preset of ``--model NAME``, options such as ``--model.num_layers 2``. A file may itself say
``model: NAME``, or ``preset: NAME`` among the keys of ``model``, and change some of the preset's keys.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron_grit.config.commands import (
    Given,
    Option,
    build,
    help_page,
    note_command,
    options_of,
    read_options,
    suggestion,
    values_of,
)
from megatron_grit.config.kinds import objective_problem
from megatron_grit.config.knob import expand_path, expanded, knob
from megatron_grit.config.locate import Dumper, Located, read_yaml
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.values import convert, describe_type, shortened, takes_null
from megatron_grit.errors import ConfigError
from megatron_grit.store.files import replacing

PRESETS = Path(__file__).parent / "presets"

Result = TypeVar("Result")


DESCRIPTION = """Train with the GRIT objectives. Run one process for each device, under torchrun or srun.

Example:
    torchrun --nproc-per-node 8 -m megatron_grit.cli.train --config run.yaml --parallel.tensor 2

Values come from the defaults, each --config FILE in turn, the preset of --model, then the keys below."""


@dataclass(kw_only=True)
class TrainSwitches:
    """Of the command line alone."""

    config: list[str] = knob([], repeat=True, path=True)
    """YAML file of section.key values; may be given several times, later files win."""
    model: str | None = None
    """Preset of the model's shape by its name, such as mistral_7b (docs/configuration.md), or a YAML file."""
    dry_run: bool = False
    """Check everything, print the resolved configuration, and end."""
    print_config: bool = False
    """Check all but files, print the resolved configuration, and end."""


@dataclass(kw_only=True)
class TrainArguments:
    """A parsed command line."""

    config: RunConfig
    origins: dict[str, str] = field(default_factory=dict)
    """Where each key that is not a default was given: "file:line" or "command line"."""
    dry_run: bool = False
    print_config: bool = False


def parse_run_config(argv: list[str] | None = None) -> RunConfig:
    """Resolve a command line, ``sys.argv`` where none is given.

    Raises:
        ConfigError: an unknown key or option, a value of the wrong type, a file that is missing or not valid YAML.
    """
    return parse_train_arguments(argv).config


def parse_train_arguments(
    argv: Sequence[str] | None = None, prog: str = "megatron-grit train", others: Sequence[str] = ()
) -> TrainArguments:
    """As :func:`parse_run_config`, with the switches that are not part of the configuration.

    Args:
        argv: the command line without the program.
        prog: its name in ``--help``.
        others: options of another piece, which a misspelt one may have meant.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not others:
        note_command(prog, argv)
    switches, keys = options_of(TrainSwitches), run_options()
    if "-h" in argv or "--help" in argv:
        described = DESCRIPTION + f"\nPresets: {', '.join(preset_names())}."
        print(help_page(prog, described, [*switches.values(), *keys.values()], sections=True))
        raise SystemExit(0)
    given = _on_command_line(lambda: _read_command_line(argv, switches | keys, others))
    chosen = build(TrainSwitches, values_of(one for one in given if one.option.key in switches))
    given = [one for one in given if one.option.key in keys]
    located = Located()
    for path in chosen.config:
        _read_config_file(path, located)
    if chosen.model is not None:
        _apply_preset(located, chosen.model, "command line")
    values = _typed(located)
    origins = located.origins | {one.option.key: "command line" for one in given}
    config = _run_config(_on_command_line(lambda: values_of(given, values)), origins)
    return TrainArguments(config=config, origins=origins, dry_run=chosen.dry_run, print_config=chosen.print_config)


def _read_command_line(argv: Sequence[str], options: dict[str, Option], others: Sequence[str]) -> list[Given]:
    for word in argv:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name in _sections() and name not in options:
            raise ConfigError(f"--{name} is a section; give --{name}.KEY VALUE, or --config FILE")
    return read_options(argv, options, others=others)


def _on_command_line(step: Callable[[], Result]) -> Result:
    """A step whose errors are in the command line."""
    try:
        return step()
    except ConfigError as error:
        raise ConfigError(f"command line: {error}") from None


def run_options() -> dict[str, Option]:
    """Every dotted key of a configuration."""
    return _options_with(_sections())


@functools.cache
def _options_with(sections: tuple[str, ...]) -> dict[str, Option]:
    return options_of(RunConfig, dotted=True)


def _run_config(values: dict[str, Any], origins: dict[str, str]) -> RunConfig:
    """A run from values whose types were checked; names of kinds are checked here."""
    config = build(RunConfig, values, "")
    if (problem := objective_problem(config)) is not None:
        where = origins.get("training.objective", "configuration")
        raise ConfigError(f"{where}: {'--' if where == 'command line' else ''}training.objective {problem}")
    return config


def load_config(path: str | Path) -> RunConfig:
    """Read a configuration that :func:`save_config` wrote, or any one configuration file.

    Raises:
        ConfigError: as for :func:`parse_run_config`.
    """
    located = Located()
    _read_config_file(path, located)
    return _run_config(_typed(located), located.origins)


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML with every key."""
    return yaml.dump(dataclasses.asdict(config), Dumper=Dumper, sort_keys=False)


def model_options(config: RunConfig) -> list[str]:
    """The model's shape as options of a command line, each followed by its value, for a run that starts from a
    checkpoint of it."""
    shape = dataclasses.asdict(config.model) | {"pretrained": None}
    words: list[str] = []
    while shape:
        key, value = shape.popitem()
        if isinstance(value, dict):
            shape |= {f"{key}.{name}": each for name, each in value.items()}
        else:
            words += [f"--model.{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the configuration as YAML. Readers see the old file or the whole new one."""
    with replacing(path) as file:
        file.write(dump_config(config))


def known_keys() -> dict[str, Any]:
    """Type of every dotted key, sections left out."""
    return {key: option.hint for key, option in run_options().items()}


def preset_names() -> list[str]:
    """Names that ``--model`` takes."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _preset_path(name: Any, where: str) -> Path:
    names = preset_names()
    if str(name) in names:
        return PRESETS / f"{name}.yaml"
    if str(name).endswith((".yaml", ".yml")):
        try:
            return Path(expand_path(str(name)))
        except ConfigError as error:
            raise ConfigError(f"{where}: model {error}") from None
    raise ConfigError(f"{where}: no model preset {name!r}{suggestion(str(name), names)}; there are {', '.join(names)}")


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
    """A key that takes the words on and off may be given true or false."""
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
            raise ConfigError(f"{where}: unknown key {key}{suggestion(key, keys)}")
        if value is None and not takes_null(keys[key]):
            raise ConfigError(f"{where}: {key} must be {describe_type(keys[key])}, not null")


def _sections() -> tuple[str, ...]:
    return _sections_among(tuple(RunConfig.__dataclass_fields__))  # kinds add theirs


@functools.cache
def _sections_among(fields: tuple[str, ...]) -> tuple[str, ...]:
    hints = typing.get_type_hints(RunConfig)
    return tuple(name for name in fields if dataclasses.is_dataclass(hints[name]))


def _typed(located: Located) -> dict[str, Any]:
    """What files say, as the types of the fields."""
    values = {}
    for key, hint in known_keys().items():
        if key in located.values:
            try:
                values[key] = expanded(run_options()[key].field, convert(hint, located.values[key]))
            except ValueError:
                told = f"{key} must be {describe_type(hint)}, not {shortened(located.values[key])}"
                raise ConfigError(f"{located.origins[key]}: {told}") from None
            except ConfigError as error:
                raise ConfigError(f"{located.origins[key]}: {key} {error}") from None
    return values
