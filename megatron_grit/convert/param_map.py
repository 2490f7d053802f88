"""A model family's weights as a two-way table between Hugging Face and megatron-core.

A family is data: the tensors, their names on both sides, and the kind of mapping between them. Import and export read
the same table, so they cannot drift apart.

Hugging Face tensors are whole. The megatron-core side is whole too, or the shard of one tensor parallel rank; then only
that shard is read (:class:`Shard`).

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
    """For lines of a table that every layer has."""
    return range(model.num_layers)


def dimensions(model: ModelConfig) -> dict[str, int]:
    """The sizes that shapes in the tables refer to, by name."""
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


Index = tuple[slice, ...]
"""Slices of leading dimensions."""


class Readable(Protocol):
    """A tensor in memory, or in a file of which only the indexed part is read."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, index: Index, /) -> Tensor: ...


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that tensor parallel rank ``rank`` of ``size`` holds: equal parts along ``dim``."""

    dim: int = 0
    rank: int = 0
    size: int = 1

    def take(self, tensor: Readable) -> Tensor:
        return tensor[self.index(tensor.shape)]

    def index(self, shape: Sequence[int]) -> Index:
        """Slices of this rank's part of a tensor."""
        slices = [slice(0, size) for size in shape]
        if self.size > 1:
            part, rest = divmod(shape[self.dim], self.size)
            assert not rest, "the checks of the mesh refuse what does not divide"
            slices[self.dim] = slice(self.rank * part, (self.rank + 1) * part)
        return tuple(slices)


WHOLE = Shard()


class Kind(Protocol):
    """How one megatron-core tensor is made from one or more Hugging Face tensors, and back."""

    def hf_to_megatron(
        self, tensors: Sequence[Readable], model: ModelConfig, expert: int, shard: Shard = WHOLE
    ) -> Tensor:
        """Join whole Hugging Face tensors, or their parts for one tensor parallel rank."""
        ...

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        """Split into Hugging Face tensors."""
        ...


class Copy:
    """The same tensor on both sides."""

    def hf_to_megatron(
        self, tensors: Sequence[Readable], model: ModelConfig, expert: int, shard: Shard = WHOLE
    ) -> Tensor:
        return shard.take(tensors[0])

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        return [tensor]


class VocabularyRows:
    """[V, D] or [V], padded with zero rows for megatron-core.

    Rows of tokens that the model has and the tensor lacks are the mean of the existing rows: their logit is the mean of
    all logits, so none gets more than an average share of the probability (Hewitt, "Initializing New Word Embeddings
    for Pretrained Language Models", 2021).
    """

    def hf_to_megatron(
        self, tensors: Sequence[Readable], model: ModelConfig, expert: int, shard: Shard = WHOLE
    ) -> Tensor:
        assert model.vocab_size is not None
        source = tensors[0]
        padded = padded_vocabulary(model.vocab_size, model.vocab_multiple, shard.size)
        num_rows = padded // shard.size
        first = shard.rank * num_rows
        there = source[(slice(min(first, source.shape[0]), min(first + num_rows, source.shape[0])),)]
        if len(there) == num_rows:
            return there
        rows = there.new_zeros(num_rows, *source.shape[1:])
        rows[: len(there)] = there
        added = slice(max(source.shape[0] - first, 0), max(min(model.vocab_size - first, num_rows), 0))
        if added.start < added.stop:
            rows[added] = _mean_row(source).to(rows.dtype)
        return rows

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        return [tensor[: model.vocab_size]]


def _mean_row(source: Readable) -> Tensor:
    """Mean over rows, in blocks of a fixed size, so that every rank computes the same bits."""
    total = torch.zeros(source.shape[1:], dtype=torch.float64)
    for start in range(0, source.shape[0], 4096):
        total += source[(slice(start, min(start + 4096, source.shape[0])),)].sum(0, dtype=torch.float64)
    return total / source.shape[0]


class GroupedQKV:
    """q [N x H, D], k and v [G x H, D]; megatron-core stacks them by query group: its queries, its key, its value.
    Biases likewise, without D. A tensor parallel rank holds whole groups."""

    def hf_to_megatron(
        self, tensors: Sequence[Readable], model: ModelConfig, expert: int, shard: Shard = WHOLE
    ) -> Tensor:
        groups, rest = divmod(num_query_groups(model), shard.size)
        assert not rest, "the checks of the mesh refuse what does not divide"
        parts = [shard.take(tensor).unflatten(0, (groups, -1)) for tensor in tensors]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        groups, channels = num_query_groups(model), head_channels(model)
        queries = model.num_attention_heads // groups * channels
        parts = tensor.unflatten(0, (groups, -1)).split([queries, channels, channels], dim=1)
        return [part.flatten(0, 1) for part in parts]


class ZeroVocabularyRows:
    """[V] zeros: the output bias of a model that was saved without its output layer."""

    def hf_to_megatron(
        self, tensors: Sequence[Readable], model: ModelConfig, expert: int, shard: Shard = WHOLE
    ) -> Tensor:
        assert model.vocab_size is not None
        return torch.zeros(padded_vocabulary(model.vocab_size, model.vocab_multiple, shard.size) // shard.size)

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        raise NotImplementedError("a table's first form is the one that is exported")


class GatedFC1:
    """gate [F, D] and up [F, D], concatenated along F; biases likewise. A tensor parallel rank holds rows of both."""

    def hf_to_megatron(
        self, tensors: Sequence[Readable], model: ModelConfig, expert: int, shard: Shard = WHOLE
    ) -> Tensor:
        return torch.cat([shard.take(tensor) for tensor in tensors])

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        return list(tensor.chunk(2))


class ExpertOf:
    """One expert of a tensor that holds all of them, [E, ...]. Import only: exports write one tensor an expert."""

    def hf_to_megatron(
        self, tensors: Sequence[Readable], model: ModelConfig, expert: int, shard: Shard = WHOLE
    ) -> Tensor:
        index = shard.index(tensors[0].shape[1:])
        return tensors[0][(slice(expert, expert + 1), *index)][0]

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        raise NotImplementedError("a table's first form is the one that is exported")


class GatedExpertOf(ExpertOf):
    """One expert's gate and up projections of [E, 2 F, D]; a tensor parallel rank holds rows of both."""

    def hf_to_megatron(
        self, tensors: Sequence[Readable], model: ModelConfig, expert: int, shard: Shard = WHOLE
    ) -> Tensor:
        width = tensors[0].shape[1] // 2
        gate, *others = shard.index((width, *tensors[0].shape[2:]))
        up = slice(width + gate.start, width + gate.stop)
        one = slice(expert, expert + 1)
        return torch.cat([tensors[0][(one, rows, *others)][0] for rows in (gate, up)])


@dataclass(frozen=True)
class Form:
    """Hugging Face tensors, their shapes by the names of :func:`dimensions`, and how they become one tensor."""

    kind: Kind
    tensors: dict[str, tuple[str, ...]]
    without: frozenset[str] = frozenset()
    """Tensors with which this form does not apply."""


@dataclass(frozen=True)
class Entry:
    """One line of a table. Names contain ``{layer}`` and ``{expert}``. Import reads any of the forms, export writes the
    first."""

    megatron: str
    forms: tuple[Form, ...]
    only_if: Callable[[ModelConfig], bool] = field(default=lambda model: True)
    layers: Callable[[ModelConfig], Collection[int]] = all_layers

    def instances(self, model: ModelConfig) -> Iterator[tuple[str, int, int]]:
        """(megatron-core name, layer, expert) of every tensor of this line."""
        for layer in self.layers(model) if "{layer}" in self.megatron else (0,):
            for expert in range((model.num_experts or 0) if "{expert}" in self.megatron else 1):
                yield self.megatron.format(layer=layer, expert=expert), layer, expert


@dataclass(frozen=True)
class Conversion:
    """How one megatron-core tensor is to be made."""

    megatron: str
    kind: Kind
    sources: dict[str, list[int]]
    """Hugging Face tensors and their shapes."""
    expert: int
    described_by: str = "config.json"
    """What says the shapes, for messages."""

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Compare the shape of a source tensor with the configuration's.

        Raises:
            CheckpointError: they differ.
        """
        if list(shape) != self.sources[name]:
            raise CheckpointError(
                f"tensor {name} has shape {list(shape)}, but {self.described_by} makes it {self.sources[name]}"
            )

    def make(self, tensors: Mapping[str, Readable], model: ModelConfig, shard: Shard = WHOLE) -> Tensor:
        """The tensor, or one rank's shard of it.

        Args:
            tensors: the source tensors.
            model: shape of the model to make; its vocabulary may be larger than the source's.
            shard: the part to make; nothing else is read.
        """
        return self.kind.hf_to_megatron([tensors[name] for name in self.sources], model, self.expert, shard)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its table, and its configuration in both directions."""

    name: str
    architecture: str
    """``architectures`` in config.json."""
    model_type: str
    """``model_type`` there, by which transformers chooses the model's class."""
    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()
    """Patterns of tensors in old checkpoints that are not weights, such as rotary frequencies."""
    model_config: Callable[[dict[str, Any]], ModelConfig]
    """config.json to ours."""
    hf_config: Callable[[ModelConfig], dict[str, Any]]
    """Ours to config.json."""

    @property
    def base_architecture(self) -> str:
        """``architectures`` of the decoder without its output layer, as ``AutoModel`` saves it."""
        return self.architecture.removesuffix("ForCausalLM") + "Model"

    @property
    def scorer_architecture(self) -> str:
        """``architectures`` of the decoder with a linear layer for a score in place of its output layer."""
        return self.architecture.removesuffix("ForCausalLM") + "ForSequenceClassification"

    @property
    def input_embedding(self) -> str:
        """The tensor of the word embeddings."""
        return self._tensor_of("embedding.word_embeddings.weight")

    @property
    def output_layer(self) -> str:
        """The tensor of the output layer."""
        return self._tensor_of("output_layer.weight")

    def _tensor_of(self, megatron: str) -> str:
        return next(name for entry in self.entries if entry.megatron == megatron for name in entry.forms[0].tensors)

    def to_megatron(self, tensors: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """Convert one tensor after another, so that a lazily read source is never in memory as a whole.

        Args:
            tensors: the complete Hugging Face state dict, or a lazy reader of it.
            model: the model's shape; ``vocab_size`` must be set.

        Yields:
            (name in megatron-core's GPTModel, whole tensor).

        Raises:
            CheckpointError: a tensor is missing, left over, or of another shape than the configuration says.
        """
        for conversion in self.plan(tensors, model):
            for name in conversion.sources:
                conversion.check(name, tensors[name].shape)
            yield conversion.megatron, conversion.make(tensors, model)

    def to_hf(self, tensors: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """The way back.

        Raises:
            CheckpointError: a tensor of the table is missing.
        """
        for name, kind, targets in self.outputs(model):
            if name not in tensors:
                raise CheckpointError(f"tensor {name} is missing, which a {self.name} model has")
            yield from zip(targets, kind.megatron_to_hf(tensors[name], model), strict=True)

    def outputs(self, model: ModelConfig) -> Iterator[tuple[str, Kind, list[str]]]:
        """Each megatron-core tensor of a model, and the names of the Hugging Face tensors that ``kind`` makes of it."""
        for entry in self.entries:
            if not entry.only_if(model):
                continue
            form = entry.forms[0]
            for name, layer, expert in entry.instances(model):
                yield name, form.kind, [hf.format(layer=layer, expert=expert) for hf in form.tensors]

    def plan(self, present: Collection[str], model: ModelConfig) -> list[Conversion]:
        """Every tensor to make of those that are present. Nothing is read yet.

        Raises:
            CheckpointError: a tensor is missing or left over.
        """
        plan: list[Conversion] = []
        used: set[str] = set()
        names, sizes = set(present), dimensions(model)
        for entry in self.entries:
            if not entry.only_if(model):
                continue
            for name, layer, expert in entry.instances(model):
                wanted = [
                    {
                        hf.format(layer=layer, expert=expert): [sizes[dimension] for dimension in shape]
                        for hf, shape in form.tensors.items()
                    }
                    for form in entry.forms
                ]
                form = next(
                    (
                        number
                        for number, (each, needed) in enumerate(zip(entry.forms, wanted, strict=True))
                        if needed.keys() <= names and not each.without & names
                    ),
                    None,
                )
                if form is None:
                    missing = sorted(wanted[0].keys() - names)[0]
                    raise CheckpointError(
                        f"tensor {missing} is missing, which config.json's {self.name} model has; give all of its "
                        "weights, and the config.json that they were saved with"
                    )
                used |= wanted[form].keys()
                plan.append(Conversion(name, entry.forms[form].kind, wanted[form], expert))
        left_over = sorted(name for name in names - used if not any(re.fullmatch(p, name) for p in self.ignored))
        if left_over:
            raise CheckpointError(
                f"tensor {left_over[0]} ({len(left_over)} in all) has no place in a {self.name} model; "
                "the weights are of another architecture than config.json says"
            )
        return plan
