"""Tasks of mteb by name, on its own data or on folders of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_grit.compat import needed
from megatron_grit.config.commands import suggestion
from megatron_grit.config.locate import yaml_file
from megatron_grit.errors import ConfigError, DataError, GritError
from megatron_grit.evaluation.ranking.collection import read_beir
from megatron_grit.store.digest import digest_of_files

_SUITES = Path(__file__).parent / "suites.yaml"
_SPLITS = {"MSMARCO": "dev"}
"""Of tasks that are not evaluated on test."""


def import_mteb() -> ModuleType:
    """The package mteb.

    Raises:
        ConfigError: it is not installed.
    """
    with needed("evaluate mteb needs", "mteb", "eval"):
        import mteb
    return mteb


def suites() -> dict[str, list[str]]:
    """Tasks of each suite."""
    with yaml_file(_SUITES, "file of suites") as (loader, root):
        found: dict[str, list[str]] = loader.construct_document(root)
    return found


def load_tasks(names: Sequence[str], languages: Sequence[str] | None) -> list[Any]:
    """Tasks of mteb.

    Args:
        names: of tasks or suites.
        languages: keep subsets that are all of these languages, by three letters. None: all.

    Raises:
        ConfigError: a name that is none; offers the nearest.
    """
    mteb, known = import_mteb(), suites()
    wanted = dict.fromkeys(task for name in names for task in known.get(name, [name]))
    every = _all_names()
    tasks = []
    for name in wanted:
        if name not in every:
            near = suggestion(name, [*every, *known])
            raise ConfigError(f"unknown task {name}{near or '; mteb available-tasks lists them'}")
        try:
            task = mteb.get_task(name, languages=languages, exclusive_language_filter=languages is not None)
        except ValueError:
            task = None
        if task is None:
            raise ConfigError(f"task {name} has no part in {', '.join(languages or [])}; give other --languages")
        split = _SPLITS.get(name, "test")
        if split in task.eval_splits and not task.is_aggregate:
            task.filter_eval_splits([split])
        tasks.append(task)
    return tasks


def _all_names() -> list[str]:
    from mteb.get_tasks import TASK_LIST

    return [each.metadata.name for each in TASK_LIST]


def parts_of(task: Any) -> list[Any]:
    """The tasks that a task's score is the mean of; the task itself, for most."""
    return list(task.metadata.tasks) if task.is_aggregate else [task]


def use_folder(task: Any, data_folder: str | Path) -> None:
    """Have a task read its data from a folder of its name.

    The folder is a data set in the layout of its repository at Hugging Face (files of .jsonl, .csv or .parquet named by
    split, with README.md where there are several configurations; or a folder for each language); for retrieval and
    reranking also one of BEIR's.

    Args:
        task: of mteb.
        data_folder: with ``NAME/`` for each task, and for each part of one that has parts.

    Raises:
        DataError: there is no such folder.
    """
    from mteb.abstasks import AbsTaskRetrieval

    for part in parts_of(task):
        folder = Path(data_folder) / part.metadata.name
        if not folder.is_dir():
            path = part.metadata.dataset["path"]
            raise DataError(
                f"is missing; put the data set there, laid out as that of Hugging Face, {path}", path=folder
            )
        is_beir = isinstance(part, AbsTaskRetrieval) and any(
            (folder / f"corpus.jsonl{end}").is_file() for end in ("", ".gz", ".zst")
        )
        if is_beir:
            load: Callable[..., None] = partial(_load_beir, part, folder)
        elif part.metadata.is_multilingual and all((folder / name).is_dir() for name in part.hf_subsets):
            load = partial(_load_subsets, part, folder)
        else:
            own = {**part.metadata.dataset, "path": str(folder)}
            part.metadata = part.metadata.model_copy(update={"dataset": own})
            load = part.load_data
        part.load_data = partial(_located, folder, load)


def data_digests(task: Any, data_folder: str | Path | None) -> dict[str, str | None]:
    """Digest of the data of each part of a task, by the part's name: of names, sizes and contents of the files in its
    folder, without hidden ones. None: the data are mteb's own, of the revision that the task's definition names."""
    names = [part.metadata.name for part in parts_of(task)]
    return {name: None if data_folder is None else _digest_of_folder(Path(data_folder) / name) for name in names}


def _digest_of_folder(folder: Path) -> str:
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent) / name for name in names if not name.startswith(".")]
    return digest_of_files(folder, files, None)


def _located(folder: Path, load: Callable[..., None], *arguments: Any, **keywords: Any) -> None:
    """Load data, and have an error name the folder."""
    try:
        load(*arguments, **keywords)
    except GritError:
        raise
    except Exception as error:  # whatever datasets and its readers raise, down to pyarrow's own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise DataError(f"cannot be read as the task's data set ({reason})", path=folder) from error


def _load_beir(task: Any, folder: Path, *arguments: Any, **keywords: Any) -> None:
    from datasets import Dataset

    def rows(ids: list[str], texts: list[str]) -> Any:
        return Dataset.from_dict({"id": ids, "text": texts})

    held = {}
    for split in task.eval_splits:
        found = read_beir(folder, split)
        ids = found.document_ids
        held[split] = {
            "corpus": rows(ids, found.documents),
            "queries": rows(found.query_ids, found.queries),
            "relevant_docs": {
                query: {ids[place] if place >= 0 else f"missing {-place}": grade for place, grade in grades.items()}
                for query, grades in zip(found.query_ids, found.judgements, strict=True)
            },
            "top_ranked": None,
        }
    task.dataset = {"default": held}
    task.dataset_transform()
    task.data_loaded = True


def _load_subsets(task: Any, folder: Path, *arguments: Any, **keywords: Any) -> None:
    from datasets import load_dataset

    task.dataset = {name: load_dataset(str(folder / name)) for name in task.hf_subsets}
    task.dataset_transform()
    task.data_loaded = True
