"""Exports a checkpoint as a directory that transformers, sentence-transformers and vLLM read.

The checkpoint, of any layout, is read a few tensors at a time and written as safetensors files of a given size, so
memory does not grow with the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_grit import __version__
from megatron_grit.config.schema import ModelConfig, ParallelConfig
from megatron_grit.config.values import shortened
from megatron_grit.convert.families.registry import family_of_model
from megatron_grit.convert.hf_out.exported import Checkpoint, Exported, read_checkpoint
from megatron_grit.convert.hf_out.files import write_files
from megatron_grit.convert.hf_out.reader import CheckpointReader
from megatron_grit.convert.param_map import Family, Kind
from megatron_grit.convert.peft.merge import Into, Reader, has_adapters, open_merged
from megatron_grit.convert.raw_safetensors import RawTensor, write_header
from megatron_grit.convert.scorer import is_left_out, scorer_outputs
from megatron_grit.errors import CheckpointError, ConfigError
from megatron_grit.models.names import is_added
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.store.digest import HashingFile, sha256_of_file
from megatron_grit.store.files import check_room
from megatron_grit.store.folder import OutputFolder
from megatron_grit.store.progress import Progress
from megatron_grit.training.checkpoint import resolve_checkpoint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SAFETENSORS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_BATCH_BYTES = 1 << 28
"""Tensors are read in batches of this size, or of an eighth of a file if that is less; a larger tensor alone."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the checkpoint, and the Hugging Face tensors it becomes."""

    name: str
    kind: Kind
    targets: tuple[RawTensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(target.num_bytes for target in self.targets)


def export_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    max_shard_size: str = "5GB",
    dtype: str = "keep",
    tokenizer: str | Path | None = None,
    adapters: Into | None = None,
    base: str | Path | None = None,
) -> Path:
    """Write a checkpoint as a Hugging Face directory.

    Runs in one process, on the CPU. A killed export resumes with the same call and gives the same bytes.

    Args:
        source: a checkpoint, or the output directory of a run for its newest one.
        target: directory to write; must not exist, or be empty.
        max_shard_size: largest weight file, such as 5GB or 500MB. A tensor is never split.
        dtype: keep, bf16, fp16 or fp32.
        tokenizer: the tokenizer that the model was trained with, with its tokenizer_config.json beside it. None: where
            the run found it, or else the file in the checkpoint.
        adapters: for a run with adapters, what they are merged into: trained, the base as during training, which
            ``adapter.quantize`` rounds to 4 bits; or original, the base as stored.
        base: for a run with adapters, where their base is now. None: where the run read it.

    Returns:
        The directory.

    Raises:
        CheckpointError: the checkpoint is damaged or of a shape that no family has.
        OutputError: the target is not empty, another process is writing it, or there is no room.
        ConfigError: an invalid size or dtype.
    """
    limit = parse_size(max_shard_size)
    if dtype != "keep" and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype} is not known; there are keep, {', '.join(DTYPES)}")
    path = resolve_checkpoint(source)
    if base is not None and adapters is None:
        raise ConfigError("--base has no meaning without --merge; leave it out")
    if has_adapters(path) != (adapters is not None):
        raise ConfigError(
            f"{path} holds a whole model; it is exported without --merge and --adapter-only"
            if adapters is not None
            else f"{path} holds adapters; give --merge for one model, or --adapter-only for an adapter that PEFT loads"
        )
    read = read_checkpoint(path, tokenizer)
    family = family_of_model(read.model)
    identity = _identity(path, limit, dtype, adapters)
    with (
        OutputFolder(Path(target), identity) as folder,
        parallel_job(ParallelConfig(device="cpu"), seed=0) as context,
    ):
        reader: Reader
        if adapters is None:
            reader = CheckpointReader(path, read.config, read.vocab_size, context)
        else:
            reader = open_merged(path, context, into=adapters, base=base)
        wanted = DTYPES.get(dtype, reader.dtype)
        shards = list(_plan_shards(family, read, reader, limit, wanted))
        written = sum(file.stat().st_size for file in folder.path.glob("*.safetensors"))
        check_room(target, sum(entry.num_bytes for shard in shards for entry in shard) - written)
        names = _shard_names(len(shards))
        with Progress(sum(map(len, shards)), "exporting", "tensor") as bar:
            for name, shard in zip(names, shards, strict=True):
                if folder.find(name) is not None:
                    bar.skip(len(shard))
                    continue
                with folder.writing(name) as file:
                    _write_shard(file, _batches(shard, limit), reader, read.model, wanted)
                bar.update(len(shard))
        exported = _describe(read, family, wanted, dict(zip(names, shards, strict=True)), reader)
        with folder.naming(folder.path):
            write_files(folder.path, exported)
        folder.publish()
        return Path(target)


def _describe(
    source: Checkpoint, family: Family, dtype: torch.dtype, files: dict[str, list[PlannedTensor]], reader: Reader
) -> Exported:
    """Facts about the written weights, for the other files."""
    targets = {target: name for name, shard in files.items() for entry in shard for target in entry.targets}
    return Exported(
        source=source,
        family=family,
        dtype=dtype,
        num_bytes=sum(target.num_bytes for target in targets),
        num_parameters=sum(math.prod(target.shape) for target in targets),
        weight_map={target.name: name for target, name in targets.items()},
        head={name: tensor.float() for name, tensor in reader.read(reader.head_names).items()},
    )


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB.

    Raises:
        ConfigError: not a size, or not above 0.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
    unit = None if match is None else _UNITS.get(match[2].upper())
    size = 0 if match is None or unit is None else int(float(match[1]) * unit)
    if size < 1:
        raise ConfigError(
            f"max_shard_size {shortened(text)} is no size; give a number of B, KB, MB, GB, KiB, MiB or GiB, as 5GB"
        )
    return size


def _identity(path: Path, limit: int, dtype: str, adapters: Into | None) -> dict[str, str | int]:
    """Everything the weight files depend on."""
    described = next(file for file in (path / "manifest.json", path / "state.json") if file.is_file())
    identity: dict[str, str | int] = {
        "checkpoint": sha256_of_file(described),
        "max_shard_size": limit,
        "dtype": dtype,
        "version": __version__,
    }
    return identity if adapters is None else identity | {"adapters": adapters}


def _plan_shards(
    family: Family, source: Checkpoint, reader: Reader, limit: int, dtype: torch.dtype
) -> Iterator[list[PlannedTensor]]:
    """The tensors of each file: layer by layer, as many as fit."""
    entries, model = [], source.model
    for name, kind, targets in scorer_outputs(family, model) if source.scores else family.outputs(model):
        if name not in reader.shapes:
            raise CheckpointError(f"tensor {name} is missing, which a {family.name} model has")
        parts = kind.megatron_to_hf(reader.shapes[name], model)
        described = [
            RawTensor(hf, _SAFETENSORS[dtype], tuple(part.shape), part.numel() * dtype.itemsize)
            for hf, part in zip(targets, parts, strict=True)
        ]
        entries.append(PlannedTensor(name, kind, tuple(described)))
    placed = {entry.name for entry in entries}
    left_out = [is_added, *([is_left_out] if source.scores else [])]
    left_over = sorted(name for name in reader.shapes.keys() - placed if not any(out(name) for out in left_out))
    if left_over:
        raise CheckpointError(f"tensor {left_over[0]} ({len(left_over)} in all) has no place in a {family.name} model")
    shard: list[PlannedTensor] = []
    for entry in sorted(entries, key=_place):
        if shard and sum(other.num_bytes for other in shard) + entry.num_bytes > limit:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _place(entry: PlannedTensor) -> tuple[int, int]:
    """Sort key: embedding, layers in their order, then the rest."""
    if entry.name.startswith("embedding."):
        return 0, 0
    layer = re.match(r"decoder\.layers\.(\d+)\.", entry.name)
    return (2, 0) if layer is None else (1, int(layer[1]))


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(
    file: HashingFile, batches: Sequence[list[PlannedTensor]], reader: Reader, model: ModelConfig, dtype: torch.dtype
) -> None:
    targets = [target for batch in batches for entry in batch for target in entry.targets]
    write_header(file, targets, {"format": "pt"})
    for batch in batches:
        tensors = reader.read([entry.name for entry in batch])
        for entry in batch:
            parts = entry.kind.megatron_to_hf(tensors.pop(entry.name), model)
            for target, part in zip(entry.targets, parts, strict=True):
                file.write(_bytes_of(target.name, part, dtype))


def _batches(shard: Sequence[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """The tensors of a file in batches that are read together."""
    batches: list[list[PlannedTensor]] = [[]]
    most = min(_BATCH_BYTES, limit // 8)
    for entry in shard:
        if batches[-1] and sum(other.num_bytes for other in batches[-1]) + entry.num_bytes > most:
            batches.append([])
        batches[-1].append(entry)
    return batches


def _bytes_of(name: str, tensor: Tensor, dtype: torch.dtype) -> Any:
    """The bytes of a tensor in a file.

    Raises:
        CheckpointError: a value overflows fp16.
    """
    converted = tensor.to(dtype).contiguous()
    if dtype is torch.float16 and tensor.dtype is not dtype and (converted.isinf() & ~tensor.isinf()).any():
        raise CheckpointError(
            f"tensor {name} has numbers above 65504, which fp16 does not hold; export as bf16 or fp32"
        )
    return converted.flatten().view(torch.uint8).numpy().data
