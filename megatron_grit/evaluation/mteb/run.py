"""Evaluates a model on tasks of mteb, a task at a time; results are mteb's own files, and a killed run resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_grit.config.commands import command_line
from megatron_grit.errors import ConfigError
from megatron_grit.evaluation.encoder import TextEncoder, load_encoder, model_fingerprint
from megatron_grit.evaluation.mteb.instructions import load_instructions
from megatron_grit.evaluation.mteb.model import MtebModel
from megatron_grit.evaluation.mteb.options import MtebOptions
from megatron_grit.evaluation.mteb.tasks import data_digests, import_mteb, load_tasks, parts_of, use_folder
from megatron_grit.evaluation.tasks.task import Lengths
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import write_json
from megatron_grit.store.lock import locked_folder
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

SCORES = "scores.json"
_IDENTITY = "evaluation.json"


def evaluate_mteb(
    checkpoint: str | Path,
    output_dir: str | Path,
    options: MtebOptions,
    lengths: Lengths,
    *,
    device: str = "auto",
    tasks: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a model; results that are there are kept.

    Args:
        checkpoint: a checkpoint or run, or a directory of Hugging Face or sentence-transformers.
        output_dir: gets ``results/MODEL/REVISION/TASK.json`` in mteb's format, and ``scores.json``. It belongs to one
            model, one set of options and one content of the data folder of each task.
        options: which tasks, and how.
        lengths: how texts are given to the model.
        device: auto, cpu or cuda.
        tasks: mteb's task objects, in place of those that ``options`` name.

    Returns:
        The contents of ``scores.json``: main scores, their mean by type of task and over all tasks.

    Raises:
        ConfigError: an unknown task, instructions that cannot be used, mteb is not installed, or the folder holds
            results of another model, other options or other data.
        DataError: data of a task that are missing or cannot be read.
        OutputError: another process is writing into the folder, or it cannot be written.
    """
    mteb = import_mteb()
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    instructions = load_instructions(options.instructions, template=options.template, num_shots=options.num_shots)
    found = load_tasks(options.tasks, options.languages) if tasks is None else list(tasks)
    instructions.check_shots([part.metadata.name for task in found for part in parts_of(task)])
    if options.data_folder is not None:
        for task in found:
            use_folder(task, options.data_folder)
    encoder = load_encoder(checkpoint, device)
    _set_length(encoder, options.normalize)
    settings = {"instructions": instructions.contents(), "normalize": options.normalize, **asdict(lengths)}
    settings.pop("batch_tokens")
    folder, name = Path(output_dir), Path(checkpoint).resolve().name
    identity = {"model": name, "weights": model_fingerprint(checkpoint, encoder), "options": settings}
    with locked_folder(folder):
        name = _take(folder, identity)
        meta = ModelMeta.create_empty(
            {
                "name": f"megatron-grit/{name}",
                "revision": digest_of_settings([identity["weights"], settings])[:16],
                "max_tokens": lengths.max_length,
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["PyTorch"],
                "use_instructions": instructions.name != "none",
            }
        )
        cache = mteb.ResultCache(cache_path=folder)
        parts = [part.metadata.name for task in found for part in parts_of(task)]
        evaluated = {part for part in parts if cache.get_task_result_path(part, meta).exists()}
        digests = {part: digest for task in found for part, digest in data_digests(task, options.data_folder).items()}
        _take_data(folder, digests, evaluated)
        model, scores = MtebModel(encoder, instructions, lengths, meta), dict[str, dict[str, Any]]()
        for number, task in enumerate(found, 1):
            scores[task.metadata.name] = _run(mteb, model, task, cache)
            log.info(f"{task.metadata.name} ({number} of {len(found)}): {scores[task.metadata.name]['main_score']:.4f}")
        contents = _summary(name, scores)
        write_json(folder / SCORES, contents)
    return contents


def _run(mteb: Any, model: MtebModel, task: Any, cache: Any) -> dict[str, Any]:
    """Main score and type of a task, computed or found."""
    for part in {id(each): each for each in (*parts_of(task), task)}.values():
        path = cache.get_task_result_path(part.metadata.name, model.mteb_model_meta)
        if path.exists() and not _is_whole(path):
            log.warning(f"{path}: is damaged, so the task is evaluated again")
            path.unlink()
    result = mteb.evaluate(
        model,
        task,
        cache=cache,
        overwrite_strategy="only-missing",
        encode_kwargs={"batch_size": 512, "show_progress_bar": False},
        show_progress_bar=False,
        co2_tracker=False,
    )
    (found,) = result.task_results
    # mteb rounds what it writes; a score is the same whether it was computed or found.
    return {"main_score": round(float(found.get_score()), 6), "type": task.metadata.type}


def _is_whole(path: Path) -> bool:
    """Whether a result was written to its end: mteb writes in place, and a kill leaves a part."""
    try:
        return "scores" in json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False


def _set_length(encoder: TextEncoder, normalize: str) -> None:
    """Have vectors normalised or not.

    Raises:
        ConfigError: the model is not ours: its modules say.
    """
    if normalize == "auto":
        return
    config = getattr(encoder, "config", None)
    if config is None:
        raise ConfigError("normalize is of checkpoints; what a directory of Hugging Face normalises its modules say")
    config.embedding.normalize = normalize == "true"


def _take(folder: Path, identity: dict[str, Any]) -> str:
    """Make a folder that of a model and its options, or find that it is. Returns the model's name there.

    Raises:
        ConfigError: it is another one's.
    """
    path = folder / _IDENTITY
    if not path.exists():
        others = sorted(each.name for each in (folder / "results").glob("*") if each.is_dir())
        if others:
            raise ConfigError(f"{folder}: holds results of another model, {others[0]}; give another --output-dir")
        write_json(path, identity)
        return str(identity["model"])
    try:
        held = json.loads(path.read_bytes())
        other, options = held["model"], held["options"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: is damaged; delete it with results/, or give another --output-dir") from None
    if held.get("weights") != identity["weights"]:
        raise ConfigError(f"{folder}: holds results of another model, {other}; give another --output-dir")
    changed = [key for key, value in identity["options"].items() if options.get(key) != value]
    if changed:
        raise ConfigError(f"{folder}: holds results with other {', '.join(changed)}; give another --output-dir")
    return str(other)


def _take_data(folder: Path, digests: dict[str, str | None], evaluated: set[str]) -> None:
    """Note what data tasks are evaluated on, or find that results are of these data.

    Args:
        folder: that of the model, see :func:`_take`.
        digests: of the data of each task.
        evaluated: tasks that have a result.

    Raises:
        ConfigError: a result is of other data.
    """
    path = folder / _IDENTITY
    identity = json.loads(path.read_bytes())
    held = identity.get("data", {})
    other = sorted(name for name in evaluated if held.get(name) != digests[name])
    if other:
        raise ConfigError(f"{folder}: holds results of {', '.join(other)} on other data; give another --output-dir")
    if held != (data := held | digests):
        write_json(path, identity | {"data": data})


def _summary(model: str, scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Main scores, in the form that ``evaluate table`` reads, and their means."""
    kinds: dict[str, list[float]] = {}
    for each in scores.values():
        kinds.setdefault(each["type"], []).append(each["main_score"])
    return {
        "model": model,
        "results": scores,
        "by_type": {kind: fmean(values) for kind, values in sorted(kinds.items())},
        "mean": fmean(each["main_score"] for each in scores.values()),
        "command": command_line(),
    }


def format_scores(contents: dict[str, Any]) -> str:
    """Lines for a terminal: tasks, then types, then the mean over tasks."""
    rows = [(name, each["main_score"]) for name, each in contents["results"].items()]
    rows += [*contents["by_type"].items(), ("mean over tasks", contents["mean"])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}s} {value:8.4f}" for name, value in rows)
