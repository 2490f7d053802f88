"""How much each token of a text or conversation counts as a label of the next-token loss, by its role.

Shape suffix legend: T = tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_grit.config.schema.loss import LossConfig
from megatron_grit.data.indexed.roles import Role

PRESETS: dict[str, dict[Role, float]] = {
    "it": {Role.TEXT: 1, Role.ANSWER: 1},
    "im": {Role.TEXT: 1, Role.ANSWER: 1, Role.SYSTEM: 1, Role.USER: 1},
    "im_release": {Role.TEXT: 1, Role.ANSWER: 1, Role.SYSTEM: 1, Role.USER: 1, Role.TEMPLATE: 1},
    "lm": {Role.TEXT: 1, Role.ANSWER: 1, Role.SYSTEM: 1, Role.USER: 1, Role.TEMPLATE: 1},
}
"""Of each value of ``loss.labels``: weights, 0 where a role is not named."""
_NAMES = {
    Role.TEXT: "text",
    Role.SYSTEM: "system",
    Role.USER: "user",
    Role.ANSWER: "assistant",
    Role.TEMPLATE: "template",
}


@dataclass(frozen=True, kw_only=True)
class LabelWeights:
    """Weights of a run's labels. The first token of a segment, which nothing predicts, is no label."""

    by_role: tuple[float, ...]
    """Of the tokens of each role."""
    opening: float | None = None
    """Of what the template puts before the first turn. None: as the rest of the template."""
    answer_end: float | None = None
    """Of ``end_ids`` in assistant turns. None: as the rest of the turn."""
    template_end: float | None = None
    """Of ``end_ids`` in the template. None: as the rest of the template."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""

    @staticmethod
    def of(loss: LossConfig, end_ids: Sequence[int] = ()) -> LabelWeights:
        """The weights that a run asks for.

        Args:
            loss: its losses.
            end_ids: tokens that end an answer; needed where :func:`weighs_ends`.
        """
        given = loss.role_weights
        preset = PRESETS[loss.labels]
        by_role = []
        for role in Role:
            own = getattr(given, _NAMES[role]) if role in _NAMES else None
            by_role.append(float(preset.get(role, 0) if own is None else own))
        return LabelWeights(
            by_role=tuple(by_role),
            opening=0.0 if loss.labels == "im_release" and given.template is None else None,
            answer_end=given.assistant_eos,
            template_end=given.template_eos,
            end_ids=tuple(end_ids),
        )

    @property
    def needs_tokens(self) -> bool:
        """Whether roles alone do not tell the weights."""
        return self.answer_end is not None or self.template_end is not None

    def identity(self) -> list[object]:
        """What tells weights apart, for JSON; empty for those of a run that says nothing of them."""
        if self == ANSWERS:
            return []
        return [list(self.by_role), self.opening, self.answer_end, self.template_end, list(self.end_ids)]

    def spans(self, roles: Sequence[int], starts_record: bool) -> list[float]:
        """Weight of the tokens of each span of a segment, but for tokens that end a turn.

        Args:
            roles: of its spans.
            starts_record: whether it begins where its record does.
        """
        weights = [self.by_role[role] for role in roles]
        if self.opening is not None and starts_record:
            for place, role in enumerate(roles):
                if role != Role.TEMPLATE:
                    break
                weights[place] = self.opening
        return weights

    def total(self, roles: Sequence[int], lengths: Sequence[int], starts_record: bool) -> tuple[int, float]:
        """Labels of a segment, and the sum of their weights, where tokens are not needed.

        Args:
            roles: of its spans.
            lengths: of its spans.
            starts_record: whether it begins where its record does.
        """
        count, weight, first = 0, 0.0, 1
        for each, length in zip(self.spans(roles, starts_record), lengths, strict=True):
            labels = length - min(first, length)
            first -= length - labels
            if each:
                count += labels
                weight += labels * each
        return count, weight

    def of_tokens(
        self, roles: Sequence[int], lengths: Sequence[int], starts_record: bool, tokens_T: np.ndarray
    ) -> np.ndarray:
        """Weight of each token of a segment as a label: float32 [T], 0 for the first.

        Args:
            roles: of its spans.
            lengths: of its spans.
            starts_record: whether it begins where its record does.
            tokens_T: int [T].
        """
        weights_T = np.repeat(np.array(self.spans(roles, starts_record), dtype=np.float32), lengths)
        if self.needs_tokens:
            roles_T = np.repeat(np.array(roles), lengths)
            ends_T = np.isin(tokens_T, self.end_ids)
            for role, weight in ((Role.ANSWER, self.answer_end), (Role.TEMPLATE, self.template_end)):
                if weight is not None:
                    weights_T[ends_T & (roles_T == role)] = weight
        weights_T[:1] = 0
        return weights_T


def weighs_ends(loss: LossConfig) -> bool:
    """Whether a run weighs the tokens that end a turn apart from others."""
    return loss.role_weights.assistant_eos is not None or loss.role_weights.template_eos is not None


ANSWERS = LabelWeights.of(LossConfig())
"""Texts and assistant turns, each token alike."""
