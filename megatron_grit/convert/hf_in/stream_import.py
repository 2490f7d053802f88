"""A checkpoint written of Hugging Face weights that are never in memory together.

The model is built without storage, for the names, shapes and places on disk of its weights. The engine plans the
writing of it as of any checkpoint, so the format is that of every other, and the files are then filled one tensor
after another, in the order of the source's files: one output file for each, or several for a large one.

Until it is whole the checkpoint is ``step_00000000.partial``. Of each file in it that was written to its end there is a
note in ``step_00000000.conversion``, with its SHA-256 and what is where in it. A conversion that is started again keeps
those whose content is still that of the note, and gives the same files as one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from megatron_grit import compat
from megatron_grit.config.parse import save_config
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.convert.hf_in.folder import WeightFolder
from megatron_grit.convert.param_map import Conversion
from megatron_grit.data.text.tokenizer import Tokenizer, copy_tokenizer
from megatron_grit.errors import CheckpointError
from megatron_grit.models.decoder import GritDecoder, build_model
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.store.digest import digest_of_settings, sha256_of_file
from megatron_grit.store.files import sync_folder, write_json
from megatron_grit.training.checkpoint import checkpoint_path, model_state
from megatron_grit.training.checkpoint_save import describe_checkpoint
from megatron_grit.training.manifest import write_manifest, write_part

MAX_FILE_BYTES = 2 << 30
"""Files of the checkpoint are about as large as the source's, or this large where those are larger."""
Chunk = tuple[str, tuple[int, ...]]
"""Name on disk and offsets of one stored piece of a tensor."""


def write_checkpoint(
    config: RunConfig, plan: Sequence[Conversion], weights: WeightFolder, tokenizer: Tokenizer
) -> Path:
    """Write ``checkpoints/step_00000000`` under ``config.output_dir``, or finish one that was begun.

    Args:
        config: its ``model`` is what is made, which may have more tokens than the source.
        plan: how each tensor is made of the source's.
        weights: the source.
        tokenizer: copied beside the weights.

    Raises:
        CheckpointError: a file cannot be read or written; names it.
    """
    final = checkpoint_path(config.output_dir, 0)
    folder = final.with_name(final.name + ".partial")
    notes = Notes(folder, _fingerprint(config, weights, tokenizer))
    try:
        with parallel_job(config.parallel, config.training.seed) as context:
            notes.prepare()
            _write_weights(config, context, plan, weights, notes)
            save_config(config, folder / "config.yaml")
            copy_tokenizer(tokenizer, folder)
            write_json(folder / "state.json", describe_checkpoint(config, context, tokenizer, step=0))
            write_part(folder, [], context.rank)
            write_manifest(folder, context.world_size)
            folder.rename(final)
            sync_folder(final.parent)
            notes.remove()
    except (OSError, CheckpointException) as error:
        path = Path(getattr(error, "filename", None) or folder)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); make room and start the same command again, which goes on from the "
            "files that are whole"
        ) from error
    return final


def build_without_storage(config: RunConfig, vocab_size: int, context: ParallelContext) -> GritDecoder:
    """The model with weights that have shapes and no memory."""
    meta = torch.device("meta")
    with meta, _WithoutStorage():
        return build_model(config, vocab_size, dataclasses.replace(context, device=meta))


class _WithoutStorage(TorchFunctionMode):
    """Put on the meta device what asks for another one: the engine's layers name theirs, whatever the default is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _write_weights(
    config: RunConfig, context: ParallelContext, plan: Sequence[Conversion], weights: WeightFolder, notes: Notes
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
    request = compat.plan_sharded_save(model_state(model, context), notes.weights)
    small, large = compat.planned_writes(request)
    files = _files(small, [(item, maker.conversion(_place(item))) for item, _ in large], weights)
    compat.set_planned_files(request, len(files))
    results: dict[int, list[Any]] = {}
    total = sum(file.num_bytes for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", smoothing=0.05) as bar:
        for number, file in enumerate(files):
            path = notes.weights / f"__0_{number}.distcp"
            found = notes.find(path, len(file.items))
            if found is None:
                bucket = (str(path), path.name, (file.small, maker.tensors(file.large, bar)))
                written = compat.write_sharded_file(request, bucket, number)
                notes.add(path, [compat.written_part(result) for result in written])
                results[number] = written
            else:
                bar.update(file.num_bytes)
                pairs = zip(file.items, found, strict=True)
                results[number] = [compat.written_before(item, path.name, part) for item, part in pairs]
    request.async_fn_args[2].put(results)
    for finalize in request.finalize_fns:
        finalize()


def _place(item: Any) -> Chunk:
    name, offsets, _ = compat.chunk_of(item)
    return name, offsets


class _Maker:
    """Makes what the engine wants to write, one tensor at a time.

    Args:
        plan: how each tensor is made.
        weights: of what.
        model: the shape to make.
        state: the model's sharded state dict, which says how a tensor is stored.
        dtype: type of each tensor.
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
        """How the tensor is made that a stored piece is of."""
        return self._conversions[place]

    def tensors(self, items: Sequence[Any], bar: tqdm[Any]) -> Iterator[tuple[Any, Tensor]]:
        """Each item with its tensor; pieces of one tensor follow each other, and no other is in memory."""
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
    """The tensor with memory of its own: torch.save writes all of the memory that a tensor is a part of."""
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
        """All of it in the order of writing."""
        return [item for item, _ in self.small] + self.large


def _files(small: list[tuple[Any, Any]], large: list[tuple[Any, Conversion]], weights: WeightFolder) -> list[_File]:
    """Cut what is to be written into files, in the order in which the source's files are read."""
    order = {file: number for number, file in enumerate(weights.files)}
    last_file = {
        conversion.megatron: max(order[weights.file_of(name)] for name in conversion.sources) for _, conversion in large
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


class Notes:
    """What is known of the files of a conversion that is under way.

    Args:
        folder: the checkpoint under its temporary name.
        fingerprint: of all that the files depend on.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.weights = folder / "weights"
        self._folder, self._fingerprint = folder, fingerprint
        self._notes = folder.with_suffix(".conversion")
        self._kept = self._notes / "files"

    def prepare(self) -> None:
        """Make the folders. Files of an earlier start are put aside, since the engine plans into an empty folder; those
        of another source, tokenizer or version are removed."""
        source = self._notes / "source.json"
        if not source.is_file() or json.loads(source.read_text()) != self._fingerprint:
            for folder in (self._folder, self._notes):
                shutil.rmtree(folder, ignore_errors=True)
        self._kept.mkdir(parents=True, exist_ok=True)
        if self.weights.is_dir():
            for path in self.weights.glob("*.distcp"):
                path.rename(self._kept / path.name)
            shutil.rmtree(self.weights)
        self.weights.mkdir(parents=True)
        if not source.is_file():
            write_json(source, self._fingerprint)

    def add(self, path: Path, parts: list[list[int]]) -> None:
        """Note that a file is whole."""
        write_json(self._note(path), {"bytes": path.stat().st_size, "sha256": sha256_of_file(path), "parts": parts})

    def find(self, path: Path, num_parts: int) -> list[list[int]] | None:
        """Take up a file of an earlier start. None: there is none that is whole."""
        kept, note = self._kept / path.name, self._note(path)
        if kept.is_file() and note.is_file():
            said = json.loads(note.read_text())
            parts: list[list[int]] = said["parts"]
            same_size = kept.stat().st_size == said["bytes"] and len(parts) == num_parts
            if same_size and sha256_of_file(kept) == said["sha256"]:
                kept.rename(path)
                return parts
        kept.unlink(missing_ok=True)
        return None

    def remove(self) -> None:
        """Forget it all: the checkpoint is whole."""
        shutil.rmtree(self._notes)

    def _note(self, path: Path) -> Path:
        return self._notes / f"{path.name}.json"


def _fingerprint(config: RunConfig, weights: WeightFolder, tokenizer: Tokenizer) -> str:
    """Changes with whatever the files depend on."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights.files]
    shapes = {name: [list(each.shape), str(each.dtype)] for name, each in weights.stored.items()}
    parts = [
        dataclasses.asdict(config),
        stats,
        shapes,
        tokenizer.fingerprint,
        compat.installed_versions(),
        MAX_FILE_BYTES,
    ]
    return digest_of_settings(parts)
