"""Command lines from dataclasses: a flag for each field, read and explained by one piece for every verb and tool.

``--batch-tokens 8``, ``--batch_tokens 8`` and ``--batch-tokens=8`` are the same. A list takes several values or one
YAML list, ``--input a b`` or ``--input '[a, b]'``; ``--input+ c`` adds to it, and ``--input`` given again replaces it.
A boolean takes nothing, true or false, and ``--no-NAME`` is false. ``null`` is None.

What the metadata of a field (:func:`~megatron_grit.config.knob.knob`) may say of its flag:

- ``flag``: another name, such as from, which no field can have;
- ``positional=True``: no name, but a place in front of all options; a list takes every word there;
- ``alone``: the value of the flag without a value;
- ``repeat=True``: each occurrence adds to the list;
- ``verbatim=True``: items that look like YAML lists are texts;
- ``null``: the word for None, in place of null;
- ``read``: a function from the text to the value, which raises ValueError with what it expects;
- ``settings``: a dataclass; the field is a dictionary of those of its fields that were given;
- ``path=True``: ``~`` and ``$NAME`` are replaced, and it must not be empty;
- ``rest=True``: the field is a list of the options that are not known.
"""

from __future__ import annotations

import dataclasses
import difflib
import shlex
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_grit.config.knob import expanded, may_be_empty, range_problem, range_text
from megatron_grit.config.values import (
    BOOLEANS,
    convert,
    describe_type,
    documents,
    item_type,
    shortened,
    takes_null,
    takes_word,
)
from megatron_grit.errors import ConfigError

Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One flag."""

    key: str
    """Name of the field; of nested sections with dots, "model.num_layers"."""
    hint: Any
    """Its type."""
    field: dataclasses.Field
    """What declares it."""
    group: type
    """Dataclass that holds it."""
    dotted: bool = False
    """Whether it is a key of configuration files, and spelled as it is there."""

    @property
    def shown(self) -> str:
        """As help and errors spell it."""
        name = str(self.field.metadata.get("flag", self.key))
        if self.field.metadata.get("positional"):
            return name.upper()
        return f"--{name}" if self.dotted else f"--{name.replace('_', '-')}"

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return item_type(self.hint) is not None and "read" not in self.field.metadata

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.field.default is dataclasses.MISSING and self.field.default_factory is dataclasses.MISSING

    @property
    def default(self) -> Any:
        """What it is where it is not given."""
        factory = self.field.default_factory
        return self.field.default if factory is dataclasses.MISSING else factory()

    def read(self, texts: list[str]) -> Any:
        """The value of what follows the flag.

        Raises:
            ConfigError: it is none, or out of range.
        """
        facts, item = self.field.metadata, item_type(self.hint)
        text = texts[-1] if texts else ""
        if not texts:
            return facts.get("alone", True)
        if facts.get("path") and "" in texts:
            raise ConfigError(f"{self.shown} must not be empty; give a path, or leave it out")
        if "read" in facts:
            try:
                return facts["read"](text)
            except ValueError as error:
                raise ConfigError(f"{self.shown} {shortened(text)} {error}") from None
        is_null = len(texts) == 1 and text == facts.get("null", "null") and not facts.get("verbatim")
        if takes_null(self.hint) and (is_null or texts == ["~"]):
            return None
        value: Any = text
        is_word = takes_word(self.hint) and len(texts) == 1 and not text.startswith("[")
        if item is not None and not is_word:
            value = _listed(texts, self.dotted) if not facts.get("verbatim") else texts
        try:
            # Of a verb, null may be a text like any other; a key of configuration files is as YAML reads it.
            if is_null and not is_word and (self.dotted or self.hint is not str):
                raise ValueError(text)
            value = convert(self.hint, value)
        except ValueError:
            told = "null" if is_null else shortened(text if item is None or len(texts) == 1 else texts)
            limits = f", {range_text(self.field)}" if range_text(self.field) else ""
            raise ConfigError(f"{self.shown} must be {describe_type(self.hint)}{limits}, not {told}") from None
        try:
            return expanded(self.field, value)
        except ConfigError as error:
            raise ConfigError(f"{self.shown} {error}") from None

    def check(self, value: Any) -> None:
        """Refuse a number out of range and an empty text where the default is none.

        Raises:
            ConfigError: names the option.
        """
        if "" in (value if isinstance(value, list | tuple) else [value]) and not may_be_empty(self.field):
            raise ConfigError(f"{self.shown} must not be empty")
        if (problem := range_problem(self.field, value)) is not None:
            raise ConfigError(f"{self.shown} {problem}")


def _listed(texts: list[str], is_yaml: bool) -> Any:
    """Several values, or one that is a list in YAML.

    Args:
        texts: the words.
        is_yaml: what begins as a list has to be one. If not, a pattern such as [ab]*.jsonl is a text.
    """
    if is_yaml and texts == [""]:
        return ""  # which is no list
    if len(texts) != 1 or not texts[0].startswith("[") or not (is_yaml or texts[0].endswith("]")):
        return texts
    import yaml

    from megatron_grit.config.locate import load_yaml

    try:
        return load_yaml(texts[0])
    except yaml.YAMLError:
        return texts[0]  # which is no list


@dataclass(frozen=True, kw_only=True)
class Given:
    """One option of a command line."""

    option: Option
    texts: list[str]
    adds: bool = False
    """To the list that was given before."""


def options_of(cls: type, *, dotted: bool = False, prefix: str = "") -> dict[str, Option]:
    """The flags of a dataclass by key. Nested dataclasses add theirs, with the section's name before a dot where
    ``dotted``."""
    found: dict[str, Option] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = field.metadata.get("settings", hints[field.name])
        if dataclasses.is_dataclass(hint):
            found |= options_of(
                typing.cast(type, hint), dotted=dotted, prefix=f"{prefix}{field.name}." if dotted else ""
            )
        elif not field.metadata.get("rest"):
            found[prefix + field.name] = Option(
                key=prefix + field.name, hint=hint, field=field, group=cls, dotted=dotted
            )
    return found


def suggestion(word: str, candidates: Iterable[str]) -> str:
    """The nearest valid word, as the end of a message. A key in the wrong section is found by its last part."""
    candidates = list(candidates)
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.75)
    near = near or [name for name in candidates if len(word.lstrip("-")) > 2 and name.startswith(word)]
    if not near:
        leaf = {key.rpartition(".")[2]: key for key in reversed(candidates)}
        last = word.lstrip("-").rpartition(".")[2]
        near = [leaf[name] for name in difflib.get_close_matches(last, leaf, n=1, cutoff=0.75)]
    return f" (did you mean {near[0]}?)" if near else ""


def read_options(
    argv: Sequence[str],
    options: Mapping[str, Option],
    rest: list[str] | None = None,
    others: Iterable[str] = (),
    foreign: Mapping[str, str] | None = None,
) -> list[Given]:
    """Split a command line into options and their texts.

    Args:
        argv: the command line without the program.
        options: those that there are.
        rest: gets what is not known, to be read by another piece. None: that is an error.
        others: further options that may have been meant.
        foreign: options of another program, with underscores: the one that means the same here, or what to do instead.

    Raises:
        ConfigError: an option that is not known, lacks its value, or a value of no option.
    """
    flags = {str(option.field.metadata.get("flag", key)): option for key, option in options.items()}
    flags = {name: option for name, option in flags.items() if not option.field.metadata.get("positional")}
    waiting = [option for option in options.values() if option.field.metadata.get("positional")]
    given: list[Given] = []
    queue = list(argv)
    while queue:
        word, equals, text = queue.pop(0).partition("=")
        if not word.startswith("--"):
            if waiting:
                taken = waiting[0] if waiting[0].is_list else waiting.pop(0)  # a list takes all words of no option
                given.append(Given(option=taken, texts=[word + equals + text], adds=taken.is_list))
            elif rest is not None and rest:
                rest.append(word + equals + text)
            elif given and given[-1].option.hint is bool and not given[-1].texts:
                name = given[-1].option.shown
                raise ConfigError(f"{name} must be true or false, not {word + equals + text!r}")
            else:
                raise ConfigError(f"{word + equals + text!r} belongs to no option")
            continue
        name = word[2:].replace("-", "_")
        said = (foreign or {}).get(name, name)
        option = flags.get(said.removesuffix("+"))
        if option is None and said != name:
            raise ConfigError(f"{word} is no option here: {said}")
        if option is None and (no := flags.get(name.removeprefix("no_"))) and no.hint is bool and not equals:
            given.append(Given(option=no, texts=["false"]))
            continue
        if option is None and rest is not None:
            rest.append(word + equals + text)
            continue
        if option is None:
            raise ConfigError(f"unknown option {word}{suggestion(word, [*_spellings(flags.values()), *others])}")
        texts = [text] if equals else _texts_of(option, queue)
        if not texts and option.hint is not bool and "alone" not in option.field.metadata:
            raise ConfigError(f"{word} needs a value: {describe_type(option.hint)}")
        given.append(Given(option=option, texts=texts, adds=name.endswith("+")))
    return given


def _spellings(options: Iterable[Option]) -> list[str]:
    return [option.shown for option in options]


def _texts_of(option: Option, queue: list[str]) -> list[str]:
    """Take the words after a flag that belong to it."""
    most = len(queue) if option.is_list and not option.field.metadata.get("repeat") else 1
    if option.hint is bool:
        most = int(bool(queue) and queue[0].lower() in BOOLEANS)
    texts: list[str] = []
    while queue and len(texts) < most and not queue[0].startswith("--"):
        texts.append(queue.pop(0))
    return texts


def values_of(given: Iterable[Given], values: dict[str, Any] | None = None) -> dict[str, Any]:
    """Values by key; those of later options win, over ``values`` too."""
    values = dict(values or {})
    for one in given:
        key, value = one.option.key, one.option.read(one.texts)
        if one.adds or one.option.field.metadata.get("repeat"):
            value = [*(values.get(key, one.option.default) or []), *(value or [])]
        values[key] = value
    return values


def build(cls: type[Options], values: Mapping[str, Any], prefix: str | None = None) -> Options:
    """An instance of a dataclass, its sections included; what has no value keeps its default.

    Args:
        cls: the dataclass.
        values: by key, of the right types.
        prefix: of the keys, where sections are dotted. None: they are not.
    """
    arguments: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        facts = cls.__dataclass_fields__[name].metadata  # type: ignore[attr-defined]
        key = (prefix or "") + name
        if "settings" in facts:
            known = options_of(facts["settings"])
            arguments[name] = {known_key: value for known_key, value in values.items() if known_key in known}
        elif dataclasses.is_dataclass(hint):
            arguments[name] = build(typing.cast(type, hint), values, None if prefix is None else f"{key}.")
        elif key in values:
            arguments[name] = values[key]
    return cls(**arguments)


def parse_command(cls: type[Options], argv: Sequence[str] | None, *, prog: str, description: str) -> Options:
    """The options of a verb or tool.

    Args:
        cls: dataclass whose fields are the flags. Its attribute ``FOREIGN``, if it has one, is as of
            :func:`read_options`.
        argv: the command line without the program. None: that of the process.
        prog: name of the command.
        description: what it does, with an example.

    Raises:
        ConfigError: an option that is unknown, missing, of the wrong type or out of range; names it.
        SystemExit: ``--help`` was asked for and is printed.
    """
    argv = sys.argv[1:] if argv is None else argv
    note_command(prog, argv)
    options = options_of(cls)
    if "-h" in argv or "--help" in argv:
        print(help_page(prog, description, options.values()))
        raise SystemExit(0)
    rest = [field.name for field in dataclasses.fields(typing.cast(Any, cls)) if field.metadata.get("rest")]
    unknown: list[str] | None = [] if rest else None
    values = values_of(read_options(argv, options, unknown, foreign=getattr(cls, "FOREIGN", None)))
    missing = [option.shown for option in options.values() if option.required and option.key not in values]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given; {prog} --help explains")
    for key, value in values.items():
        options[key].check(value)
    return build(cls, values | {name: unknown for name in rest})


_COMMAND: list[str] = []


def note_command(prog: str, argv: Sequence[str]) -> None:
    """Remember what this process was asked to do, for the results that it writes."""
    _COMMAND[:] = [*prog.split(), *argv]


def command_line() -> str | None:
    """The command that this process runs, as a shell takes it; None: none, as in a program that uses the package."""
    return shlex.join(_COMMAND) if _COMMAND else None


def help_page(prog: str, description: str, options: Iterable[Option], *, sections: bool = False) -> str:
    """What ``--help`` prints.

    Args:
        prog: name of the command.
        description: what it does, with an example.
        options: in the order in which they are shown.
        sections: a heading for each dataclass, from its docstring; else required ones first.
    """
    width = min(shutil.get_terminal_size().columns, 120) - 2
    options = list(options)
    texts = {group: documents(group) for group in {option.group for option in options}}
    placed = [option for option in options if option.required or option.field.metadata.get("positional")]
    needed = [_usage(option) if option.required else f"[{_usage(option)}]" for option in placed]
    usage = " ".join([f"usage: {prog}", *needed, "[OPTION ...]"])
    lines = [*textwrap.wrap(usage, width, subsequent_indent=" " * 8, break_on_hyphens=False), "", description.strip()]
    groups: dict[str, list[Option]] = {}
    for option in options:
        title = (option.group.__doc__ or "").strip() if sections else "required:" if option.required else "options:"
        groups.setdefault(title, []).append(option)
    for title, members in sorted(groups.items(), key=lambda item: item[0] == "options:"):
        lines += ["", *textwrap.wrap(title, width)]
        for option in members:
            left = f"  {_usage(option)}"
            body = textwrap.wrap(f"{texts[option.group][option.field.name]}{_limits(option)}", width - 26)
            first = [left] if len(left) > 24 else [left.ljust(26) + body.pop(0)]
            lines += [*first, *(" " * 26 + line for line in body)]
    return "\n".join(lines)


def _usage(option: Option) -> str:
    """The flag and the form of its value."""
    if option.hint is bool and not option.dotted:
        return option.shown.replace("--", "--[no-]")
    form = {int: "N", float: "X", bool: "true|false"}
    parts = [part for part in (option.hint, *typing.get_args(option.hint)) if part in form]
    name = form[parts[0]] if parts else option.shown.rpartition(".")[2].lstrip("-").replace("-", "_").upper()
    for part in (option.hint, *typing.get_args(option.hint)):
        if typing.get_origin(part) is typing.Literal:
            name = "|".join(typing.get_args(part))
    if option.field.metadata.get("positional"):
        return f"{option.shown} ..." if option.is_list else name
    name += " ..." if option.is_list and not option.field.metadata.get("repeat") else ""
    return f"{option.shown} {f'[{name}]' if 'alone' in option.field.metadata else name}"


def _limits(option: Option) -> str:
    """Range and default, behind the explanation."""
    default = None if option.required else option.default
    default = "false" if default is False and option.dotted else default
    parts = [range_text(option.field)] if range_text(option.field) else []
    if default is not False and default not in (None, "", [], ()):
        default = "-".join(map(str, default)) if isinstance(default, tuple) else default
        shown = " ".join(map(str, default)) if option.is_list else default
        parts.append(f"default: {'true' if shown is True else shown}")
    return f" ({'; '.join(parts)})" if parts else ""
