"""Instructions of tasks as data: a set that comes with the package, or a YAML file of the same form.

    task_prompts: true            # take what mteb's definition of a task says, where tasks below does not name it
    template: "Instruct: {instruction}\\nQuery: "   # in place of the model's own
    types:                        # by task type, for all other tasks
      STS: Retrieve semantically similar text
      Retrieval: {query: Find documents that answer, document: ""}
    tasks:                        # by task
      ArguAna: {query: Find arguments against this one}
    examples:                     # for num_shots 1
      ArguAna: {text: a query, match: what it should find}

Of retrieval a single text is that of queries, and documents have none. Everywhere else, reranking included, it is for
all texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from megatron_grit.config.commands import suggestion
from megatron_grit.config.locate import yaml_file
from megatron_grit.errors import ConfigError

Sided = str | dict[str, str]
"""A text, or one for "query" and one for "document"."""

_SETS = Path(__file__).parent / "sets"
_KEYS = ("task_prompts", "template", "types", "tasks", "examples")
TEMPLATES = {"own": None, "instruct": "Instruct: {instruction}\nQuery: "}
"""What is put in front of a text by name; None: the model's own template."""


@dataclass(frozen=True, kw_only=True)
class InstructionSet:
    """What texts of each task are embedded for."""

    name: str
    types: Mapping[str, Sided] = field(default_factory=dict)
    tasks: Mapping[str, Sided] = field(default_factory=dict)
    examples: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Of each task a text and what it should match."""
    task_prompts: bool = False
    template: str | None = None
    """With {instruction}. None: the model's own."""
    num_shots: int = 0

    def contents(self) -> dict[str, Any]:
        """All of it, for an identity."""
        return asdict(self)

    def of(self, task: str, kind: str, prompt: Any, side: Literal["query", "document"] | None) -> str:
        """The instruction of a text.

        Args:
            task: its name.
            kind: the task's type.
            prompt: of mteb's definition of the task.
            side: of the text, where the task tells.
        """
        published = prompt if self.task_prompts else None
        found: Sided = self.tasks.get(task) or published or self.types.get(kind) or ""
        is_document = side == "document"
        if isinstance(found, str):
            found = {"query": found} | ({"document": ""} if "Retrieval" in kind else {})
        text = found.get("document", "" if "Retrieval" in kind else found.get("query", "")) if is_document else None
        text = found.get("query", "") if text is None else text
        if self.num_shots and text:
            example = self.examples[task]
            text = f'{text.rstrip(".: ")}. For example, "{example["text"]}" matches "{example["match"]}"'
        return text

    def check_shots(self, tasks: list[str]) -> None:
        """Refuse tasks without an example, where one is asked for.

        Raises:
            ConfigError: names them.
        """
        missing = [task for task in tasks if task not in self.examples]
        if self.num_shots and missing:
            raise ConfigError(
                f"num_shots 1: the instructions {self.name} have no example of {', '.join(missing)}; give a YAML file "
                f"with examples: {missing[0]}: {{text: ..., match: ...}}"
            )


def known_sets() -> list[str]:
    """Names of the sets that come with the package."""
    return sorted(path.stem for path in _SETS.glob("*.yaml"))


def load_instructions(name: str, *, template: str | None = None, num_shots: int = 0) -> InstructionSet:
    """A set by its name or file.

    Args:
        name: of :func:`known_sets`, or of a YAML file.
        template: "own", "instruct" or a text with {instruction}. None: what the set says.
        num_shots: 0, or 1 to append an example to each instruction.

    Raises:
        ConfigError: there is none, it is not of the form, or a template without {instruction}.
    """
    path = _SETS / f"{name}.yaml" if name in known_sets() else Path(name)
    if not path.is_file():
        raise ConfigError(f"instructions {name}: no set and no file of this name; sets are {', '.join(known_sets())}")
    with yaml_file(path, "file of instructions") as (loader, root):
        value = None if root is None else loader.construct_document(root)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: give types: and tasks: of instructions")
    for key in value:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key {key}{suggestion(str(key), _KEYS)}")
    shape = {
        part: _texts(path, part, value.get(part) or {}, sides)
        for part, sides in (
            ("types", ("query", "document")),
            ("tasks", ("query", "document")),
            ("examples", ("text", "match")),
        )
    }
    for task, example in shape["examples"].items():
        if not isinstance(example, dict) or len(example) < 2:
            raise ConfigError(f"{path}: examples.{task} must be {{text: ..., match: ...}}")
    wanted = value.get("template") if template is None else TEMPLATES.get(template, template)
    if wanted is not None and (not isinstance(wanted, str) or wanted.count("{instruction}") != 1):
        raise ConfigError(
            f"template must be one of {', '.join(TEMPLATES)}, or hold {{instruction}} once, not {str(wanted)[:60]!r}"
        )
    return InstructionSet(
        name=name,
        types=shape["types"],
        tasks=shape["tasks"],
        examples=cast(Any, shape["examples"]),
        task_prompts=value.get("task_prompts") is True,
        template=wanted,
        num_shots=num_shots,
    )


def _texts(path: Path, part: str, value: Any, sides: tuple[str, str]) -> dict[str, Sided]:
    """Texts, or dictionaries of texts, by task or type."""
    form = f"a text, or {{{sides[0]}: ..., {sides[1]}: ...}}"
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {part} must have {form} of each name")
    for name, found in value.items():
        texts = found if isinstance(found, dict) else {sides[0]: found}
        if not texts or any(key not in sides or not isinstance(text, str) for key, text in texts.items()):
            raise ConfigError(f"{path}: {part}.{name} must be {form}")
    return value
