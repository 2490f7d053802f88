"""Texts and records made by a rule, and a tokenizer that merges across newlines."""

from __future__ import annotations

import json
from pathlib import Path

TEXT = (
    "the quick brown fox jumps over a lazy dog while seven old bakers count their loaves under one paper moon and "
    "nobody asks why rivers bend or how glass remembers light across winter markets"
)
WORDS = TEXT.split()


def sentence(number: int, num_words: int = 9) -> str:
    """A sentence that no other number gives."""
    chosen = [WORDS[(number * 7 + place * (3 + number % 5)) % len(WORDS)] for place in range(num_words)]
    return " ".join([*chosen, str(number)])


def embedding_record(number: int, num_negatives: int = 3) -> dict:
    """Instructed and plain passages, of unequal lengths."""
    return {
        "query": ["Find the sentence", sentence(number, 4)],
        "pos": [["", sentence(number, 9)], sentence(number, 5)],
        "neg": [["Find another", sentence(1000 + 10 * number + k, 3 + 4 * k)] for k in range(num_negatives)],
    }


def chat_record(number: int, num_turns: int) -> dict:
    """Questions and answers, of unequal lengths."""
    return {"text": [sentence(number * 31 + turn, 2 + (number + turn) % 5) for turn in range(2 * num_turns)]}


def generative_record(number: int) -> dict:
    """Conversations of one to five turns, and a plain text every fourth time."""
    return chat_record(number, 1 + number % 5) if number % 4 else {"text": sentence(number, 40)}


def byte_level_json(path: Path, *, config: dict | None = None) -> Path:
    """A byte-level tokenizer.json whose pieces may reach across a newline, as no pre-tokenizer splits the text."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken("<s>", special=True), AddedToken("</s>", special=True)],
        show_progress=False,
    )
    backend.train_from_iterator([">\nYes", ">\nYes indeed"] * 50, trainer)
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path / "tokenizer.json"
