"""Adapters written in PEFT's format: adapter_config.json and adapter_model.safetensors.

A fused projection (GPT-NeoX's query_key_value) has one adapter in PEFT and three here: their ranks are put one after
the other, with blocks of lora_B.

Experts are written by the names of transformers 4, one module each. PEFT turns them into those of transformers 5,
which holds all experts of a layer in one parameter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_grit.config.adapter_shape import alpha_of, patterns_of, projection_name, rank_of
from megatron_grit.config.schema import AdapterConfig, ModelConfig
from megatron_grit.config.shape import dense_layers
from megatron_grit.convert.families.registry import family_of_model
from megatron_grit.convert.peft.sites import Site, WholeAdapter, adapter_sites, part_shape, resized, tied_output
from megatron_grit.errors import CheckpointError
from megatron_grit.store.files import replacing, write_json
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def is_peft_folder(path: str | Path) -> bool:
    """Whether there is an adapter in PEFT's format."""
    return (Path(path) / CONFIG).is_file()


def write_peft(path: str | Path, adapter: WholeAdapter, model: ModelConfig, base: str | None = None) -> Path:
    """Write an adapter so that ``PeftModel.from_pretrained`` loads it onto the exported model.

    Args:
        path: directory; files of these names in it are replaced.
        adapter: what to write, in the types that its tensors have.
        model: the model that it belongs to.
        base: name or directory of the Hugging Face model, for ``base_model_name_or_path``.

    Returns:
        ``path``.

    Raises:
        CheckpointError: PEFT has no form for it; says what to export instead.
    """
    from safetensors.torch import save

    settings, tensors = to_peft(adapter, model)
    settings["base_model_name_or_path"] = base
    path = Path(path)
    blob = save(
        {name: tensor.detach().clone().contiguous() for name, tensor in sorted(tensors.items())}, {"format": "pt"}
    )
    with replacing(path / WEIGHTS, "wb") as file:
        file.write(blob)
    write_json(path / CONFIG, settings)
    return path


def to_peft(adapter: WholeAdapter, model: ModelConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(contents of adapter_config.json, tensors of adapter_model.safetensors).

    Raises:
        CheckpointError: PEFT has no form for it.
    """
    config, sites = adapter.config, adapter_sites(model)
    rank, has_experts = _rank(adapter, sites)
    scaling = config.alpha / (math.sqrt(rank) if config.rslora else rank)
    # PEFT makes one adapter of gate and up, of twice the rank and twice the alpha: with square roots another scaling.
    is_plain = config.rslora and has_experts
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": config.alpha * (math.sqrt(rank) if is_plain else 1),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora and not is_plain,
        "use_dora": config.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    dtype = next(iter(adapter.tensors.values())).dtype if adapter.tensors else torch.float32
    tensors: dict[str, Tensor] = {}
    adapted: dict[str, tuple[int, float]] = {}
    for site in sites:
        parts = {part: factors for part in site.parts if (factors := adapter.part(site.linear, part))}
        if not parts and not (has_experts and site.expert is not None):
            continue
        if model.num_experts is not None and site.leaf in ("linear_fc1", "linear_fc2"):
            _check_experts(config, model)
        if site.expert is not None:
            # transformers 5 holds gate and up in one parameter, and PEFT reads adapters of experts only where all of
            # their projections have one: those that are missing add nothing.
            parts = {
                part: resized(parts[part], rank, adapter.scaling(site.linear, part), scaling)
                if part in parts
                else _nothing(part_shape(site, part, model), rank, dtype)
                for part in site.parts
            }
            settings["lora_dropout"] = 0.0  # PEFT refuses another one for experts
        if site.is_fused:
            written = _fused(site, parts, adapter, model)
        else:
            written = {name: parts[part] for part, name in zip(site.parts, site.modules, strict=True) if part in parts}
        for module, factors in written.items():
            own = len(factors["lora_A"])
            adapted[module] = own, _alpha(adapter, site, module, own) * (math.sqrt(own) if is_plain else 1)
            for factor, tensor in factors.items():
                suffix = "lora_magnitude_vector" if factor == "magnitude" else f"{factor}.weight"
                tensors[f"{PREFIX}{module}.{suffix}"] = tensor
    if config.dropout and not settings["lora_dropout"]:
        log.info("PEFT has no dropout for adapters of experts; adapter_config.json says 0")
    settings["rank_pattern"] = patterns_of({name: own for name, (own, _) in adapted.items()}, rank)
    settings["alpha_pattern"] = patterns_of(
        {name: alpha for name, (_, alpha) in adapted.items()}, settings["lora_alpha"]
    )
    settings["target_modules"] = sorted({module.rpartition(".")[2] for module in adapted})
    settings["modules_to_save"] = _modules_to_save(adapter, model, adapted)
    tensors |= {PREFIX + name: tensor for name, tensor in adapter.trained.items()}
    words = _word_embeddings(model)
    if model.tie_embeddings and words in adapter.trained:
        # PEFT makes copies of both and asks for both.
        settings["ensure_weight_tying"] = True
        tensors[PREFIX + tied_output(model)] = adapter.trained[words]
    return settings, tensors


def _fused(
    site: Site,
    parts: Mapping[str, dict[str, Tensor]],
    adapter: WholeAdapter,
    model: ModelConfig,
) -> dict[str, dict[str, Tensor]]:
    """Adapters of several projections as one of the module that holds them, whose rank is the sum of theirs and whose
    scaling is the first one's."""
    (module,) = site.modules
    factors = {"lora_A": torch.cat([part["lora_A"] for part in parts.values()])}
    rows, first = [], 0
    scaling = adapter.scaling(site.linear, next(iter(parts)))
    for part in site.parts:
        block = factors["lora_A"].new_zeros(part_shape(site, part, model)[0], len(factors["lora_A"]))
        if part in parts:
            rank = len(parts[part]["lora_A"])
            own = resized(parts[part], rank, adapter.scaling(site.linear, part), scaling)
            block[:, first : first + rank] = own["lora_B"]
            first += rank
        rows.append(block)
    factors["lora_B"] = site.join(rows, model)
    if adapter.config.kind == "dora":
        if len(parts) < len(site.parts):
            raise CheckpointError(
                f"{site.linear}: DoRA of {', '.join(parts)} alone has no form in PEFT, where {module} is one module; "
                "export the merged model instead"
            )
        factors["magnitude"] = site.join([part["magnitude"] for part in parts.values()], model)
    return {module: factors}


def _alpha(adapter: WholeAdapter, site: Site, module: str, rank: int) -> float:
    """Alpha of a written module."""
    config = adapter.config
    if site.expert is not None:
        return config.alpha
    if not site.is_fused:
        return alpha_of(config, projection_name(site.linear, site.parts[site.modules.index(module)]))
    first = projection_name(site.linear, next(part for part in site.parts if adapter.part(site.linear, part)))
    times = rank / rank_of(config, first)
    return alpha_of(config, first) * (math.sqrt(times) if config.rslora else times)


def _rank(adapter: WholeAdapter, sites: Sequence[Site]) -> tuple[int, bool]:
    """``r`` of adapter_config.json, and whether experts have adapters: then it is the highest of theirs, since PEFT has
    one rank for them."""
    found = [adapter.part(site.linear, part) for site in sites if site.expert is not None for part in site.parts]
    ranks = [len(factors["lora_A"]) for factors in found if factors]
    return max(ranks, default=adapter.config.rank), bool(ranks)


def _nothing(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    rows, width = shape
    return {"lora_A": torch.zeros(rank, width, dtype=dtype), "lora_B": torch.zeros(rows, rank, dtype=dtype)}


def _check_experts(config: AdapterConfig, model: ModelConfig) -> None:
    """Refuse what PEFT cannot load onto a mixture in transformers 5."""
    if config.kind == "dora":
        raise CheckpointError("PEFT has no DoRA for experts; export the merged model instead")
    if model.moe_shared_ffn_hidden_size is not None or dense_layers(model):
        raise CheckpointError(
            "PEFT gives adapters named gate_proj, up_proj or down_proj to experts alone, and this model has other "
            "layers of these names (shared experts or layers without experts); export the merged model, or train "
            "adapters of attention only"
        )


def _word_embeddings(model: ModelConfig) -> str:
    outputs = family_of_model(model).outputs(model)
    return next(targets[0] for name, _, targets in outputs if name == "embedding.word_embeddings.weight")


def _modules_to_save(adapter: WholeAdapter, model: ModelConfig, adapted: Collection[str]) -> list[str] | None:
    """Modules that are saved whole, by their full names."""
    modules = sorted({name.rpartition(".")[0] for name in adapter.trained})
    complete: dict[str, set[str]] = defaultdict(set)
    for _, _, targets in family_of_model(model).outputs(model):
        for name in targets:
            complete[name.rpartition(".")[0]].add(name)
    for module in modules:
        missing = sorted(complete[module] - adapter.trained.keys())
        if missing or module in adapted:
            why = f"{missing[0]} was not" if missing else "it has an adapter as well"
            raise CheckpointError(
                f"a parameter of {module} was trained and {why}; PEFT saves whole modules: export the merged model"
            )
    return modules or None
