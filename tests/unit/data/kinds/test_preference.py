"""Rows of pairs and rated answers: pairs stay whole, long ones are cut or left out, answers change places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_grit.config.kinds import option
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.indexed.writer import IndexedWriter
from megatron_grit.data.kinds.preference import PreferenceStream, fit
from megatron_grit.data.order.sources import OpenFiles
from megatron_grit.data.rows.segments import Segment
from megatron_grit.errors import ConfigError, DataError

VOCAB = 1000


class _Tokenizer:
    fingerprint, path, vocab_size, pad_id = "of the test", Path("tokenizer"), VOCAB, 0


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Ten pairs with prompts of 3 tokens, answers of 4 + n and 8; each token tells its record and place."""
    with IndexedWriter(tmp_path / "pairs", RowKind.PREFERENCE, VOCAB) as writer:
        for number in range(10):
            lead = (Role.USER, [10 * number, 10 * number + 1, 10 * number + 2])
            chosen, rejected = [100 + number] * (4 + number), [200 + number] * 8
            writer.add([lead, (Role.CHOSEN, chosen), lead, (Role.REJECTED, rejected)])
        writer.finalize(tokenizer_fingerprint="of the test", template="none", limits={})
    return str(tmp_path / "pairs")


def stream(prefix: str, tmp_path: Path, **changes: object) -> PreferenceStream:
    config = RunConfig(output_dir=str(tmp_path / "run"))
    config.data.tokens_per_row = 40
    for key, value in {"preference.data": [prefix], "preference.batch_size": 10, **changes}.items():
        section, name = key.split(".")
        setattr(option(config, section), name, value)
    return PreferenceStream(config, _Tokenizer(), OpenFiles())  # type: ignore[arg-type]


def of_pairs(segments: list[Segment]) -> bool:
    """Whether they are the two conversations of one record after another's."""
    pairs = list(zip(segments[::2], segments[1::2], strict=True))
    return all(one.record == two.record and one.stop <= two.start and one.start == 0 for one, two in pairs)


@pytest.mark.parametrize("packing", ["step", "window"])
def test_pairs_stay_whole(packing: str, prefix: str, tmp_path: Path) -> None:
    rows_of = {"data.packing": packing} | ({"preference.rows": 4} if packing == "window" else {})
    made = stream(prefix, tmp_path, **rows_of)
    rows = made.rows(0)
    assert all(of_pairs(row.segments) and row.length <= 40 for row in rows)
    assert sorted(np.concatenate([row.slots for row in rows])) == list(range(sum(len(row.segments) for row in rows)))
    assert [segment.record for row in rows for segment in row.segments[::2]]
    counts = made.counts(rows, 1)
    assert counts.num_chosen == counts.num_rejected == counts.num_records == counts.num_segments // 2
    for row in rows:
        packed = made.make_row(row, 40, 0)
        assert packed.loss_mask_1T is not None and packed.labels_1T is not None and packed.is_chosen_S is not None
        labels = packed.labels_1T[packed.loss_mask_1T > 0]
        assert len(labels) == sum(segment.num_labels for segment in row.segments) and (labels >= 100).all()
        assert packed.is_chosen_S.tolist() == [True, False] * (len(row.segments) // 2)


def test_long_pairs(prefix: str, tmp_path: Path) -> None:
    """Prompts of 3, answers of up to 13 and 8: 27 tokens."""
    with pytest.raises(DataError, match="more than data.tokens_per_row 20"):
        stream(prefix, tmp_path, **{"data.tokens_per_row": 20})
    kept = stream(prefix, tmp_path, **{"data.tokens_per_row": 20, "preference.over_long": "drop"})
    assert {segment.record for segment in kept.segments(0)} == {0, 1, 2}
    cut = stream(prefix, tmp_path, **{"data.tokens_per_row": 20, "preference.over_long": "truncate"})
    sizes = {segment.record: [] for segment in cut.segments(0)}  # type: ignore[var-annotated]
    for segment in cut.segments(0):
        sizes[segment.record].append((segment.length, segment.num_labels))
    assert len(sizes) == 10 and sizes[9] == [(10, 7), (10, 7)] and sizes[0] == [(7, 4), (11, 8)]
    assert sizes[3] == [(10, 7), (10, 7)]
    none = stream(prefix, tmp_path, **{"data.tokens_per_row": 6, "preference.over_long": "truncate"})
    with pytest.raises(DataError, match="all of its 10 records are too long"):
        none.segments(0)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_what_is_cut_between_its_answers_keeps_its_side(loss: str, tmp_path: Path) -> None:
    """Rows of 20: each side of the first record ends within its second question, of 7 tokens, behind a rated answer."""
    with IndexedWriter(tmp_path / "turns", RowKind.PREFERENCE, VOCAB) as writer:
        for rated in (Role.CHOSEN, Role.REJECTED), (Role.CHOSEN,), (Role.REJECTED,):
            # Of a pair each answer is rated from where the two differ, of a single conversation the last one.
            first = Role.ANSWER if len(rated) == 1 else None
            spans = [
                [(Role.USER, [1, 2]), (first or side, [3] * 4), (Role.USER, [4] * 7), (side, [5] * 9)] for side in rated
            ]
            if loss == "kto" or len(rated) == 2:
                writer.add([span for side in spans for span in side])
        writer.finalize(tokenizer_fingerprint="of the test", template="none", limits={})
    changes = {"data.tokens_per_row": 20, "preference.over_long": "truncate", "preference.loss": loss}
    made = stream(str(tmp_path / "turns"), tmp_path, **changes, **{"preference.batch_size": 3 if loss == "kto" else 1})
    rows = made.rows(0)
    found = {}
    for row in rows:
        packed = made.make_row(row, 20, 0)
        assert packed.is_chosen_S is not None
        for segment, is_chosen in zip(row.segments, packed.is_chosen_S.tolist(), strict=True):
            found[segment.record, segment.start > 0] = (segment.length, segment.num_labels, is_chosen)
    expected = {(0, False): (10, 4, True), (0, True): (10, 4, False)}
    if loss == "kto":
        expected |= {(1, False): (20, 7, True), (2, False): (20, 7, False)}
    assert found == expected
    counts = made.counts(rows, 1)
    num_single = 2 if loss == "kto" else 0
    assert (counts.num_records, counts.num_chosen, counts.num_rejected) == (
        1 + num_single,
        1 + num_single // 2,
        1 + num_single // 2,
    )
    assert counts.num_chosen_labels == 4 + (7 if loss == "kto" else 0)


def test_a_rated_answer_behind_the_end_of_a_row_leaves_its_record_out(tmp_path: Path) -> None:
    """The earlier answer, which fits, is of the prompt."""
    with IndexedWriter(tmp_path / "turns", RowKind.PREFERENCE, VOCAB) as writer:
        for size in (30, 3):
            writer.add([(Role.USER, [1]), (Role.ANSWER, [2] * 5), (Role.USER, [3] * size), (Role.CHOSEN, [4] * 5)])
        writer.finalize(tokenizer_fingerprint="of the test", template="none", limits={})
    changes = {"data.tokens_per_row": 20, "preference.over_long": "truncate", "preference.loss": "kto"}
    made = stream(str(tmp_path / "turns"), tmp_path, **changes, **{"preference.batch_size": 2})
    assert [(segment.record, segment.num_labels) for segment in made.segments(0)] == [(1, 5)]


def test_sizes_that_fit() -> None:
    assert fit([5, 6], 10, 20) == [5, 6]
    assert fit([5, 30], 100, 20) == [5, 15]
    assert fit([30, 5], 100, 20) == [15, 5]
    assert fit([30, 40], 100, 20) == [10, 10]
    assert fit([30, 40], 8, 20) == [8, 8]
    assert fit([30], 25, 20) == [20]


def test_answers_change_places_for_kto(prefix: str, tmp_path: Path) -> None:
    made = stream(prefix, tmp_path, **{"preference.loss": "kto"})
    (row,) = [row for row in made.baseline_rows(0) if any(segment.record == 2 for segment in row.segments)][:1]
    packed = made.make_row(row, 40, 0)
    assert sum(len(each.segments) for each in made.baseline_rows(0)) == 20
    ends = packed.cu_seqlens.tolist()
    for place, segment in enumerate(row.segments):
        tokens = packed.tokens_1T[0, ends[place] : ends[place + 1]].tolist()
        other, side = (segment.record + 5) % 10, 100 if segment.start == 0 else 200
        size = 4 + other if side == 100 else 8
        assert tokens == [10 * segment.record + number for number in range(3)] + [side + other] * size
        assert packed.loss_mask_1T is not None
        assert packed.loss_mask_1T[0, ends[place] : ends[place + 1]].tolist() == [0.0] * 2 + [1.0] * size + [0.0]
    places = {tuple(each) for each in packed.records_S3[:, 1:].tolist()}  # type: ignore[index]
    assert places == {(segment.record, 2 + (segment.start > 0)) for segment in row.segments}


def test_single_answers_need_kto(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "one", RowKind.PREFERENCE, VOCAB) as writer:
        writer.add([(Role.USER, [1]), (Role.CHOSEN, [2])])
        writer.finalize(tokenizer_fingerprint="of the test", template="none", limits={})
    with pytest.raises(DataError, match="preference.loss dpo compares two; set it to kto"):
        stream(str(tmp_path / "one"), tmp_path).segments(0)
    with pytest.raises(DataError, match="holds one record"):
        stream(str(tmp_path / "one"), tmp_path, **{"preference.loss": "kto"}).baseline_rows(0)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "texts", RowKind.GENERATIVE, VOCAB) as writer:
        writer.add([(Role.TEXT, [1, 2])])
        writer.finalize(tokenizer_fingerprint="of the test", template="none", limits={})
    with pytest.raises(DataError, match="holds generative records and stands under preference.data"):
        stream(str(tmp_path / "texts"), tmp_path)
    with pytest.raises(ConfigError, match="needs preference.rows"):
        stream(str(tmp_path / "texts"), tmp_path, **{"data.packing": "window"})
