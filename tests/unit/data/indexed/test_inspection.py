"""What an indexed file looks like in print."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_grit.data.indexed.inspection import describe_records, verify_file
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import DataError
from tests.unit.data.samples import chat_record


def test_spans_with_text(indexed_prefixes: dict[str, str], tokenizer: Tokenizer) -> None:
    header, legend, *lines = describe_records(indexed_prefixes["gen"], tokenizer, start=1, count=2)
    assert "50 generative records" in header and "template gritlm" in header
    assert [part.split(":")[0] for part in legend.split("; ")] == ["supervised", "pooled", "attended"]
    assert [line for line in lines if line.startswith("record")] == ["record 1", "record 2"]
    first, second = (record["text"] for record in map(chat_record, (1, 2), (2, 3)))
    assert [line.split() for line in lines[1:6]] == [
        ["TEMPLATE", "attended", lines[1].split()[2], "<s><|user|>⏎"],
        ["USER", "attended", lines[2].split()[2], first[0].replace(" ", "·")],
        ["TEMPLATE", "attended", lines[3].split()[2], "⏎<|assistant|>⏎"],
        ["ANSWER", "supervised", lines[4].split()[2], first[1].replace(" ", "·") + "</s>"],
        ["TEMPLATE", "attended", lines[5].split()[2], "⏎<|user|>⏎"],
    ]
    users = [line for line in lines[lines.index("record 2") :] if line.split()[0] == "USER"]
    assert [line.split()[-1] for line in users] == [turn.replace(" ", "·") for turn in second[::2]]


def test_ids_without_a_tokenizer_and_colour(indexed_prefixes: dict[str, str]) -> None:
    lines = list(describe_records(indexed_prefixes["emb_a"], count=1, colour=True))
    assert "\x1b[36mpooled" in lines[1] and "\x1b[32msupervised" in lines[1]
    assert sum("pooled" in line and "\x1b[36m" in line for line in lines[2:]) == 6
    assert lines[3].split()[:2] == ["QUERY_INSTRUCTION", "attended"] and "\x1b[2m1 " in lines[3]


def test_errors(indexed_prefixes: dict[str, str], mistral: Tokenizer) -> None:
    with pytest.raises(DataError, match="has 50 records, so no record 50"):
        list(describe_records(indexed_prefixes["gen"], start=50))
    with pytest.raises(DataError, match="built with another tokenizer"):
        list(describe_records(indexed_prefixes["gen"], mistral))


@pytest.mark.parametrize("multimodal", [False, True])
def test_files_of_megatron(tmp_path: Path, tokenizer: Tokenizer, multimodal: bool) -> None:
    """Without a .json, written by the engine's own builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "plain.bin"), dtype=np.int32, multimodal=multimodal)
    for text in ("the quick fox", "a\tdog"):
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        builder.add_document(np.array(ids), [len(ids) - 1, 1], [4, 77] if multimodal else None)
    builder.finalize(str(tmp_path / "plain.idx"))
    header, _, *lines = describe_records(tmp_path / "plain", tokenizer, colour=True)
    assert "2 documents, 4 sequences" in header and "no .json" in header
    assert ("without modes" in header) == (not multimodal)
    used = [line.split()[:2] for line in lines[1:3]]
    expected = [["QUERY", "pooled"], ["MODE", "77"]] if multimodal else [["TEXT", "supervised"]] * 2
    assert used == expected
    assert "the·quick·fox" in lines[1] and "</s>" in lines[2] and "a⇥dog" in lines[4]
    assert verify_file(tmp_path / "plain").startswith("verified: index;")
    with pytest.raises(DataError, match="plain.idx: has 2 records, so no record 2"):
        list(describe_records(tmp_path / "plain", start=2))


def test_ids_of_another_vocabulary(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "plain.bin"), dtype=np.int32)
    builder.add_document(np.array([1, tokenizer.vocab_size]), [2])
    builder.finalize(str(tmp_path / "plain.idx"))
    with pytest.raises(DataError, match="plain.bin: holds ids that .* does not have"):
        list(describe_records(tmp_path / "plain", tokenizer))


def test_damage_is_found(indexed_prefixes: dict[str, str], tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"copy{suffix}").write_bytes(Path(indexed_prefixes["gen"] + suffix).read_bytes())
    assert verify_file(tmp_path / "copy") == "verified: checksums, index and roles"
    content = bytearray((tmp_path / "copy.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "copy.bin").write_bytes(content)
    with pytest.raises(DataError, match="copy.bin"):
        verify_file(tmp_path / "copy")
    with pytest.raises(DataError, match="no.json: no such file"):
        verify_file(tmp_path / "no")
