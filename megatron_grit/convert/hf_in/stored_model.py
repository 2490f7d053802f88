"""A Hugging Face model as it is stored: with or without its output layer, tied or not, under the family's names or the
shorter ones of ``AutoModel``.

``AutoModel.save_pretrained``, which sentence-transformers calls, writes the decoder alone: ``architectures`` is
``MistralModel``, tensors have no ``model.`` in front, and there is no output layer. Such a model is read as one whose
output layer is its input embedding. So is a model for sequence classification with one label, such as a reward model,
whose linear layer becomes the embedding head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.families.registry import family_of_config, load_hf_config
from megatron_grit.convert.hf_in.reader import (
    WeightFolder,
    check_weights,
    has_weights,
    open_weights,
    read_config_json,
)
from megatron_grit.convert.param_map import Conversion, Family
from megatron_grit.convert.scorer import SCORE, score_conversion
from megatron_grit.errors import CheckpointError
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class StoredModel:
    """A model's shape, its weights under the family's names, and how ours are made of them. A context manager that
    closes the weights."""

    shape: ModelConfig
    weights: WeightFolder
    plan: Sequence[Conversion]

    def check(self) -> Literal["fp32", "bf16"]:
        """See :func:`~megatron_grit.convert.hf_in.reader.check_weights`."""
        return check_weights(self.plan, self.weights)

    def __enter__(self) -> StoredModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.weights.__exit__(kind, error, trace)


def open_model(folder: Path, *, allow_pickle: bool = False, tied: bool | None = None) -> StoredModel:
    """Open a model's directory.

    Args:
        folder: with config.json and weights.
        allow_pickle: as of :func:`~megatron_grit.convert.hf_in.reader.open_weights`.
        tied: whether the output layer is the input embedding, where that was found out before. None: find out, and log
            what is not as config.json says.

    Raises:
        CheckpointError: a model that is not supported, or weights that are not those of its config.json.
    """
    shape, family, weights = _open(folder, allow_pickle, tied)
    try:
        if not scores(folder, family):
            return StoredModel(shape, weights, family.plan(weights, shape))
        if SCORE not in weights:
            raise CheckpointError(f"tensor {SCORE} is missing, which config.json's {family.scorer_architecture} has")
        plan = family.plan(weights.keys() - {SCORE}, shape)
        return StoredModel(shape, weights, [*plan, score_conversion(shape)])
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def stored_shape(folder: Path, *, weights: bool = True) -> ModelConfig:
    """The shape of a model's directory.

    Args:
        folder: with config.json.
        weights: whether they have to be there; if not, and they cannot be read, the shape is what config.json says.

    Raises:
        CheckpointError: as :func:`open_model`.
    """
    if weights or has_weights(folder):
        try:
            shape, _, opened = _open(folder, False, None)
            with opened:
                return shape
        except CheckpointError:
            if weights:
                raise
    shape, family = load_hf_config(folder), family_of_config(read_config_json(folder), folder)
    return replace(shape, tie_embeddings=shape.tie_embeddings or _is_base(folder, family))


def _open(folder: Path, allow_pickle: bool, tied: bool | None) -> tuple[ModelConfig, Family, WeightFolder]:
    shape, family = load_hf_config(folder), family_of_config(read_config_json(folder), folder)
    weights = open_weights(folder, allow_pickle=allow_pickle)
    is_bare = _use_names_of_family(weights, family)
    if tied is None:
        tied = _is_tied(folder, shape, family, weights, is_bare)
    if tied and family.input_embedding in weights:
        weights.drop(family.output_layer)
    elif tied:
        weights.rename({family.output_layer: family.input_embedding})
    return replace(shape, tie_embeddings=tied), family, weights


def _is_base(folder: Path, family: Family) -> bool:
    """Whether it has no output layer."""
    return family.base_architecture in (read_config_json(folder).get("architectures") or []) or scores(folder, family)


def scores(folder: Path, family: Family | None = None) -> bool:
    """Whether a model's directory is that of a model with a linear layer for scores.

    Args:
        folder: with config.json.
        family: of the model. None: find it.
    """
    settings = read_config_json(folder)
    family = family or family_of_config(settings, folder)
    return family.scorer_architecture in (settings.get("architectures") or [])


def _use_names_of_family(weights: WeightFolder, family: Family) -> bool:
    """Put ``model.``, ``transformer.`` or ``gpt_neox.`` in front of names that lack it. Returns whether they did."""
    prefix, _, bare = family.input_embedding.partition(".")
    if bare not in weights:
        return False
    heads = {
        name
        for entry in family.entries
        if entry.megatron.startswith("output_layer.")
        for name in entry.forms[0].tensors
    }
    weights.rename({name: f"{prefix}.{name}" for name in weights if name not in heads})
    return True


def _is_tied(folder: Path, shape: ModelConfig, family: Family, weights: WeightFolder, is_bare: bool) -> bool:
    """As transformers decides it: by what is stored rather than by ``tie_word_embeddings``.

    Raises:
        CheckpointError: a model for generation without its output layer.
    """
    head, embedding = family.output_layer, family.input_embedding
    if head not in weights:
        if shape.tie_embeddings:
            return True
        if is_bare or _is_base(folder, family):
            log.info(f"{folder}: has no {head}; the input embedding is the output layer (model.tie_embeddings)")
            return True
        raise CheckpointError(
            f"{folder}: tensor {head} is missing, which config.json's {family.name} model has; give all of its "
            "weights, or set tie_word_embeddings to true in config.json: the input embedding is then the output layer"
        )
    if not shape.tie_embeddings or embedding not in weights:
        return shape.tie_embeddings
    if _are_equal(weights, head, embedding):
        return True
    log.warning(
        f"{folder}: config.json has tie_word_embeddings, but {head} and {embedding} differ: both are kept, as "
        "transformers does (model.tie_embeddings false)"
    )
    return False


def _are_equal(weights: WeightFolder, one: str, other: str) -> bool:
    """Whether two matrices are the same; some rows in memory at a time."""
    first, second = weights.stored[one], weights.stored[other]
    if first.shape != second.shape:
        return False
    rows = range(0, first.shape[0], _ROWS_AT_ONCE)
    parts = (slice(start, start + _ROWS_AT_ONCE) for start in rows)
    return all(torch.equal(first[(part,)], second[(part,)]) for part in parts)
