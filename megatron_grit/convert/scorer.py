"""Models that give a text one number, as transformers stores them: ``score.weight`` in place of the output layer.

It is a linear function of the state of the last token: ``LlamaForSequenceClassification`` and its like, with one label.
Here it is the embedding head.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.param_map import Conversion, Copy, Family, Kind

SCORE = "score.weight"
_HEAD = "embedding_head.weight"
_OUTPUT_LAYER = "output_layer."


def is_left_out(name: str) -> bool:
    """Whether such a model has no place for a tensor of the decoder: the output layer's."""
    return name.startswith(_OUTPUT_LAYER)


def scorer_outputs(family: Family, model: ModelConfig) -> Iterator[tuple[str, Kind, list[str]]]:
    """As :meth:`~megatron_grit.convert.param_map.Family.outputs`, for such a model."""
    yield from (each for each in family.outputs(model) if not is_left_out(each[0]))
    yield _HEAD, Copy(), [SCORE]


def score_conversion(model: ModelConfig) -> Conversion:
    """How the head is made."""
    return Conversion(_HEAD, Copy(), {SCORE: [1, model.hidden_size]}, 0, described_by="a reward model of one label")
