"""The start-up audit's look at the first batches: labels, pooling and positions against the roles on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_grit.data.builders.grit_builder import build_grit
from megatron_grit.data.indexed.label_weights import LabelWeights
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.kinds import embedding, generative
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.training.audit.batches import BatchAudit
from tests.corpus import sentences, tiny_run, write_jsonl


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    tiny_run(directory)
    pairs = sentences(96)
    write_jsonl(directory / "bare.jsonl", [{"prompt": "", "completion": answer} for _, answer in pairs])
    write_jsonl(directory / "plain.jsonl", [{"text": answer} for _, answer in pairs])
    for name in ("bare", "plain"):
        build_grit([directory / f"{name}.jsonl"], directory / name, directory / "tokenizer.model")
    return directory


def check_data(
    corpus: Path,
    *,
    generative: str = "gen",
    change: Callable[[StepBatch], None] | None = None,
    labels: Literal["it", "im", "im_release", "lm"] = "it",
) -> Any:
    config = tiny_run(corpus)
    config.loss.labels = labels
    config.data.generative = [str(corpus / generative)]
    tokenizer = load_tokenizer(config.data.tokenizer)  # type: ignore[arg-type]
    loader = GritDataLoader(config, tokenizer)
    batches = [loader.batch(step) for step in range(2)]
    for batch in batches if change is not None else []:
        assert change is not None
        change(batch)
    audit = BatchAudit(tokenizer, {"generative": LabelWeights.of(config.loss)})
    return audit.check(batches), audit.summary()


def test_sound_data_passes(corpus: Path) -> None:
    problem, summary = check_data(corpus)
    assert problem is None
    shares = [float(part.partition("%")[0]) for part in summary.split(", ")]
    assert len(shares) == 2 and all(10 < share < 90 for share in shares), summary
    problem, _ = check_data(corpus, generative="plain")  # texts are supervised whole
    assert problem is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, r"a text of record .*emb#\d+ has no token to pool"),
        (1.0, r"padding after .*emb#\d+ is pooled|an instruction of record .*emb#\d+ is pooled in part"),
    ],
)
def test_a_lost_pooling_mask_is_found(corpus: Path, value: float, message: str) -> None:
    with mock.patch.object(embedding, "_POOLED", np.full(len(Role) + 1, value, dtype=np.float32)):
        problem, _ = check_data(corpus)
    assert problem is not None
    assert re.search(message, problem), problem


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, r"data of step 1: record .*gen#\d+ has no supervised token"),
        (1.0, r"token 2 of record .*gen#\d+ is supervised, and its role is (TEMPLATE|USER)"),
    ],
)
def test_a_lost_loss_mask_is_found(corpus: Path, value: float, message: str) -> None:
    """Of the rows alone: what the run asks for is as it was."""
    original = generative.make_row

    def make_row(planned: Any, row_length: int, pad_id: int, weights: LabelWeights, kind: str) -> PackedRow:
        return original(planned, row_length, pad_id, replace(weights, by_role=(value,) * len(Role)), kind)

    with mock.patch.object(generative, "make_row", make_row):
        problem, _ = check_data(corpus)
    assert problem is not None
    assert re.search(message, problem), problem


def test_prompts_that_are_to_be_trained_are_no_problem(corpus: Path) -> None:
    summaries = {}
    for labels in ("it", "im", "im_release", "lm"):
        problem, summaries[labels] = check_data(corpus, labels=labels)  # type: ignore[arg-type]
        assert problem is None, problem
    assert len(set(summaries.values())) == 4


def first_generative(change: Callable[[PackedRow], None]) -> Callable[[StepBatch], None]:
    return lambda batch: change(batch.rows_of("generative")[0])


def first_embedding(change: Callable[[PackedRow], None]) -> Callable[[StepBatch], None]:
    return lambda batch: change(batch.rows_of("embedding")[0])


def restart_nowhere(row: PackedRow) -> None:
    row.positions_1T = torch.arange(row.tokens_1T.shape[1])[None]


def label_last_tokens(row: PackedRow) -> None:
    assert row.loss_mask_1T is not None
    row.loss_mask_1T[0, row.cu_seqlens[1 : len(row.record_ids) + 1].long() - 1] = 1


def label_padding(row: PackedRow) -> None:
    assert row.loss_mask_1T is not None and bool(row.padding_mask_1T[0, -2])
    row.loss_mask_1T[0, -2] = 1


def shift_labels(row: PackedRow) -> None:
    assert row.labels_1T is not None
    row.labels_1T = row.labels_1T.roll(-1, 1)


def forget_last_label(row: PackedRow) -> None:
    assert row.loss_mask_1T is not None
    row.loss_mask_1T[0, int(row.loss_mask_1T[0].nonzero()[0])] = 0


def double_bos(row: PackedRow) -> None:
    row.tokens_1T[0, 1] = row.tokens_1T[0, 0]


def empty(row: PackedRow) -> None:
    row.record_ids = []


def pool_one_more(row: PackedRow) -> None:
    assert row.pool_mask_T is not None
    row.pool_mask_T[int(row.pool_mask_T.nonzero()[0]) - 1] = 1


def pool_a_gap(row: PackedRow) -> None:
    assert row.pool_mask_T is not None
    row.pool_mask_T[int(row.pool_mask_T.nonzero()[1])] = 0


def pool_padding(row: PackedRow) -> None:
    assert row.pool_mask_T is not None
    row.pool_mask_T[-1] = 1


def end_early(row: PackedRow) -> None:
    row.padding_mask_1T[0, row.num_tokens - 1] = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first_generative(shift_labels), "has not the next token as its label"),
        (first_generative(label_last_tokens), "has a label, which is of another segment"),
        (first_generative(label_padding), "padding after .* is supervised"),
        (first_generative(forget_last_label), "is not supervised, and its role is ANSWER"),
        (first_generative(restart_nowhere), "do not count up from 0"),
        (first_generative(double_bos), "begins with two BOS tokens"),
        (first_embedding(empty), "a row is all padding"),
        (first_embedding(pool_one_more), "an instruction of record .* is pooled in part"),
        (first_embedding(pool_a_gap), "is not its end"),
        (first_embedding(pool_padding), "padding after .* is pooled"),
        (first_embedding(end_early), "end elsewhere than the row's padding mask says"),
    ],
)
def test_a_wrong_row_is_found(corpus: Path, change: Callable[[StepBatch], None], message: str) -> None:
    problem, _ = check_data(corpus, change=change)
    assert problem is not None
    assert re.search(message, problem), problem


def test_conversations_that_are_supervised_whole_are_found(corpus: Path) -> None:
    problem, _ = check_data(corpus, generative="bare")
    assert problem is not None and "every token of all 16 conversations of" in problem
