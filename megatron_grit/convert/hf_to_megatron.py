"""Hugging Face checkpoints to megatron-core weights. Reads safetensors, one tensor at a time, and never pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.config.shape import expert_width, head_channels, num_query_groups
from megatron_grit.convert.families import gpt_neo, gpt_neox, gptj, llama, mistral, mixtral, qwen
from megatron_grit.convert.param_map import Family
from megatron_grit.errors import CheckpointError

FAMILIES: tuple[Family, ...] = (
    mistral.FAMILY,
    mixtral.FAMILY,
    llama.FAMILY,
    qwen.QWEN2,
    qwen.QWEN2_MOE,
    qwen.QWEN3,
    qwen.QWEN3_MOE,
    gpt_neox.FAMILY,
    gptj.FAMILY,
    gpt_neo.FAMILY,
)


def load_hf_config(path: str | Path) -> ModelConfig:
    """The shape of a Hugging Face model.

    Args:
        path: directory with a config.json.

    Raises:
        CheckpointError: no config.json, or a model that is not supported.
    """
    settings = _read_config(Path(path))
    family = family_of_config(settings, Path(path))
    try:
        return family.model_config(settings)
    except KeyError as error:
        raise CheckpointError(f"{Path(path) / 'config.json'}: key {error.args[0]} is missing") from None


def family_of_config(settings: dict[str, Any], path: Path) -> Family:
    """The family that ``architectures`` in a config.json names."""
    architectures = settings.get("architectures") or []
    for family in FAMILIES:
        if family.architecture in architectures:
            return family
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise CheckpointError(f"{path / 'config.json'}: architectures is {architectures}; supported: {supported}")


def family_of_model(model: ModelConfig) -> Family:
    """The family of one of our models: its ``architecture``, or the first whose config.json can say its shape.

    Raises:
        CheckpointError: none can, or not the one that it names.
    """
    named = [family for family in FAMILIES if model.architecture in (None, family.architecture)]
    for family in named:
        if describes(family, model):
            return family
    supported = ", ".join(family.architecture for family in FAMILIES)
    if model.architecture is None:
        raise CheckpointError(f"no architecture of transformers has such a shape; those known here: {supported}")
    if not named:
        raise CheckpointError(f"model.architecture is {model.architecture}; supported: {supported}")
    raise CheckpointError(f"model.architecture is {model.architecture}, whose config.json cannot say the model's shape")


def describes(family: Family, model: ModelConfig) -> bool:
    """Whether a model's shape survives being written to a family's config.json and read again."""
    model = replace(model, architecture=family.architecture, vocab_size=model.vocab_size or 1)
    try:
        read = family.model_config(family.hf_config(model))
    except (KeyError, CheckpointError):
        return False
    ours, theirs = _resolved(model), _resolved(read)
    return ours.keys() == theirs.keys() and all(_same(value, theirs[name]) for name, value in ours.items())


def _resolved(model: ModelConfig) -> dict[str, Any]:
    """What counts of a shape, with nothing left to a default."""
    shape = vars(model) | {"kv_channels": head_channels(model), "num_query_groups": num_query_groups(model)}
    experts = {name for name in shape if name.startswith("moe_")}
    if model.num_experts is not None:
        shape["moe_ffn_hidden_size"] = expert_width(model)
        experts = set()
    return {name: value for name, value in shape.items() if name not in _NOT_IN_FILES | experts}


_NOT_IN_FILES = {"vocab_multiple", "attention_backend", "moe_z_loss_coeff", "hidden_dropout", "init_std"}
"""Fields that config.json does not hold, or that change nothing once a model is trained."""


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return bool(ours == theirs)


def hf_state_dict_to_megatron(tensors: Mapping[str, Tensor], model_config: ModelConfig) -> dict[str, Tensor]:
    """Whole megatron-core tensors of a Hugging Face state dict.

    Args:
        tensors: Hugging Face names to tensors; may read lazily, as :class:`SafetensorsFolder` does.
        model_config: the model's shape, from :func:`load_hf_config`.

    Returns:
        Names of megatron-core's GPTModel to tensors in the type of the source. The vocabulary is padded with zero
        rows to a multiple of ``model_config.vocab_multiple``.

    Raises:
        CheckpointError: a tensor is missing, left over or of the wrong shape.
    """
    return dict(family_of_model(model_config).to_megatron(tensors, model_config))


def convert_checkpoint(source: str | Path, target: str | Path, tokenizer: str | Path | None = None) -> Path:
    """Write a Hugging Face model as a checkpoint to start a run from (``checkpoint.load``).

    One process, on the CPU. Weights keep their precision, bf16 or fp32; they are in memory once, and one source
    tensor beside them.

    Args:
        source: directory with config.json, *.safetensors and a tokenizer.
        target: directory to write ``checkpoints/step_00000000`` under.
        tokenizer: where the tokenizer is, if not in ``source``.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: the source cannot be converted, or the target has a checkpoint already.
    """
    source, target = Path(source), Path(target)
    model_config = load_hf_config(source)
    _weight_files(source)
    # Importing the engine takes seconds; the mistakes above are told at once.
    from megatron_grit.data.tokenizer import load_tokenizer
    from megatron_grit.models.gpt import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import list_checkpoints
    from megatron_grit.training.checkpoint_save import save_checkpoint

    if list_checkpoints(target):
        raise CheckpointError(f"{target}: there are checkpoints here already; give another directory")
    loaded_tokenizer = load_tokenizer(tokenizer or source)
    assert model_config.vocab_size is not None
    if loaded_tokenizer.vocab_size > model_config.vocab_size:
        raise CheckpointError(
            f"{loaded_tokenizer.path}: has {loaded_tokenizer.vocab_size} tokens, the model {model_config.vocab_size}; "
            "give the model's own tokenizer"
        )
    config = RunConfig(output_dir=str(target), model=model_config)
    config.data.tokenizer = str(loaded_tokenizer.path)
    config.parallel.device = "cpu"
    with SafetensorsFolder(source) as tensors:
        config.training.precision = precision_of(tensors)
        with parallel_job(config.parallel, config.training.seed) as context:
            model = build_model(config, model_config.vocab_size, context)
            _fill(model, family_of_model(model_config).to_megatron(tensors, model_config))
            return save_checkpoint(config, context, model, None, loaded_tokenizer, step=0)


def precision_of(tensors: Mapping[str, Tensor]) -> Literal["fp32", "bf16"]:
    """bf16 where the weights are; fp32 for all else, since bf16 would round fp16 weights."""
    first = next(iter(tensors.values()))
    return "bf16" if first.dtype is torch.bfloat16 else "fp32"


def _fill(model: torch.nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tqdm(tensors, total=len(parameters), unit="tensor", desc="converting"):
            parameters.pop(name).copy_(tensor)
    assert not parameters, f"the table does not fill {sorted(parameters)}"


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a folder of safetensors files as a mapping that reads a tensor when it is asked for.

    Raises:
        CheckpointError: no safetensors there, or a file that its index names is missing or cut short.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = Path(path)
        self._files = ExitStack()
        self._readers: dict[str, Any] = {}
        self._last: tuple[str, Tensor] | None = None
        for file in _weight_files(self._path):
            try:
                reader = self._files.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not a whole safetensors file ({error}); copy it again") from None
            self._readers |= dict.fromkeys(reader.keys(), reader)

    def __getitem__(self, name: str) -> Tensor:
        # A tensor that holds all experts is asked for once an expert, so the last one read is kept.
        if self._last is None or self._last[0] != name:
            self._last = (name, self._readers[name].get_tensor(name))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._last = None
        self._readers = {}
        self._files.close()


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no config.json; give the directory of a Hugging Face model") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return settings


def _weight_files(path: Path) -> list[Path]:
    """The files that model.safetensors.index.json lists, or all safetensors files where there is no index."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(
                {path / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            )
        except (ValueError, KeyError, AttributeError):
            raise CheckpointError(f"{index}: not an index of weights") from None
    else:
        files = sorted(path.glob("*.safetensors"))
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, though {index.name} names it")
    if not files:
        pickled = sorted(path.glob("*.bin"))
        why = f"; {pickled[0].name} is pickle, which can run code: save the model as safetensors" if pickled else ""
        raise CheckpointError(f"{path}: no *.safetensors{why}")
    return files
