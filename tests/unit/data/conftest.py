"""Tokenizers and indexed files that the tests of this folder share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_grit.data.builders.grit_builder import Limits, build_grit
from megatron_grit.data.text.templates import ASSISTANT_PREFIX, EMBED_PREFIX, USER_PREFIX
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from tests.unit.data.samples import embedding_record, generative_record, sentence


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [sentence(number, 12) for number in range(200)]
    texts += [USER_PREFIX + texts[0] + ASSISTANT_PREFIX + texts[1], USER_PREFIX + texts[2] + EMBED_PREFIX + texts[3]]
    return train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "small", 400)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def mistral() -> Tokenizer:
    """The SentencePiece model of Mistral 7B v0.1, which GritLM uses."""
    package = pytest.importorskip("mistral_common", reason="mistral-common carries the Mistral v1 tokenizer")
    return load_tokenizer(Path(package.__file__).parent / "data" / "tokenizer.model.v1")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(records: Sequence[object], name: str = "input.jsonl") -> Path:
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def indexed_prefixes(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> dict[str, str]:
    """Two embedding sources of 40 and 60 records, a generative one of 50, and one without negatives."""
    folder = tmp_path_factory.mktemp("indexed")
    sources = {
        "emb_a": [embedding_record(number) for number in range(40)],
        "emb_b": [embedding_record(100 + number, num_negatives=1 + number % 2) for number in range(60)],
        "no_neg": [embedding_record(number, num_negatives=0) for number in range(40)],
        "gen": [generative_record(number) for number in range(50)],
    }
    for name, records in sources.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        build_grit([path], folder / name, tokenizer_path, Limits(query=64, passage=96, generative=256))
    return {name: str(folder / name) for name in sources}
