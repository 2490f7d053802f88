"""Answer a prompt with a trained model.

Example:
    megatron-grit generate --checkpoint runs/grit --prompt "What does json.dumps(obj) do?" --max-new-tokens 64
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.cli.main import guarded


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, generate and print. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "megatron-grit generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint directory, or a run's output directory")
    parser.add_argument("--prompt", required=True, help="what the user says")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer in tokens (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; matters above temperature 0")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return guarded(lambda: _run(parser.parse_args(argv)), "megatron-grit generate")


def _run(arguments: argparse.Namespace) -> None:
    from megatron_grit.inference.model import GritModel

    model = GritModel.load(arguments.checkpoint, device=arguments.device)
    print(
        model.generate(
            arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
