"""Every knob of a retrieval database, declared once; kept in the project directory as config.json."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from megatron_grit.errors import ConfigError
from megatron_grit.store.files import write_json

CONFIG_FILE = "config.json"
MOST_ON_GPU = 2048
"""Neighbors, and lists, that one search on a GPU finds or visits at most (GPU_MAX_SELECTION_K of faiss)."""


@dataclass(kw_only=True)
class RetroDbConfig:
    """A retrieval database: which documents, how they are cut, embedded, indexed and searched."""

    data_paths: list[str] = field(default_factory=list)
    """Prefixes of indexed files, the documents of the database; one is enough. A relative one counts from the project
    directory, or from where the command is run. Later ones may be added with the task add."""
    tokenizer: str | None = None
    """SentencePiece .model, tokenizer.json or their folder, with which the documents were made."""
    chunk_length: int = 64
    """Tokens of a chunk."""
    min_chunk_tokens: int = 1
    """Chunks of fewer tokens that hold more than white space are left out."""
    duplicates: Literal["keep", "exact", "near"] = "exact"
    """Chunks that stand in the database already: keep them, leave out equal ones, or also similar ones by MinHash."""
    near_threshold: float = 0.8
    """With duplicates near: the estimated Jaccard similarity of runs of three tokens from which a chunk is left out."""
    minhash_permutations: int = 128
    """With duplicates near: length of a MinHash signature."""
    valid_fraction: float = 0.0
    """Share of the documents that is kept out of the database, for validation; drawn at random."""
    seed: int = 1234
    """Of random choices: validation documents, the training sample of the index."""
    doc_block_size: int = 100_000
    """Documents of a block of chunks."""
    block_size: int = 100_000
    """Chunks of a block of embeddings, codes and neighbors."""
    embedder: str | None = None
    """What embeds chunks: directory of a Hugging Face encoder or of a sentence-transformers model, or one of our
    checkpoints or runs."""
    embedder_pooling: Literal["auto", "mean", "mean_text", "cls"] = "auto"
    """Of a Hugging Face encoder: mean over all tokens; mean_text, over all but the first and the last ([CLS] and [SEP],
    as Retro does); cls. auto: what the directory's sentence-transformers modules say, else mean_text."""
    embedder_max_length: int = 256
    """Tokens of the embedder to which a chunk's text is cut."""
    query_instruction: str = ""
    """Of our own models: what queries are embedded for. Of a Hugging Face encoder: text in front of queries, in place
    of the prompt that its directory names."""
    embedder_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the embedder's matrix products."""
    batch_tokens: int = 8192
    """Tokens of a forward pass of the embedder, padding included."""
    embedder_tensor: int = 1
    """Of our own models: tensor parallel size. With this, embedder_pipeline, embedder_context and embedder_expert a
    model that one GPU cannot hold is spread over several processes, which embed together. The number of processes is a
    multiple of embedder_tensor x embedder_pipeline x the least common multiple of the other two. Another mesh changes
    the last digits of vectors."""
    embedder_pipeline: int = 1
    """Of our own models: pipeline stages."""
    embedder_context: int = 1
    """Of our own models: context parallel size."""
    embedder_expert: int = 1
    """Of our own models with a mixture of experts: expert parallel size."""
    embedding_dtype: Literal["float32", "float16"] = "float32"
    """To which vectors of chunks are rounded, and in which the task embed keeps them: 4 or 2 bytes a channel."""
    index: str = "auto"
    """A faiss factory string, such as OPQ32_64,IVF65536_HNSW8,PQ32. auto: chosen from the number of chunks,
    index_memory_gb and recall."""
    metric: Literal["l2", "inner_product"] = "l2"
    """What is compared."""
    ntrain: int | None = None
    """Chunks that the index is trained on, drawn at random. null: as many as it needs."""
    train_load_fraction: float = 1.0
    """Share of them that is loaded for training."""
    add_load_fraction: float = 1.0
    """Share of each block's chunks that is added to the index."""
    index_memory_gb: float = 16.0
    """With index auto: memory for the index while it is searched."""
    recall: float = 0.95
    """With index auto, and where nprobe and ef_search are null: wanted recall of the nearest neighbors."""
    recall_queries: str | None = None
    """A text file, a query in each line, that chooses how the index is searched and measures its recall. null: chunks
    of query_paths, or of the database where that is empty or part of it."""
    num_shards: int = 1
    """Files that the index is spread over, each with a run of the chunks; searched one after the other, or by several
    processes."""
    nprobe: int | None = None
    """Lists that are visited. null: the fewest that reach recall on a sample."""
    ef_search: int | None = None
    """Candidates of an HNSW search. null: as nprobe."""
    index_placement: Literal["mapped", "memory", "spread"] = "mapped"
    """Where query-neighbors has the index. mapped: on disk, of which the system reads what a search touches; memory:
    whole in each process; spread: each process holds some of its files, and all of them search every query."""
    index_on_gpu: bool = False
    """Search on GPUs what a process holds in memory: that of its local rank under torchrun, else all. Needs the GPU
    build of faiss."""
    query_paths: list[str] = field(default_factory=list)
    """Prefixes of indexed files whose chunks get neighbors. Empty: those of data_paths."""
    num_neighbors_query: int = 200
    """Neighbors that are searched. Where filters leave fewer than num_neighbors_save, up to 16 times as many are."""
    num_neighbors_save: int = 20
    """Of these, neighbors that are kept after filtering."""
    max_overlap: float | None = None
    """Leave out neighbors of which more than this share of the runs of eight tokens, continuation included, stands in
    the query's chunk or the one after it. null: none are."""
    version: int | None = None
    """State of the database that is searched, of those in db/versions. null: the newest. Training that began with one
    keeps it."""
    keep_embeddings: bool = False
    """Keep the embeddings of the training sample and the codes, which --validate can then check."""


_AT_LEAST_ONE = (
    "chunk_length",
    "doc_block_size",
    "block_size",
    "embedder_max_length",
    "batch_tokens",
    "embedder_tensor",
    "embedder_pipeline",
    "embedder_context",
    "embedder_expert",
    "num_shards",
    "num_neighbors_save",
    "ntrain",
    "nprobe",
    "ef_search",
)


def config_problems(config: RetroDbConfig) -> Iterator[str]:
    """What is wrong with a configuration by itself."""
    yield from _value_problems(config)
    if any(_is_null(config)):
        return
    for name in _AT_LEAST_ONE:
        value = getattr(config, name)
        if value is not None and value < 1:
            yield f"{name} must be at least 1, not {value}"
    for name in ("near_threshold", "train_load_fraction", "add_load_fraction", "recall"):
        if not 0 < getattr(config, name) <= 1:
            yield f"{name} must be above 0 and at most 1, not {getattr(config, name)}"
    if config.minhash_permutations < 16:
        yield f"minhash_permutations must be at least 16, not {config.minhash_permutations}"
    if config.index_memory_gb <= 0:
        yield f"index_memory_gb must be above 0, not {config.index_memory_gb}"
    if not 0 <= config.valid_fraction < 1:
        yield f"valid_fraction must be at least 0 and below 1, not {config.valid_fraction}"
    if config.max_overlap is not None and not 0 <= config.max_overlap <= 1:
        yield f"max_overlap must be between 0 and 1, not {config.max_overlap}"
    if config.chunk_length >= 2**31:
        yield f"chunk_length must be below 2**31, not {config.chunk_length}"
    if not 0 <= config.min_chunk_tokens <= config.chunk_length:
        yield f"min_chunk_tokens {config.min_chunk_tokens} must be between 0 and chunk_length {config.chunk_length}"
    if config.num_neighbors_save > config.num_neighbors_query:
        yield (
            f"num_neighbors_save {config.num_neighbors_save} is above num_neighbors_query {config.num_neighbors_query}"
        )
    if config.index_on_gpu:
        yield from _gpu_problems(config)
    places = [Path(path).resolve() for path in config.data_paths]
    repeated = next((path for n, path in enumerate(config.data_paths) if places[n] in places[:n]), None)
    if repeated is not None:
        yield f"data_paths names {repeated} more than once"


def _value_problems(config: RetroDbConfig) -> Iterator[str]:
    """Values that JSON or a command line can give and no setting can have."""
    for name in _is_null(config):
        yield f"{name} must not be null; leave it out for its default"
    for field_ in dataclasses.fields(config):
        value = getattr(config, field_.name)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{field_.name} must be a finite number, not {value}"
    if config.seed is not None and not 0 <= config.seed < 2**63:
        yield f"seed must be at least 0 and below 2**63, not {config.seed}"


def _is_null(config: RetroDbConfig) -> Iterator[str]:
    """Settings that are null and may not be."""
    for name, hint in get_type_hints(RetroDbConfig).items():
        if getattr(config, name) is None and type(None) not in get_args(hint):
            yield name


def _gpu_problems(config: RetroDbConfig) -> Iterator[str]:
    if config.index_placement == "mapped":
        yield "index_on_gpu needs the index in memory; set index_placement to memory or spread"
    for name in ("num_neighbors_query", "nprobe"):
        value = getattr(config, name)
        if value is not None and value > MOST_ON_GPU:
            yield (
                f"{name} {value:,} is above {MOST_ON_GPU:,}, the most of a search on a GPU; lower it, or set "
                "index_on_gpu to false"
            )


def save_project_config(config: RetroDbConfig, project: Path) -> None:
    """Write ``config.json``."""
    write_json(project / CONFIG_FILE, dict(sorted(dataclasses.asdict(config).items())))


def load_project_config(project: Path) -> RetroDbConfig | None:
    """The configuration of a project directory. None: it has none yet.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key or a value of the wrong type.
    """
    path = project / CONFIG_FILE
    if not path.exists():
        return None
    from jsonargparse import ArgumentParser

    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings of a database ({{...}}); put it back from a copy")
    known = [field.name for field in dataclasses.fields(RetroDbConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ", perhaps of another version; remove it"
            raise ConfigError(f"{path}: unknown key {key!r}{hint}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RetroDbConfig)
    try:
        config = RetroDbConfig(**parser.parse_object(values).as_dict())
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    problem = next(_value_problems(config), None)
    if problem is not None:
        raise ConfigError(f"{path}: {problem}")
    return config
