"""Held-out texts as rows: every record once, the same segments for any number of ranks."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_grit.config.schema import DataConfig, RunConfig, TrainingConfig
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role, supervised
from megatron_grit.data.rows import held_out
from megatron_grit.data.rows.batch import StepBatch
from megatron_grit.data.rows.held_out import HeldOutLoader
from megatron_grit.data.text.tokenizer import Tokenizer

LIMIT = 40


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are several, the last one smaller than the others."""
    monkeypatch.setattr(held_out, "ROWS_OF_A_STEP", 5)


def steps_of(
    prefixes: dict[str, str], tokenizer: Tokenizer, ranks: int = 1, rows_multiple: int = 1, **data: object
) -> list[list[StepBatch]]:
    """The steps of each rank."""
    config = RunConfig(
        data=DataConfig(
            generative=[prefixes["emb_a"]],
            valid=[prefixes["gen"]],
            tokens_per_row=LIMIT,
            over_long="drop",
            packing="window",
            **data,  # type: ignore[arg-type]
        ),
        training=TrainingConfig(objective="generative", generative_rows=7),
    )
    loaders = [HeldOutLoader(config, tokenizer, rank, ranks, rows_multiple=rows_multiple) for rank in range(ranks)]
    return [list(loader.iterate(0, loader.stream.num_steps)) for loader in loaders]


def labels_of(steps: list[StepBatch]) -> Counter[tuple[str, int]]:
    """How often each token is predicted, by its record."""
    found: Counter[tuple[str, int]] = Counter()
    for row in (row for step in steps for row in step.rows):
        bounds = row.cu_seqlens.tolist()
        assert row.loss_mask_1T is not None and row.labels_1T is not None
        for record, start, end in zip(row.record_ids, bounds, bounds[1:], strict=False):
            mask, labels = row.loss_mask_1T[0, start:end] > 0, row.labels_1T[0, start:end]
            found.update((record, token) for token in labels[mask].tolist())
    return found


@pytest.mark.parametrize(("ranks", "rows_multiple"), [(1, 1), (3, 1), (2, 2)])
def test_each_label_comes_once(
    indexed_prefixes: dict[str, str], tokenizer: Tokenizer, ranks: int, rows_multiple: int
) -> None:
    """Also where records are longer than a row, whatever the run does with its own."""
    by_rank = steps_of(indexed_prefixes, tokenizer, ranks, rows_multiple)
    source, expected, longest = IndexedRecords(indexed_prefixes["gen"]), Counter[tuple[str, int]](), 0
    for record in range(len(source)):
        roles, lengths = source.spans(record)
        of_tokens = [role for role, length in zip(roles, lengths, strict=True) for _ in range(length)]
        tokens = source.tokens(record, 0, len(of_tokens)).tolist()
        name = f"{indexed_prefixes['gen']}#{record}"
        expected.update(
            (name, token)
            for place, (token, role) in enumerate(zip(tokens, of_tokens, strict=True))
            if place and supervised(Role(role))
        )
        longest = max(longest, sum(lengths))
    assert longest > LIMIT and sum(map(labels_of, by_rank), Counter[tuple[str, int]]()) == expected
    for steps in zip(*by_rank, strict=True):
        assert len({len(step.rows) for step in steps}) == 1 and not len(steps[0].rows) % rows_multiple
        assert all(step.parts["generative"].counts == steps[0].parts["generative"].counts for step in steps)
    assert len(by_rank[0]) > 2
    assert sum(step.parts["generative"].counts.num_labels for step in by_rank[0]) == expected.total()
