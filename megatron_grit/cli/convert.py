"""Convert a Hugging Face model to a checkpoint.

Example:
    megatron-grit convert --from Mistral-7B-v0.1 --to checkpoints/mistral_7b

Reads Mistral, Mixtral, Llama, Qwen2, Qwen3 and their mixtures, GPT-NeoX, GPT-J and GPT-Neo from a local directory
with config.json, *.safetensors and a tokenizer. Start a run from the result with
--checkpoint.load checkpoints/mistral_7b.
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.cli.main import guarded


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and convert. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "megatron-grit convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", required=True, help="directory of the Hugging Face model")
    parser.add_argument("--to", dest="target", required=True, help="directory for the checkpoint")
    parser.add_argument("--tokenizer", help="file or directory of the tokenizer (default: the one in --from)")
    return guarded(lambda: _run(parser.parse_args(argv)), "megatron-grit convert")


def _run(arguments: argparse.Namespace) -> None:
    from megatron_grit.convert.hf_to_megatron import convert_checkpoint

    print(convert_checkpoint(arguments.source, arguments.target, arguments.tokenizer))


# Saving a checkpoint starts processes that import this file again.
if __name__ == "__main__":
    sys.exit(main())
