"""A model family's weights as a two-way table between Hugging Face and megatron-core.

A family is data: which tensors there are, what each is called on either side, and which of a few kinds of mapping
joins them. Nothing is written twice, so import and export cannot drift apart.

Tensors here are whole: sharding over tensor, pipeline and expert parallel ranks is the checkpoint's business.

Shape suffix legend: N = query heads, G = key-value heads (query groups), H = channels of a head, D = hidden size,
F = feed-forward width, E = experts, V = vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import expert_width, head_channels, num_query_groups, padded_vocabulary
from megatron_grit.errors import CheckpointError


def all_layers(model: ModelConfig) -> Collection[int]:
    """All of them."""
    return range(model.num_layers)


def dimensions(model: ModelConfig) -> dict[str, int]:
    """Sizes that the tables' shapes are written in."""
    return {
        "vocab": model.vocab_size or 0,
        "hidden": model.hidden_size,
        "query": model.num_attention_heads * head_channels(model),
        "key_value": num_query_groups(model) * head_channels(model),
        "qkv": (model.num_attention_heads + 2 * num_query_groups(model)) * head_channels(model),
        "head": head_channels(model),
        "positions": model.max_position_embeddings,
        "ffn": model.ffn_hidden_size,
        "experts": model.num_experts or 0,
        "expert_ffn": expert_width(model),
        "expert_gate_up": 2 * expert_width(model),
        "shared_ffn": model.moe_shared_ffn_hidden_size or 0,
        "one": 1,
    }


class Kind(Protocol):
    """How one megatron-core tensor is made of one or more Hugging Face tensors, and back."""

    def hf_to_megatron(self, tensors: Sequence[Tensor], model: ModelConfig, expert: int) -> Tensor:
        """Join Hugging Face tensors."""
        ...

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        """Split into Hugging Face tensors."""
        ...


class Copy:
    """The same tensor on both sides."""

    def hf_to_megatron(self, tensors: Sequence[Tensor], model: ModelConfig, expert: int) -> Tensor:
        return tensors[0]

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        return [tensor]


class VocabularyRows:
    """[V, D] or [V], padded with zero rows for megatron-core."""

    def hf_to_megatron(self, tensors: Sequence[Tensor], model: ModelConfig, expert: int) -> Tensor:
        assert model.vocab_size is not None
        rows = padded_vocabulary(model.vocab_size, model.vocab_multiple, 1)
        padded = tensors[0].new_zeros(rows, *tensors[0].shape[1:])
        padded[: len(tensors[0])] = tensors[0]
        return padded

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        return [tensor[: model.vocab_size]]


class GroupedQKV:
    """q [N x H, D], k and v [G x H, D]; megatron-core stacks them by query group: its queries, its key, its value.
    Biases likewise, without D."""

    def hf_to_megatron(self, tensors: Sequence[Tensor], model: ModelConfig, expert: int) -> Tensor:
        groups = num_query_groups(model)
        parts = [tensor.unflatten(0, (groups, -1)) for tensor in tensors]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        groups, channels = num_query_groups(model), head_channels(model)
        queries = model.num_attention_heads // groups * channels
        parts = tensor.unflatten(0, (groups, -1)).split([queries, channels, channels], dim=1)
        return [part.flatten(0, 1) for part in parts]


class GatedFC1:
    """gate [F, D] and up [F, D], one on the other; biases likewise."""

    def hf_to_megatron(self, tensors: Sequence[Tensor], model: ModelConfig, expert: int) -> Tensor:
        return torch.cat(list(tensors))

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        return list(tensor.chunk(2))


class ExpertOf:
    """One expert of a tensor that holds all of them, [E, ...]. Import only: exports write one tensor an expert."""

    def hf_to_megatron(self, tensors: Sequence[Tensor], model: ModelConfig, expert: int) -> Tensor:
        return tensors[0][expert]

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        raise NotImplementedError("a table's first form is the one that is exported")


@dataclass(frozen=True)
class Form:
    """Hugging Face tensors, their shapes in the words of :func:`dimensions`, and how they become one tensor."""

    kind: Kind
    tensors: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Entry:
    """One line of a table. Names hold ``{layer}`` and ``{expert}``.

    Several forms: any of them is read, the first is written.
    """

    megatron: str
    forms: tuple[Form, ...]
    only_if: Callable[[ModelConfig], bool] = field(default=lambda model: True)
    layers: Callable[[ModelConfig], Collection[int]] = all_layers

    def instances(self, model: ModelConfig) -> Iterator[tuple[str, int, int]]:
        """(megatron-core name, layer, expert) of every tensor that this line stands for."""
        for layer in self.layers(model) if "{layer}" in self.megatron else (0,):
            for expert in range((model.num_experts or 0) if "{expert}" in self.megatron else 1):
                yield self.megatron.format(layer=layer, expert=expert), layer, expert


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its table, and its configuration in both directions."""

    name: str
    architecture: str
    """``architectures`` in config.json."""
    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()
    """Patterns of tensors in old checkpoints that hold no weights."""
    model_config: Callable[[dict[str, Any]], ModelConfig]
    """config.json to ours."""
    hf_config: Callable[[ModelConfig], dict[str, Any]]
    """Ours to config.json."""

    def to_megatron(self, tensors: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """Convert one tensor after another, so that a lazily read source never sits in memory as a whole.

        Args:
            tensors: the complete Hugging Face state dict, or a lazy reader of it.
            model: the model's shape; ``vocab_size`` must be set.

        Yields:
            (name in megatron-core's GPTModel, whole tensor).

        Raises:
            CheckpointError: a tensor is missing, left over, or of another shape than the configuration says.
        """
        plan = self._plan(tensors, model)
        for name, form, layer, expert in plan:
            sources = [_checked(tensors, hf, shape, model, layer, expert) for hf, shape in form.tensors.items()]
            yield name, form.kind.hf_to_megatron(sources, model, expert)

    def to_hf(self, tensors: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """The way back.

        Raises:
            CheckpointError: a tensor of the table is missing.
        """
        for entry in self.entries:
            if not entry.only_if(model):
                continue
            form = entry.forms[0]
            for name, layer, expert in entry.instances(model):
                if name not in tensors:
                    raise CheckpointError(f"tensor {name} is missing, which a {self.name} model has")
                parts = form.kind.megatron_to_hf(tensors[name], model)
                for hf, part in zip(form.tensors, parts, strict=True):
                    yield hf.format(layer=layer, expert=expert), part

    def _plan(self, present: Collection[str], model: ModelConfig) -> list[tuple[str, Form, int, int]]:
        """Every tensor to make, with the form in which its sources are there. Nothing is read yet."""
        plan, used, names = [], set(), set(present)
        for entry in self.entries:
            if not entry.only_if(model):
                continue
            for name, layer, expert in entry.instances(model):
                wanted = [{hf.format(layer=layer, expert=expert) for hf in form.tensors} for form in entry.forms]
                form = next((i for i, needed in enumerate(wanted) if needed <= names), None)
                if form is None:
                    missing = sorted(wanted[0] - names)[0]
                    raise CheckpointError(f"tensor {missing} is missing, which config.json's {self.name} model has")
                used |= wanted[form]
                plan.append((name, entry.forms[form], layer, expert))
        left_over = sorted(name for name in names - used if not any(re.fullmatch(p, name) for p in self.ignored))
        if left_over:
            raise CheckpointError(
                f"tensor {left_over[0]} ({len(left_over)} in all) has no place in a {self.name} model; "
                "the weights are of another architecture than config.json says"
            )
        return plan


def _checked(
    tensors: Mapping[str, Tensor], template: str, shape: tuple[str, ...], model: ModelConfig, layer: int, expert: int
) -> Tensor:
    name = template.format(layer=layer, expert=expert)
    tensor, sizes = tensors[name], dimensions(model)
    expected = [sizes[dimension] for dimension in shape]
    if list(tensor.shape) != expected:
        raise CheckpointError(f"tensor {name} has shape {list(tensor.shape)}, but config.json makes it {expected}")
    return tensor
