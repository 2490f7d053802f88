"""Which settings each task of a database build was made with, and which of them may therefore still change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.errors import ConfigError

STAGES = ("db-build", "embed", "index-train", "index-add", "query-neighbors")
"""In the order in which they run."""
CHANGES = ("add", "tombstone")
"""Tasks that change a database that is built. Neighbors are searched after them."""
TASKS: dict[str, tuple[str, ...]] = {
    "build": STAGES,
    "index-build": ("index-train", "index-add"),
    "query-pretraining-neighbors": ("query-neighbors",),
}
"""Names that stand for other tasks."""

_EMBEDDER = ("embedder", "embedder_pooling", "embedder_max_length", "embedder_precision", "embedding_dtype")
_SETTINGS: dict[str, tuple[str, ...]] = {
    "db-build": (
        "data_paths",
        "tokenizer",
        "chunk_length",
        "min_chunk_tokens",
        "duplicates",
        "near_threshold",
        "minhash_permutations",
        "valid_fraction",
        "seed",
    ),
    "embed": (*_EMBEDDER, "block_size"),
    "index-train": (*_EMBEDDER, "index", "metric", "ntrain", "train_load_fraction", "index_memory_gb"),
    "index-add": ("add_load_fraction", "num_shards", "recall_queries"),
}
"""Those that a finished task fixes. What query-neighbors makes is kept apart for all settings of its own."""
_PATHS = ("embedder", "tokenizer", "data_paths", "recall_queries")
_FOLLOWING: dict[str, tuple[str, ...]] = {"db-build": STAGES, "index-train": ("index-train", "index-add")}
_TRACES: dict[str, tuple[str, ...]] = {
    "db-build": ("db/indexed_dataset_infos.json",),
    "embed": ("embeddings/*.hdf5",),
    "index-train": ("index/*/*/empty_*.json",),
    "index-add": ("index/*/*/search.json",),
    "query-neighbors": ("query/*/table.json",),
}
FILES: dict[str, tuple[str, ...]] = {
    "db-build": (
        *(f"db/{name}" for name in ("individual", "merged", "duplicates", "report.json", "indexed_dataset_infos.json")),
        "db/versions/[0-9]*",
    ),
    "embed": ("embeddings",),
    "index-train": ("index",),
    "index-add": (
        "index/recall_queries",
        *(f"index/*/*/{name}" for name in ("added_*", "add_codes*", "exact_neighbors.hdf5", "search.json")),
    ),
    "query-neighbors": ("query",),
}
"""What a task makes, as patterns in the project directory."""
FOLDERS = ("db", "embeddings", "index", "query")
"""Of a project directory that are ours."""


def expand_tasks(text: str) -> list[str]:
    """The stages of a comma list, in their order, each once.

    Args:
        text: names of stages, of :data:`CHANGES`, or of :data:`TASKS`.

    Raises:
        ConfigError: a name that is no task.
    """
    order = [*STAGES[:-1], *CHANGES, STAGES[-1]]
    wanted: set[str] = set()
    for name in text.split(","):
        names = TASKS.get(name.strip(), (name.strip(),))
        for stage in names:
            if stage not in order:
                raise ConfigError(f"no task {stage!r}; there are {', '.join([*TASKS, *order])}")
        wanted.update(names)
    return [stage for stage in order if stage in wanted]


def with_following(stages: Iterable[str]) -> set[str]:
    """Stages and those that are worth nothing when these are made again."""
    return {other for stage in stages for other in _FOLLOWING.get(stage, (stage,))}


def built_stages(project: Path) -> list[str]:
    """Stages of which there is something in a project directory."""
    return [stage for stage, traces in _TRACES.items() if any(any(project.glob(trace)) for trace in traces)]


def changed_settings(
    old: RetroDbConfig, new: RetroDbConfig, built: Iterable[str], overwritten: Iterable[str]
) -> Iterator[str]:
    """A line for each setting that something was built with and that is now another one.

    Args:
        old: the configuration of the project directory.
        new: the one that is wanted.
        built: stages that are there.
        overwritten: of them, those that are made again.
    """
    kept = [stage for stage in built if stage not in with_following(overwritten)]
    for name in dict.fromkeys(name for stage in kept for name in _SETTINGS.get(stage, ())):
        before, now = getattr(old, name), getattr(new, name)
        if not _matters(name, old, new) or same_value(name, before, now):
            continue
        fixed = [stage for stage in kept if name in _SETTINGS.get(stage, ())]
        # What follows a stage is made again with it.
        first = [stage for stage in fixed if stage not in with_following(other for other in fixed if other != stage)]
        line = (
            f"{name} is {before!r} in what was built (by {', '.join(fixed)}) and now {now!r}; leave it, or build again "
            f"with --overwrite {','.join(first)}"
        )
        if name == "data_paths" and same_value(name, before, list(now)[: len(before)]):
            line += "; documents are added with --tasks add"
        elif name == "data_paths":
            line += "; where the same files were only moved, leave links to them in the old place"
        elif name in _PATHS:
            line += "; where the same files were only moved, change it in config.json"
        yield line


def _matters(name: str, old: RetroDbConfig, new: RetroDbConfig) -> bool:
    if name in ("near_threshold", "minhash_permutations"):
        return "near" in (old.duplicates, new.duplicates)
    return name != "index_memory_gb" or "auto" in (old.index, new.index)


def setting_in_use(config: RetroDbConfig, name: str) -> Any:
    """A setting for the signature of what is built with it: its default where it does not matter, so that changing it
    then makes nothing anew."""
    return getattr(config if _matters(name, config, config) else RetroDbConfig, name)


def same_value(name: str, first: Any, second: Any) -> bool:
    """Whether two values of a setting mean the same: paths may be spelled in several ways."""
    return bool(_comparable(name, first) == _comparable(name, second))


def _comparable(name: str, value: Any) -> Any:
    if name not in _PATHS or value is None:
        return value
    return [Path(path).resolve() for path in value] if isinstance(value, list) else Path(value).resolve()
