"""Evaluations of a model on judged collections, written to one JSON file each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_grit.config.checkpoint_folder import holds_checkpoint, resolve_checkpoint
from megatron_grit.errors import ConfigError
from megatron_grit.evaluation.checkpoint import run_tasks
from megatron_grit.evaluation.encoder import checkpoint_digest, is_model_folder
from megatron_grit.evaluation.ranking.collection import read_beir
from megatron_grit.evaluation.ranking.options import RerankingOptions
from megatron_grit.evaluation.tasks import reranking, retrieval, useb
from megatron_grit.evaluation.tasks.task import Lengths
from megatron_grit.store.files import check_output


def evaluate_collection(  # many: the collection, and how it is embedded
    checkpoint: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    lengths: Lengths,
    split: str | None = None,
    query_instruction: str | None = "",
    document_instruction: str | None = "",
    device: str = "auto",
    layer: int | None = None,
) -> dict[str, Any]:
    """Retrieval with a model's embeddings.

    Args:
        checkpoint: as for :func:`~megatron_grit.evaluation.checkpoint.run_tasks`, and so are the others.
        data: folder of BEIR's, folder of one of USEB's tasks, whose texts all have the instruction of queries, or JSONL
            of embedding records, which hold their instructions themselves.
        output: JSON file.
        split: as for :func:`~megatron_grit.evaluation.ranking.collection.read_beir`, and so are the instructions.

    Returns:
        The contents of the file.

    Raises:
        GritError: data that cannot be used, options of a folder with a file, or an output that cannot be written.
    """
    check_output(output, [] if Path(data).is_dir() else [data])
    how = {"query_instruction": query_instruction, "document_instruction": document_instruction}
    name, task = "retrieval", None  # type: str, Any
    if useb.is_useb(data):
        if document_instruction:
            raise ConfigError(f"{data}: of USEB's tasks all texts have the instruction of queries; leave the other out")
        name, task = "useb", useb.read(data, split, query_instruction)
    elif Path(data).is_dir():
        task = read_beir(data, split, **how)
    else:
        if split is not None or any(how.values()):
            raise ConfigError(f"{data}: --split and instructions are of folders; records of a file have their own")
        task = retrieval.read(data)
    return run_tasks(checkpoint, output, {name: task}, lengths, device=device, layer=layer)


def evaluate_reranking(
    checkpoint: str | Path,
    data: str | Path,
    output: str | Path,
    options: RerankingOptions,
    lengths: Lengths,
    *,
    split: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Reranking with what a model generates; scores of each query stand in ``OUTPUT.scores.jsonl``.

    Args:
        checkpoint: a checkpoint, or the output directory of a run.
        data: folder of BEIR's.
        output: JSON file.
        options: what is reranked, and how.
        lengths: how texts are given to the model.
        split: as for :func:`~megatron_grit.evaluation.ranking.collection.read_beir`.
        device: auto, cpu or cuda.

    Returns:
        The contents of the file.

    Raises:
        GritError: data or a model that cannot be used, or an output that cannot be written.
    """
    scores = Path(output).with_suffix(".scores.jsonl")
    for path in (output, scores):
        check_output(path, [options.ranking])
    if not holds_checkpoint(checkpoint) and is_model_folder(checkpoint):
        raise ConfigError(f"{checkpoint}: reranking takes a checkpoint; import it with megatron-grit convert")
    weights = checkpoint_digest(resolve_checkpoint(checkpoint))
    candidates = reranking.read(data, options, split=split, output=scores, weights=weights)
    return run_tasks(checkpoint, output, {"reranking": candidates}, lengths, device=device)
