"""Weights that Megatron-LM saved before ``torch_dist``: where they are, and which of ours they are.

    latest_checkpointed_iteration.txt   number of the newest iteration, or "release"
    iter_0000100/mp_rank_03/model_optim_rng.pt   what tensor parallel rank 3 held, and the run's arguments

Column parallel layers are split by their outputs, row parallel ones by their inputs; of a gated layer each rank has its
part of both halves. Norms are called ``..._norm``, or ``..._layernorm`` in older versions. In a layer that reads
neighbors ``post_attention_norm`` comes before cross-attention and ``post_inter_attention_norm`` before the feed-forward
layer; the encoder is the ``retriever`` of the first such layer.

A file is pickle. Tensors, numbers and the arguments' plain values are made of it; in place of an object of any other
class there is an empty one, and no code of a file or of its classes runs (:mod:`~megatron_grit.convert.torch_file`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import reading_layers
from megatron_grit.convert.hf_in.reader import WeightFolder
from megatron_grit.convert.megatron_in.folder import FILE, rank_folders
from megatron_grit.convert.param_map import WHOLE, Conversion, Copy, Readable, Shard, VocabularyRows, dimensions
from megatron_grit.convert.torch_file import read_torch_file
from megatron_grit.errors import CheckpointError

_COLUMN, _ROW, _WHOLE = (0, 0), (1, None), (None, None)
"""Along which dimension weight and bias are split."""
_MODULES: dict[str, tuple[str, tuple[int | None, int | None], tuple[str, ...]]] = {
    "self_attention.linear_qkv": ("self_attention.query_key_value", _COLUMN, ("qkv", "hidden")),
    "self_attention.linear_proj": ("self_attention.dense", _ROW, ("hidden", "query")),
    "cross_attention.linear_q": ("inter_attention.query", _COLUMN, ("query", "hidden")),
    "cross_attention.linear_kv": ("inter_attention.key_value", _COLUMN, ("key_values", "hidden")),
    "cross_attention.linear_proj": ("inter_attention.dense", _ROW, ("hidden", "query")),
    "mlp.linear_fc1": ("mlp.dense_h_to_4h", _COLUMN, ("fc1", "hidden")),
    "mlp.linear_fc2": ("mlp.dense_4h_to_h", _ROW, ("hidden", "ffn")),
}
"""Ours, theirs, how it is split, and its shape."""
_CROSS = "cross_attention."


class _Empty:
    """In place of an object that is not read."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Arguments:
    """In place of the namespace that holds the arguments: they become its attributes."""


class LegacyFolder(WeightFolder):
    """The weights of an iteration, rank by rank: a tensor's name has its rank in front, as in "03/encoder.layers.0...".

    Args:
        path: of an iteration.

    Raises:
        CheckpointError: ranks are missing, or a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.ranks = rank_folders(path)
        files = [folder / FILE for folder in self.ranks]
        saved = [_load_file(file) for file in files]  # mapped: a parameter is made of all of them
        self._tensors = {
            file: _tensors_of(file, rank, found) for rank, (file, found) in enumerate(zip(files, saved, strict=True))
        }
        # A namespace of argparse itself where the engine, once imported, has told torch that it is safe.
        self.arguments: Mapping[str, Any] = dict(getattr(saved[0].get("args"), "__dict__", {}))
        self.version = float(saved[0].get("checkpoint_version") or 0)
        """How heads are laid out in a tensor."""
        super().__init__(path, files, None)

    def contents(self, file: Path) -> list[tuple[str, Sequence[int], torch.dtype]]:
        return [(name, tensor.shape, tensor.dtype) for name, tensor in self._tensors[file].items()]

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        return self._tensors[self._file_of[name]][name][slices].clone(memory_format=torch.contiguous_format)


def _tensors_of(file: Path, rank: int, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    model = saved.get("model")
    language = model.get("language_model") if isinstance(model, dict) else None
    if not isinstance(language, dict):
        raise CheckpointError(f"{file}: holds no language model of Megatron-LM's older layout")
    return {f"{rank:02d}/{name}": tensor for name, tensor in _flat(language) if isinstance(tensor, Tensor)}


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _load_file(file: Path) -> dict[str, Any]:
    return read_torch_file(
        file,
        "a checkpoint of Megatron-LM",
        "Load and save the checkpoint once with a Megatron-LM that you trust it with",
        lambda name: _Arguments if name == "argparse.Namespace" else _Empty,
    )


@dataclass(frozen=True)
class Joined:
    """A tensor of the shards of all ranks; then as :class:`Copy` or as :class:`VocabularyRows`."""

    dim: int | None
    """Along which they are split; None: every rank has all of it."""
    is_gated: bool = False
    """Each rank has its part of both halves."""
    is_vocabulary: bool = False

    def hf_to_megatron(
        self, tensors: Sequence[Readable], model: ModelConfig, expert: int, shard: Shard = WHOLE
    ) -> Tensor:
        parts = [tensor[()] for tensor in tensors]
        if self.dim is None:
            whole = parts[0]
        elif self.is_gated:
            halves = zip(*(part.chunk(2) for part in parts), strict=True)
            whole = torch.cat([torch.cat(half) for half in halves])
        else:
            whole = torch.cat(parts, self.dim)
        kind = VocabularyRows() if self.is_vocabulary else Copy()
        return kind.hf_to_megatron([whole], model, expert, shard)

    def megatron_to_hf(self, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        raise NotImplementedError("nothing is written in this layout")


def conversions(weights: LegacyFolder, model: ModelConfig, num_rows: int) -> list[Conversion]:
    """How each of our parameters is made.

    Args:
        weights: of all ranks.
        model: their shape.
        num_rows: of the vocabulary, padded.

    Raises:
        CheckpointError: a tensor is missing or left over.
    """
    names, used = {name.partition("/")[2] for name in weights.stored}, set()
    sizes = dimensions(model) | {"rows": num_rows, "fc1": model.ffn_hidden_size}
    sizes["fc1"] *= 2 if model.activation == "swiglu" else 1
    sizes["key_values"] = 2 * sizes["key_value"]
    plan = []
    for ours, possible, kind, dimensions_of in _parameters(model):
        theirs = next((name for name in possible if name in names), None)
        if theirs is None:
            raise CheckpointError(f"{weights.path}: tensor {possible[0]} is missing, which its args ask for")
        used.add(theirs)
        shape = [sizes[name] for name in dimensions_of]
        ranks = range(len(weights.ranks)) if kind.dim is not None else range(1)
        if kind.dim is not None:
            shape[kind.dim] //= len(weights.ranks)
        plan.append(Conversion(ours, kind, {f"{rank:02d}/{theirs}": shape for rank in ranks}, 0, "args"))
    if left_over := sorted(names - used):
        raise CheckpointError(
            f"{weights.path}: tensor {left_over[0]} ({len(left_over)} in all) has no place in a model of its args"
        )
    return plan


_Parameter = tuple[str, list[str], Joined, tuple[str, ...]]


def _parameters(model: ModelConfig) -> Iterator[_Parameter]:
    """Our name, the names that it may have there, how shards are joined, and the whole shape."""
    words = Joined(0, is_vocabulary=True)
    yield "embedding.word_embeddings.weight", ["embedding.word_embeddings.weight"], words, ("rows", "hidden")
    if model.position_embedding == "learned_absolute":
        name = "embedding.position_embeddings.weight"
        yield name, [name], Joined(None), ("positions", "hidden")
    if not model.tie_embeddings:
        yield "output_layer.weight", ["output_layer.weight"], words, ("rows", "hidden")
    yield from _norm(model, "decoder.final_layernorm", "encoder.final")
    reading = reading_layers(model)
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"encoder.layers.{layer}."
        yield from _layer(model, ours, theirs, layer in reading)
        if reading and layer == reading[0]:
            for number in range(model.retro.encoder_layers):
                names = f"{ours}encoder.layers.{number}.", f"{theirs}retriever.layers.{number}."
                yield from _layer(model, *names, number == 0)


def _layer(model: ModelConfig, ours: str, theirs: str, reads: bool) -> Iterator[_Parameter]:
    yield from _norm(model, f"{ours}input_layernorm", f"{theirs}input")
    if reads:
        yield from _norm(model, f"{ours}pre_cross_attn_layernorm", f"{theirs}post_attention")
    yield from _norm(model, f"{ours}pre_mlp_layernorm", f"{theirs}post_{'inter_' if reads else ''}attention")
    for own, (other, dims, shape) in _MODULES.items():
        if own.startswith(_CROSS) and not reads:
            continue
        gated = own == "mlp.linear_fc1" and model.activation == "swiglu"
        yield f"{ours}{own}.weight", [f"{theirs}{other}.weight"], Joined(dims[0], gated), shape
        if model.add_bias_linear:
            yield f"{ours}{own}.bias", [f"{theirs}{other}.bias"], Joined(dims[1], gated), shape[:1]


def _norm(model: ModelConfig, ours: str, theirs: str) -> Iterator[_Parameter]:
    for part in ("weight", "bias") if model.normalization == "layernorm" else ("weight",):
        names = [f"{theirs}_norm.{part}", f"{theirs}_layernorm.{part}"]
        yield f"{ours}.{part}", names, Joined(None), ("hidden",)


def check_layout(weights: LegacyFolder) -> None:
    """Refuse heads that are laid out in another way.

    Raises:
        CheckpointError: they are.
    """
    if weights.version < 2:
        raise CheckpointError(
            f"{weights.path}: has checkpoint_version {weights.version:g}, whose heads are laid out differently; "
            "load and save it once with a newer Megatron-LM"
        )


def number_of_rows(weights: LegacyFolder) -> int:
    """Rows of the vocabulary, padding included."""
    pattern = re.compile(r"\d+/embedding\.word_embeddings\.weight")
    return sum(tensor.shape[0] for name, tensor in weights.stored.items() if pattern.fullmatch(name))
