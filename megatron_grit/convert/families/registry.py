"""All model families, and the family and shape of a Hugging Face model or of one of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_grit.config.knob import names_with
from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import expert_width, head_channels, num_query_groups
from megatron_grit.config.values import shortened
from megatron_grit.convert.families import gpt_neo, gpt_neox, gptj, llama, mistral, mixtral, qwen
from megatron_grit.convert.hf_in.reader import read_config_json
from megatron_grit.convert.param_map import Family
from megatron_grit.errors import CheckpointError
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

FAMILIES: tuple[Family, ...] = (
    mistral.FAMILY,
    mixtral.FAMILY,
    llama.FAMILY,
    qwen.QWEN2,
    qwen.QWEN2_MOE,
    qwen.QWEN3,
    qwen.QWEN3_MOE,
    gpt_neox.FAMILY,
    gptj.FAMILY,
    gpt_neo.FAMILY,
)


def load_hf_config(path: str | Path) -> ModelConfig:
    """The shape of a Hugging Face model, read from its config.json.

    Args:
        path: directory with a config.json.

    Raises:
        CheckpointError: no config.json, or a model that is not supported.
    """
    settings = read_config_json(Path(path))
    family = family_of_config(settings, Path(path))
    try:
        return family.model_config(settings)
    except CheckpointError as error:
        raise CheckpointError(f"{Path(path) / 'config.json'}: {error}") from None


def family_of_config(settings: dict[str, Any], path: Path) -> Family:
    """The family of a config.json: as in transformers that of ``model_type``, where ``architectures`` names none or any
    family that is known here; without a ``model_type`` that of ``architectures``.

    Raises:
        CheckpointError: a model that is not supported.
    """
    file, model_type = path / "config.json", settings.get("model_type")
    architectures = settings.get("architectures") or []
    named = next((each for each in FAMILIES if _architectures(each) & {*architectures}), None)
    typed = next((each for each in FAMILIES if each.model_type == model_type), None)
    if named is None and (architectures or typed is None):
        supported = ", ".join(family.architecture for family in FAMILIES)
        raise CheckpointError(f"{file}: architectures is {architectures}; supported: {supported}")
    if typed is None and model_type is not None:
        supported = ", ".join(family.model_type for family in FAMILIES)
        raise CheckpointError(f"{file}: model_type is {model_type}, by which transformers goes; supported: {supported}")
    if named is not None and typed is not None and named is not typed:
        log.warning(f"{file}: architectures is {architectures}; model_type {model_type} counts, as in transformers")
    family = typed or named
    assert family is not None
    return family


def _architectures(family: Family) -> set[str]:
    return {family.architecture, family.base_architecture, family.scorer_architecture}


def family_of_model(model: ModelConfig) -> Family:
    """The family of one of our models: its ``architecture``, or the first whose config.json can say its shape.

    Raises:
        CheckpointError: none can, or not the one that it names.
    """
    named = [family for family in FAMILIES if model.architecture in (None, family.architecture)]
    for family in named:
        if describes(family, model):
            return family
    if not named:
        supported = ", ".join(family.architecture for family in FAMILIES)
        raise CheckpointError(f"model.architecture is {model.architecture}; supported: {supported}")
    what = f"model.architecture is {model.architecture}, whose config.json cannot say the model's shape"
    if model.architecture is None:
        what = "no architecture of transformers that is known here has such a shape"
    differing = {family.architecture: differences(family, model) for family in named}
    nearest = min(differing, key=lambda name: len(differing[name]))
    raise CheckpointError(f"{what}; in the nearest, {nearest}, {', '.join(differing[nearest])}")


def describes(family: Family, model: ModelConfig) -> bool:
    """Whether a model's shape survives being written to a family's config.json and read again."""
    return not differences(family, model)


def differences(family: Family, model: ModelConfig) -> list[str]:
    """What of a model's shape does not survive being written to a family's config.json and read again: options with
    their values and those that the family would have."""
    model = replace(model, architecture=family.architecture, vocab_size=model.vocab_size or 1)
    try:
        read = family.model_config(family.hf_config(model))
    except CheckpointError as error:
        return [str(error)]
    ours, theirs = _resolved(model), _resolved(read)
    return [
        f"model.{name} {shortened(ours.get(name))} would be {shortened(theirs.get(name))}"
        for name in dict.fromkeys([*ours, *theirs])
        if name not in ours or name not in theirs or not same_value(ours[name], theirs[name])
    ]


def _resolved(model: ModelConfig) -> dict[str, Any]:
    """The fields of a shape that must survive config.json, defaults filled in."""
    shape = vars(model) | {"kv_channels": head_channels(model), "num_query_groups": num_query_groups(model)}
    experts = {name for name in shape if name.startswith("moe_")}
    if model.num_experts is not None:
        shape["moe_ffn_hidden_size"] = expert_width(model)
        experts = set()
    left_out = names_with(ModelConfig, "in_files", False) | experts
    return {name: value for name, value in shape.items() if name not in left_out}


def same_value(ours: Any, theirs: Any) -> bool:
    """Whether two values of a key are equal, up to the rounding of a JSON or YAML file."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return bool(ours == theirs)


def hf_state_dict_to_megatron(tensors: Mapping[str, Tensor], model_config: ModelConfig) -> dict[str, Tensor]:
    """Whole megatron-core tensors of a Hugging Face state dict.

    Args:
        tensors: Hugging Face names to tensors; may read lazily, as a ``WeightFolder`` does.
        model_config: the model's shape, from :func:`load_hf_config`.

    Returns:
        Names of megatron-core's GPTModel to tensors in the type of the source. The vocabulary is padded with zero
        rows to a multiple of ``model_config.vocab_multiple``.

    Raises:
        CheckpointError: a tensor is missing, left over or of the wrong shape.
    """
    return dict(family_of_model(model_config).to_megatron(tensors, model_config))
