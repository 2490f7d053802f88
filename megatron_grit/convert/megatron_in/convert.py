"""A checkpoint of Megatron-LM's older layout to one of ours."""

from __future__ import annotations

from pathlib import Path

from megatron_grit.config.schema import RunConfig
from megatron_grit.convert.hf_in.reader import check_weights
from megatron_grit.convert.megatron_in.arguments import model_of_arguments
from megatron_grit.convert.megatron_in.folder import find_legacy
from megatron_grit.convert.megatron_in.legacy import LegacyFolder, check_layout, conversions, number_of_rows
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import CheckpointError


def convert_legacy(source: str | Path, target: str | Path, tokenizer: str | Path | None = None) -> Path:
    """Write the weights as a checkpoint to start a run from (``checkpoint.load``), at any layout.

    One process, on the CPU; optimizer and random states are left out. A killed conversion resumes as that of
    :func:`~megatron_grit.convert.hf_in.convert.convert_checkpoint`.

    Args:
        source: directory with the tracker file, or of an iteration.
        target: directory to write ``checkpoints/step_00000000`` under.
        tokenizer: where the tokenizer is, if not in ``source``.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: the source cannot be converted, or the target has a checkpoint already.
    """
    folder, target = find_legacy(source), Path(target)
    if folder is None:
        raise CheckpointError(f"{source}: has no mp_rank_00 of Megatron-LM's older layout")
    loaded = load_tokenizer(tokenizer or source)
    with LegacyFolder(folder) as weights:
        check_layout(weights)
        try:
            model = model_of_arguments(weights.arguments, loaded.vocab_size)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        num_rows = number_of_rows(weights)
        if loaded.vocab_size > num_rows:
            raise CheckpointError(
                f"{loaded.path}: has {loaded.vocab_size} tokens, the model {num_rows} rows; give the model's own "
                "tokenizer with --tokenizer"
            )
        plan = conversions(weights, model, num_rows)
        precision = check_weights(plan, weights)
        # Importing the engine takes seconds; the mistakes above are told at once.
        from megatron_grit.convert.hf_in.writer import write_checkpoint
        from megatron_grit.training.checkpoint import list_checkpoints

        if list_checkpoints(target):
            raise CheckpointError(f"{target}: already holds checkpoints; give another directory")
        config = RunConfig(output_dir=str(target), model=model)
        config.data.tokenizer = str(loaded.path)
        config.parallel.device = "cpu"
        config.training.precision = precision
        return write_checkpoint(config, plan, weights, loaded)
