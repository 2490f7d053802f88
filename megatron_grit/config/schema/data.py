"""Input and packing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.blend import expand_item
from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class DataConfig:
    """What is read and how it is packed."""

    tokenizer: str | None = knob(None, path=True)
    """SentencePiece .model file, tokenizer.json, a directory that holds one, or a model's name on the hub."""
    embedding: list[str] = knob([], path=expand_item)
    """Sources of queries and passages, indexed files of tools/preprocess/build_grit.py: a list of prefixes; or weights
    and prefixes in turn, "0.7 a 0.3 b"; or a .yaml file with a list of path, weight or epochs, and cap
    (docs/data_formats.md). Each batch comes from one source. Without weights, sources are drawn in proportion to their
    size."""
    generative: list[str] = knob([], path=expand_item)
    """Sources of texts or conversations, in the same notation. Each batch mixes all sources."""
    valid: list[str] = knob([], path=expand_item)
    """Texts or conversations that are not trained on, in the same notation without weights: their next-token loss and
    perplexity are measured at the end, and every training.valid_interval steps. Each is read once, whole: what is
    longer than a row is split."""
    chat_template: str | None = knob(None, path=True)
    """How the model converses when it generates: tulu, gritlm, zephyr, llama2, chatml, tokenizer for the one that comes
    with the tokenizer, or your own .yaml file. null: that of the conversations in generative, else of the base, else of
    the tokenizer, else gritlm. Kept in every checkpoint."""
    retro_project: str | None = knob(None, path=True)
    """Directory of a retrieval database (tools/retro/build_db.py): the run trains on the documents that get neighbors
    there, with their tokenizer, but for those of valid. generative, where it is given, takes the place of these
    documents."""
    retro_version: int | Literal["newest"] | None = knob(None, at_least=1)
    """Version of retro_project whose neighbors a run with model.retro reads. newest: a newer one is taken between two
    steps, once all sources have neighbors in it. null: the newest at the start. Every checkpoint says what its steps
    read, and a run that resumes reads that."""
    retro_shuffle: bool = False
    """A control: each chunk reads the neighbors of another chunk of its file, drawn with training.seed. What a model
    that reads gains all the same, it does not gain from what its neighbors say."""
    neighbors: Literal["database", "contexts"] = "database"
    """Where a model with model.retro finds what it reads. database: neighbors in retro_project. contexts: those beside
    the generative files, which megatron-grit build-qa wrote for each question; other files have none."""
    embedding_temperature: float = knob(1.0, above=0)
    """Sources of embedding are drawn in proportion to weight ** (1 / embedding_temperature); above 1, small sources are
    drawn more often."""
    allow_shared_texts: bool = False
    """Allow records with the same query or positive in one batch, where they are negatives of each other. false: put
    them into different batches; records that fit into none are left out of that epoch."""
    packing: Literal["step", "window"] = "step"
    """step: the generative_batch_size sequences of a step are packed into as few, nearly equal rows as hold them.
    window: a step has generative_rows rows of exactly tokens_per_row tokens, filled from the stream of sequences."""
    packing_window: int = knob(1024, at_least=1)
    """With packing window, sequences that are packed at a time."""
    over_long: Literal["stop", "drop", "truncate", "split"] = "stop"
    """Generative records above tokens_per_row or max_position_embeddings: end the run, leave them out, cut off their
    end, or split them into pieces that overlap by one token, so that each label is trained once. A piece counts as a
    sequence; one without labels is left out."""
    split_multiple: int = knob(1, at_least=1)
    """With over_long split, pieces begin at multiples of so many tokens of their record; tokens_per_row is best a
    multiple of it and one more. retro_project sets it to the length of a chunk, so that all chunks of a piece have
    their neighbors."""
    over_long_texts: Literal["stop", "truncate"] = "stop"
    """Queries and passages above tokens_per_row or max_position_embeddings: end the run, or cut off their end."""
    cache_dir: str | None = knob(None, path=True)
    """Folder for what is computed once from the data: rows of packing window, shared texts of large sources. null:
    output_dir/cache."""
    checksum: bool = False
    """Read every indexed file at the start and compare it with its checksums."""
    tokens_per_row: int = knob(2048, at_least=2)
    """Token budget of one packed row, which is one micro-batch."""
    train_group_size: int = knob(2, at_least=1)
    """Passages of a query: one positive and train_group_size - 1 negatives."""
    num_rows_multiple: int | None = knob(None, at_least=1)
    """Rows of a step are rounded up to a multiple of this. null: the data parallel size. Set it to a multiple of
    every data parallel size in use to keep rows, and so the expert balancing loss, the same on all of them."""
    prefetch_steps: int = knob(2, at_least=0)
    """Steps that are packed ahead of time in a background thread."""
