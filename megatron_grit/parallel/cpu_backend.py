"""Everything that megatron-core needs replaced to run without a GPU.

The engine asks for CUDA devices, streams and random states by name. On a machine without a GPU each of those
requests is answered here by its CPU counterpart, once per process. The lines named
are of megatron-core 0.16.1; 0.19.2 needs the same list. Nothing here runs when a GPU is used.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = ("zeros", "ones", "empty", "tensor", "empty_like", "zeros_like", "ones_like", "arange", "full")
_installed = False


def install() -> None:
    """Answer the engine's CUDA calls on the CPU. Later calls do nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    # jit_fuser is torch.compile, which compiles longer than a small model trains (first step 11.8 s, not 0.04 s).
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "torch._dynamo" in sys.modules:  # the engine was imported first, and what it decorated stays decorated
        torch.compiler.set_stance("force_eager")
    # torch keeps a set of its factory functions, made at first use, for `with torch.device(...)`. Made after they are
    # replaced it would hold the replacements, and a model that transformers builds on the meta device would come out
    # with uninitialised buffers.
    _device_constructors()
    _replace_device_calls()
    _replace_factories()
    _replace_streams()
    _replace_random_state()
    _replace_tensor_type()
    _replace_engine_functions()


def _replace_device_calls() -> None:
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]  # layers.py:261
    torch.cuda.set_device = lambda *_: None  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]  # p2p_communication.py:398
    torch.cuda.empty_cache = lambda: None  # type: ignore[assignment]
    # rope_utils.py:63 under context parallelism, the gradient scaler, offloading
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    torch.Tensor.record_stream = lambda self, _: None  # type: ignore[method-assign, assignment]


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _replace_factories() -> None:
    # schedules.py:596, 983, 2138; transformer/utils.py:35; optimizer.py:473; clip_grads.py:90; distributed buffers
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


class _Stream:
    """A stream whose work is always done."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Event:
    """An event that has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: _Event) -> float:
        return 0.0


def _replace_streams() -> None:
    torch.cuda.Stream = _Stream  # type: ignore[assignment, misc]  # token_dispatcher.py:445
    torch.cuda.Event = _Event  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda *_: _Stream()  # type: ignore[assignment, return-value]
    torch.cuda.default_stream = lambda *_: _Stream()  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda *_: contextlib.nullcontext()  # type: ignore[assignment, return-value]


def _replace_random_state() -> None:
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)  # type: ignore[assignment]
    # The tracker warns at each fork that the CPU state moved; here that is the state it is meant to move.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _replace_tensor_type() -> None:
    # optimizer.py:671, distrib_optimizer.py:361 and clip_grads.py:167 accept torch.cuda.FloatTensor and nothing else
    original = torch.Tensor.type

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if not args and not kwargs and isinstance(result, str) and not result.startswith("torch.cuda"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _replace_engine_functions() -> None:
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # The engine's own returns CPU tensors unchanged, so all_to_all gets tensors as split sizes (mappings.py:444).
        if not isinstance(tensor, Tensor):
            return tensor
        return tensor.cpu().numpy() if as_numpy else tensor.cpu()

    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu
    _replace_uneven_exchanges()


def _replace_uneven_exchanges() -> None:
    """Tokens of experts that are split over ranks come in different numbers from each: gloo takes equal ones only."""
    import megatron.core.tensor_parallel.mappings as mappings

    gather_evenly = mappings._gather_along_first_dim
    scatter_evenly = mappings._reduce_scatter_along_first_dim

    def gather(values: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
        if output_split_sizes is None:
            return gather_evenly(values, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = values.new_zeros(max(sizes), *values.shape[1:])
        padded[: values.shape[0]] = values
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def scatter(values: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
        if input_split_sizes is None:
            return scatter_evenly(values, group, input_split_sizes, use_global_buffer)
        total = values.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].contiguous()

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = scatter
