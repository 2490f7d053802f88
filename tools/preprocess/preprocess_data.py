"""Tokenise JSONL documents into Megatron's .bin and .idx, one pair for every JSON key.

PREFIX_KEY_document.bin, .idx and .json are written; PREFIX_KEY_sentence with --split-sentences. The tokens are those of
each document tokenised alone, in the order of the input, whatever the numbers of workers and partitions. The same
command after an interruption goes on where it stopped.

Example:
  python tools/preprocess/preprocess_data.py --input 'corpus/*.jsonl.zst' --output-prefix data/corpus \\
      --tokenizer-model tokenizer.model --append-eod --workers 16
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.data.builders.documents import TOKENIZER_FILES, DocumentOptions, describe, find_tokenizer, preprocess
from megatron_grit.errors import EXIT_STATUS, GritError
from megatron_grit.store.logs import configure_logging


def main() -> int:
    """Parse the command line and build. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="JSONL files or glob patterns: plain, .gz or .zst")
    add("--json-keys", nargs="+", default=["text"], help="keys to take, each into a file of its own")
    add("--output-prefix", required=True, help="path of the output without _KEY_document.bin")
    add("--tokenizer-type", default="auto", choices=["auto", *TOKENIZER_FILES], help="found from the file by default")
    add("--tokenizer-model", required=True, help="SentencePiece .model, tokenizer.json, or their folder")
    add("--append-eod", action="store_true", help="put the end of sequence behind each document")
    add("--split-sentences", action="store_true", help="each sentence is a sequence of its own (NLTK's Punkt)")
    add("--keep-newlines", action="store_true", help="white space after a sentence stays with it")
    add("--punkt-model", help="JSON of an earlier run, or a punkt_tab folder; default: trained on the corpus")
    add("--lang", help="take NLTK's own Punkt parameters of this language, from NLTK_DATA")
    add("--workers", type=int, default=1, help="processes that tokenise")
    add("--partitions", type=int, default=1, help="parts of the input that are built and journalled on their own")
    add("--partition", type=int, help="build this one only, from 0; the command without it joins them")
    add("--on-error", choices=("stop", "skip"), default="stop", help="a line that is not a document")
    add("--log-interval", type=int, default=100_000, help="documents between lines, where there is no terminal")
    add("--no-checksum", dest="checksum", action="store_false", help="do not write checksums into the .json")
    add("--overwrite", action="store_true", help="replace the files of an earlier build")
    arguments = parser.parse_args()
    configure_logging()
    try:
        options = DocumentOptions(
            tokenizer=find_tokenizer(arguments.tokenizer_model, arguments.tokenizer_type),
            json_keys=tuple(arguments.json_keys),
            append_eod=arguments.append_eod,
            punkt_model=arguments.punkt_model,
            keep_newlines=arguments.keep_newlines,
        )
        names = ("split_sentences", "lang", "on_error", "workers", "partitions", "partition", "overwrite", "checksum")
        settings = {name: getattr(arguments, name) for name in (*names, "log_interval")}
        totals = preprocess(arguments.input, arguments.output_prefix, options, progress=True, **settings)
    except (GritError, OSError) as error:
        print(f"preprocess_data: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    except KeyboardInterrupt:
        print("preprocess_data: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print("\n".join(describe(totals)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
