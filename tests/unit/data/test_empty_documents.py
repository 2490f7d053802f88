"""Empty documents are kept, so that document k is that of line k, and skipped by all that reads tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.builders.documents import DocumentOptions, describe, preprocess
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.indexed.inspection import describe_records, verify_file
from megatron_grit.data.indexed.merge import merge_indexed
from megatron_grit.data.indexed.reader import IndexedFile, file_paths, read_meta
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import DataError
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.work import Worker
from tests.unit.data.indexed_files import run_config
from tests.unit.data.samples import sentence
from tests.unit.retrieval.databases import make_project

COUNT = 24
EMPTY = {
    "nowhere": set(),
    "first": {0},
    "last": {COUNT - 1},
    "in a row": {0, 1, 7, 8, 9, 22, 23},
    "all but one": set(range(COUNT)) - {5},
}


@pytest.fixture(scope="module")
def stripping(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Its normaliser leaves nothing of white space."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.normalizer = normalizers.Strip()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator((sentence(number, 12) for number in range(100)), trainer)
    path = tmp_path_factory.mktemp("stripping") / "tokenizer.json"
    fast.save(str(path))
    return load_tokenizer(path)


def texts_of(empty: set[int]) -> list[str]:
    return [("", "  \n")[line % 2] if line in empty else f"{sentence(line, 5 + line)}." for line in range(COUNT)]


def build(folder: Path, keys: dict[str, list[str]], tokenizer: Tokenizer, name: str = "out", **how: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dict(zip(keys, line, strict=True))) for line in zip(*keys.values(), strict=True)]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = DocumentOptions(tokenizer=str(tokenizer.path), json_keys=tuple(keys), append_eod=True)
    totals = preprocess([folder / "in.jsonl"], folder / name, options, block_bytes=200, **how)  # type: ignore[arg-type]
    num_empty = sum(not tokenizer.encode(text) for text in next(iter(keys.values())))
    said = f"{next(iter(keys))}: {COUNT} documents" + (f" ({num_empty} of them without" if num_empty else ",")
    assert len(lines) != COUNT or said in describe(totals)[1]
    return folder / f"{name}_text_{'sentence' if how.get('split_sentences') else 'document'}"


@pytest.mark.parametrize("where", EMPTY)
@pytest.mark.parametrize("how", [{}, {"partitions": 3}, {"split_sentences": True}], ids=str)
def test_document_k_of_every_key_is_that_of_line_k(tmp_path: Path, stripping: Tokenizer, where: str, how: dict) -> None:
    if how.get("split_sentences"):
        pytest.importorskip("nltk")
    keys = {"text": texts_of(EMPTY[where]), "title": texts_of(EMPTY["in a row"] ^ {3})}
    prefix = build(tmp_path, keys, stripping, **how)
    for key, texts in keys.items():
        records = IndexedRecords(str(prefix).replace("text", key))
        records.verify()
        assert records.meta.num_records == COUNT == records.file.num_documents
        expected = [stripping.encode(text) for text in texts]
        for line, ids in enumerate(expected):
            start, stop = records.file.sequences(line)
            assert records.tokens(line).tolist() == [*ids, stripping.eos_id] if ids else start == stop
        assert records.skipped().tolist() == [line for line, ids in enumerate(expected) if not ids]


def rows_of(config: RunConfig, tokenizer: Tokenizer) -> list[dict[str, list]]:
    batches = list(GritDataLoader(config, tokenizer).iterate(0, 6))
    rows = [row for batch in batches for row in batch.rows_of("generative")]
    return [{name: item.tolist() for name, item in vars(row).items() if isinstance(item, torch.Tensor)} for row in rows]


@pytest.mark.parametrize("packing", ["step", "window"])
@pytest.mark.parametrize("where", EMPTY)
def test_training_takes_the_same_batches(tmp_path: Path, stripping: Tokenizer, where: str, packing: str) -> None:
    texts, other = texts_of(EMPTY[where]), texts_of({2, 3})
    found = []
    for name, kept in (("with", [texts, other]), ("without", [[text for text in texts if text.strip()], other])):
        prefixes = [
            str(build(tmp_path / f"{name}{place}", {"text": each}, stripping)) for place, each in enumerate(kept)
        ]
        (tmp_path / f"{name}.yaml").write_text(f"- path: {prefixes[0]}\n- path: {prefixes[1]}\n  cap: 9\n")
        config = run_config(
            tmp_path / name,
            training={"generative_rows": 3 if packing == "window" else None},
            generative=[str(tmp_path / f"{name}.yaml")],
            packing=packing,
            packing_window=16,
            tokens_per_row=256,
            over_long="split",
        )
        found.append(rows_of(config, stripping))
        again = rows_of(config, stripping)
        assert again == found[-1]
    assert found[0] == found[1]


def test_a_database_has_the_same_chunks(tmp_path: Path, stripping: Tokenizer) -> None:
    found = []
    texts = texts_of(EMPTY["in a row"])
    for name, kept in (("with", texts), ("without", [text for text in texts if text.strip()])):
        prefix = build(tmp_path / name, {"text": kept}, stripping)
        settings = {"tokenizer": str(stripping.path), "valid_fraction": 0.0}
        project = make_project(tmp_path / name / "db", [str(prefix)], tmp_path, **settings)
        build_chunks(project, Worker())
        db = ChunkDb(project)
        tokens, mask = db.read_tokens(np.arange(len(db)))
        found.append((tokens.tolist(), mask.tolist(), [db.tokens(chunk).tolist() for chunk in range(len(db))]))
    assert found[0] == found[1] and len(found[0][0]) > COUNT


def test_joined_files_keep_them_and_an_inspection_counts_them(tmp_path: Path, stripping: Tokenizer) -> None:
    prefixes = [build(tmp_path / name, {"text": texts_of(EMPTY[name])}, stripping) for name in ("first", "all but one")]
    meta = merge_indexed(prefixes, tmp_path / "joined")
    assert meta is not None and (meta.num_records, meta.num_skipped) == (2 * COUNT, COUNT)
    header, _, *lines = describe_records(tmp_path / "joined", stripping, start=COUNT + 4, count=2)
    assert f"48 documents records ({COUNT} of them without a token to predict" in header
    assert lines[:3] == [f"record {COUNT + 4}", "  empty", f"record {COUNT + 5}"] and "TEXT" in lines[3]
    assert verify_file(tmp_path / "joined").startswith("verified")
    Path(f"{tmp_path}/joined.json").unlink()
    assert f"48 documents ({COUNT} of them" in next(describe_records(tmp_path / "joined"))


def test_nothing_but_empty_documents_is_refused(tmp_path: Path, stripping: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"in\.jsonl: all 3 documents are empty for .*out_text_document"):
        build(tmp_path, {"text": ["", " ", "\n"]}, stripping, partitions=2)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_files_without_them_are_those_of_before(tmp_path: Path, stripping: Tokenizer) -> None:
    prefix = build(tmp_path, {"text": texts_of(set())}, stripping)
    path = file_paths(prefix)[2]
    assert "num_skipped" not in path.read_text() and read_meta(prefix).num_skipped == 0


def test_a_boundary_that_makes_another_document_empty_is_damage(tmp_path: Path, stripping: Tokenizer) -> None:
    prefix = build(tmp_path, {"text": texts_of({4})}, stripping)
    file = IndexedFile(prefix)
    content = bytearray(file.idx_path.read_bytes())
    place = file.modes_at - 8 * (COUNT - 10)
    content[place : place + 8] = content[place - 8 : place]
    file.idx_path.write_bytes(content)
    config = run_config(tmp_path, generative=[str(prefix)], tokens_per_row=256)
    with pytest.raises(DataError, match=r"\.idx: holds 2 documents of fewer than two tokens, its \.json says 1"):
        GritDataLoader(config, stripping).batch(0)
