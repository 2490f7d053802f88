"""What caches of log-probabilities are known by: another model must not read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_grit.config.schema import RunConfig
from megatron_grit.training.reference.records import ReferenceLogProbs
from megatron_grit.training.reference.tokens import TokenLogProbs
from tests.rows import tiny_config

OTHERS: dict[str, dict[str, object]] = {
    "model": {"attention_scale": 30.0, "norm_epsilon": 0.5, "rotary_base": 5e4, "sliding_window": 8, "moe_top_k": 1},
    "adapter": {"alpha": 8.0, "rslora": True, "quantize": "nf4"},
    "training": {"precision": "bf16"},
}
SAME: dict[str, dict[str, object]] = {
    "model": {"attention_backend": "sdpa", "hidden_dropout": 0.1, "architecture": "LlamaForCausalLM"},
    "adapter": {"dropout": 0.1, "load": "elsewhere"},
    "training": {"seed": 1, "recompute": "full"},
}


class _Sources(list[range]):
    """One source of four records."""

    longest_segment = longest_unit = 64
    rules = SimpleNamespace(policy="stop")

    def identity(self, indices: list[int]) -> list[str]:
        return ["of the data"]

    def meta(self, number: int) -> Any:
        return SimpleNamespace(num_records=4, longest_segment_tokens=16)

    def __getitem__(self, number: Any) -> Any:
        return SimpleNamespace(lengths=lambda: np.full(4, 16))


def _of_records(config: RunConfig, weights: str) -> list[str]:
    stream: Any = SimpleNamespace(sources=_Sources([range(4)]), width=2)
    context: Any = SimpleNamespace()
    found = ReferenceLogProbs(config, context, stream, weights, None)
    return [str(source.folder) for source in found._sources]


def _of_tokens(config: RunConfig, weights: str) -> list[str]:
    stream: Any = SimpleNamespace(sources=_Sources([range(4)]))
    context: Any = SimpleNamespace()
    found = TokenLogProbs(config, context, stream, weights, with_adapters=False)
    return [str(folder) for folder in found._folders]


@pytest.mark.parametrize("folders", [_of_records, _of_tokens])
def test_a_cache_is_of_one_model(folders: Callable[[RunConfig, str], list[str]], tmp_path: Path) -> None:
    """Every option that changes its outputs names another cache, and no other option does."""

    def made(section: str = "training", name: str = "seed", value: object = 42, weights: str = "some") -> list[str]:
        config = tiny_config()
        config.data.cache_dir = str(tmp_path)
        setattr(getattr(config, section), name, value)
        return folders(config, weights)

    first = made()
    assert made(weights="others") != first
    for section, options in OTHERS.items():
        for name, value in options.items():
            assert made(section, name, value) != first, f"{section}.{name}"
    for section, options in SAME.items():
        for name, value in options.items():
            assert made(section, name, value) == first, f"{section}.{name}"
