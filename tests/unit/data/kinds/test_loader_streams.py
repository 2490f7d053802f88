"""The loader over blends: the same global batches from anywhere, full rows, long records, texts kept apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role, RowKind, num_labels
from megatron_grit.data.kinds import embedding
from megatron_grit.data.kinds.generative import GenerativeStream
from megatron_grit.data.order.sources import OpenFiles
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.errors import ConfigError, DataError
from tests.unit.data.indexed_files import TOKENIZER, chat, ids, pair, run_config, text, write, write_chats


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two generative sources of 40 and 23 records, two embedding sources of 30 and 18 that share texts."""
    folder = tmp_path_factory.mktemp("streams")
    chats = [[3 + number % 5, 2 + number % 11] * (1 + number % 3) for number in range(40)]
    texts = [text(number, 5 + number * 3 % 37) for number in range(23)]
    pairs = [pair(number, 100 + number // 2, 300 + number) for number in range(30)]
    others = [pair(50 + number % 9, 150 + number, 400 + number, length=3 + number % 7) for number in range(18)]
    return {
        "chats": write_chats(folder / "chats", chats),
        "texts": write(folder / "texts", texts, RowKind.GENERATIVE),
        "pairs": write(folder / "pairs", pairs, RowKind.EMBEDDING),
        "others": write(folder / "others", others, RowKind.EMBEDDING),
    }


def config_of(files: dict[str, str], folder: Path, packing: str = "step", **data: object) -> RunConfig:
    blends = {
        "embedding": [files["pairs"], files["others"]],
        "generative": [f"0.5 {files['chats']} 0.5 {files['texts']}"],
        "packing_window": 16,
        "train_group_size": 2,
        "num_rows_multiple": 6,
    }
    training = {"generative_rows": 6 if packing == "window" else None, "generative_batch_size": 14}
    return run_config(folder, objective="unified", training=training, packing=packing, **(blends | data))


def content(row: PackedRow) -> tuple:
    tensors = {name: value.tolist() for name, value in vars(row).items() if isinstance(value, torch.Tensor)}
    return row.kind, row.record_ids, row.max_seqlen, tensors


def whole_batch(config: RunConfig, step: int, dp_size: int, start: int, prefetch: int) -> tuple:
    """The global batch of a step, put together from all ranks of a run that begins at ``start``."""
    config.data.prefetch_steps = prefetch
    parts: list[StepBatch] = []
    for rank in range(dp_size):
        batches = GritDataLoader(config, TOKENIZER, rank, dp_size).iterate(start, step + 1)
        parts.append(list(batches)[-1])
    rows = []
    for kind in RowKind:
        per_rank = [part.rows_of(kind) for part in parts]
        rows += [content(per_rank[index % dp_size][index // dp_size]) for index in range(sum(map(len, per_rank)))]
    counts = [
        (part.row_length, part.num_tokens, pairs.num_queries, pairs.source, part.counts_of("generative"))
        for part in parts
        for pairs in [part.counts_of("embedding")]
    ]
    assert all(count == counts[0] for count in counts)
    for rank, part in enumerate(parts):
        mine = [slot for row in part.rows_of("embedding") for slot in row.slots_S.tolist()]
        assert [slots.tolist() for slots in part.counts_of("embedding").slots_by_rank][rank] == mine
    return rows, counts[0]


@pytest.mark.parametrize("packing", ["step", "window"])
@settings(max_examples=12)
@given(
    step=st.integers(0, 20),
    dp_size=st.sampled_from([1, 2, 3, 6]),
    begun=st.integers(0, 4),
    prefetch=st.integers(0, 2),
    seed=st.integers(0, 3),
)
def test_the_same_global_batch_on_every_mesh_and_after_every_resume(
    files: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    packing: str,
    step: int,
    dp_size: int,
    begun: int,
    prefetch: int,
    seed: int,
) -> None:
    config = config_of(files, tmp_path_factory.mktemp("reference"), packing)
    config.training.seed = seed
    expected = whole_batch(config, step, 1, step, 0)
    config.data.cache_dir = str(tmp_path_factory.mktemp("other"))
    assert whole_batch(config, step, dp_size, max(0, step - begun), prefetch) == expected


def segments(row: PackedRow) -> list[slice]:
    bounds = row.cu_seqlens.tolist()
    slices = [slice(start, stop) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    return slices[: len(row.record_ids)]


def record_tokens(name: str) -> list[int]:
    prefix, _, index = name.rpartition("#")
    return IndexedRecords(prefix).tokens(int(index)).tolist()


def test_full_rows(files: dict[str, str], tmp_path: Path) -> None:
    config = config_of(files, tmp_path, "window", tokens_per_row=60)
    loader = GritDataLoader(config, TOKENIZER, row_multiple=16, equal_rows=False)
    filled, seen = [], Counter()
    for step in range(40):
        batch = loader.batch(step)
        rows = batch.rows_of("generative")
        assert len(rows) == batch.counts_of("generative").num_rows == 6
        assert {row.tokens_1T.shape[1] for row in rows} == {64}
        assert all(row.num_tokens <= 60 for row in rows)
        assert batch.counts_of("generative").num_sequences == sum(len(row.record_ids) for row in rows)
        assert batch.counts_of("generative").num_loss_tokens == sum(int(row.loss_mask_1T.sum()) for row in rows)
        for row in rows:
            filled.append(row.num_tokens / 60)
            for name, place in zip(row.record_ids, segments(row), strict=True):
                assert row.tokens_1T[0, place].tolist() == record_tokens(name)
                seen[name] += 1
    assert np.mean(filled) > 0.98
    # Equal weights: the 23 texts are gone through again before the 40 conversations are.
    per_source = Counter(name.rpartition("#")[0] for name in seen.elements())
    counts = loader.source_counts(40)
    assert counts["generative"] == {
        files["chats"]: per_source[files["chats"]],
        files["texts"]: per_source[files["texts"]],
    }
    assert sum(counts["embedding"].values()) == 40 * 4
    visits = {
        source: [seen[f"{files[source]}#{r}"] for r in range(size)] for source, size in (("chats", 40), ("texts", 23))
    }
    assert all(max(times) - min(times) <= 2 for times in visits.values())


@pytest.mark.parametrize("packing", ["step", "window"])
def test_no_text_twice_in_a_batch(files: dict[str, str], tmp_path: Path, packing: str) -> None:
    def repeats(allow: bool) -> tuple[int, set[str | None]]:
        config = config_of(files, tmp_path, packing, allow_shared_texts=allow)
        loader, found, sources = GritDataLoader(config, TOKENIZER), 0, set()
        for step in range(30):
            batch = loader.batch(step)
            sources.add(batch.counts_of("embedding").source)
            texts = []
            for row in batch.rows_of("embedding"):
                for slot, place in zip(row.slots_S.tolist(), segments(row), strict=True):
                    if slot < 4 or (slot - 4) % 2 == 0:  # a query or a positive
                        pooled = row.pool_mask_T[place] > 0
                        texts.append(tuple(row.tokens_1T[0, place][pooled].tolist()))
            assert len(texts) == 8
            found += len(texts) - len(set(texts))
        return found, sources

    assert repeats(allow=False) == (0, {files["pairs"], files["others"]})
    assert repeats(allow=True)[0] > 5


def long_files(folder: Path) -> str:
    records = [chat(number, 3, 5) for number in range(20)]
    records[4] = chat(4, 40, 100)
    records[9] = chat(9, 100, 3, 5, 60)
    records[15] = text(15, 200)
    return write(folder / "long", records, RowKind.GENERATIVE)


def labels_trained(config: RunConfig, num_steps: int) -> tuple[Counter[str], dict[str, list[int]]]:
    """Labels by record, and the tokens of each record's first segment."""
    loader = GritDataLoader(config, TOKENIZER)
    trained: Counter[str] = Counter()
    heads: dict[str, list[int]] = {}
    for step in range(num_steps):
        batch = loader.batch(step)
        rows, counts = batch.rows_of("generative"), batch.counts_of("generative")
        assert counts.num_sequences == sum(len(row.record_ids) for row in rows)
        assert counts.num_loss_tokens == sum(int(row.loss_mask_1T.sum()) for row in rows)
        for row in rows:
            for name, place in zip(row.record_ids, segments(row), strict=True):
                count = int(row.loss_mask_1T[0, place].sum())
                assert count > 0
                trained[name] += count
                heads.setdefault(name, row.tokens_1T[0, place].tolist())
    return trained, heads


def test_long_records(tmp_path: Path) -> None:
    prefix = long_files(tmp_path)
    records = IndexedRecords(prefix)
    labels = {f"{prefix}#{index}": num_labels(*records.spans(index)) for index in range(20)}
    special = {f"{prefix}#{index}" for index in (4, 9, 15)}
    short = {name: count for name, count in labels.items() if name not in special}
    config = run_config(tmp_path, training={"generative_batch_size": 20}, generative=[prefix], over_long="drop")
    assert labels_trained(config, 1)[0] == short
    config.data.over_long = "truncate"
    trained, heads = labels_trained(config, 1)
    assert trained == short | {f"{prefix}#4": 24, f"{prefix}#15": 63}  # nothing of #9 that is left has a label
    assert heads[f"{prefix}#15"] == ids(15, 64)
    config.data.over_long = "split"
    assert labels_trained(config, 1)[0] == labels
    assert labels_trained(config, 3)[0] == {name: 3 * count for name, count in labels.items()}
    config.data.split_multiple = 24
    assert labels_trained(config, 3)[0] == {name: 3 * count for name, count in labels.items()}
    stream = GenerativeStream(config, TOKENIZER, OpenFiles())
    cut = [segment for segment in stream.segments(0) if segment.name in special]
    assert len(cut) > 6 and all(segment.start % 24 == 0 for segment in cut)
    rows = GritDataLoader(config, TOKENIZER).batch(0).rows
    pieces = [row.tokens_1T[0, place].tolist() for row in rows for place in segments(row)]
    assert sorted(pieces) == sorted(
        stream.sources[s.source].tokens(s.record, s.start, s.stop - s.start).tolist() for s in stream.segments(0)
    )
    config.data.split_multiple = 64
    with pytest.raises(ConfigError, match="data.split_multiple 64 needs rows of 65 tokens at least"):
        labels_trained(config, 1)


def test_long_records_in_full_rows(tmp_path: Path) -> None:
    prefix = long_files(tmp_path)
    every = {f"{prefix}#{index}" for index in range(20)}
    found = {}
    for policy in ("drop", "truncate", "split"):
        config = run_config(
            tmp_path,
            training={"generative_rows": 1},
            packing="window",
            packing_window=20,
            generative=[prefix],
            over_long=policy,
        )
        found[policy] = labels_trained(config, 300)[0]
    assert found["drop"].keys() == every - {f"{prefix}#{index}" for index in (4, 9, 15)}
    assert found["truncate"].keys() == every - {f"{prefix}#9"}
    assert found["split"].keys() == every
    epochs = found["split"][f"{prefix}#0"] / 5
    assert found["split"][f"{prefix}#15"] == pytest.approx(199 * epochs, rel=0.15)  # all of it


def test_long_texts_are_cut(tmp_path: Path) -> None:
    records = [pair(number, 50 + number, length=100 if number == 3 else 4) for number in range(8)]
    prefix = write(tmp_path / "pairs", records, RowKind.EMBEDDING)
    config = run_config(tmp_path, objective="embedding", embedding=[prefix])
    with pytest.raises(DataError, match="pairs#3 has a segment of 102 tokens, .* set data.over_long_texts"):
        GritDataLoader(config, TOKENIZER)
    config.data.over_long_texts = "truncate"
    loader = GritDataLoader(config, TOKENIZER)
    longest = max(
        place.stop - place.start
        for step in range(2)
        for row in loader.batch(step).rows_of("embedding")
        for place in segments(row)
    )
    assert longest == 64
    record = [(Role.QUERY_INSTRUCTION, ids(1, 70)), (Role.QUERY, [5, 6]), (Role.POSITIVE, [8])]
    prefix = write(tmp_path / "instructed", [record] * 4, RowKind.EMBEDDING)
    config.data.embedding, config.data.allow_shared_texts = [prefix], True
    with pytest.raises(
        DataError, match=r"instructed#\d has an instruction that leaves no room for its text in 64 tokens"
    ):
        GritDataLoader(config, TOKENIZER).batch(0)


def test_all_sequences_of_a_step_too_long(tmp_path: Path) -> None:
    prefix = write_chats(tmp_path / "long", [[40, 40]] * 6)
    config = run_config(tmp_path, generative=[prefix], over_long="drop")
    with pytest.raises(ConfigError, match="all 6 records are longer than data.tokens_per_row 64, the shortest has 80"):
        GritDataLoader(config, TOKENIZER)
    few = write_chats(tmp_path / "few", [[40, 40]] * 60 + [[3, 4]])
    config.data.generative, config.training.generative_batch_size = [few], 1
    with pytest.raises(DataError, match="all of its 1 sequences are too long, and data.over_long is drop"):
        for step in range(2):
            GritDataLoader(config, TOKENIZER).batch(step)


def test_a_batch_that_shared_texts_forbid(tmp_path: Path) -> None:
    prefix = write(tmp_path / "pairs", [pair(number, number % 3) for number in range(12)], RowKind.EMBEDDING)
    config = run_config(tmp_path, objective="embedding", embedding=[prefix])
    with pytest.raises(ConfigError, match="pairs has no 4 records without a query or positive in common"):
        GritDataLoader(config, TOKENIZER).batch(0)
    config.data.allow_shared_texts = True
    assert GritDataLoader(config, TOKENIZER).batch(0).counts_of("embedding").num_queries == 4


def test_shared_texts_of_a_large_source_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "pairs", [pair(number // 2, 50 + number) for number in range(12)], RowKind.EMBEDDING)
    config = run_config(tmp_path, objective="embedding", embedding=[prefix])
    expected = content(GritDataLoader(config, TOKENIZER).batch(2).rows_of("embedding")[0])
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(embedding, "_CACHED_FROM_BYTES", 1)
    GritDataLoader(config, TOKENIZER).batch(2)
    assert len(list((tmp_path / "cache").glob("shared_texts-*.cache"))) == 1
    monkeypatch.setattr(embedding, "find_bound_records", None)  # not called again
    assert content(GritDataLoader(config, TOKENIZER).batch(2).rows_of("embedding")[0]) == expected


def test_a_changed_source_is_planned_anew(tmp_path: Path) -> None:
    def names(lengths: list[list[int]]) -> list[list[str]]:
        config = run_config(
            tmp_path,
            generative=[write_chats(tmp_path / "gen", lengths)],
            packing="window",
            packing_window=16,
            training={"generative_rows": 2},
        )
        return [row.record_ids for row in GritDataLoader(config, TOKENIZER).batch(0).rows_of("generative")]

    short = names([[2, 3 + number] for number in range(20)])
    assert names([[2, 23 - number] for number in range(20)]) != short
    assert len(list((tmp_path / "cache").glob("rows-*.cache"))) == 2
    assert names([[2, 3 + number] for number in range(20)]) == short
    assert len(list((tmp_path / "cache").glob("rows-*.cache"))) == 2
