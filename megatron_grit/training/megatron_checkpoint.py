"""Checkpoints that Megatron-LM wrote: where their weights are, and under which names.

Megatron-LM saves with ``--ckpt-format torch_dist`` into

    latest_checkpointed_iteration.txt   number of the newest iteration, or "release"
    iter_0000100/                       weights, optimizer, random states and arguments in one sharded state dict

Names of weights are those of the engine's GPTModel without a prefix. Two things vary: layers are stacked under one name
or have a number each, and a mixture of experts saved with TransformerEngine's layers names the norm before it
otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_grit.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.")
_NORM_OF_DENSE, _NORM_OF_EXPERTS = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
_OTHER_STATE = ("optimizer", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler", "common_state")
_KEYS = {  # which keys of the configuration a tensor's shape hangs on
    "embedding.position_embeddings": "model.max_position_embeddings and model.hidden_size",
    "self_attention": "model.num_attention_heads, model.num_query_groups, model.kv_channels and model.hidden_size",
    "linear_fc": "model.ffn_hidden_size, model.activation and model.hidden_size",
    "router": "model.num_experts and model.hidden_size",
}


def find_megatron_checkpoint(path: Path) -> Path | None:
    """The directory of an iteration: ``path`` itself, or the one that the tracker file in it names. None: neither.

    Raises:
        CheckpointError: the tracker names a directory that is not there or not of torch_dist.
    """
    if (path / TRACKER).is_file():
        said = (path / TRACKER).read_text().strip()
        if said != "release" and not said.isdecimal():
            raise CheckpointError(f"{path / TRACKER}: holds {said[:40]!r}; expected an iteration's number or release")
        folder = path / (said if said == "release" else f"iter_{int(said):07d}")
        if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
            raise CheckpointError(
                f"{folder}: is not a checkpoint of format torch_dist, the only one that is read here; convert it with "
                "Megatron-LM's --ckpt-convert-format torch_dist"
            )
        return folder
    if (path / ".metadata").is_file() and dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        return path
    return None


def is_other_state(name: str) -> bool:
    """Whether a name of such a checkpoint is of something else than the weights."""
    return name.startswith(_OTHER_STATE)


class MegatronNames:
    """Names and shapes in a Megatron-LM checkpoint.

    Args:
        folder: of an iteration.

    Raises:
        CheckpointError: it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._saved = dist_checkpointing.load_tensors_metadata(str(folder))
        except Exception as error:  # whatever the engine's reader meets in a damaged file
            raise CheckpointError(f"{folder}: cannot be read ({error})") from error

    def metadata(self) -> dict[str, Any]:
        """What the model's sharded state dict must be told to have the checkpoint's names."""
        return {"non_homogeneous_layers": True} if any(map(_NUMBERED.match, self._saved)) else {}

    def rename(self, state: dict[str, Any]) -> None:
        """Give the model's tensors the checkpoint's names."""
        for value in nested_values(state):
            other = value.key.replace(_NORM_OF_DENSE, _NORM_OF_EXPERTS) if isinstance(value, ShardedTensor) else None
            if other in self._saved and value.key not in self._saved:
                value.key = other

    def check(self, state: dict[str, Any], num_layers: int, vocab_size: int) -> None:
        """Compare the shapes of the model's tensors with the checkpoint's.

        Args:
            state: the model's sharded state dict, renamed.
            num_layers: of the whole model.
            vocab_size: of the model before padding.

        Raises:
            CheckpointError: the first that differs, and the key of the configuration that it hangs on.
        """
        numbers = {int(found.group(1)) for name in self._saved if (found := _NUMBERED.match(name))}
        if numbers and len(numbers) != num_layers:
            raise CheckpointError(f"{self._folder}: has {len(numbers)} layers; set model.num_layers to that")
        for tensor in _tensors(state):
            saved = self._saved.get(tensor.key)
            if saved is None:
                continue
            theirs, ours = tuple(saved.global_shape), tuple(tensor.global_shape)
            if tensor.allow_shape_mismatch:  # rows of the vocabulary, padded
                if theirs[0] < vocab_size:
                    raise CheckpointError(
                        f"{self._folder}: {tensor.key} has {theirs[0]} rows, the vocabulary {vocab_size} tokens; give "
                        "the tokenizer that the model was trained with"
                    )
                theirs = (ours[0], *theirs[1:])
            if theirs != ours:
                shapes = f"is {list(theirs)} there and {list(ours)} in this model"
                raise CheckpointError(f"{self._folder}: {tensor.key} {shapes}; {_advice(tensor, theirs, ours)}")


def _tensors(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from (part for part in nested_values(value.build()) if isinstance(part, ShardedTensor))
        elif isinstance(value, ShardedTensor):
            yield value


def _advice(tensor: ShardedTensor, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    if tensor.prepend_axis_num and theirs[0] != ours[0]:
        return f"set model.num_layers to {theirs[0]}"
    return f"compare {next((keys for part, keys in _KEYS.items() if part in tensor.key), 'model.hidden_size')}"
