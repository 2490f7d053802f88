"""Every knob of a retrieval database, declared once; kept in the project directory as config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_grit.config.commands import options_of, suggestion
from megatron_grit.config.database.megatron_names import MEGATRON_NAMES
from megatron_grit.config.knob import knob, value_problem
from megatron_grit.config.options import BatchSize
from megatron_grit.config.values import convert, describe_type, takes_null
from megatron_grit.errors import ConfigError
from megatron_grit.store.sealed import CHECKSUM, unseal, write_sealed

CONFIG_FILE = "config.json"
MOST_ON_GPU = 2048
"""Neighbors, and lists, that one search on a GPU finds or visits at most (GPU_MAX_SELECTION_K of faiss)."""


@dataclass(kw_only=True)
class RetroDbConfig:
    """A retrieval database: which documents, how they are cut, embedded, indexed and searched."""

    data_paths: list[str] = knob([], path=True)
    """Prefixes of indexed files, the documents of the database; one is enough. A relative one counts from the project
    directory, or from where the command is run. Later ones may be added with the task add."""
    tokenizer: str | None = knob(None, path=True)
    """SentencePiece .model, tokenizer.json or their folder, with which the documents were made."""
    chunk_length: int = knob(64, at_least=1, below=2**31)
    """Tokens of a chunk."""
    min_chunk_tokens: int = knob(1, at_least=0)
    """Chunks of fewer tokens that hold more than white space are left out."""
    duplicates: Literal["keep", "exact", "near"] = "exact"
    """Chunks that stand in the database already: keep them, leave out equal ones, or also similar ones by MinHash."""
    near_threshold: float = knob(0.8, above=0, at_most=1)
    """With duplicates near: the estimated Jaccard similarity of runs of three tokens from which a chunk is left out."""
    minhash_permutations: int = knob(128, at_least=16)
    """With duplicates near: length of a MinHash signature."""
    valid_fraction: float = knob(0.0, at_least=0, below=1)
    """Share of the documents that is kept out of the database, for validation; drawn at random."""
    seed: int = knob(1234, at_least=0, below=2**63)
    """Of random choices: validation documents, the training sample of the index."""
    doc_block_size: int = knob(100_000, at_least=1)
    """Documents of a block of chunks."""
    block_size: int = knob(100_000, at_least=1)
    """Chunks of a block of embeddings, codes and neighbors."""
    embedder: str | None = knob(None, path=True)
    """What embeds chunks: directory of a Hugging Face encoder or of a sentence-transformers model, or one of our
    checkpoints or runs."""
    embedder_pooling: Literal["auto", "mean", "mean_text", "cls"] = "auto"
    """Of a Hugging Face encoder: mean over all tokens; mean_text, over all but the first and the last ([CLS] and [SEP],
    as Retro does); cls. auto: what the directory's sentence-transformers modules say, else mean_text."""
    embedder_max_length: int = knob(256, at_least=1)
    """Tokens of the embedder to which a chunk's text is cut."""
    query_instruction: str = ""
    """Of our own models: what queries are embedded for. Of a Hugging Face encoder: text in front of queries, in place
    of the prompt that its directory names."""
    embedder_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the embedder's matrix products."""
    batch_tokens: int = knob(BatchSize.batch_tokens, at_least=1)
    """Tokens of a forward pass of the embedder, padding included."""
    embedder_tensor: int = knob(1, at_least=1)
    """Of our own models: tensor parallel size. With this, embedder_pipeline, embedder_context and embedder_expert a
    model that one GPU cannot hold is sharded over several processes, which embed together. The number of processes is a
    multiple of embedder_tensor x embedder_pipeline x the least common multiple of the other two. Another mesh changes
    the last digits of vectors."""
    embedder_pipeline: int = knob(1, at_least=1)
    """Of our own models: pipeline stages."""
    embedder_context: int = knob(1, at_least=1)
    """Of our own models: context parallel size."""
    embedder_expert: int = knob(1, at_least=1)
    """Of our own models with a mixture of experts: expert parallel size."""
    embedding_dtype: Literal["float32", "float16"] = "float32"
    """To which vectors of chunks are rounded, and in which the task embed keeps them: 4 or 2 bytes a channel."""
    index: str = "auto"
    """A faiss factory string, such as OPQ32_64,IVF65536_HNSW8,PQ32. auto: chosen from the number of chunks,
    index_memory_gb and recall."""
    metric: Literal["l2", "inner_product"] = "l2"
    """What is compared."""
    ntrain: int | None = knob(None, at_least=1)
    """Chunks that the index is trained on, drawn at random. null: as many as it needs."""
    train_load_fraction: float = knob(1.0, above=0, at_most=1)
    """Share of them that is loaded for training."""
    add_load_fraction: float = knob(1.0, above=0, at_most=1)
    """Share of each block's chunks that is added to the index."""
    index_memory_gb: float = knob(16.0, above=0)
    """With index auto: memory for the index while it is searched."""
    recall: float = knob(0.95, above=0, at_most=1)
    """With index auto, and where nprobe and ef_search are null: wanted recall of the nearest neighbors."""
    recall_queries: str | None = knob(None, path=True)
    """A file of questions that chooses how the index is searched for questions, and measures what that finds; for
    chunks it is always measured. Text with one in each line, or JSONL with query, question, prompt or text. It may be
    given at any time, with the task recall."""
    num_shards: int | None = knob(None, at_least=1)
    """Files that the index is spread over, each with a run of the chunks; searched one after the other, or by several
    processes. null: as few as keep each below 128 GiB, which the process that fills one holds in memory."""
    nprobe: int | None = knob(None, at_least=1)
    """Lists that are visited. null: the fewest that reach recall on a sample."""
    ef_search: int | None = knob(None, at_least=1)
    """Candidates of an HNSW search. null: as nprobe."""
    index_placement: Literal["mapped", "memory", "spread"] = "mapped"
    """Where query-neighbors has the index. mapped: on disk, of which the system reads what a search touches; memory:
    whole in each process; spread: each process holds some of its files, and all of them search every query."""
    index_on_gpu: bool = False
    """Search on GPUs what a process holds in memory: that of its local rank under torchrun, else all. Needs the GPU
    build of faiss."""
    query_paths: list[str] = knob([], path=True)
    """Prefixes of indexed files whose chunks get neighbors. Empty: those of data_paths."""
    num_neighbors_query: int = knob(200, at_least=1)
    """Neighbors that are searched. Where filters leave fewer than num_neighbors_save, the search is made again without
    those of the same document and of removed ones; where that leaves too few, up to 16 times as many are searched."""
    num_neighbors_save: int = knob(20, at_least=1)
    """Of these, neighbors that are kept after filtering."""
    max_overlap: float | None = knob(0.25, at_least=0, at_most=1)
    """Leave out neighbors of which more than this share of the runs of eight tokens, continuation included, stands in
    the query's chunk or the one after it: copies, whose continuation is what is to be predicted. null: none are."""
    version: int | None = knob(None, at_least=1)
    """State of the database that is searched, of those in db/versions. null: the newest. Training that began with one
    keeps it."""
    keep_embeddings: bool = False
    """Keep the embeddings of the training sample and the codes, which --validate can then check."""


def config_problems(config: RetroDbConfig) -> Iterator[str]:
    """What is wrong with a configuration by itself."""
    yield from _value_problems(config)
    if any(_is_null(config)):
        return
    if config.min_chunk_tokens > config.chunk_length:
        yield f"min_chunk_tokens {config.min_chunk_tokens} is above chunk_length {config.chunk_length}"
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
    nulls = list(_is_null(config))
    yield from (f"{name} must not be null; leave it out for its default" for name in nulls)
    for field in dataclasses.fields(config):
        if (
            field.name not in nulls
            and (problem := value_problem(RetroDbConfig, field.name, getattr(config, field.name))) is not None
        ):
            yield f"{field.name} {problem}"


def _is_null(config: RetroDbConfig) -> Iterator[str]:
    """Settings that are null and may not be."""
    for name, option in options_of(RetroDbConfig).items():
        if getattr(config, name) is None and not takes_null(option.hint):
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
    write_sealed(project / CONFIG_FILE, dict(sorted(dataclasses.asdict(config).items())))


def version_numbers(folder: Path) -> list[int]:
    """Versions of the project in a folder, ascending."""
    return sorted(int(path.stem) for path in (folder / "db" / "versions").glob("[0-9]*.json") if path.stem.isdigit())


def load_project_config(project: Path) -> RetroDbConfig | None:
    """The configuration of a project directory. None: it has none yet.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key or a value of the wrong type.
    """
    path = project / CONFIG_FILE
    if not path.exists():
        return None
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); put it back from a copy") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings of a database ({{...}}); put it back from a copy")
    settings = options_of(RetroDbConfig)
    if any(key.startswith("retro_") for key in values):
        raise ConfigError(f"{path}: is a project of Megatron-LM's Retro tools; {_as_options(values)}")
    written = dict(values)
    values.pop(CHECKSUM, None)
    for key, value in values.items():
        if key not in settings:
            hint = suggestion(key, settings) or "; perhaps it is of another version: remove it"
            raise ConfigError(f"{path}: unknown key {key!r}{hint}")
        try:
            values[key] = convert(settings[key].hint, value)
        except ValueError:
            if value is not None:
                raise ConfigError(f"{path}: {key} must be {describe_type(settings[key].hint)}, not {value!r}") from None
    try:
        unseal(written)
    except ValueError as error:
        raise ConfigError(
            f'{path}: {error}; put it back from a copy, or, if you edited it, remove its line "{CHECKSUM}"'
        ) from None
    config = RetroDbConfig(**values)
    problem = next(_value_problems(config), None)
    if problem is not None:
        raise ConfigError(f"{path}: {problem}")
    return config


def _as_options(values: Mapping[str, Any]) -> str:
    """How to build a database with the settings of Megatron's tools."""
    same = [
        f"--{MEGATRON_NAMES[key].replace('_', '-')} {json.dumps(value) if isinstance(value, list) else value}"
        for key, value in values.items()
        if MEGATRON_NAMES.get(key) in options_of(RetroDbConfig) and value is not None
    ]
    return f"its files are not read, a database is built in another directory with: {' '.join(same)}"
