"""Reads whole tensors of a checkpoint of any layout, a few at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.convert.skeleton import build_without_storage
from megatron_grit.errors import CheckpointError
from megatron_grit.models.names import of_head
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.checkpoint import model_state
from megatron_grit.training.manifest import verify_manifest

_PARTS = ("weights", "config.yaml", "state.json", "tokenizer")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")


class CheckpointReader:
    """Reads a checkpoint's weights by their names in the decoder.

    The model is built without storage, only for the names and offsets of its tensors. The engine's own loader reads a
    whole model or nothing: all layers are one tensor on disk, of which a process has to request every part.

    Args:
        config: its configuration.
        vocab_size: of its model.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """

    def __init__(self, path: Path, config: RunConfig, vocab_size: int, context: ParallelContext) -> None:
        for part in _PARTS:
            verify_manifest(path, context, part)
        config = dataclasses.replace(config, parallel=ParallelConfig(device="cpu"))
        model = build_without_storage(config, vocab_size, context)
        self.skeleton = model
        """The model, without storage."""
        self._folder = path / "weights"
        self._places: dict[str, Any] = model_state(model, context)
        self._reader = dcp.FileSystemReader(self._folder)
        try:
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        except Exception as error:  # a pickle that is not one raises anything
            raise self._damaged("its list of tensors", error) from error
        self.shapes: Mapping[str, Tensor] = dict(model.named_parameters())
        """Every parameter, without storage."""
        self.dtype = next(iter(self.shapes.values())).dtype
        """Of the weights."""

    @property
    def head_names(self) -> list[str]:
        """Parameters of the embedding head and of learned pooling."""
        return [name for name in self.shapes if of_head(name)]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors.

        Raises:
            CheckpointError: one is not in the checkpoint or has another shape there.
        """
        planner = _Planner()
        parts = {name: self._ask(name, planner) for name in names}
        if not parts:
            return {}
        plan = self._reader.prepare_local_plan(LoadPlan(planner.items))
        try:
            self._reader.read_data(plan, planner).wait()
        except (RuntimeError, ValueError, KeyError, OSError, EOFError) as error:
            raise self._damaged(f"tensor {next(iter(parts))} or one near it", error) from error
        return {name: self._join(name, pieces) for name, pieces in parts.items()}

    def _ask(self, name: str, planner: _Planner) -> list[Tensor]:
        place = self._places[name]
        pieces = place.build() if isinstance(place, ShardedTensorFactory) else [place]
        return [planner.add(piece, self._stored(name, piece)) for piece in pieces]

    def _stored(self, name: str, piece: ShardedTensor) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata.get(piece.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{self._folder}: tensor {name} is missing; use another checkpoint")
        # How many rows pad the vocabulary depends on the layout that the checkpoint was saved from.
        rows = slice(1, None) if name in _VOCABULARY and stored.size[0] >= piece.global_shape[0] else slice(None)
        if tuple(stored.size[rows]) != tuple(piece.global_shape[rows]):
            raise CheckpointError(
                f"{self._folder}: tensor {name} is part of one of shape {list(stored.size)}, config.yaml makes it "
                f"{list(piece.global_shape)}; use another checkpoint"
            )
        return stored

    def _join(self, name: str, pieces: list[Tensor]) -> Tensor:
        place = self._places[name]
        whole = place.merge_fn(pieces) if isinstance(place, ShardedTensorFactory) else pieces[0]
        return whole.view(self.shapes[name].shape)

    def _damaged(self, what: str, error: BaseException) -> CheckpointError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return CheckpointError(f"{self._folder}: {what} cannot be read ({reason}); use another checkpoint")


class _Planner(LoadPlanner):
    """Which parts of stored tensors are read into which target tensors."""

    def __init__(self) -> None:
        self.items: list[ReadItem] = []
        self._targets: dict[Any, Tensor] = {}

    def add(self, piece: ShardedTensor, stored: TensorStorageMetadata) -> Tensor:
        """Request a piece of a stored tensor. Returns the tensor that will receive it."""
        sizes = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
        target = torch.empty(sizes, dtype=stored.properties.dtype)
        box = ChunkStorageMetadata(torch.Size(piece.global_offset), torch.Size(sizes))
        # One stored tensor is requested several times: for each layer, and for both halves of a gated layer.
        for item in create_read_items_for_chunk_list(piece.key, stored, [box]):
            index = dataclasses.replace(item.dest_index, fqn=f"{len(self._targets)}:{piece.key}")
            self.items.append(dataclasses.replace(item, dest_index=index))
        self._targets[f"{len(self._targets)}:{piece.key}"] = target
        return target.flatten(0, piece.prepend_axis_num) if piece.prepend_axis_num else target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where the bytes of an item go."""
        target = self._targets[read_item.dest_index.fqn]
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dimension, start, length)
        return target.detach()

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: :meth:`resolve_tensor` gave the place itself."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError("only tensors are asked for")

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        raise NotImplementedError("the plan is made of the items that were added")

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self.items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan
