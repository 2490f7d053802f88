"""What an indexed file looks like in print."""

from __future__ import annotations

import pytest

from megatron_grit.data.inspection import describe_records
from megatron_grit.data.tokenizer import Tokenizer
from megatron_grit.errors import DataError


def test_spans_with_text(indexed_prefixes: dict[str, str], tokenizer: Tokenizer) -> None:
    header, *lines = describe_records(indexed_prefixes["gen"], tokenizer, start=1, count=2)
    assert "50 generative records" in header
    assert [line for line in lines if line.startswith("record")] == ["record 1", "record 2"]
    context, answer = lines[1], lines[2]
    assert context.split()[:2] == ["CONTEXT", "attended"] and r"<|user|>\n" in context
    assert answer.split()[:2] == ["ANSWER", "supervised"] and answer.endswith("' </s>")


def test_ids_without_a_tokenizer_and_colour(indexed_prefixes: dict[str, str]) -> None:
    lines = list(describe_records(indexed_prefixes["emb_a"], count=1, colour=True))
    assert sum("pooled" in line and "\x1b[36m" in line for line in lines) == 6
    assert lines[2].split()[:2] == ["QUERY_INSTRUCTION", "attended"] and "\x1b[2m1 " in lines[2]


def test_errors(indexed_prefixes: dict[str, str], mistral: Tokenizer) -> None:
    with pytest.raises(DataError, match="has 50 records, so no record 50"):
        list(describe_records(indexed_prefixes["gen"], start=50))
    with pytest.raises(DataError, match="built with another tokenizer"):
        list(describe_records(indexed_prefixes["gen"], mistral))
