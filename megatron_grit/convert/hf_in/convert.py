"""A Hugging Face model to a checkpoint of ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_grit.config.knob import value_problem
from megatron_grit.config.schema import EmbeddingConfig, ModelConfig, RunConfig
from megatron_grit.convert.hf_in.embedder import decoder_folder, embedder_defaults
from megatron_grit.convert.hf_in.stored_model import open_model
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import CheckpointError, ConfigError
from megatron_grit.store.hub import local_folder


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    tokenizer: str | Path | None = None,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    vocab_size: int | None = None,
) -> Path:
    """Write a Hugging Face model as a checkpoint to start a run from (``checkpoint.load``), at any layout.

    One process, on the CPU. Weights keep their precision, bf16 or fp32, and pass through memory one tensor at a time.
    A killed conversion resumes from the finished files when it is started again.

    Args:
        source: directory with config.json, weights and a tokenizer, or ``organisation/name`` on the Hugging Face hub.
        target: directory to write ``checkpoints/step_00000000`` under.
        tokenizer: where the tokenizer is, if not in ``source``.
        revision: branch, tag or commit on the hub.
        allow_pickle: where there is no safetensors file, read tensors, and nothing else, from pytorch_model*.bin.
        vocab_size: larger vocabulary; the rows of the added tokens are the mean of the existing ones.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: the source cannot be converted, or the target has a checkpoint already.
        ConfigError: ``vocab_size`` is no number of tokens.
    """
    if (problem := value_problem(ModelConfig, "vocab_size", vocab_size)) is not None:
        raise ConfigError(f"vocab_size {problem}")
    folder, target = decoder_folder(local_folder(source, revision, allow_pickle=allow_pickle)), Path(target)
    if target.exists() and target.samefile(folder):
        raise CheckpointError(f"{target}: is the model that is read; give another directory to write")
    with open_model(folder, allow_pickle=allow_pickle) as stored:
        precision = stored.check()
        model_config = replace(stored.shape, vocab_size=grown_vocabulary(stored.shape, vocab_size, folder))
        # Importing the engine takes seconds; the mistakes above are told at once.
        from megatron_grit.convert.hf_in.writer import write_checkpoint
        from megatron_grit.training.checkpoint import list_checkpoints

        if list_checkpoints(target):
            raise CheckpointError(f"{target}: already holds checkpoints; give another directory")
        loaded_tokenizer = load_tokenizer(tokenizer or folder)
        check_tokenizer(loaded_tokenizer, model_config)
        config = RunConfig(output_dir=str(target), model=model_config)
        config.embedding = EmbeddingConfig(**embedder_defaults(folder))
        config.data.tokenizer = str(loaded_tokenizer.path)
        config.parallel.device = "cpu"
        config.training.precision = precision
        return write_checkpoint(config, stored.plan, stored.weights, loaded_tokenizer)


def grown_vocabulary(shape: ModelConfig, wanted: int | None, source: str | Path) -> int:
    """Vocabulary size of the model to make.

    Args:
        shape: of the Hugging Face model.
        wanted: requested vocabulary size. None: the source's.
        source: the model's directory, for messages.

    Raises:
        CheckpointError: fewer than the model has.
    """
    assert shape.vocab_size is not None
    if wanted is not None and wanted < shape.vocab_size:
        raise CheckpointError(
            f"{source}: has {shape.vocab_size} tokens; model.vocab_size {wanted} would cut some off, and may only add"
        )
    return wanted or shape.vocab_size


def check_tokenizer(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Refuse a tokenizer with more ids than the model's embedding has rows.

    Raises:
        CheckpointError: names the tokenizer and says what to do.
    """
    assert model.vocab_size is not None
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} tokens, the model {model.vocab_size}; give the model's own "
            f"tokenizer, or add rows for the new tokens with model.pretrained and model.vocab_size "
            f"{tokenizer.vocab_size}"
        )
