"""Make a database of a folder of documents, embedded by the model that will answer.

Reads .txt, .md, .html and .jsonl, plain, .gz or .zst. The same command resumes a killed build.

Example:
  megatron-grit rag build --checkpoint runs/grit --input docs --project-dir rag
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.retrieval.rag.options import RagBuild
from megatron_grit.store.logs import say_loading


def run(options: RagBuild) -> None:
    """Build and say how many documents there are."""
    say_loading()
    from megatron_grit.retrieval.rag.build import build_database

    print(f"{build_database(options)} documents in {options.project_dir}")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and build. Returns the exit status."""
    return command(RagBuild, run, argv, prog="megatron-grit rag build", about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
