"""Build a retrieval database: chunks, embeddings, index and neighbors.

Tasks: db-build cuts documents into chunks; index-train trains the index on a random sample of them; index-add adds all
and measures the recall; query-neighbors finds the neighbors of every chunk that is trained on. build is all four,
index-build the second and third. The same command after an interruption goes on where it stopped. Settings are kept in
DIR/config.json and need not be given again.

Example:
  python tools/retro/build_db.py --project-dir db --tasks build --data_paths '[data/corpus_text_document]' \\
      --tokenizer tokenizer.model --embedder all-MiniLM-L6-v2
  torchrun --nproc-per-node 8 tools/retro/build_db.py --project-dir db --tasks index-add,query-neighbors
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import guarded
from megatron_grit.config.retro_arguments import parse_retro_arguments


def main() -> int:
    """Parse the command line and build. Returns the exit status."""
    return guarded(_run, "build_db")


def _run() -> None:
    arguments = parse_retro_arguments(sys.argv[1:], __doc__ or "")
    from megatron_grit.retrieval.stages import run_tasks

    run_tasks(arguments.project_dir, arguments.tasks, arguments.given)


if __name__ == "__main__":
    sys.exit(main())
