"""Checkpoints that Megatron-LM wrote: where their weights are, and under which names.

Megatron-LM saves with ``--ckpt-format torch_dist`` into

    latest_checkpointed_iteration.txt   number of the newest iteration, or "release"
    iter_0000100/                       weights, optimizer, random states and arguments in one sharded state dict

GPTModel's weights have the names that they have here, with two exceptions: layers may be numbered instead of stacked
under one name, and TransformerEngine's layers name the norm before experts differently.

HybridModel (MambaModel in older versions) numbers attention and feed-forward layers separately: layer i here is layers
2i and 2i + 1 there. It calls the last norm ``final_norm``. Its pattern has a symbol for each layer: * for attention, -
for feed-forward, E for experts. Patterns such as *-*-*E load; other layers or another order make another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory

from megatron_grit.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.")
"""Begins the name of a layer's own tensor; else those of all layers are one."""
_NORM_OF_DENSE, _NORM_OF_EXPERTS = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
_LAST_NORM, _LAST_NORM_OF_HYBRID = "decoder.final_layernorm.", "decoder.final_norm."
_SYMBOLS = {"self_attention.linear_qkv.": "*", "mlp.experts.": "E", "mlp.": "-", "mixer.": "M"}
"""HybridModel's symbol of a layer, by how names in it start; the first that matches."""
_OTHER_STATE = ("optimizer", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler", "common_state")
_KEYS = {  # keys of the configuration that determine a tensor's shape
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
                f"{folder}: is not a checkpoint of format torch_dist, the only one that is loaded; convert it with "
                "Megatron-LM's --ckpt-convert-format torch_dist, or mp_rank_00/model_optim_rng.pt with megatron-grit "
                "convert"
            )
        return folder
    if (path / ".metadata").is_file() and dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        return path
    return None


def is_other_state(name: str) -> bool:
    """Whether a name in such a checkpoint belongs to something other than the weights."""
    return name.startswith(_OTHER_STATE)


class MegatronNames:
    """Names and shapes in a Megatron-LM checkpoint.

    Args:
        folder: of an iteration.

    Raises:
        CheckpointError: it cannot be read, or holds a HybridModel with layers that no decoder here has.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._saved = dist_checkpointing.load_tensors_metadata(str(folder))
        except Exception as error:  # whatever the engine's reader meets in a damaged file
            raise CheckpointError(f"{folder}: cannot be read ({error})") from error
        self._layers = _layer_symbols(self._saved)
        self._pattern: str | None = None
        """HybridModel's; None: the names are GPTModel's."""
        if any(name.startswith(_LAST_NORM_OF_HYBRID) for name in self._saved):
            self._pattern = "".join(self._layers.values())
        if self._pattern is not None and not re.fullmatch(r"(\*[-E])+", self._pattern):
            raise CheckpointError(
                f"{folder}: holds a HybridModel with the layers {self._pattern}; only attention (*) with a "
                "feed-forward layer (-) or experts (E) after it, such as *-*- or *E*E, loads here"
            )

    def metadata(self) -> dict[str, Any]:
        """What the model's sharded state dict must be told to have the checkpoint's names."""
        return {"non_homogeneous_layers": True} if any(map(NUMBERED.match, self._saved)) else {}

    def rename(self, state: dict[str, Any]) -> None:
        """Give the model's tensors the checkpoint's names."""
        for value in nested_values(state):
            if not isinstance(value, ShardedBase):
                continue
            if self._pattern is not None:
                value.key = _name_of_hybrid(value.key)
            other = value.key.replace(_NORM_OF_DENSE, _NORM_OF_EXPERTS)
            if other in self._saved and value.key not in self._saved:
                value.key = other

    def check(self, state: dict[str, Any], num_layers: int, vocab_size: int) -> None:
        """Compare the shapes of the model's tensors with the checkpoint's.

        Args:
            state: the model's sharded state dict, renamed.
            num_layers: of the whole model.
            vocab_size: of the model before padding.

        Raises:
            CheckpointError: the first that differs, with the keys of the configuration that determine it.
        """
        saved_layers = len(self._layers) if self._pattern is None else len(self._layers) // 2
        if saved_layers and saved_layers != num_layers:
            raise CheckpointError(f"{self._folder}: has {saved_layers} layers; set model.num_layers to {saved_layers}")
        symbols = _layer_symbols(value.key for value in nested_values(state) if isinstance(value, ShardedBase))
        if any(self._layers.get(number) != symbol for number, symbol in symbols.items()):
            raise CheckpointError(
                f"{self._folder}: has experts in other layers than this model; its layers are "
                f"{''.join(self._layers.values())} (* attention, - feed-forward, E experts): compare "
                "model.num_experts and model.moe_dense_layers"
            )
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


def _layer_symbols(names: Iterable[str]) -> dict[int, str]:
    """HybridModel's symbol of each layer that has a number in these names, in their order; ? for one not known here."""
    parts: dict[int, set[str]] = {}
    for name in names:
        if found := NUMBERED.match(name):
            parts.setdefault(int(found[1]), set()).add(name[found.end() :])
    symbols = {}
    for number in sorted(parts):
        known = (symbol for start, symbol in _SYMBOLS.items() if any(name.startswith(start) for name in parts[number]))
        symbols[number] = next(known, "?")
    return symbols


def _name_of_hybrid(name: str) -> str:
    found = NUMBERED.match(name)
    if found is None:
        return name.replace(_LAST_NORM, _LAST_NORM_OF_HYBRID)
    rest = name[found.end() :]
    number = 2 * int(found[1]) + (not rest.startswith("self_attention."))
    return f"decoder.layers.{number}.{rest}"


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
