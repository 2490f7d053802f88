"""What a configuration of adapters and frozen parameters may not say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_grit.config.checks.adapter import adapter_problems
from megatron_grit.config.checks.ranges import range_problems
from megatron_grit.config.schema import RunConfig
from tests.rows import tiny_config


def lora(**model: object) -> RunConfig:
    config = tiny_config(**model)
    config.adapter.kind, config.checkpoint.load = "lora", "base"
    return config


def change(section: str, key: str, value: object) -> Callable[[RunConfig], None]:
    return lambda config: setattr(getattr(config, section), key, value)


WRONG: dict[str, tuple[Callable[[RunConfig], None], str]] = {
    "no base": (change("checkpoint", "load", None), "needs a model to stand beside"),
    "no projection": (change("adapter", "targets", ["router"]), "router is none of q_proj"),
    "no gate": (change("adapter", "targets", ["gate_proj"]), "the model has no gate_proj"),
    "no value": (change("adapter", "rank_pattern", ["q_proj"]), "'q_proj' is not PATTERN=VALUE"),
    "half a rank": (change("adapter", "rank_pattern", ["q_proj=1.5"]), "give a whole number of at least 1"),
    "no alpha": (change("adapter", "alpha_pattern", ["q_proj=nan"]), "give a number above 0"),
    "no expression": (change("adapter", "alpha_pattern", ["(=3"]), "'(' is no regular expression"),
    "no such layer": (change("adapter", "rank_pattern", ["layers.9.mlp.up_proj=3"]), "fits no projection"),
    "no targets": (change("adapter", "targets", []), "adapter.targets is empty"),
    "quantised": (
        lambda c: (change("adapter", "kind", "none")(c), change("adapter", "quantize", "nf4")(c))[0],
        "needs adapters",
    ),
    "no adapters to load": (
        lambda c: (change("adapter", "kind", "none")(c), change("adapter", "load", "x")(c))[0],
        "adapter.load needs",
    ),
    "no biases": (change("training", "trainable", ["biases"]), "use norms instead"),
    "tied head": (change("training", "frozen", ["head"]), "use embeddings instead of head"),
    "new tokens": (change("embedding", "side_tokens", True), "add embeddings to training.trainable"),
}


@pytest.mark.parametrize("case", WRONG)
def test_contradictions(case: str) -> None:
    config = lora(activation="gelu", tie_embeddings=True)
    assert not list(adapter_problems(config))
    damage, words = WRONG[case]
    damage(config)
    assert words in " ".join(problem.message for problem in adapter_problems(config))


@pytest.mark.parametrize(("key", "value"), [("rank", 0), ("alpha", 0.0), ("dropout", 1.0), ("dropout", -0.1)])
def test_ranges(key: str, value: float) -> None:
    config = lora()
    setattr(config.adapter, key, value)
    assert [problem.key for problem in range_problems(config)] == [f"adapter.{key}"]
