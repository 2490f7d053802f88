"""What ``--tasks`` names: suites, tasks and groups of lm-eval, and YAML files of tasks.

A suite is data: ``suites.yaml`` in this package. Its parts are evaluated one after another,
each a run of the harness of its own, because a harness holds a task with one number of examples only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_grit.config.commands import suggestion
from megatron_grit.config.locate import yaml_file
from megatron_grit.errors import ConfigError, DataError

SUITES = Path(__file__).with_name("suites.yaml")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tasks that one run of the harness takes."""

    name: str
    """Of its folder of results; empty for tasks that are named alone."""
    tasks: tuple[str, ...]
    """Names, or paths of YAML files."""
    num_fewshot: int | None = None
    """Examples in a prompt. None: as the tasks say."""
    metric: str | None = None
    """The one that a suite's means are taken of. None: no means."""
    group: str = ""
    """Group of the suite."""
    scale: float = 1.0
    """Multiplies the figure in means."""
    runs_code: bool = False
    """Whether what the model writes is run as a program."""
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    """Options of generation that differ from the tasks' own."""


def read_suites(path: Path | None = None) -> dict[str, list[Part]]:
    """Parts of each suite of a file: ``SUITE: {PART: {tasks: [NAME], ...}}``, with the fields of :class:`Part`.

    Args:
        path: the file. None: this package's.

    Raises:
        ConfigError: the file is not of this form.
    """
    path = path or SUITES
    with yaml_file(path, "file of suites") as (loader, root):
        value = None if root is None else loader.construct_document(root)
    try:
        return {
            suite: [Part(name=name, **entry | {"tasks": tuple(entry["tasks"])}) for name, entry in parts.items()]
            for suite, parts in (value or {}).items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: give suites as SUITE: {{PART: {{tasks: [NAME, ...]}}}} ({error!r})") from None


def parts_of(names: Sequence[str], num_fewshot: int | None = None) -> list[Part]:
    """The parts that names stand for, which may have commas between them: those of each suite, and one of all that are
    no suites.

    Raises:
        ConfigError: no name, one of them twice, or ``num_fewshot`` with a suite, whose parts have their own.
    """
    suites = read_suites()
    names = [name for given in names for name in given.split(",") if name]
    if not names:
        raise ConfigError(f"name at least one task, or a suite: {', '.join(suites)}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"task {twice} is named twice")
    alone = tuple(name for name in names if name not in suites)
    parts = [part for name in names if name in suites for part in suites[name]]
    if parts and num_fewshot is not None:
        raise ConfigError("num_fewshot is of tasks that are named alone; the parts of a suite have their own")
    held = [part.name for part in parts]
    if twice := next((name for name in held if held.count(name) > 1), None):
        raise ConfigError(f"part {twice} is in two of the suites; evaluate them into folders of their own")
    return ([Part(name="", tasks=alone, num_fewshot=num_fewshot)] if alone else []) + parts


class TaskLoader:
    """Loads tasks of lm-eval with their data.

    Args:
        include_path: folders with YAML files of tasks, which count before lm-eval's own.

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(self, include_path: Sequence[str | Path] = ()) -> None:
        from lm_eval.tasks import TaskManager

        for folder in include_path:
            if not Path(folder).is_dir():
                raise ConfigError(f"include_path {folder}: there is no such folder")
        self._paths = [str(folder) for folder in include_path]
        # lm-eval reads some 14,000 files to find its own tasks: only where one of them is asked for.
        self.manager = TaskManager(include_path=self._paths or None, include_defaults=False)
        self._whole = False

    def check(self, parts: Sequence[Part], may_run_code: bool) -> None:
        """Refuse what cannot be evaluated, before anything is loaded.

        Raises:
            ConfigError: a task that there is not, with near names, or one that runs what the model writes as a program,
                where that is not allowed.
        """
        for part in parts:
            for name in part.tasks:
                entry = self._entry(name)
                if (part.runs_code or _runs_code(entry)) and not may_run_code:
                    raise ConfigError(
                        f"task {name} runs what the model writes as programs on this machine; allow it with "
                        "--confirm-run-unsafe-code"
                    )

    def load(self, part: Part) -> list[Any]:
        """Tasks and groups of a part, with their data.

        Raises:
            DataError: the data of one are not there, or its file is no task.
        """
        found: list[Any] = []
        for name in part.tasks:
            try:
                loaded = self.manager.load([name])
            except Exception as error:  # data sets' packages raise whatever they like
                raise DataError(f"task {name} cannot be loaded: {_first_line(error)}{_hint(error)}") from error
            inside = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
            nested = {child for children in loaded["group_map"].values() for child in children}
            found += [group for key, group in loaded["groups"].items() if key not in nested]
            found += [task for key, task in loaded["tasks"].items() if key not in inside]
        return found

    def _entry(self, name: str) -> Any:
        """What lm-eval's index says of a name. None: it is a file.

        Raises:
            ConfigError: there is no such task.
        """
        if name.endswith((".yaml", ".yml")) or "/" in name:
            if not Path(name).is_file():
                raise ConfigError(f"task {name}: there is no such file")
            return None
        if name not in self.manager.task_index and not self._whole:
            from lm_eval.tasks import TaskManager

            self.manager, self._whole = TaskManager(include_path=self._paths or None), True
        if name not in self.manager.task_index:
            known = [*read_suites(), *self.manager.all_tasks]
            raise ConfigError(f"task {name!r} is not known{suggestion(name, known)}; lm-eval ls tasks lists lm-eval's")
        return self.manager.task_index[name]


def _runs_code(entry: Any) -> bool:
    config = getattr(entry, "cfg", None)
    return isinstance(config, Mapping) and bool(config.get("unsafe_code"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _hint(error: BaseException) -> str:
    missing = isinstance(error, FileNotFoundError | ConnectionError) or "offline" in str(error).lower()
    return "; data are read from this machine alone unless --allow-downloads is given" if missing else ""
