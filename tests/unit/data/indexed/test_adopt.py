"""Indexed files of other programs get the .json that they lack, if they are sound."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.cli import main as cli
from megatron_grit.config.checks.run import find_problems
from megatron_grit.data.builders.documents import DocumentOptions, preprocess
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.indexed import reader, records
from megatron_grit.data.indexed.adopt import adopt_indexed, describe_adopted
from megatron_grit.data.indexed.inspection import describe_records, verify_file
from megatron_grit.data.indexed.reader import file_paths, read_meta, token_dtype
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import DataError
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.work import Worker
from tests.unit.data.indexed_files import run_config
from tests.unit.data.samples import sentence
from tests.unit.retrieval.databases import make_project

TEXTS = ["", *(sentence(number, 3 + number % 9) for number in range(40)), "", ""]


def by_megatron(prefix: Path, documents: list[list[int]], dtype: type) -> None:
    """As tools/preprocess_data.py does: through the engine's own builder, an empty document without a sequence."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")


def by_datatrove(prefix: Path, documents: list[list[int]], dtype: type) -> None:
    """The layout of its MegatronDocumentTokenizer: each document is one sequence, also an empty one."""
    lengths = np.array([len(ids) for ids in documents], dtype="<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8 if dtype is np.uint16 else 4, len(lengths), len(lengths) + 1)
    boundaries = np.arange(len(lengths) + 1, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + boundaries.tobytes())
    Path(f"{prefix}.bin").write_bytes(b"".join(np.array(ids, dtype=dtype).tobytes() for ids in documents))


WRITERS: dict[str, Callable[[Path, list[list[int]], type], None]] = {"Megatron": by_megatron, "datatrove": by_datatrove}


def ids_of(tokenizer: Tokenizer, end: int | None = None) -> list[list[int]]:
    ends = [tokenizer.eos_id] if end is None else [end]
    return [[*tokenizer.encode(text), *ends] if text else [] for text in TEXTS]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """The same texts by preprocess_data.py."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = DocumentOptions(tokenizer=str(tokenizer.path), append_eod=True)
    preprocess([folder / "in.jsonl"], folder / "out", options)
    return folder / "out_text_document"


def rows(prefix: Path, tokenizer: Tokenizer, folder: Path) -> list[list[int]]:
    config = run_config(folder, generative=[str(prefix)], tokens_per_row=128)
    return [row.tokens_1T.tolist() for row in GritDataLoader(config, tokenizer).batch(3).rows_of("generative")]


def chunks(prefix: Path, tokenizer: Tokenizer, folder: Path) -> list[list[int]]:
    project = make_project(folder / "db", [str(prefix)], folder, tokenizer=str(tokenizer.path))
    build_chunks(project, Worker())
    db = ChunkDb(project)
    return [db.tokens(chunk).tolist() for chunk in range(len(db))]


@pytest.mark.parametrize("block_bytes", [1 << 24, 64])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_others_wrote_is_used_like_our_own(
    tmp_path: Path, tokenizer: Tokenizer, own: Path, writer: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (reader, records):
        monkeypatch.setattr(module, "CHECKED_BLOCK_BYTES", block_bytes)
    prefix = tmp_path / "theirs"
    WRITERS[writer](prefix, ids_of(tokenizer), token_dtype(tokenizer.vocab_size))
    before = [path.read_bytes() for path in file_paths(prefix)[:2]]
    adopted = adopt_indexed(f"{prefix}.bin", tokenizer)
    assert [path.read_bytes() for path in file_paths(prefix)[:2]] == before
    assert adopted.last_ids == {tokenizer.eos_id: 40}
    meta, ours = read_meta(prefix), read_meta(own)
    if writer == "Megatron" and block_bytes > 64:
        assert file_paths(prefix)[2].read_bytes() == file_paths(own)[2].read_bytes()
    assert (meta.num_records, meta.num_tokens, meta.num_skipped) == (43, ours.num_tokens, 3)
    assert verify_file(prefix) == "verified: checksums, index and roles"
    assert rows(prefix, tokenizer, tmp_path / "a") == rows(own, tokenizer, tmp_path / "b")
    assert chunks(prefix, tokenizer, tmp_path / "a") == chunks(own, tokenizer, tmp_path / "b")
    header, _, *lines = describe_records(prefix, tokenizer, start=0, count=2)
    assert "43 documents records (3 of them without" in header and lines[1].startswith(("  empty", "  TEXT"))


def test_it_is_said_how_documents_end_and_begin(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = tokenizer.encode("a")[-1]
    documents = [*ids_of(tokenizer, other)[:31], *ids_of(tokenizer)[31:]]
    by_megatron(tmp_path / "a", documents, np.int32)
    counts, ends, begin = describe_adopted(adopt_indexed(tmp_path / "a", tokenizer), tokenizer)
    assert counts.startswith(f"{tmp_path}/a: 43 documents (3 of them without")
    name = tokenizer.id_to_token(other)
    assert ends == f"  10 of 40 documents that are not empty (25.0%) end with </s> (2); 30 end with {name} ({other})"
    assert TEXTS[1].split()[0] in begin


def test_the_command_and_the_messages_that_name_it(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "a"
    by_datatrove(prefix, ids_of(tokenizer), np.uint16)
    wanted = f"megatron-grit adopt-indexed --prefix {prefix} --tokenizer"
    with pytest.raises(DataError, match=wanted):
        read_meta(prefix)
    config = run_config(tmp_path, generative=[str(prefix)], tokenizer=str(tokenizer.path))
    assert any(f"{wanted} {tokenizer.path}" in str(problem) for problem in find_problems(config, 1))
    command = ["adopt-indexed", "--prefix", f"{prefix}.idx", "--tokenizer", str(tokenizer.path)]
    assert cli.main(command) == 0
    assert "40 of 40 documents that are not empty (100.0%) end with </s> (2)" in capsys.readouterr().out
    assert not any("adopt" in str(problem) for problem in find_problems(config, 1))
    assert cli.main(command) == 2
    assert "a.json: exists already" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0


def test_what_is_damaged_or_of_another_kind_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix, ids = tmp_path / "a", ids_of(tokenizer)
    bin_path, idx_path, json_path = file_paths(prefix)
    by_megatron(prefix, ids, np.uint16)
    good_bin, good = bin_path.read_bytes(), idx_path.read_bytes()

    def flipped(content: bytes, byte: int, value: int) -> bytes:
        return content[:byte] + bytes([value]) + content[byte + 1 :]

    lengths, pointers = 34, 34 + 4 * 40
    documents = pointers + 8 * 40
    cases = {
        "not a Megatron index": (good_bin, flipped(good, 3, 0)),
        "index version 2; 1 is known": (good_bin, flipped(good, 9, 2)),
        "token type 6 is none of": (good_bin, flipped(good, 17, 6)),
        r"its index says \d+": (good_bin[:-2], good),
        "bytes long, its header says": (good_bin, good[:-8]),
        "sequence 4 is said to be": (good_bin, flipped(good, lengths + 4 * 4, 99)),
        "sequence 8 is said to be": (good_bin, flipped(good, pointers + 8 * 9, 1)),
        "document 5 holds sequences": (good_bin, flipped(good, documents + 8 * 6, 1)),
        "the first document does not start at 0": (good_bin, flipped(good, documents, 1)),
        f"record 1 holds the id {255 << 8 | good_bin[4]}, outside the vocabulary": (flipped(good_bin, 5, 255), good),
        "has mode bytes": (good_bin, good + bytes(40)),
    }
    for message, (tokens, index) in cases.items():
        bin_path.write_bytes(tokens)
        idx_path.write_bytes(index)
        with pytest.raises(DataError, match=message):
            adopt_indexed(prefix, tokenizer)
        assert not json_path.exists()
    by_datatrove(prefix, [[], []], np.uint16)
    with pytest.raises(DataError, match=r"a\.bin: holds no token"):
        adopt_indexed(prefix, tokenizer)
    bin_path.rename(tmp_path / "a.ds")
    with pytest.raises(DataError, match="MegatronDocumentTokenizer"):
        adopt_indexed(prefix, tokenizer)
