"""Ranks and scalings of a run's adapters, projection by projection.

A projection's name is ``decoder.layers.1.self_attention.q_proj``, ``decoder.layers.1.mlp.up_proj``, or that of an
expert, ``decoder.layers.1.mlp.experts.local_experts.3.up_proj``.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from megatron_grit.config.schema import AdapterConfig, ModelConfig
from megatron_grit.config.shape import dense_layers

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def projection_name(linear: str, part: str) -> str:
    """The name of a projection.

    Args:
        linear: name of the engine's layer that holds it, decoder.layers.1.mlp.linear_fc1.
        part: q_proj, up_proj ...
    """
    return f"{linear.rpartition('.')[0]}.{part}"


def projection_names(model: ModelConfig, parts: tuple[str, ...]) -> Iterator[str]:
    """The projections of a model that are among ``parts``."""
    for layer in range(model.num_layers):
        places = (
            ["mlp"]
            if layer in dense_layers(model)
            else [
                *(f"mlp.experts.local_experts.{number}" for number in range(model.num_experts or 0)),
                *(["mlp.shared_experts"] if model.moe_shared_ffn_hidden_size else []),
            ]
        )
        for part in parts:
            for place in ["self_attention"] if part in ATTENTION else places:
                yield f"decoder.layers.{layer}.{place}.{part}"


def rank_of(adapter: AdapterConfig, name: str) -> int:
    """Rank of a projection's adapter: the first entry of ``adapter.rank_pattern`` that fits, else ``adapter.rank``."""
    return int(_first(tuple(adapter.rank_pattern), name, adapter.rank))


def alpha_of(adapter: AdapterConfig, name: str) -> float:
    """Alpha of a projection's adapter, likewise."""
    return _first(tuple(adapter.alpha_pattern), name, adapter.alpha)


def scaling_of(adapter: AdapterConfig, name: str) -> float:
    """What a projection's adapter is multiplied by: alpha / rank, or alpha / sqrt(rank)."""
    rank = rank_of(adapter, name)
    return alpha_of(adapter, name) / (math.sqrt(rank) if adapter.rslora else rank)


def patterns_of(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Patterns, in the order in which they count, that give names their values where all others have a default.

    Args:
        values: of modules by name.
        default: value of names that no pattern fits.
    """
    specific: dict[str, float] = {}
    common: dict[str, float] = {}
    leaves: dict[str, list[str]] = defaultdict(list)
    for name in values:
        leaves[name.rpartition(".")[2]].append(name)
    for leaf, names in leaves.items():
        most = Counter(values[name] for name in names).most_common(1)[0][0]
        specific |= {name: values[name] for name in names if values[name] != most}
        if most != default:
            common[leaf] = most
    return specific | common


@functools.lru_cache(maxsize=64)
def read_entry(entry: str) -> tuple[re.Pattern[str], float]:
    """Pattern and value of ``PATTERN=VALUE``: PEFT's rule, a regular expression for the end of a name, from a dot on.

    Raises:
        ValueError: not of this form.
    """
    pattern, _, value = entry.rpartition("=")
    if not pattern:
        raise ValueError(f"{entry!r} is not PATTERN=VALUE")
    try:
        return re.compile(rf"(.*\.)?({pattern})"), float(value)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None


@functools.lru_cache(maxsize=1 << 16)
def _first(entries: tuple[str, ...], name: str, default: float) -> float:
    for entry in entries:
        pattern, value = read_entry(entry)
        if pattern.fullmatch(name):
            return value
    return default
