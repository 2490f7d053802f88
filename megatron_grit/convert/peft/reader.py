"""Adapters that PEFT wrote, read: adapter_config.json and adapter_model.safetensors.

A fused projection (GPT-NeoX's query_key_value) has one adapter in PEFT and three here: all three get the same lora_A,
and their rows of lora_B. Adapters of experts are read by the names of transformers 4, one module each, and in the form
of transformers 5, which holds all experts of a layer in one parameter.

Shape suffix legend: R = rank, I = input width, O = rows, E = experts.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_grit.config.adapter_shape import patterns_of, projection_name
from megatron_grit.config.schema import AdapterConfig, ModelConfig
from megatron_grit.config.shape import expert_width
from megatron_grit.convert.families.registry import family_of_model
from megatron_grit.convert.peft.sites import Site, WholeAdapter, adapter_sites, part_shape, tied_output
from megatron_grit.convert.peft.writer import CONFIG, PREFIX, WEIGHTS
from megatron_grit.errors import CheckpointError

_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "bias",
    "init_lora_weights",
}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
}
"""Keys that say what has an adapter, which the tensors say as well, or how it was first drawn."""
_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def read_peft(path: str | Path, model: ModelConfig) -> WholeAdapter:
    """Read an adapter that PEFT wrote.

    Each module keeps its rank and its scaling (``rank_pattern``, ``alpha_pattern``): with others an optimizer's steps
    would be other ones, though the function starts alike.

    Args:
        path: directory with adapter_config.json and adapter_model.safetensors.
        model: the model that it is for.

    Raises:
        CheckpointError: it is of another model, has a part that is not known here, or is damaged; names file and key.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    settings = _read_settings(path / CONFIG)
    try:
        stored = load_file(path / WEIGHTS)
    except FileNotFoundError:
        raise CheckpointError(f"{path / WEIGHTS}: missing; adapters in pickle (*.bin) are not read") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / WEIGHTS}: not a whole safetensors file ({error}); copy it again") from None
    reader = _PeftTensors(path / WEIGHTS, settings, model)
    reader.take(stored)
    kind = "dora" if settings.get("use_dora") else "lora"
    return reader.finish(kind)


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; give the directory of a PEFT adapter") from None
    except ValueError:
        raise CheckpointError(f"{file}: not JSON") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        found = settings.get("peft_type") if isinstance(settings, dict) else settings
        raise CheckpointError(f"{file}: peft_type is {found}; only LORA is supported")
    if settings.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: bias is {settings['bias']}; only none is supported")
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_THE_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights is {init}, which changes the base model; save the adapter again with PEFT's "
            "path_initial_model_for_weight_conversion, as a plain one"
        )
    for key in sorted(settings.keys() - _READ - _WITHOUT_EFFECT):
        if settings[key]:
            raise CheckpointError(f"{file}: {key} is {settings[key]}; this is not supported")
    if not isinstance(settings.get("r"), int) or settings["r"] < 1 or "lora_alpha" not in settings:
        raise CheckpointError(f"{file}: r and lora_alpha must be given, r as a number above 0")
    return settings


class _PeftTensors:
    """Turns PEFT's tensors to ours, one module after another."""

    def __init__(self, file: Path, settings: dict[str, Any], model: ModelConfig) -> None:
        self._file, self._settings, self._model = file, settings, model
        self._sites: dict[str, tuple[Site, str | None]] = {}
        self._stacked: dict[str, list[Site]] = defaultdict(list)
        for site in adapter_sites(model):
            for number, module in enumerate(site.modules):
                self._sites[module] = (site, None if site.is_fused else site.parts[number])
            if site.stacked is not None:
                self._stacked[site.stacked].append(site)
        self._outputs = {name for _, _, names in family_of_model(model).outputs(model) for name in names}
        first = next(iter(self._sites))
        self._decoder = first[: first.index(".") + 1]  # models without a head leave it out of their names
        self._found: dict[tuple[str, str], tuple[dict[str, Tensor], float]] = {}
        self._trained: dict[str, Tensor] = {}

    def take(self, stored: Mapping[str, Tensor]) -> None:
        """Sort all tensors."""
        modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in stored.items():
            name = key.removeprefix(PREFIX)
            match = re.fullmatch(r"(.*)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name)
            if match is not None:
                modules[match[1]]["magnitude" if "magnitude" in match[2] else match[2]] = tensor
                continue
            name = name if name in self._outputs else self._decoder + name
            if name in self._outputs:
                self._trained[name] = tensor
            elif not (self._model.tie_embeddings and key.removeprefix(PREFIX) == tied_output(self._model)):
                raise self._error(f"tensor {key} has no place in this model")
            elif not any(torch.equal(tensor, other) for other in stored.values() if other is not tensor):
                raise self._error(f"tensor {key} is not the input embedding, which model.tie_embeddings makes it")
        for module, factors in modules.items():
            self._take_module(module, factors)

    def _take_module(self, module: str, factors: dict[str, Tensor]) -> None:
        if not {"lora_A", "lora_B"} <= factors.keys():
            raise self._error(f"module {module} has {', '.join(factors)} and not both of lora_A and lora_B")
        if ("magnitude" in factors) != bool(self._settings.get("use_dora")):
            raise self._error(f"module {module}: use_dora and its lora_magnitude_vector contradict each other")
        for name in (module, self._decoder + module):
            if name in self._sites:
                site, part = self._sites[name]
                alpha = self._alpha(name, len(factors["lora_A"]))
                self._put(site, part, factors, alpha, name)
                return
            container = name.removesuffix(".base_layer")
            if container in self._stacked:
                self._take_stacked(container, factors)
                return
        raise self._error(
            f"module {module} has an adapter; embeddings, output layers and routers cannot have one here, unless the "
            "adapter is of another model"
        )

    def _take_stacked(self, container: str, factors: dict[str, Tensor]) -> None:
        """All experts of a layer: lora_A [E R, I], lora_B [O, R E]."""
        num_experts = self._model.num_experts or 1
        width, hidden = expert_width(self._model), self._model.hidden_size
        shapes = {"linear_fc1": (hidden, 2 * width), "linear_fc2": (width, hidden)}
        found = (factors["lora_A"].shape[1], len(factors["lora_B"]))
        leaf = next((leaf for leaf, shape in shapes.items() if shape == found), None)
        rank, rest = divmod(len(factors["lora_A"]), num_experts)
        if leaf is None or rest or factors["lora_B"].shape[1] != rank * num_experts:
            raise self._error(f"{container}: an adapter of {found[0]} inputs and {found[1]} rows is of another model")
        parameter = f"{container}.{'gate_up_proj' if leaf == 'linear_fc1' else 'down_proj'}"
        alpha = self._alpha(parameter, rank)
        by_expert_A = factors["lora_A"].unflatten(0, (num_experts, rank))
        by_expert_B = factors["lora_B"].unflatten(1, (rank, num_experts))
        for site in self._stacked[container]:
            if site.leaf == leaf:
                assert site.expert is not None
                own = {"lora_A": by_expert_A[site.expert], "lora_B": by_expert_B[..., site.expert]}
                self._put(site, None if len(site.parts) > 1 else site.parts[0], own, alpha, parameter)

    def _put(self, site: Site, part: str | None, factors: dict[str, Tensor], alpha: float, module: str) -> None:
        """Of one part, or of a module that is all of them."""
        if part is not None:
            self._found[site.linear, part] = (self._checked(site, part, factors, module), alpha)
            return
        rows = {name: site.split(factors[name], self._model) for name in ("lora_B", "magnitude") if name in factors}
        for number, name in enumerate(site.parts):
            own = {"lora_A": factors["lora_A"]} | {factor: parts[number] for factor, parts in rows.items()}
            self._found[site.linear, name] = (self._checked(site, name, own, module), alpha)

    def _checked(self, site: Site, part: str, factors: dict[str, Tensor], module: str) -> dict[str, Tensor]:
        num_rows, width = part_shape(site, part, self._model)
        rank = len(factors["lora_A"])
        expected = {"lora_A": [rank, width], "lora_B": [num_rows, rank], "magnitude": [num_rows]}
        for name, tensor in factors.items():
            if list(tensor.shape) != expected[name]:
                raise self._error(
                    f"module {module}: {name} has shape {list(tensor.shape)}, this model makes it {expected[name]}"
                )
        return factors

    def _alpha(self, module: str, rank: int) -> float:
        expected = _of_pattern(self._settings.get("rank_pattern"), module, self._settings["r"])
        if rank != expected:
            raise self._error(f"module {module} has rank {rank}, {CONFIG} says {expected}")
        return float(_of_pattern(self._settings.get("alpha_pattern"), module, self._settings["lora_alpha"]))

    def finish(self, kind: Any) -> WholeAdapter:
        """All of them, and the options that a run has them by."""
        if not self._found:
            raise self._error("there is no adapter in it")
        settings, found = self._settings, self._found
        ranks = {projection_name(*place): len(factors["lora_A"]) for place, (factors, _) in found.items()}
        alphas = {projection_name(*place): alpha for place, (_, alpha) in found.items()}
        config = AdapterConfig(
            kind=kind,
            rank=settings["r"],
            alpha=float(settings["lora_alpha"]),
            rank_pattern=[f"{name}={value}" for name, value in patterns_of(ranks, settings["r"]).items()],
            alpha_pattern=[
                f"{name}={value:.17g}" for name, value in patterns_of(alphas, settings["lora_alpha"]).items()
            ],
            dropout=float(settings.get("lora_dropout") or 0.0),
            targets=sorted({part for _, part in found}),
            rslora=bool(settings.get("use_rslora")),
        )
        tensors = {
            f"{linear}.adapter.{part}.{name}": tensor
            for (linear, part), (factors, _) in found.items()
            for name, tensor in factors.items()
        }
        return WholeAdapter(config, tensors, self._trained)

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {message}")


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the end of a module's name matches."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise CheckpointError(f"{CONFIG}: {pattern!r} is not a regular expression") from None
    return default
