"""Which device a process computes on, and whether this node has what its processes need."""

from __future__ import annotations

import os

import torch

from megatron_grit.errors import ConfigError
from megatron_grit.store.environment import local_rank, local_size
from megatron_grit.store.logs import get_logger


def select_device(wanted: str, option: str = "parallel.device") -> torch.device:
    """The local rank's GPU, or the CPU.

    Args:
        wanted: auto, cpu or cuda.
        option: where the user said so, for messages.

    Raises:
        ConfigError: cuda is wanted and there is none, or none for this local rank.
    """
    if wanted == "cpu":
        # The engine asks torch whether CUDA is there, not us, so it must find none.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return torch.device("cpu")
    if (problem := _problem(wanted, option, local_rank() + 1)) is not None:
        raise ConfigError(problem)
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def device_errors(wanted: str, option: str = "parallel.device") -> list[ConfigError]:
    """What :func:`select_device` would refuse in one of the processes of this node; arguments as there. Nothing where
    it is not known how many there will be."""
    size = local_size()
    problem = None if size is None else _problem(wanted, option, size)
    return [] if problem is None else [ConfigError(problem)]


def warn_of_slow_bf16(device: torch.device, precision: str, option: str) -> None:
    """Say once, on rank 0, that ``option`` is better fp32 on a CPU that has no instructions for bf16."""
    if device.type == "cpu" and precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        get_logger(__name__).info(f"this processor has no instructions for bf16; {option} fp32 is faster here")


def _problem(wanted: str, option: str, count: int) -> str | None:
    """Why this node has no device for ``count`` processes."""
    if wanted == "cpu":
        return None
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == 0:
        return f"{option} is cuda, but torch finds no GPU; use auto or cpu" if wanted == "cuda" else None
    if count > found:
        return (
            f"{count} processes on this node need a GPU each, but torch finds {found}; start as many processes on a "
            "node, or look at CUDA_VISIBLE_DEVICES"
        )
    return None
