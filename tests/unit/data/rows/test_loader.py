"""The loader: rows, labels and masks against a plain oracle, and the same data on every mesh."""

from __future__ import annotations

import re
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_grit.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_grit.data.indexed.label_weights import LabelWeights
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role, RowKind, pooled, split_segments, supervised
from megatron_grit.data.order.sampler import passage_draws, pick_passages
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_grit.errors import ConfigError, DataError
from tests.unit.data.samples import TEXT, generative_record

QUERIES, SEQUENCES, GROUP = 12, 20, 3


def make_config(prefixes: dict[str, str], *, objective: str = "unified", **data: object) -> RunConfig:
    settings = {
        "embedding": [prefixes["emb_a"], prefixes["emb_b"]],
        "generative": [prefixes["gen"]],
        "tokens_per_row": 256,
        "train_group_size": GROUP,
        "num_rows_multiple": 4,
    }
    return RunConfig(
        data=DataConfig(**(settings | data)),
        training=TrainingConfig(
            embedding_batch_size=QUERIES, generative_batch_size=SEQUENCES, objective=objective, seed=7
        ),
    )


@pytest.fixture(scope="module")
def config(indexed_prefixes: dict[str, str]) -> RunConfig:
    return make_config(indexed_prefixes)


def tensors(row: PackedRow) -> dict[str, object]:
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in vars(row).items()
        if value is not None
    }


def same(left: StepBatch, right: StepBatch) -> bool:
    def plain(batch: StepBatch) -> dict[str, object]:
        values = dict(vars(batch))
        for kind, part in values.pop("parts").items():
            values[f"{kind} rows"] = [tensors(row) for row in part.rows]
            values[f"{kind} counts"] = vars(part.counts) | {
                "slots_by_rank": [slots.tolist() for slots in getattr(part.counts, "slots_by_rank", [])],
                "group_sizes_S": list(getattr(part.counts, "group_sizes_S", [])),
            }
        return values

    return plain(left) == plain(right)


def source_record(name: str) -> list[tuple[Role, np.ndarray]]:
    prefix, _, index = name.rpartition("#")
    return IndexedRecords(prefix).get(int(index))


def segments(row: PackedRow) -> list[slice]:
    bounds = row.cu_seqlens.tolist()
    slices = [slice(start, stop) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    has_padding = bool(row.padding_mask_1T.any())
    return slices[: len(slices) - has_padding]


@pytest.mark.parametrize("step", [0, 5, 123])
def test_row_invariants(config: RunConfig, tokenizer: Tokenizer, step: int) -> None:
    loader = GritDataLoader(config, tokenizer, row_multiple=16)
    batch = loader.batch(step)
    rows = batch.rows
    assert len(batch.rows_of("embedding")) % 4 == len(batch.rows_of("generative")) % 4 == 0
    assert batch.row_length % 16 == 0
    assert batch.row_length - 16 < max(row.num_tokens for row in rows) <= batch.row_length <= 256
    assert sum(row.num_tokens for row in rows) == batch.num_tokens
    assert batch.num_padded_tokens == batch.row_length * len(rows)
    for row in rows:
        bounds = row.cu_seqlens.tolist()
        assert row.cu_seqlens.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == batch.row_length
        assert row.max_seqlen == max(np.diff(bounds)) and min(np.diff(bounds)) > 0
        assert row.positions_1T[0].tolist() == [t for length in np.diff(bounds) for t in range(length)]
        ends = segments(row)[-1].stop
        assert row.padding_mask_1T[0].tolist() == [t >= ends for t in range(batch.row_length)]
        assert (row.tokens_1T[0, ends:] == tokenizer.pad_id).all()
        assert len(row.record_ids) == len(segments(row))


def test_rows_of_their_own_length(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Without pipeline stages rows differ in length; what is in them does not change."""
    equal = GritDataLoader(config, tokenizer, row_multiple=16).batch(5)
    own = GritDataLoader(config, tokenizer, row_multiple=16, equal_rows=False).batch(5)
    lengths = []
    for kind in RowKind:
        for longer, row in zip(equal.rows_of(kind), own.rows_of(kind), strict=True):
            length = row.tokens_1T.shape[1]
            lengths.append(length)
            assert length == -(-row.num_tokens // 16) * 16
            assert row.record_ids == longer.record_ids
            assert row.tokens_1T.tolist() == longer.tokens_1T[:, :length].tolist()
            assert row.cu_seqlens.tolist()[-1] == length
            if row.loss_mask_1T is not None:
                assert row.loss_mask_1T.tolist() == longer.loss_mask_1T[:, :length].tolist()
    assert len(set(lengths)) > 1
    assert own.row_length == equal.row_length == max(lengths)
    assert own.num_padded_tokens == sum(lengths) < equal.num_padded_tokens
    assert (own.num_tokens, own.counts_of("generative").num_loss_tokens) == (
        equal.num_tokens,
        equal.counts_of("generative").num_loss_tokens,
    )


def test_generative_labels_against_the_records(config: RunConfig, tokenizer: Tokenizer) -> None:
    batch = GritDataLoader(config, tokenizer).batch(3)
    total, names = 0, []
    for row in batch.rows_of("generative"):
        names += row.record_ids
        expected_labels, expected_mask = np.zeros(batch.row_length), np.zeros(batch.row_length)
        for name, place in zip(row.record_ids, segments(row), strict=True):
            spans = source_record(name)
            ids = np.concatenate([ids for _, ids in spans])
            trained = np.concatenate([np.full(len(ids), supervised(role)) for role, ids in spans])
            assert row.tokens_1T[0, place].tolist() == ids.tolist()
            expected_labels[place.start : place.stop - 1] = ids[1:]
            expected_mask[place.start : place.stop - 1] = trained[1:]
        assert row.labels_1T[0].tolist() == expected_labels.tolist()
        assert row.loss_mask_1T[0].tolist() == expected_mask.tolist()
        total += int(expected_mask.sum())
    assert batch.counts_of("generative").num_loss_tokens == total > 0
    assert len(names) == batch.counts_of("generative").num_sequences == SEQUENCES
    assert batch.counts_of("generative").num_rows == len(batch.rows_of("generative"))


def test_supervised_tokens_decode_to_answers(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Of conversations with one to five turns exactly the answers, each with its EOS, are trained."""
    loader = GritDataLoader(config, tokenizer)
    seen = set()
    for step in range(5):
        for row in loader.batch(step).rows_of("generative"):
            for name, place in zip(row.record_ids, segments(row), strict=True):
                turns = generative_record(int(name.rpartition("#")[2]))["text"]
                if isinstance(turns, str):
                    continue
                trained = row.labels_1T[0, place][row.loss_mask_1T[0, place] > 0]
                ends = (trained == tokenizer.eos_id).nonzero().flatten().tolist()
                answers = [trained[start + 1 : stop].tolist() for start, stop in pairwise([-1, *ends])]
                assert [tokenizer.decode(ids) for ids in answers] == turns[1::2]
                assert ends[-1] == len(trained) - 1
                seen.add(len(answers))
    assert seen == {1, 2, 3, 4, 5}


def test_embedding_rows_against_the_records(config: RunConfig, tokenizer: Tokenizer) -> None:
    batch = GritDataLoader(config, tokenizer).batch(2)
    texts: dict[int, tuple[str, Role]] = {}
    chosen: dict[int, int] = {}  # which of its record's texts a slot holds
    for row in batch.rows_of("embedding"):
        places = segments(row)
        assert row.segment_ids_T.tolist() == [
            index for index, place in enumerate(places) for _ in range(place.stop - place.start)
        ] + [len(places)] * (batch.row_length - places[-1].stop)
        assert row.slots_S.tolist() == sorted(row.slots_S.tolist())
        for name, place, slot in zip(row.record_ids, places, row.slots_S.tolist(), strict=True):
            spans = source_record(name)
            roles = [role for role, _ in spans]
            ids = row.tokens_1T[0, place].tolist()
            (match,) = {  # the one text of the record that these ids are
                (start, stop)
                for start, stop in split_segments(roles)
                if [index for _, part in spans[start:stop] for index in part.tolist()] == ids
            }
            mask = [float(pooled(role)) for role, part in spans[slice(*match)] for _ in part]
            assert row.pool_mask_T[place].tolist() == mask and any(mask)
            texts[slot] = (name, roles[match[1] - 1])
            chosen[slot] = split_segments(roles).index(match)
        assert not row.pool_mask_T[places[-1].stop :].any()
    assert sorted(texts) == list(range(QUERIES * (1 + GROUP)))
    for query in range(QUERIES):
        name = texts[query][0]
        first = QUERIES + query * GROUP
        assert texts[query][1] is Role.QUERY
        assert [texts[slot] for slot in range(first, first + GROUP)] == [
            (name, Role.POSITIVE),
            (name, Role.NEGATIVE),
            (name, Role.NEGATIVE),
        ]
        roles = [role for role, _ in source_record(name)]
        num_positives = roles.count(Role.POSITIVE)
        positive, negatives = pick_passages(
            passage_draws(7, 2, QUERIES, GROUP)[query], num_positives, roles.count(Role.NEGATIVE)
        )
        expected = [1 + positive, *(1 + num_positives + negative for negative in negatives)]
        assert [chosen[slot] for slot in range(first, first + GROUP)] == expected
    assert len({texts[query][0] for query in range(QUERIES)}) == QUERIES
    assert {name.rpartition("#")[0] for name, _ in texts.values()} == {batch.counts_of("embedding").source}


def test_every_mesh_has_the_same_rows(config: RunConfig, tokenizer: Tokenizer) -> None:
    whole = GritDataLoader(config, tokenizer).batch(4)
    for dp_size in (2, 4):
        parts = [GritDataLoader(config, tokenizer, rank, dp_size).batch(4) for rank in range(dp_size)]
        for kind in RowKind:
            rows = whole.rows_of(kind)
            assert all(len(part.rows_of(kind)) == len(rows) // dp_size for part in parts)
            for index, row in enumerate(rows):
                part = parts[index % dp_size]
                assert tensors(part.rows_of(kind)[index // dp_size]) == tensors(row)
        for rank, part in enumerate(parts):
            mine = [slot for row in part.rows_of("embedding") for slot in row.slots_S.tolist()]
            slots, first = (each.counts_of("embedding").slots_by_rank for each in (part, parts[0]))
            assert [slot.tolist() for slot in slots] == [slot.tolist() for slot in first]
            assert slots[rank].tolist() == mine
            for count in ("row_length", "num_tokens", "num_padded_tokens"):
                assert getattr(part, count) == getattr(whole, count)
            assert part.counts_of("generative") == whole.counts_of("generative")


def test_slots_do_not_depend_on_the_number_of_rows(config: RunConfig, tokenizer: Tokenizer, indexed_prefixes) -> None:
    """Without num_rows_multiple rows differ between meshes; what is in them does not."""

    def slots(dp_size: int) -> Counter:
        free = make_config(indexed_prefixes, num_rows_multiple=None)
        batches = [GritDataLoader(free, tokenizer, rank, dp_size).batch(1) for rank in range(dp_size)]
        assert len({len(batch.rows_of("embedding")) for batch in batches}) == 1
        return Counter(
            (slot, name, tuple(row.tokens_1T[0, place].tolist()))
            for batch in batches
            for row in batch.rows_of("embedding")
            for slot, name, place in zip(row.slots_S.tolist(), row.record_ids, segments(row), strict=True)
        )

    assert slots(1) == slots(2) == slots(3)


def test_iterate_is_batch_from_any_step(config: RunConfig, tokenizer: Tokenizer) -> None:
    loader = GritDataLoader(config, tokenizer)
    batches = list(loader.iterate(2, 6))
    assert [batch.step for batch in batches] == [2, 3, 4, 5]
    fresh = GritDataLoader(config, tokenizer)
    assert all(same(batch, fresh.batch(batch.step)) for batch in reversed(batches))
    assert not same(batches[0], batches[1])


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "grit-data-prefetch"]


def test_prefetch_thread_ends_with_its_iterator(config: RunConfig, tokenizer: Tokenizer) -> None:
    steps = GritDataLoader(config, tokenizer).iterate(0, 1000)
    next(steps)
    assert len(prefetch_threads()) == 1
    steps.close()
    assert not prefetch_threads()


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_errors_reach_the_step_they_belong_to(
    indexed_prefixes: dict[str, str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, prefetch_steps: int
) -> None:
    loader = GritDataLoader(make_config(indexed_prefixes, prefetch_steps=prefetch_steps), tokenizer)
    batch = loader.batch

    def fail_at_two(step: int) -> StepBatch:
        if step == 2:
            raise DataError("the disk went away")
        return batch(step)

    monkeypatch.setattr(loader, "batch", fail_at_two)
    steps = loader.iterate(0, 9)
    assert [next(steps).step, next(steps).step] == [0, 1]
    with pytest.raises(DataError, match="the disk went away"):
        next(steps)
    assert not prefetch_threads()


@pytest.mark.parametrize(
    ("objective", "name", "count"),
    [("embedding", "num_queries", QUERIES), ("generative", "num_sequences", SEQUENCES)],
)
def test_one_objective(
    indexed_prefixes: dict[str, str], tokenizer: Tokenizer, objective: str, name: str, count: int
) -> None:
    other = "generative" if objective == "embedding" else "embedding"
    batch = GritDataLoader(make_config(indexed_prefixes, objective=objective, **{other: []}), tokenizer).batch(0)
    assert list(batch.parts) == [objective] and batch.rows_of(objective) and not batch.rows_of(other)
    assert getattr(batch.counts_of(objective), name) == count
    unified = GritDataLoader(make_config(indexed_prefixes), tokenizer).batch(0)
    names = [row.record_ids for row in batch.rows_of(objective)]
    assert names == [row.record_ids for row in unified.rows_of(objective)]


def test_without_negatives(indexed_prefixes: dict[str, str], tokenizer: Tokenizer) -> None:
    sources = {"embedding": [indexed_prefixes["no_neg"]], "objective": "embedding"}
    with pytest.raises(ConfigError, match="no_neg has records without any; set data.train_group_size to 1"):
        GritDataLoader(make_config(indexed_prefixes, **sources), tokenizer)
    batch = GritDataLoader(make_config(indexed_prefixes, train_group_size=1, **sources), tokenizer).batch(0)
    assert sum(len(row.slots_S) for row in batch.rows_of("embedding")) == 2 * QUERIES


def test_too_few_negatives_are_repeated(indexed_prefixes: dict[str, str], tokenizer: Tokenizer) -> None:
    sources = {"embedding": [indexed_prefixes["emb_b"]], "objective": "embedding", "train_group_size": 6}
    batch = GritDataLoader(make_config(indexed_prefixes, **sources), tokenizer).batch(0)
    assert sum(len(row.slots_S) for row in batch.rows_of("embedding")) == QUERIES * 7


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embedding": ["/nowhere/pairs"]}, DataError, "/nowhere/pairs.json: no such file"),
        ({"embedding": []}, ConfigError, "data.embedding is empty, but training.objective unified needs it"),
        ({"embedding": "gen"}, DataError, "gen.json: holds generative records and stands under data.embedding"),
        ({"generative": "emb_a"}, DataError, "emb_a.json: holds embedding records and stands under data.generative"),
        ({"num_rows_multiple": 3, "dp_size": 2}, ConfigError, "num_rows_multiple 3 is not a multiple of .* size 2"),
        (
            {"tokens_per_row": 64},
            DataError,
            r"record .*#\d+ has a segment of \d+ tokens, more than data.tokens_per_row 64",
        ),
        ({"max_position_embeddings": 50}, DataError, "more than model.max_position_embeddings 50"),
        ({"packing": "window", "generative_rows": 3, "dp_size": 2}, ConfigError, "generative_rows 3 is not a multiple"),
        ({"seed": -1}, ConfigError, "training.seed -1 is negative"),
        ({"embedding_batch_size": 41}, ConfigError, r"emb_a has 40 records, fewer than .*embedding_batch_size 41"),
    ],
)
def test_impossible_runs(indexed_prefixes, tokenizer: Tokenizer, change: dict, error: type, message: str) -> None:
    data = {key: value for key, value in change.items() if key in vars(DataConfig())}
    for key in ("embedding", "generative"):
        if isinstance(data.get(key), str):
            data[key] = [indexed_prefixes[data[key]]]
    config = make_config(indexed_prefixes, **data)
    for key in ("seed", "embedding_batch_size", "generative_rows"):
        setattr(config.training, key, change.get(key, getattr(config.training, key)))
    if "max_position_embeddings" in change:
        config.model = ModelConfig(max_position_embeddings=change["max_position_embeddings"])
    with pytest.raises(error, match=message):
        GritDataLoader(config, tokenizer, dp_size=change.get("dp_size", 1))


def test_another_tokenizer_is_refused(config: RunConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of the same name, size and special tokens, too; both are told by their SHA-256."""
    other = load_tokenizer(train_sentencepiece([TEXT[::-1]], tmp_path / "tokenizer", 300))
    message = f"emb_a.json: was built with another tokenizer than {other.path} "
    message += f"(SHA-256 {tokenizer.fingerprint[:12]}..., not {other.fingerprint[:12]}...)"
    with pytest.raises(DataError, match=re.escape(message)):
        GritDataLoader(config, other)


def test_more_rows_than_texts(indexed_prefixes: dict[str, str], tokenizer: Tokenizer) -> None:
    config = make_config(indexed_prefixes, num_rows_multiple=64)
    with pytest.raises(ConfigError, match="embedding batch: 48 segments cannot fill 64 rows"):
        GritDataLoader(config, tokenizer).batch(0)


def test_long_record_is_named_where_the_metadata_hides_it(
    indexed_prefixes: dict[str, str], tokenizer: Tokenizer
) -> None:
    for kind, name in (("embedding", "emb_."), ("generative", "gen")):
        loader = GritDataLoader(make_config(indexed_prefixes, objective=kind), tokenizer)
        loader.streams[kind].sources.longest_segment = 20
        with pytest.raises(
            DataError, match=rf"record .*{name}#\d+ has a segment of \d+ tokens, more than data.tokens_pe"
        ):
            loader.batch(0)


def test_record_without_labels_is_refused(
    indexed_prefixes: dict[str, str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LabelWeights, "total", lambda *arguments: (0, 0.0))
    loader = GritDataLoader(make_config(indexed_prefixes, objective="generative"), tokenizer)
    with pytest.raises(DataError, match=r"gen#\d+ has no token to predict"):
        loader.batch(0)


def test_row_kinds(config: RunConfig, tokenizer: Tokenizer) -> None:
    batch = GritDataLoader(config, tokenizer).batch(0)
    assert {row.kind for row in batch.rows_of("embedding")} == {RowKind.EMBEDDING}
    assert {row.kind for row in batch.rows_of("generative")} == {RowKind.GENERATIVE}
    assert all(row.labels_1T is None and row.loss_mask_1T is None for row in batch.rows_of("embedding"))
    assert all(row.segment_ids_T is None and row.pool_mask_T is None for row in batch.rows_of("generative"))
