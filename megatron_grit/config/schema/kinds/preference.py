"""Answers that are preferred to others, or rated: a loss of their log-probabilities under the model and a reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_grit.config.blend import expand_item
from megatron_grit.config.checks.packing import packing_problems
from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.knob import knob
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.workload import LossCost, RowWorkload, TextLengths, predicted_rows

DEFAULT_BETA = {"dpo": 0.1, "dpo_norm": 5.0, "ipo": 0.1, "kto": 0.1, "simpo": 2.0, "orpo": 0.1}
"""Of each loss: DPO's, IPO's, KTO's and ORPO's published ones; 5 for length-normalised DPO (Tulu 3, arXiv 2411.15124);
2 for SimPO (arXiv 2405.14734)."""
WITHOUT_REFERENCE = ("simpo", "orpo")
_ONLY_IN: dict[str, tuple[str, ...]] = {
    "label_smoothing": ("dpo", "dpo_norm", "simpo"),
    "gamma_beta_ratio": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Options that only some losses look at."""


@dataclass(kw_only=True)
class PreferenceConfig:
    """Training on preferences (docs/preferences.md): pairs of answers, or rated ones for kto."""

    data: list[str] = knob([], path=expand_item)
    """Indexed files of megatron-grit build-preference, in the notation of data.generative."""
    loss: Literal["dpo", "dpo_norm", "ipo", "kto", "simpo", "orpo"] = "dpo"
    """dpo (arXiv 2305.18290). dpo_norm: DPO on log-probabilities a token. ipo (arXiv 2310.12036), on those a token too.
    kto (arXiv 2402.01306): of single answers, desirable or not; a pair is one of each. simpo (arXiv 2405.14734) and
    orpo (arXiv 2403.07691) need no reference."""
    beta: float | None = knob(None, above=0)
    """How much a difference of log-probabilities weighs; in ipo the strength of the regularisation, in orpo the weight
    of the odds ratio. null: 0.1, of dpo_norm 5, of simpo 2."""
    label_smoothing: float = knob(0.0, at_least=0, below=0.5)
    """Share of the pairs that are taken to be the wrong way round (cDPO), in dpo, dpo_norm and simpo."""
    reference_free: bool = False
    """Leave the reference out of dpo, dpo_norm and ipo: as if it gave all answers one probability."""
    gamma_beta_ratio: float = knob(0.25, at_least=0)
    """In simpo the margin between the mean log-probabilities of two answers that is aimed at, gamma / beta."""
    sft_weight: float | None = knob(None, at_least=0)
    """Weight of the next-token loss of the preferred answers beside it. null: 1 in orpo, else 0."""
    desirable_weight: float = knob(1.0, at_least=0)
    """In kto, of desirable answers."""
    undesirable_weight: float = knob(1.0, at_least=0)
    """In kto, of undesirable answers."""
    reference: Literal["cache", "adapters_off"] = "cache"
    """Where the reference's log-probabilities come from. cache: the model as the run starts computes them once, before
    the first step, and they are kept on disk. adapters_off: of a run with adapters, the base in every step."""
    cache_dir: str | None = knob(None, path=True)
    """Folder of the cache, which runs with the same model and data can share. null: beside other caches of the data."""
    weight: float = knob(1.0, at_least=0)
    """Weight of the loss in the loss of a step."""
    batch_size: int = knob(64, at_least=1)
    """Records of a global batch: pairs, or rated answers."""
    rows: int | None = knob(None, at_least=1)
    """With data.packing window, rows of a global batch that are filled from the stream of records, in place of
    batch_size."""
    over_long: Literal["stop", "drop", "truncate"] = "stop"
    """Records whose conversations do not fit one row of data.tokens_per_row together, or of which one is above
    max_position_embeddings: end the run, leave them out, or cut off the ends of their answers."""


SECTION = PreferenceConfig
DATA, WEIGHT, BATCH = "preference.data", "preference.weight", "preference.batch_size"
MADE_BY = "megatron-grit build-preference"
LOSS = "preference"
METRICS = (
    "loss_preference",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
)
EMBEDS = False


def beta_of(config: PreferenceConfig) -> float:
    """The beta of a run, that of its loss by default."""
    return DEFAULT_BETA[config.loss] if config.beta is None else config.beta


def needs_reference(config: PreferenceConfig) -> bool:
    """Whether a run compares its model with a reference."""
    return config.loss not in WITHOUT_REFERENCE and not config.reference_free


def problems(config: RunConfig, multiple: int) -> Iterator[Problem]:
    """What contradicts itself in the options of a run that trains it; arguments as for other kinds."""
    own: PreferenceConfig = config.preference  # type: ignore[attr-defined]
    for name, losses in _ONLY_IN.items():
        if own.loss not in losses and getattr(own, name) != getattr(PreferenceConfig, name):
            yield Problem(f"preference.{name}", f"preference.{name} has no effect on {own.loss}")
    if own.reference_free and own.loss not in ("dpo", "dpo_norm", "ipo"):
        why = "measures from its reference" if own.loss == "kto" else "has no reference"
        yield Problem("preference.reference_free", f"preference.reference_free: {own.loss} {why}; set it to false")
    if own.reference == "adapters_off" and not needs_reference(own):
        why = "preference.reference_free leaves it out" if own.reference_free else f"{own.loss} has no reference"
        yield Problem("preference.reference", f"preference.reference adapters_off has no effect: {why}; set cache")
    elif own.reference == "adapters_off" and config.adapter.kind == "none":
        yield Problem(
            "preference.reference", "preference.reference adapters_off needs adapters; set adapter.kind, or cache"
        )
    if config.model.retro.num_neighbors:
        yield Problem("training.objective", "preferences have no neighbors, and model.retro reads some; leave it out")
    yield from packing_problems(config, multiple, batch=BATCH, rows="preference.rows", what="rows of preferences")


def plan_rows(config: RunConfig, data_size: int, lengths: TextLengths) -> RowWorkload:
    """The rows of a step as a configuration leads to them; arguments as for other kinds. A record is taken for a pair
    of two sequences; kto has rows beside them of as many other answers."""
    own: PreferenceConfig = config.preference  # type: ignore[attr-defined]
    full_rows = own.rows if config.data.packing == "window" else None
    rows = predicted_rows(config, "preference", data_size, lengths, batch_size=2 * own.batch_size, full_rows=full_rows)
    return replace(rows, rows_beside=rows.rows if own.loss == "kto" else 0)


def measured_passes(config: RunConfig) -> int:
    """Passes of the step's rows, or of as many, forward alone: kto's of other answers, and those of a reference that is
    asked in every step, about both."""
    own: PreferenceConfig = config.preference  # type: ignore[attr-defined]
    others = int(own.loss == "kto")
    asks = needs_reference(own) and own.reference == "adapters_off"
    return others + (1 + others if asks else 0)


def loss_cost(config: RunConfig, rows: RowWorkload, data_size: int) -> LossCost:
    """A few numbers for each segment; logits and token losses belong to the rows' passes through the model."""
    return LossCost(memory=8 * 8 * rows.segments, operations=100.0 * rows.segments)
