"""Convert a Hugging Face model to a checkpoint, or a checkpoint to a Hugging Face model.

Examples:
    megatron-grit convert --from Mistral-7B-v0.1 --to checkpoints/mistral_7b
    megatron-grit convert --from runs/grit --to exports/grit

Which way is seen from --from: a checkpoint, or the output directory of a run, is exported; anything else is imported.

Import reads Mistral, Mixtral, Llama, Qwen2, Qwen3 and their mixtures, GPT-NeoX, GPT-J and GPT-Neo. Start a run from the
result with --checkpoint.load checkpoints/mistral_7b. Export writes a directory that transformers,
sentence-transformers and vLLM read. What is killed goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_grit.cli.main import guarded
from megatron_grit.config.checkpoint_folder import holds_checkpoint
from megatron_grit.errors import ConfigError

_IMPORT_ONLY = {"revision": None, "allow_pickle": False, "vocab_size": None}
_EXPORT_ONLY = {"max_shard_size": "5GB", "dtype": "keep", "merge": None, "base": None, "adapter_only": False}


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and convert. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "megatron-grit convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", required=True, help="Hugging Face model, checkpoint or run directory")
    parser.add_argument("--to", dest="target", required=True, help="directory to write")
    parser.add_argument("--tokenizer", help="file or directory of the tokenizer (default: the one of --from)")
    parser.add_argument("--revision", help="import: branch, tag or commit on the hub")
    parser.add_argument("--allow-pickle", action="store_true", help="import: read tensors from *.bin, and nothing else")
    parser.add_argument("--vocab-size", type=int, help="import: add tokens up to so many, each the mean of the others")
    parser.add_argument("--max-shard-size", default="5GB", help="export: largest weight file (default: 5GB)")
    parser.add_argument("--dtype", default="keep", choices=("keep", "bf16", "fp16", "fp32"), help="export: of weights")
    adapters = parser.add_mutually_exclusive_group()
    merge = "export of adapters: in one model with their base; after adapter.quantize, in the 4 bits that they were "
    merge += "trained beside, or original: in the base as it was read"
    adapters.add_argument("--merge", nargs="?", const="trained", choices=("trained", "original"), help=merge)
    adapters.add_argument("--adapter-only", action="store_true", help="export of adapters: as PEFT loads them")
    parser.add_argument("--base", help="with --merge: where the base is now, if not where the run read it")
    return guarded(lambda: _run(parser.parse_args(argv)), "megatron-grit convert")


def _run(arguments: argparse.Namespace) -> None:
    source = Path(arguments.source)
    is_export = holds_checkpoint(source)
    for name, default in (_IMPORT_ONLY if is_export else _EXPORT_ONLY).items():
        if getattr(arguments, name) != default:
            way = "is a checkpoint, which is exported" if is_export else "holds no checkpoint of ours to export"
            raise ConfigError(f"{source} {way}; --{name.replace('_', '-')} has no meaning here, leave it out")
    if is_export:
        from megatron_grit.convert.hf_out.convert import export_checkpoint
        from megatron_grit.convert.peft.merge import export_adapter

        if arguments.adapter_only:
            print(export_adapter(source, arguments.target))
            return
        options = {name: getattr(arguments, name) for name in ("max_shard_size", "dtype", "base")}
        options |= {"tokenizer": arguments.tokenizer, "adapters": arguments.merge}
        print(export_checkpoint(source, arguments.target, **options))
    else:
        from megatron_grit.convert.hf_in.convert import convert_checkpoint

        options = {name: getattr(arguments, name) for name in _IMPORT_ONLY}
        print(convert_checkpoint(arguments.source, arguments.target, arguments.tokenizer, **options))


# Saving a checkpoint starts processes that import this file again.
if __name__ == "__main__":
    sys.exit(main())
