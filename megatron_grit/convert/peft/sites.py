"""Adapters of a whole model, and the Hugging Face modules they belong to.

Tensors are whole here, under the names that adapters have in this package: ``<linear>.adapter.<part>.lora_A``
[rank, in], ``.lora_B`` [rows of the part, rank], and DoRA's ``.magnitude`` [rows of the part].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_grit.config.adapter_shape import projection_name, scaling_of
from megatron_grit.config.checks.adapter import model_projections
from megatron_grit.config.schema import AdapterConfig, ModelConfig
from megatron_grit.config.shape import expert_width
from megatron_grit.convert.families.registry import family_of_model
from megatron_grit.convert.param_map import ExpertOf, GatedFC1, GroupedQKV, Kind, dimensions

_PROJECTIONS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Projections that an engine's layer holds, in the order of an adapter's parts."""


FACTORS = ("lora_A", "lora_B", "magnitude")


@dataclass(frozen=True)
class Site:
    """A linear layer of the engine, and the Hugging Face modules or parameter it corresponds to."""

    linear: str
    """Name in the whole model: decoder.layers.0.self_attention.linear_qkv."""
    parts: tuple[str, ...]
    """Projections that may have an adapter: q_proj ..."""
    modules: tuple[str, ...]
    """Module of each part; or the one that holds all of them (GPT-NeoX's query_key_value)."""
    expert: int | None
    """Number of the expert that it belongs to."""
    stacked: str | None
    """Module whose parameter holds all experts of the layer in transformers 5, if there is one."""

    @property
    def is_fused(self) -> bool:
        """Whether one Hugging Face module holds all parts."""
        return len(self.modules) < len(self.parts)

    @property
    def leaf(self) -> str:
        """Name of the engine's layer in its block."""
        return self.linear.rpartition(".")[2]

    def join(self, parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """The rows of several projections as the engine has them, which is the order of a fused module's as well."""
        return self._kind.hf_to_megatron(parts, model, 0) if len(parts) > 1 else parts[0]

    def split(self, rows: Tensor, model: ModelConfig) -> list[Tensor]:
        """Inverse of :meth:`join`."""
        return self._kind.megatron_to_hf(rows, model) if len(self.parts) > 1 else [rows]

    @property
    def _kind(self) -> Kind:
        return GroupedQKV() if self.leaf == "linear_qkv" else GatedFC1()


@dataclass
class WholeAdapter:
    """An adapter of a whole model."""

    config: AdapterConfig
    """All but quantize and load."""
    tensors: dict[str, Tensor]
    """Factors by name."""
    trained: dict[str, Tensor] = field(default_factory=dict)
    """Other weights that were trained, whole and without padding, by their names in Hugging Face's model."""

    def scaling(self, linear: str, part: str) -> float:
        """Factor of a projection's lora_B lora_A."""
        return scaling_of(self.config, projection_name(linear, part))

    def ranks(self) -> dict[str, int]:
        """Rank of each projection that has an adapter, by the projection's name."""
        found = {}
        for name, tensor in self.tensors.items():
            linear, _, rest = name.partition(".adapter.")
            if rest.endswith(".lora_A"):
                found[projection_name(linear, rest.removesuffix(".lora_A"))] = len(tensor)
        return found

    def part(self, linear: str, part: str) -> dict[str, Tensor]:
        """The factors of a projection; empty where it has no adapter."""
        names = {factor: f"{linear}.adapter.{part}.{factor}" for factor in FACTORS}
        return {factor: self.tensors[name] for factor, name in names.items() if name in self.tensors}


def adapter_sites(model: ModelConfig) -> list[Site]:
    """Every linear layer of a model that may have an adapter."""
    sites = []
    available = model_projections(model)
    for entry in family_of_model(model).entries:
        module, _, parameter = entry.megatron.rpartition(".")
        leaf = module.rpartition(".")[2]
        if parameter != "weight" or leaf not in _PROJECTIONS or not entry.only_if(model):
            continue
        stacked = [name for form in entry.forms if isinstance(form.kind, ExpertOf) for name in form.tensors]
        for name, layer, expert in entry.instances(model):
            modules = tuple(
                hf.removesuffix(".weight").format(layer=layer, expert=expert) for hf in entry.forms[0].tensors
            )
            sites.append(
                Site(
                    linear=name.removesuffix(".weight"),
                    parts=tuple(part for part in _PROJECTIONS[leaf] if part in available),
                    modules=modules,
                    expert=expert if "{expert}" in entry.megatron else None,
                    stacked=stacked[0].rpartition(".")[0].format(layer=layer) if stacked else None,
                )
            )
    return sites


def tied_output(model: ModelConfig) -> str:
    """Hugging Face's name of the output layer, which a model with tied embeddings has no tensor for."""
    entries = family_of_model(model).entries
    (name,) = next(entry for entry in entries if entry.megatron == "output_layer.weight").forms[0].tensors
    return name


def part_shape(site: Site, part: str, model: ModelConfig) -> tuple[int, int]:
    """(rows, input width) of a projection."""
    sizes = dimensions(model)
    inner = model.ffn_hidden_size if site.expert is None else expert_width(model)
    if ".shared_experts." in site.linear:
        inner = sizes["shared_ffn"]
    return {
        "q_proj": (sizes["query"], model.hidden_size),
        "k_proj": (sizes["key_value"], model.hidden_size),
        "v_proj": (sizes["key_value"], model.hidden_size),
        "o_proj": (model.hidden_size, sizes["query"]),
        "gate_proj": (inner, model.hidden_size),
        "up_proj": (inner, model.hidden_size),
        "down_proj": (model.hidden_size, inner),
    }[part]


def resized(factors: Mapping[str, Tensor], rank: int, scaling: float, new_scaling: float) -> dict[str, Tensor]:
    """The same update, expressed with a higher rank and another scaling.

    Added rows and columns are zero, and so are their gradients: they stay zero.
    """
    lora_A, lora_B = factors["lora_A"], factors["lora_B"]
    extra = rank - len(lora_A)
    assert extra >= 0
    if extra:
        lora_A = torch.nn.functional.pad(lora_A, (0, 0, 0, extra))
        lora_B = torch.nn.functional.pad(lora_B, (0, extra))
    if scaling != new_scaling:
        lora_B = (lora_B.double() * (scaling / new_scaling)).to(lora_B.dtype)
    return {**factors, "lora_A": lora_A, "lora_B": lora_B}
