"""Answer requests for embeddings and text over HTTP.

Example:
    megatron-grit serve --checkpoint runs/grit --port 8000
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.cli.main import guarded


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and serve until stopped. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "megatron-grit serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint directory, or a run's output directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one (default: 8000)")
    parser.add_argument("--name", help="of the model in responses (default: name of the checkpoint's directory)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text that are read (default: 512)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer in tokens (default: 512)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return guarded(lambda: _run(parser.parse_args(argv)), "megatron-grit serve")


def _run(arguments: argparse.Namespace) -> None:
    from megatron_grit.serving.server import serve

    serve(
        arguments.checkpoint,
        host=arguments.host,
        port=arguments.port,
        device=arguments.device,
        name=arguments.name,
        max_length=arguments.max_length,
        max_new_tokens=arguments.max_new_tokens,
    )


if __name__ == "__main__":
    sys.exit(main())
