"""The one place that probes versions and optional packages.

Two engines are supported: megatron-core 0.16 (Python 3.11) and 0.17 to 0.19 (Python 3.12 and newer). What differs
between them is decided here and nowhere else.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_grit.errors import ConfigError


@functools.cache
def engine_version() -> tuple[int, int]:
    """Major and minor version of megatron-core."""
    major, minor = metadata.version("megatron-core").split(".")[:2]
    return int(major), int(minor)


def installed_versions() -> dict[str, str]:
    """Versions that a checkpoint records."""
    return {name: metadata.version(name) for name in ("torch", "megatron-core")}


def install_command(extra: str) -> str:
    """What a user types to get the packages of an extra of pyproject.toml: of the installed package, or of a checkout
    that runs without being installed."""
    try:
        metadata.distribution("megatron-grit")
    except metadata.PackageNotFoundError:
        return f"pip install -e '{Path(__file__).parents[1]}[{extra}]'"
    return f"pip install 'megatron-grit[{extra}]'"


@contextmanager
def needed(what: str, package: str, extra: str) -> Iterator[None]:
    """Around the late import of an optional package.

    Args:
        what: needs it, with its verb: "plots need".
        package: as pip names it, but for faiss, whose packages have several names.
        extra: that has it.

    Raises:
        ConfigError: it is not installed, or fails to import, with the reason; names the command that installs it.
    """
    try:
        yield
    except ImportError as error:
        module = (error.name or "").partition(".")[0]
        is_missing = isinstance(error, ModuleNotFoundError) and module.replace("_", "-") == package
        reason = "" if is_missing else f", which fails to import ({str(error).partition(chr(10))[0]})"
        raise ConfigError(f"{what} {package}{reason}: {install_command(extra)}") from error


@functools.cache
def have_transformer_engine() -> bool:
    """Whether TransformerEngine imports. It may be installed and still fail, on a machine without its driver."""
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def transformer_engine_version() -> str | None:
    """None where it does not import."""
    if not have_transformer_engine():
        return None
    import transformer_engine

    return str(transformer_engine.__version__)


@functools.cache
def have_varlen_attention() -> bool:
    """Whether torch's variable-length flash attention does what is needed here, and the GPU runs it.

    torch 2.10 has it without windows, a scale and fewer key than query heads; 2.12 with all three. Its kernels are for
    compute capability 8.0 (A100) and newer.
    """
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    import torch
    from torch.nn.attention.varlen import varlen_attn

    if not {"window_size", "scale", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def te_core_attention_class() -> type:
    """TransformerEngine's dot-product attention as the engine wraps it."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


def feed_forward_spec(submodules: Any) -> Any:
    """How a layer's specification names the engine's feed-forward layer: from 0.18 on, a function that builds it.

    Args:
        submodules: the layer's MLPSubmodules.
    """
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    if hasattr(MLP, "as_mlp_submodule"):
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def let_routers_run_without_transformer_engine() -> None:
    """On every device: the router of 0.16 asks whether a name is None that it never set (moe_utils.py:1192)."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def take_balancing_loss() -> Any | None:
    """The expert balancing loss that the routers of this process logged since the last call, and forget it.

    The engine keeps what routers log for the life of the process in tensors of as many layers as the first model had;
    the z-loss, which is logged there as well, is dropped.

    Returns:
        One value a layer, summed over micro-batches and without its coefficient; None where no router logged any.
    """
    if engine_version() >= (0, 19):
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        logged: dict[str, Any] = get_moe_metrics_tracker().metrics
        balance = logged.get("load_balancing_loss")
        values = None if balance is None else balance.values
    else:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        logged = get_moe_layer_wise_logging_tracker()
        values = logged.get("load_balancing_loss", {}).get("values")
    logged.clear()
    return values


def plan_sharded_save(state: dict[str, Any], folder: Path) -> Any:
    """The engine's request to write a sharded state dict, with nothing written yet but its common part. Collective.

    The engine hands the results of a forked writer back through a manager process, which it starts at the first save by
    running the main module again and which outlives a killed run. Here a thread writes, so a plain queue takes its
    place.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not isinstance(filesystem_async._results_queue, queue.Queue):
        filesystem_async._results_queue = queue.Queue()
    options: dict[str, Any] = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"  # the default needs nvidia-resiliency-ext
    return dist_checkpointing.save(state, str(folder), async_sharded_save=True, **options)


def write_sharded_file(request: Any, bucket: Any, number: int) -> list[Any]:
    """Write one file of a planned save and flush it to disk; any thread may.

    Args:
        request: of :func:`plan_sharded_save`.
        bucket: one of its write buckets, with tensors on the CPU.
        number: the bucket's place among them.

    Returns:
        What the request's finalize functions want to know of the file.

    Raises:
        Exception: whatever went wrong, an OSError most likely.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    results: queue.Queue[Any] = queue.Queue()
    pending: queue.Queue[int] = queue.Queue()
    pending.put(number)
    transforms = request.async_fn.args[0]
    FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, pending, True)
    _, written = results.get()
    if isinstance(written, BaseException):
        raise written
    return list(written)


def planned_writes(request: Any) -> tuple[list[Any], list[Any]]:
    """What a planned save would write: (item, bytes) of small objects and (item, tensor) of the others.

    Args:
        request: of :func:`plan_sharded_save`; its tensors may be on the meta device.
    """
    buckets = [contents for _, _, contents in request.async_fn_args[1]]
    return [each for small, _ in buckets for each in small], [each for _, large in buckets for each in large]


def set_planned_files(request: Any, num_files: int) -> None:
    """Have a planned save finish with the results of so many files, however many the engine meant to write."""
    request.async_fn_args[1][:] = [None] * num_files


def chunk_of(item: Any) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Name on disk, offsets in the whole tensor and sizes of what a write item of a tensor stands for."""
    chunk = item.tensor_data.chunk
    return item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes)


def written_part(result: Any) -> list[int]:
    """Bytes of an item that was written, and where it is in its file: offset and length."""
    return [result.size_in_bytes, result.storage_data.offset, result.storage_data.length]


def written_before(item: Any, file_name: str, part: list[int]) -> Any:
    """The result of writing an item, made again of :func:`written_part`."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.storage import WriteResult

    size, offset, length = part
    where = _StorageInfo(relative_path=file_name, offset=offset, length=length)
    return WriteResult(index=item.index, size_in_bytes=size, storage_data=where)
