"""Tokenise JSONL documents into Megatron's .bin and .idx, one pair for every JSON key.

PREFIX_KEY_document.bin, .idx and .json are written; PREFIX_KEY_sentence with --split-sentences. The tokens are those of
each document tokenised alone, in the order of the input, whatever the numbers of workers and partitions. After
an interruption the same command resumes.

Example:
  megatron-grit preprocess-data --input 'corpus/*.jsonl.zst' --output-prefix data/corpus \\
      --tokenizer-model tokenizer.model --append-eod --workers 16
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.data.builders.options import DocumentFileOptions


def run(options: DocumentFileOptions) -> None:
    """Build and print the counts."""
    from megatron_grit.data.builders.documents import DocumentOptions, describe, find_tokenizer, preprocess

    documents = DocumentOptions(
        tokenizer=find_tokenizer(options.tokenizer_model, options.tokenizer_type),
        json_keys=tuple(options.json_keys),
        append_eod=options.append_eod,
        punkt_model=options.punkt_model,
        keep_newlines=options.keep_newlines,
    )
    totals = preprocess(
        options.input,
        options.output_prefix,
        documents,
        split_sentences=options.split_sentences,
        lang=options.lang,
        log_interval=options.log_interval,
        **options.engine(),
    )
    print("\n".join(describe(totals)))


def main(argv: list[str] | None = None, prog: str = "megatron-grit preprocess-data") -> int:
    """Parse the command line and build. Returns the exit status."""
    return command(DocumentFileOptions, run, argv, prog=prog, about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
