"""The one place that probes versions and optional packages.

Two engines are supported: megatron-core 0.16 (Python 3.11) and 0.17 to 0.19 (Python 3.12 and newer). What differs
between them is decided here and nowhere else.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from importlib import metadata
from typing import Any


@functools.cache
def engine_version() -> tuple[int, int]:
    """Major and minor version of megatron-core."""
    major, minor = metadata.version("megatron-core").split(".")[:2]
    return int(major), int(minor)


def installed_versions() -> dict[str, str]:
    """Versions that a checkpoint records."""
    return {name: metadata.version(name) for name in ("torch", "megatron-core")}


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


@functools.cache
def have_varlen_attention() -> bool:
    """Whether torch carries variable-length flash attention (2.10 and newer)."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def gpt_model_class() -> type:
    """The engine's decoder class.

    From 0.19 on, GPTModel logs that HybridModel will take its place. Its state-dict names are the ones that
    checkpoints in the field carry, so it stays the base; when it goes, this is the line to change.
    """
    from megatron.core.models.gpt import gpt_model

    if engine_version() >= (0, 19):
        gpt_model.logger.addFilter(_without_deprecation)
    return gpt_model.GPTModel


def _without_deprecation(record: logging.LogRecord) -> bool:
    return "GPTModel IS DEPRECATED" not in record.getMessage()


def te_core_attention_class() -> type:
    """TransformerEngine's dot-product attention as the engine wraps it."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


def take_balancing_loss() -> Any | None:
    """The expert balancing loss that the routers of this process logged since the last call, and forget it.

    The engine keeps it for the life of the process in a tensor of as many layers as the first model had.

    Returns:
        One value a layer, summed over micro-batches and without its coefficient; None where no router logged any.
    """
    name = "load_balancing_loss"
    if engine_version() >= (0, 19):
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        entry = get_moe_metrics_tracker().metrics.pop(name, None)
        return None if entry is None else entry.values
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    entry = get_moe_layer_wise_logging_tracker().pop(name, None)
    return None if entry is None else entry["values"]
