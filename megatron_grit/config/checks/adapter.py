"""What adapters a configuration asks for, and where it contradicts itself about them or about what is frozen."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from megatron_grit.config.adapter_shape import projection_names, read_entry
from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.config.shape import has_attention_output_bias, has_mlp_bias, has_qkv_bias

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names of Hugging Face's linear layers that may have an adapter."""
_WORDS = "embedding.word_embeddings.weight"


def model_projections(model: ModelConfig) -> tuple[str, ...]:
    """Those of :data:`PROJECTIONS` that a model has."""
    return tuple(name for name in PROJECTIONS if name != "gate_proj" or model.activation == "swiglu")


def adapter_targets(config: RunConfig) -> tuple[str, ...]:
    """Projections that get an adapter; none without ``adapter.kind``."""
    if config.adapter.kind == "none":
        return ()
    wanted = config.adapter.targets
    return tuple(name for name in model_projections(config.model) if wanted is None or name in wanted)


def trains_output_layer(config: RunConfig) -> bool:
    """Whether the language-model head is trained, as far as patterns tell."""
    training, name = config.training, "output_layer.weight"
    selective = config.adapter.kind != "none" or bool(training.trainable)
    trained = not selective or _names(training.trainable, "head", name)
    return trained and not _names(training.frozen, "head", name)


def adapter_problems(config: RunConfig) -> Iterator[Problem]:
    """Contradictions about adapters and about what is trained."""
    adapter, training = config.adapter, config.training
    if adapter.targets is not None:
        yield from _targets(adapter.targets, config.model)
    yield from _patterns(config)
    if adapter.kind != "none" and config.checkpoint.load is None and config.model.pretrained is None:
        yield Problem(
            "adapter.kind",
            f"adapter.kind {adapter.kind} needs a model to stand beside; set model.pretrained or checkpoint.load",
        )
    if adapter.kind == "none":
        if adapter.quantize != "none":
            yield Problem(
                "adapter.quantize",
                f"adapter.quantize {adapter.quantize} needs adapters, since quantised weights cannot be trained; set "
                "adapter.kind to lora",
            )
        if adapter.load is not None:
            yield Problem("adapter.load", "adapter.load needs adapter.kind lora or dora")
    selective = adapter.kind != "none" or training.trainable
    if selective and _has_new_tokens(config) and not _names(training.trainable, "embeddings", _WORDS):
        yield Problem(
            "training.trainable",
            "embedding.brackets speca and embedding.side_tokens put in new tokens, whose embeddings would stay frozen; "
            "add embeddings to training.trainable",
        )
    words = {*training.trainable, *training.frozen}
    if "biases" in words and not _has_biases(config):
        key = "trainable" if "biases" in training.trainable else "frozen"
        yield Problem(f"training.{key}", f"training.{key}: this model has no biases (BitFit); use norms instead")
    if "head" in words and config.model.tie_embeddings:
        key = "trainable" if "head" in training.trainable else "frozen"
        yield Problem(
            f"training.{key}",
            f"training.{key}: the output layer of this model is its input embedding (model.tie_embeddings); use "
            "embeddings instead of head",
        )


def _targets(targets: list[str], model: ModelConfig) -> Iterator[Problem]:
    if not targets:
        yield Problem("adapter.targets", "adapter.targets is empty; name projections or set it to null for all")
    for name in targets:
        if name not in PROJECTIONS:
            yield Problem("adapter.targets", f"adapter.targets: {name} is none of {', '.join(PROJECTIONS)}")
        elif name not in model_projections(model):
            yield Problem(
                "adapter.targets",
                f"adapter.targets: the model has no {name}, model.activation {model.activation} is not gated; leave it "
                "out or set adapter.targets to null for all that the model has",
            )


def _patterns(config: RunConfig) -> Iterator[Problem]:
    """Entries that are none, and those that fit no projection with an adapter."""
    for key, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        for entry in getattr(config.adapter, key):
            where = f"adapter.{key}"
            try:
                pattern, value = read_entry(entry)
            except ValueError as error:
                yield Problem(where, f"{where}: {error}; give entries such as q_proj=4")
                continue
            if not 0 < value < float("inf") or kind(value) != value:
                wanted = "a whole number of at least 1" if kind is int else "a number above 0"
                yield Problem(where, f"{where}: {entry!r} gives {value:g}; give {wanted}")
            elif not any(map(pattern.fullmatch, projection_names(config.model, adapter_targets(config)))):
                yield Problem(
                    where,
                    f"{where}: {entry!r} fits no projection with an adapter; their names are such as "
                    "decoder.layers.0.self_attention.q_proj",
                )


def _has_biases(config: RunConfig) -> bool:
    model = config.model
    linears = (has_qkv_bias(model), has_attention_output_bias(model), has_mlp_bias(model), model.add_output_bias)
    return any(linears) or model.normalization == "layernorm"


def _has_new_tokens(config: RunConfig) -> bool:
    return config.embedding.brackets == "speca" or config.embedding.side_tokens


def _names(patterns: list[str], preset: str, name: str) -> bool:
    """Whether patterns take a parameter, by its name or a word that stands for it."""
    return preset in patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
