"""Train a SentencePiece tokenizer on the texts of JSONL records.

The same as ``megatron-grit train-tokenizer``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main(prog="train_tokenizer"))
