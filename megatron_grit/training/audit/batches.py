"""The first batches of a run: what is trained, pooled and predicted is what the records' roles say.

Shape suffix legend: T = tokens of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from megatron_grit.data.indexed.label_weights import LabelWeights
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role, split_texts
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from megatron_grit.data.text.tokenizer import Tokenizer


class BatchAudit:
    """Reads roles from the indexed files again, past the code that makes rows.

    Args:
        tokenizer: of the run.
        weights: of the labels of each kind.
    """

    def __init__(self, tokenizer: Tokenizer, weights: Mapping[str, LabelWeights]) -> None:
        self._tokenizer, self._weights = tokenizer, weights
        self._sources: dict[str, IndexedRecords] = {}
        self._conversations: dict[str, list[bool]] = {}
        self._num_tokens: Counter[tuple[str, bool]] = Counter()  # by the row's kind, and whether it is embedded
        self._num_used: Counter[tuple[str, bool]] = Counter()

    def check(self, batches: Iterable[StepBatch]) -> str | None:
        """What is wrong with this rank's rows, in words; None where nothing is.

        Raises:
            GritError: as the loader.
        """
        try:
            problem = next(self._problems(batches), None)
        finally:
            for source in self._sources.values():
                source.close()
        return problem or self._whole_conversations()

    def summary(self) -> str:
        """Shares of tokens that are trained and pooled, for the log."""
        return ", ".join(
            f"{self._num_used[kind, embeds] / total:.1%} of {kind} tokens are {'pooled' if embeds else 'labels'}"
            for (kind, embeds), total in self._num_tokens.items()
        )

    def _problems(self, batches: Iterable[StepBatch]) -> Iterator[str]:
        for batch in batches:
            for row in batch.rows:
                for problem in self._row_problems(row):
                    yield f"data of step {batch.step + 1}: {problem}"

    def _row_problems(self, row: PackedRow) -> Iterator[str]:
        bounds = row.cu_seqlens.tolist()
        if not row.record_ids:
            yield "a row is all padding"
            return
        tokens_T, positions_T = row.tokens_1T[0].numpy(), row.positions_1T[0].numpy()
        num_real = bounds[len(row.record_ids)]
        if bounds[-1] != len(tokens_T) or int((~row.padding_mask_1T).sum()) != num_real:
            yield f"segments of {row.record_ids[0]} and what follows it end elsewhere than the row's padding mask says"
            return
        used_T = self._used(row)
        self._num_tokens[row.kind, row.embeds] += num_real
        self._num_used[row.kind, row.embeds] += int(used_T.sum())
        mask_T = row.pool_mask_T if row.loss_mask_1T is None else row.loss_mask_1T[0]
        if mask_T is not None and mask_T[num_real:].any():
            yield f"padding after {row.record_ids[-1]} is {'pooled' if row.embeds else 'supervised'}"
        for name, first, last in zip(row.record_ids, bounds[:-1], bounds[1:], strict=False):
            if not np.array_equal(positions_T[first:last], np.arange(last - first)):
                yield f"positions of record {name} do not count up from 0"
            if last - first > 1 and (tokens_T[first : first + 2] == self._tokenizer.bos_id).all():
                yield f"record {name} begins with two BOS tokens; one of them is the template's or the tokenizer's"
            if row.embeds:
                yield from self._text_problems(name, used_T[first:last])
            else:
                yield from self._sequence_problems(row, name, first, last, used_T)

    @staticmethod
    def _used(row: PackedRow) -> np.ndarray:
        """Tokens that are pooled, or that are the label of the token before them: bool [T]."""
        if row.embeds:
            assert row.pool_mask_T is not None
            return row.pool_mask_T.numpy() > 0
        assert row.loss_mask_1T is not None
        return np.concatenate([[False], row.loss_mask_1T[0, :-1].numpy() > 0])

    def _sequence_problems(
        self, row: PackedRow, name: str, first: int, last: int, label_T: np.ndarray
    ) -> Iterator[str]:
        assert row.labels_1T is not None and row.loss_mask_1T is not None
        tokens_T, labels_T = row.tokens_1T[0].numpy(), row.labels_1T[0].numpy()
        if row.loss_mask_1T[0, last - 1] > 0:
            yield f"the last token of record {name} has a label, which is of another segment"
        labelled = np.flatnonzero(label_T[first + 1 : last]) + first
        if not len(labelled):
            yield f"record {name} has no supervised token"
            return
        wrong = labelled[labels_T[labelled] != tokens_T[labelled + 1]]
        if len(wrong):
            yield f"token {wrong[0] - first + 1} of record {name} has not the next token as its label"
        roles, lengths = self._spans(name)
        weights = self._weights[row.kind]
        if roles != [Role.TEXT] and not weights.by_role[Role.USER]:
            self._conversations.setdefault(name.rpartition("#")[0], []).append(len(labelled) == last - first - 1)
        if sum(lengths) != last - first:
            return  # a piece of a record that was cut
        by_role = weights.of_tokens(roles, lengths, True, tokens_T[first:last]) > 0
        extra = np.flatnonzero(label_T[first:last] & ~by_role)
        missing = np.flatnonzero(~label_T[first + 1 : last] & by_role[1:])
        if len(extra):
            role = Role(int(np.repeat(roles, lengths)[extra[0]]))
            yield f"token {extra[0] + 1} of record {name} is supervised, and its role is {role.name}"
        elif len(missing):
            role = Role(int(np.repeat(roles, lengths)[missing[0] + 1]))
            yield f"token {missing[0] + 2} of record {name} is not supervised, and its role is {role.name}"

    def _text_problems(self, name: str, pooled: np.ndarray) -> Iterator[str]:
        count = int(pooled.sum())
        if not count:
            yield f"a text of record {name} has no token to pool: it is empty, or its instruction fills the row"
            return
        if not pooled[-count:].all():
            yield f"what is pooled of a text of record {name} is not its end"
        roles, lengths = self._spans(name)
        leads = {
            sum(lengths[first : last - 1]): lengths[last - 1] for first, last in split_texts(roles)
        }  # a text may have been cut at its end, so its lead is what it is known by
        lead = len(pooled) - count
        if lead not in leads:
            what = "is pooled in part" if lead < max(leads) else "is not all pooled"
            whose = "an instruction" if lead < max(leads) else "a text"
            yield f"{whose} of record {name} {what}"

    def _whole_conversations(self) -> str | None:
        for source, whole in self._conversations.items():
            if all(whole):
                return (
                    f"every token of all {len(whole)} conversations of {source} in the first steps is supervised; "
                    "prompts are trained as if they were answers"
                )
        return None

    def _spans(self, name: str) -> tuple[list[int], list[int]]:
        prefix, _, record = name.rpartition("#")
        if prefix not in self._sources:
            self._sources[prefix] = IndexedRecords(prefix)
        return self._sources[prefix].spans(int(record))
