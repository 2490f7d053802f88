"""Dolly packed at 2,048 tokens: full rows, every record as often as the epochs say, and what a packed record gives is
what it gives alone: its loss and its embedding.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.data.indexed.label_weights import ANSWERS
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.indexed.writer import IndexedWriter
from megatron_grit.data.kinds import embedding, generative
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.rows.segments import spans_between
from megatron_grit.data.rows.stream import PlannedRow
from megatron_grit.data.text.tokenizer import load_tokenizer, train_sentencepiece
from megatron_grit.models import attention
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.parallel.launch import parallel_job
from tests.rows import TWO_PASSES, tiny_config

FILE = "alpagasus_3k_dolly.jsonl"
NUM_RECORDS, NUM_COMPARED = 2996, 200
TOKENS_PER_ROW, VOCAB, WINDOW = 2048, 1024, 749  # an epoch is four windows
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> RunConfig:
    """All records as conversations, and as pairs of a request and its answer."""
    folder = tmp_path_factory.mktemp("dolly")
    lines = (shared_data / FILE).read_text(encoding="utf-8").splitlines()
    texts = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
    assert len(texts) == NUM_RECORDS
    model = train_sentencepiece((text for pair in texts[::6] for text in pair), folder / "tokenizer", VOCAB)
    tokenizer = load_tokenizer(model)
    config = tiny_config(max_position_embeddings=TOKENS_PER_ROW)
    config.data.tokenizer = str(model)
    encoded = zip(*(iter(tokenizer.encode_batch([text for pair in texts for text in pair])),) * 2, strict=True)
    prefixes = {kind: folder / kind.value for kind in TWO_PASSES}
    with (
        IndexedWriter(prefixes[RowKind.GENERATIVE], RowKind.GENERATIVE, VOCAB) as chats,
        IndexedWriter(prefixes[RowKind.EMBEDDING], RowKind.EMBEDDING, VOCAB) as pairs,
    ):
        for request, answer in encoded:
            chats.add([(Role.TEMPLATE, [tokenizer.bos_id, *request]), (Role.ANSWER, [*answer, tokenizer.eos_id])])
            instruction = [tokenizer.bos_id, *request[:5]]
            pairs.add([(Role.QUERY_INSTRUCTION, instruction), (Role.QUERY, request), (Role.POSITIVE, answer)])
        for writer in (chats, pairs):
            writer.finalize(tokenizer_fingerprint=tokenizer.fingerprint, template="none", limits={})
    config.data.generative, config.data.embedding = (
        [str(prefixes[RowKind.GENERATIVE])],
        [str(prefixes[RowKind.EMBEDDING])],
    )
    config.data.tokens_per_row, config.data.train_group_size = TOKENS_PER_ROW, 1
    config.data.packing, config.data.packing_window, config.training.generative_rows = "window", WINDOW, 4
    config.data.over_long, config.data.over_long_texts = "split", "truncate"
    config.data.cache_dir = str(folder / "cache")
    config.training.embedding_batch_size = 107  # a divisor of the number of records: an epoch leaves none out
    config.data.allow_shared_texts = True  # one record comes twice
    return config


@pytest.fixture(scope="module")
def loader(config: RunConfig) -> GritDataLoader:
    return GritDataLoader(config, load_tokenizer(str(config.data.tokenizer)))


@pytest.fixture(scope="module")
def model(config: RunConfig) -> Iterator[GritDecoder]:
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        yield build_model(config, VOCAB, context).eval()


def test_rows_are_full_and_hold_every_record(loader: GritDataLoader) -> None:
    stream = loader.streams["generative"]
    assert isinstance(stream, generative.GenerativeStream) and stream._plan is not None
    block = stream._plan._block_with(0)
    lengths = (block.pieces["stop"] - block.pieces["start"]).astype(np.int64)
    per_row = np.add.reduceat(lengths, block.bounds[:-1])
    assert per_row.max() <= TOKENS_PER_ROW
    assert per_row.mean() / TOKENS_PER_ROW >= 0.99
    # 32 windows of a quarter of an epoch: rows and what waits for the next window hold eight epochs.
    pieces = np.concatenate([block.pieces, block.carry])
    counts = Counter(zip(pieces["record"].tolist(), pieces["start"].tolist(), strict=True))
    assert set(counts.values()) == {8}
    assert {record for record, _ in counts} == set(range(NUM_RECORDS))
    source = stream.sources[0]
    labels = sum(
        ANSWERS.total(*spans_between(*source.spans(record), start, stop), not start)[0]
        for _, record, start, stop, _ in pieces.tolist()
    )
    assert labels == 8 * source.meta.num_supervised_tokens
    batch = loader.batch(0)
    assert sum(row.num_tokens for row in batch.rows_of("generative")) / (4 * TOKENS_PER_ROW) >= 0.99


def test_in_a_mean_of_means_short_answers_outweigh_long_ones(loader: GritDataLoader) -> None:
    """With micro-batches of one conversation, a label of the shortest 5 % weighs 38 times one of the longest, by tokens
    of another tokenizer (cl100k): what the known spread of such trainers comes from."""
    labels = np.concatenate([loader.batch(step).counts_of("generative").group_sizes_S for step in range(25)])
    assert len(labels) > 500 and labels.min() >= 1
    high, low = np.percentile(1 / labels, [95, 5])
    assert 25 < high / low < 60


def packed_and_alone(
    loader: GritDataLoader, model: GritDecoder, kind: RowKind, num_records: int = NUM_COMPARED
) -> tuple[np.ndarray, np.ndarray]:
    """Mean losses of segments, or embeddings: from packed rows, and each in a row of its own, until so many different
    records have been seen."""
    packed, alone, step = [], [], 0
    seen: set[tuple[int, int, int]] = set()
    while len({record for record, *_ in seen}) < num_records:
        batch = loader.batch(step)
        for row, planned in zip(batch.rows_of(kind), loader.streams[kind].rows(step), strict=True):
            segments = planned.segments
            assert row.record_ids == [segment.name for segment in segments]
            together = outputs(model, row, [segment.length for segment in segments])
            for output, segment in zip(together, segments, strict=True):
                if (place := (segment.record, segment.start, segment.stop)) in seen:
                    continue
                seen.add(place)
                packed.append(output)
                length = -(-segment.length // 8) * 8
                rows = generative if kind is RowKind.GENERATIVE else embedding
                single = rows.make_row(PlannedRow(segments=[segment], slots=np.zeros(1, dtype=np.int64)), length, 0)
                alone.append(outputs(model, single, [segment.length])[0])
        step += 1
    return np.stack(packed), np.stack(alone)


@torch.no_grad()
def outputs(model: GritDecoder, row: PackedRow, lengths: list[int]) -> np.ndarray:
    """float64 [S, D]: embeddings, or for each segment its mean loss."""
    if row.embeds:
        return model(row, Output.EMBEDDINGS).double().numpy()
    losses = model(row, Output.TOKEN_LOSSES).double().numpy()
    mask = row.loss_mask_1T[0].numpy()
    starts = np.cumsum([0, *lengths[:-1]])
    used = sum(lengths)
    return (np.add.reduceat(losses[:used], starts) / np.add.reduceat(mask[:used], starts))[:, None]


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_packed_equals_alone(loader: GritDataLoader, model: GritDecoder, kind: RowKind) -> None:
    packed, alone = packed_and_alone(loader, model, kind)
    assert len(packed) >= NUM_COMPARED and packed.std() > 0.01
    np.testing.assert_allclose(packed, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_a_leak_between_records_would_be_seen(
    loader: GritDataLoader, model: GritDecoder, kind: RowKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rows' segments joined into one, packed records see each other."""
    of_row = attention.PackedSegments.of_row

    def joined(
        cu_seqlens: torch.Tensor, max_seqlen: int, mode: attention.AttentionMode, *_: object
    ) -> attention.PackedSegments:
        return of_row(cu_seqlens[[0, -1]], int(cu_seqlens[-1]), mode)

    monkeypatch.setattr(attention.PackedSegments, "of_row", staticmethod(joined))
    packed, alone = packed_and_alone(loader, model, kind)
    assert np.abs(packed - alone).max() > 100 * TOLERANCE
