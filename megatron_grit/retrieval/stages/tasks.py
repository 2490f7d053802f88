"""The tasks of a database, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.config.database.settings import PATHS, matters, same_value
from megatron_grit.errors import ConfigError
from megatron_grit.retrieval.stages.add import Add
from megatron_grit.retrieval.stages.compact import Compact
from megatron_grit.retrieval.stages.db_build import DbBuild
from megatron_grit.retrieval.stages.embed import Embed
from megatron_grit.retrieval.stages.index_add import IndexAdd, Recall
from megatron_grit.retrieval.stages.index_train import IndexTrain
from megatron_grit.retrieval.stages.query_neighbors import QueryNeighbors
from megatron_grit.retrieval.stages.task import Task
from megatron_grit.retrieval.stages.tombstone import Tombstone

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        DbBuild(),
        Embed(),
        IndexTrain(),
        IndexAdd(),
        Add(),
        Tombstone(),
        Compact(),
        Recall(),
        QueryNeighbors(),
    )
}
"""By name."""
GROUPS: dict[str, tuple[str, ...]] = {
    "build": ("db-build", "embed", "index-train", "index-add", "query-neighbors"),
    "index-build": ("index-train", "index-add"),
    "query-pretraining-neighbors": ("query-neighbors",),
}
"""Names that stand for several tasks, or for one that was called otherwise."""


def expand_tasks(text: str) -> list[str]:
    """The tasks of a comma list, in the order in which they run, each once.

    Raises:
        ConfigError: a name that is no task.
    """
    wanted: set[str] = set()
    for name in map(str.strip, text.split(",")):
        if name not in GROUPS and name not in TASKS:
            raise ConfigError(f"no task {name!r}; there are {', '.join([*GROUPS, *TASKS])}")
        wanted.update(GROUPS.get(name, (name,)))
    return [name for name in TASKS if name in wanted]


def with_following(names: Iterable[str]) -> set[str]:
    """Tasks and those whose results are lost when these start from nothing."""
    return {other for name in names for other in (name, *TASKS[name].voids)}


def changed_settings(
    old: RetroDbConfig, new: RetroDbConfig, built: Iterable[str], overwritten: Iterable[str]
) -> Iterator[str]:
    """A line for each setting that something was built with and that is now another one.

    Args:
        old: the configuration of the project directory.
        new: the one that is wanted.
        built: tasks that made something.
        overwritten: tasks that start from nothing.
    """
    kept = [name for name in built if name not in with_following(overwritten)]
    for setting in dict.fromkeys(setting for name in kept for setting in TASKS[name].settings):
        before, now = getattr(old, setting), getattr(new, setting)
        if not matters(setting, old, new) or same_value(setting, before, now):
            continue
        fixed = [name for name in kept if setting in TASKS[name].settings]
        # What follows a task is made again with it.
        first = [name for name in fixed if name not in with_following(other for other in fixed if other != name)]
        line = (
            f"{setting} is {before!r} in what was built (by {', '.join(fixed)}) and now {now!r}; leave it, or build "
            f"again with --overwrite {','.join(first)}"
        )
        if setting == "data_paths" and same_value(setting, before, list(now)[: len(before)]):
            line += "; documents are added with --tasks add"
        elif setting == "data_paths":
            line += "; to add documents, give the old paths and then the new ones with --tasks add"
            line += "; where the same files were only moved, leave links to them in the old place"
        elif setting in PATHS:
            line += "; where the same files were only moved, change it in config.json and remove its checksum"
        yield line
