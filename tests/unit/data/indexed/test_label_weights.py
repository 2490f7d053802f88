"""Weights of labels by role: presets, fractions, ends of turns, and the counts that a loss is divided by."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.loss import LossConfig, RoleWeightsConfig
from megatron_grit.data.chat import run_chat
from megatron_grit.data.indexed.label_weights import ANSWERS, LabelWeights
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.rows.held_out import HeldOutLoader
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.errors import DataError
from tests.unit.data.indexed_files import TOKENIZER, ids, run_config, text, write

T, S, U, A = Role.TEMPLATE, Role.SYSTEM, Role.USER, Role.ANSWER
EOS = 2
ROLES, LENGTHS = [T, S, T, U, T, A, T, U, T, A], [2, 3, 2, 2, 1, 3, 1, 1, 2, 2]
TOKENS = np.array([1, 9, 5, 5, 5, EOS, 9, 6, 6, 9, 7, 7, EOS, EOS, 6, 9, 9, 8, EOS])
"""The third token from the end of the first turns is an EOS of the template's; each answer ends in one."""


def loss(labels: str = "it", **weights: float) -> LossConfig:
    return LossConfig(labels=labels, role_weights=RoleWeightsConfig(**weights))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (loss(), "00 000 00 00 0 111 0 0 00 11"),
        (loss("im"), "00 111 00 11 0 111 0 1 00 11"),
        (loss("im_release"), "00 111 11 11 1 111 1 1 11 11"),
        (loss("lm"), "01 111 11 11 1 111 1 1 11 11"),
        (loss(assistant_eos=0), "00 000 00 00 0 110 0 0 00 10"),
        (loss("im", template_eos=1), "00 111 10 11 0 111 1 1 00 11"),
        (loss("im", assistant=0), "00 111 00 11 0 000 0 1 00 00"),
        (loss("im_release", template=1), "01 111 11 11 1 111 1 1 11 11"),
    ],
    ids=["it", "im", "im_release", "lm", "without EOS", "EOS after turns", "prompts", "all of the template"],
)
def test_which_tokens_are_labels(options: LossConfig, expected: str) -> None:
    weights = LabelWeights.of(options, [EOS])
    weights_T = weights.of_tokens(ROLES, LENGTHS, True, TOKENS)
    assert "".join(str(int(weight)) for weight in weights_T) == expected.replace(" ", "")
    if not weights.needs_tokens:
        assert weights.total(ROLES, LENGTHS, True) == (np.count_nonzero(weights_T), weights_T.sum())


def test_fractions_by_role() -> None:
    """Prompt loss weight: prompts count a tenth of answers."""
    weights = LabelWeights.of(loss(user=0.1, system=0.5))
    assert weights.total(ROLES, LENGTHS, True) == (5 + 3 + 3, pytest.approx(5 + 0.3 + 1.5))
    assert weights.of_tokens(ROLES, LENGTHS, True, TOKENS)[[0, 2, 7, 10]].tolist() == pytest.approx([0, 0.5, 0.1, 1])


def test_a_piece_that_begins_later_has_no_opening() -> None:
    """im_release leaves out what stands before the first turn of the record, not of the piece."""
    weights = LabelWeights.of(loss("im_release"))
    assert weights.total([T, U, T, A], [3, 2, 2, 2], starts_record=True) == (6, 6.0)
    assert weights.total([T, U, T, A], [3, 2, 2, 2], starts_record=False) == (8, 8.0)


@given(
    spans=st.lists(st.tuples(st.sampled_from([T, S, U, A, Role.TEXT]), st.integers(0, 5)), min_size=1),
    labels=st.sampled_from(["it", "im", "im_release", "lm"]),
    user=st.sampled_from([None, 0.0, 0.25, 2.0]),
    starts=st.booleans(),
)
def test_totals_are_those_of_the_tokens(
    spans: list[tuple[Role, int]], labels: str, user: float | None, starts: bool
) -> None:
    roles, lengths = [role for role, _ in spans], [length for _, length in spans]
    weights = LabelWeights.of(LossConfig(labels=labels, role_weights=RoleWeightsConfig(user=user)))  # type: ignore[arg-type]
    weights_T = weights.of_tokens(roles, lengths, starts, np.zeros(sum(lengths), dtype=np.int64))
    assert weights.total(roles, lengths, starts) == (np.count_nonzero(weights_T), weights_T.sum())


def test_the_default_says_nothing_of_itself() -> None:
    """Index caches of runs without weights stay those of before."""
    assert LabelWeights.of(LossConfig()) == ANSWERS and ANSWERS.identity() == []
    others = [loss("im"), loss("im_release"), loss("lm"), loss(user=0.5), loss(assistant_eos=0)]
    assert len({repr(LabelWeights.of(each).identity()) for each in [*others, loss()]}) == 6


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Conversations of one to three turns, and texts; some are longer than a row."""
    records = []
    for number in range(30):
        sizes = (2, 3 + number % 4, 1, 2 + number % 7) * (1 + number % 4)
        places = range(len(sizes))
        records.append([((T, U, T, A)[k % 4], ids(9 * number + k, sizes[k])) for k in places])
    records += [text(100 + number, 9 + 40 * (number % 3)) for number in range(9)]
    return write(tmp_path_factory.mktemp("weights") / "chats", records, RowKind.GENERATIVE)


def run(prefix: str, folder: Path, packing: str, **options: Any) -> RunConfig:
    training = {"generative_rows": 4 if packing == "window" else None, "generative_batch_size": 17}
    config = run_config(
        folder, objective="generative", training=training, packing=packing, generative=[prefix], packing_window=16
    )
    config.data.over_long, config.data.num_rows_multiple = "split", 4
    config.loss = LossConfig(**options)
    return config


@pytest.mark.parametrize("packing", ["step", "window"])
@pytest.mark.parametrize(
    "weights",
    [{}, {"labels": "im"}, {"labels": "lm", "role_weights": RoleWeightsConfig(user=0.25, assistant_eos=3)}],
    ids=["it", "im", "fractions"],
)
def test_counts_of_a_step_are_those_of_its_rows(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, weights: dict[str, Any]
) -> None:
    monkeypatch.setattr(run_chat, "run_chat", lambda *_: SimpleNamespace(end_ids=tuple(range(0, 5000, 3))))
    loader = GritDataLoader(run(prefix, tmp_path, packing, microbatch_sequences=3, **weights), TOKENIZER)
    for step in range(3):
        batch = loader.batch(step)
        rows, counts = batch.rows_of("generative"), batch.counts_of("generative")
        of_slot: dict[int, float] = {}
        for row in rows:
            assert row.loss_mask_1T is not None and row.slots_S is not None
            parts = row.loss_mask_1T[0].split(row.cu_seqlens.diff().tolist())
            of_slot |= {slot: float(part.sum()) for slot, part in zip(row.slots_S.tolist(), parts, strict=False)}
            assert not row.loss_mask_1T[0, row.cu_seqlens[1:] - 1].any()
        in_order = [of_slot[slot] for slot in range(counts.num_sequences)]
        groups = [sum(in_order[begin : begin + 3]) for begin in range(0, len(in_order), 3)]
        assert counts.group_sizes_S.tolist() == pytest.approx([groups[slot // 3] for slot in range(len(in_order))])
        assert counts.num_groups == len(groups)
        assert counts.num_loss_tokens == pytest.approx(sum(in_order))
        masks = [row.loss_mask_1T for row in rows if row.loss_mask_1T is not None]
        assert counts.num_labels == sum(int(mask.count_nonzero()) for mask in masks)
        if weights.get("labels") == "lm":
            assert {0.25, 1.0, 3.0} == {float(value) for mask in masks for value in mask.unique()} - {0.0}


def test_held_out_labels_are_those_of_answers(prefix: str, tmp_path: Path) -> None:
    """Runs with other weights are compared on the same labels."""
    counted = []
    for labels in ("it", "im"):
        config = run(prefix, tmp_path, "step", labels=labels)
        config.data.valid = [prefix]
        loader = HeldOutLoader(config, TOKENIZER)
        steps = range(loader.stream.num_steps)
        counted.append(sum(loader.batch(step).counts_of("generative").num_labels for step in steps))
    assert counted[0] == counted[1] > 0


def test_a_record_without_a_label_is_named(prefix: str, tmp_path: Path) -> None:
    config = run(prefix, tmp_path, "step", role_weights=RoleWeightsConfig(text=0, assistant=0))
    with pytest.raises(DataError, match=r"chats#\d+ has no token to predict; loss.labels or loss.role_weights leave"):
        GritDataLoader(config, TOKENIZER).batch(0)
