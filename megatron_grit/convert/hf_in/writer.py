"""Writes a checkpoint from Hugging Face weights, one tensor in memory at a time.

The model is built without storage, for the names, shapes and offsets of its weights. The engine plans the save as for
any checkpoint, so the format is the same. The planned files are then filled one tensor after another, in the order of
the source's files: one output file for each, or several for a large one.

Until it is whole the checkpoint is in ``step_00000000.partial``, see :class:`~megatron_grit.store.folder.OutputFolder`
whose journal also says where in a file its tensors are. A killed conversion resumes with the files that are whole, and
gives the same files as one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_grit import compat
from megatron_grit.config.parse import save_config
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.convert.hf_in.reader import WeightFolder
from megatron_grit.convert.param_map import Conversion
from megatron_grit.convert.skeleton import build_without_storage
from megatron_grit.data.chat.chat import write_chat
from megatron_grit.data.chat.run_chat import run_chat
from megatron_grit.data.text.tokenizer import Tokenizer, copy_tokenizer
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.store.files import check_room, write_json
from megatron_grit.store.folder import OutputFolder
from megatron_grit.store.lock import locked_folder
from megatron_grit.store.progress import Progress
from megatron_grit.training.checkpoint import checkpoint_path, model_state
from megatron_grit.training.checkpoint_save import describe_checkpoint
from megatron_grit.training.manifest import write_manifest, write_part

MAX_FILE_BYTES = 2 << 30
"""Files of the checkpoint are about as large as the source's, but no larger than this."""
Chunk = tuple[str, tuple[int, ...]]
"""Name on disk and offsets of a stored piece of a tensor."""


def write_checkpoint(
    config: RunConfig, plan: Sequence[Conversion], weights: WeightFolder, tokenizer: Tokenizer
) -> Path:
    """Write ``checkpoints/step_00000000`` under ``config.output_dir``, or finish one that was begun.

    Args:
        config: of the checkpoint; the vocabulary of its ``model`` may be larger than the source's.
        tokenizer: copied into the checkpoint.

    Raises:
        CheckpointError: a file cannot be read; names it.
        OutputError: a file cannot be written, or another process writes this checkpoint.
    """
    final = checkpoint_path(config.output_dir, 0)
    chat = run_chat(config, tokenizer)
    partial = final.with_name(final.name + ".partial")
    with (
        parallel_job(config.parallel, config.training.seed) as context,
        locked_folder(Path(config.output_dir)),
        OutputFolder(final, _identity(config, weights, tokenizer), partial=partial) as folder,
        folder.naming(partial),
    ):
        try:
            _write_weights(config, context, plan, weights, folder)
        except CheckpointException as error:
            raise OSError(str(error).splitlines()[0]) from error
        save_config(config, folder.path / "config.yaml")
        copy_tokenizer(tokenizer, folder.path)
        write_chat(chat, folder.path)
        write_json(folder.path / "state.json", describe_checkpoint(config, context, tokenizer, step=0))
        write_part(folder.path, [], context.rank)
        write_manifest(folder.path, context.world_size)
        folder.publish()
    return final


def _write_weights(
    config: RunConfig, context: ParallelContext, plan: Sequence[Conversion], weights: WeightFolder, folder: OutputFolder
) -> None:
    assert config.model.vocab_size is not None
    model = build_without_storage(config, config.model.vocab_size, context)
    state = {
        name: value
        for name, value in model_state(model, context).items()
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
    }
    dtype = {name: parameter.dtype for name, parameter in model.named_parameters()}
    maker = _Maker(plan, weights, config.model, state, dtype)
    place = folder.path / "weights"
    place.mkdir(exist_ok=True)
    request = compat.plan_sharded_save(model_state(model, context), place)
    small, large = compat.planned_writes(request)
    files = _files(small, [(item, maker.conversion(_place(item))) for item, _ in large], weights)
    compat.set_planned_files(request, len(files))
    results: dict[int, list[Any]] = {}
    total = sum(file.num_bytes for file in files)
    check_room(folder.target, total - sum(file.stat().st_size for file in place.glob("*.distcp")))
    with Progress(total, "converting", "B") as bar:
        for number, file in enumerate(files):
            path = place / f"__0_{number}.distcp"
            name = path.relative_to(folder.path).as_posix()
            found = folder.find(name)
            if found is None or len(found["parts"]) != len(file.items):
                bucket = (str(path), path.name, (file.small, maker.tensors(file.large, bar)))
                try:
                    written = compat.write_sharded_file(request, bucket, number)
                except RuntimeError as error:  # what torch raises where a disk fills up
                    raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from error
                folder.add(name, parts=[compat.written_part(result) for result in written])
                results[number] = written
            else:
                bar.skip(file.num_bytes)
                pairs = zip(file.items, found["parts"], strict=True)
                results[number] = [compat.written_before(item, path.name, part) for item, part in pairs]
    request.async_fn_args[2].put(results)
    for finalize in request.finalize_fns:
        finalize()


def _place(item: Any) -> Chunk:
    name, offsets, _ = compat.chunk_of(item)
    return name, offsets


class _Maker:
    """Makes the tensors that the engine's plan writes, one at a time.

    Args:
        model: shape of the model to make.
        state: the model's sharded state dict, which says how a tensor is stored.
        dtype: dtype of each tensor.
    """

    def __init__(
        self,
        plan: Sequence[Conversion],
        weights: WeightFolder,
        model: ModelConfig,
        state: Mapping[str, ShardedTensor | ShardedTensorFactory],
        dtype: Mapping[str, torch.dtype],
    ) -> None:
        self._weights, self._model, self._state, self._dtype = weights, model, state, dtype
        conversions = {conversion.megatron: conversion for conversion in plan}
        missing = dtype.keys() ^ conversions.keys()
        assert not missing, f"the table and the model differ in {sorted(missing)[:4]}"
        self._conversions = {
            place: conversions[name] for name, value in state.items() for place in _stored(value, value.data)
        }

    def conversion(self, place: Chunk) -> Conversion:
        """How the tensor of a stored piece is made."""
        return self._conversions[place]

    def tensors(self, items: Sequence[Any], bar: Progress) -> Iterator[tuple[Any, Tensor]]:
        """Each item with its tensor. Pieces of one tensor follow each other; no other tensor is in memory."""
        held: Conversion | None = None
        pieces: dict[Chunk, Tensor] = {}
        for item in items:
            name, offsets, sizes = compat.chunk_of(item)
            conversion = self._conversions[name, offsets]
            if conversion is not held:
                pieces.clear()
                made = conversion.make(self._weights.stored, self._model).to(self._dtype[conversion.megatron])
                held, pieces = conversion, _stored(self._state[conversion.megatron], made)
                del made
            yield item, _alone(pieces.pop((name, offsets))).view(sizes)
            bar.update(_num_bytes(item))


def _alone(tensor: Tensor) -> Tensor:
    """A tensor that owns its memory: torch.save writes the whole storage that a tensor is a view of."""
    is_part = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone(memory_format=torch.contiguous_format) if is_part else tensor.contiguous()


def _stored(value: ShardedTensor | ShardedTensorFactory, tensor: Tensor) -> dict[Chunk, Tensor]:
    """The pieces in which a tensor is stored."""
    if isinstance(value, ShardedTensor):
        return {(value.key, tuple(value.global_offset)): tensor}
    parts = nested_values(dataclasses.replace(value, data=tensor).build())
    return {(part.key, tuple(part.global_offset)): part.data for part in parts}


@dataclass
class _File:
    """One file to write."""

    small: list[tuple[Any, Any]]
    large: list[Any]
    num_bytes: int = 0

    @property
    def items(self) -> list[Any]:
        """All items in the order of writing."""
        return [item for item, _ in self.small] + self.large


def _files(small: list[tuple[Any, Any]], large: list[tuple[Any, Conversion]], weights: WeightFolder) -> list[_File]:
    """Divide the items into files, in the order in which the source's files are read."""
    order = {file: number for number, file in enumerate(weights.files)}
    last_file = {
        conversion.megatron: max((order[weights.file_of(name)] for name in conversion.sources), default=0)
        for _, conversion in large
    }
    files, current = [_File(small, [])], (-1, "")
    # A stable order of pieces: the engine's own differs between versions.
    for item, conversion in sorted(
        large, key=lambda each: (last_file[each[1].megatron], each[1].megatron, _place(each[0]))
    ):
        source, name = last_file[conversion.megatron], conversion.megatron
        file = files[-1]
        begins = name != current[1]
        if begins and file.large and (source != current[0] or file.num_bytes >= MAX_FILE_BYTES):
            file = _File([], [])
            files.append(file)
        file.large.append(item)
        file.num_bytes += _num_bytes(item)
        current = (source, name)
    return files


def _num_bytes(item: Any) -> int:
    _, _, sizes = compat.chunk_of(item)
    return int(torch.Size(sizes).numel() * item.tensor_data.properties.dtype.itemsize)


def _identity(config: RunConfig, weights: WeightFolder, tokenizer: Tokenizer) -> list[Any]:
    """All that the files depend on."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights.files]
    shapes = {name: [list(each.shape), str(each.dtype)] for name, each in weights.stored.items()}
    return [
        dataclasses.asdict(config),
        stats,
        shapes,
        tokenizer.fingerprint,
        compat.installed_versions(),
        MAX_FILE_BYTES,
    ]
