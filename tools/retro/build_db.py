"""Build a retrieval database: chunks, embeddings, index and neighbors.

Tasks, as a comma list:
  db-build         cut documents into chunks, leave out empty and repeated ones; needs no embedder
  embed            embed all chunks, 4 bytes a channel on disk (2 with --embedding_dtype float16)
  index-train      train the index on a random sample of the chunks
  index-add        add all chunks to it and measure its recall against exact search
  query-neighbors  find the neighbors of every chunk that is trained on
  build            all of these; index-build: index-train and index-add
  add              add documents appended to a dataset, and datasets appended to data_paths, without training again
  tombstone        remove the documents that --tombstone names; earlier versions of the database keep them
Without embed the later tasks embed what they need themselves: chunks twice, and nothing is kept on disk.

The same command goes on where it was stopped. Settings are kept in DIR/config.json and need not be given again. One
that something was built with is changed only together with --overwrite TASK. With --dry-run it is checked, in one
process, and nothing is changed.

Example:
  python tools/retro/build_db.py --project-dir db --tasks build --data_paths '[data/corpus_text_document]' \\
      --tokenizer tokenizer.model --embedder all-MiniLM-L6-v2
  torchrun --nproc-per-node 8 tools/retro/build_db.py --project-dir db --tasks embed,index-build,query-neighbors
  python tools/retro/build_db.py --project-dir db --tasks build --validate 0.01
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import guarded
from megatron_grit.config.database.arguments import parse_retro_arguments


def main() -> int:
    """Parse the command line and build. Returns the exit status."""
    return guarded(_run, "build_db")


def _run() -> None:
    arguments = parse_retro_arguments(sys.argv[1:], __doc__ or "")
    from megatron_grit.retrieval.stages.preparation import Preparation
    from megatron_grit.retrieval.stages.run import dry_run, run_tasks

    prepared = Preparation(
        arguments.project_dir,
        arguments.tasks,
        arguments.given,
        overwrite=arguments.overwrite,
        validate=arguments.validate,
        tombstone=arguments.tombstone,
    )
    if arguments.dry_run:
        print("\n".join(dry_run(prepared)))
    else:
        run_tasks(prepared)


if __name__ == "__main__":
    sys.exit(main())
