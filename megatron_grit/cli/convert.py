"""Convert a Hugging Face model to a checkpoint, or a checkpoint to a Hugging Face model.

Examples:
    megatron-grit convert --from Mistral-7B-v0.1 --to checkpoints/mistral_7b
    megatron-grit convert --from runs/grit --to exports/grit
    megatron-grit convert --from retro-8b --to checkpoints/retro_8b --tokenizer retro-8b/gpt.model

A checkpoint, or the output directory of a run, is exported; anything else is imported. Import reads Mistral, Mixtral,
Llama, Qwen2, Qwen3 and their mixtures, GPT-NeoX, GPT-J and GPT-Neo, and GPT and Retro models of Megatron-LM's older
layout (mp_rank_00/model_optim_rng.pt); start a run from the result with --checkpoint.load.
Export writes a directory that transformers, sentence-transformers and vLLM read. A killed conversion resumes when the
same command is given again.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.convert.conversion import ConvertOptions, convert


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and convert. Returns the exit status."""
    run, prog = lambda options: print(convert(options)), "megatron-grit convert"
    return command(ConvertOptions, run, argv, prog=prog, about=__doc__, resumes=True)


# Saving a checkpoint starts processes that import this file again.
if __name__ == "__main__":
    sys.exit(main())
