"""Join indexed files, one after another, into one. They have to be built alike: same kind, tokenizer and token type.

Offsets have 64 bits, so the result may hold any number of tokens. Files that Megatron wrote can be joined as well.

Example:
  python tools/preprocess/merge_indexed.py --input data/part0_text_document data/part1_text_document \\
      --output-prefix data/corpus_text_document
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.data.indexed.merge import merge_indexed
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.errors import EXIT_STATUS, GritError
from megatron_grit.store.logs import configure_logging


def main() -> int:
    """Parse the command line and join. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="prefixes, joined in this order")
    parser.add_argument("--output-prefix", required=True, help="PREFIX.bin and .idx are written; .json as the inputs")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run")
    arguments = parser.parse_args()
    configure_logging()
    try:
        merge_indexed(arguments.input, arguments.output_prefix, overwrite=arguments.overwrite)
        merged = IndexedFile(arguments.output_prefix)
    except (GritError, OSError) as error:
        print(f"merge_indexed: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    print(f"{arguments.output_prefix}: {merged.num_documents} documents, {merged.num_sequences} sequences")
    return 0


if __name__ == "__main__":
    sys.exit(main())
