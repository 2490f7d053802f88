"""Adapters beside the layers of a model, and which of its parameters are trained."""

from megatron_grit.models.adapters.freeze import PRESETS, count_trainable, has_trained, reach_back, select_trainable
from megatron_grit.models.adapters.insert import adapted_linears, adapters_off, insert_adapters
from megatron_grit.models.adapters.layout import PartLayout, part_layout
from megatron_grit.models.adapters.lora import AdaptedLinear, LoraAdapter, LoraPart, base_weight
from megatron_grit.models.adapters.names import global_name

__all__ = [
    "PRESETS",
    "AdaptedLinear",
    "LoraAdapter",
    "LoraPart",
    "PartLayout",
    "adapted_linears",
    "adapters_off",
    "base_weight",
    "count_trainable",
    "global_name",
    "has_trained",
    "insert_adapters",
    "part_layout",
    "reach_back",
    "select_trainable",
]
