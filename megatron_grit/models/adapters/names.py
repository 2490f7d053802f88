"""Names of modules and parameters that are the same whatever the layout: layers and experts by their number in the
whole model."""

from __future__ import annotations

import re
from typing import Any

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"^(.*\.experts)\.local_experts\.(\d+)\.")
_WORDS, _TIED = "embedding.word_embeddings.weight", "output_layer.weight"


def global_name(model: Any, name: str) -> str:
    """The name in the whole model, as one process would hold it.

    Args:
        model: a chunk of it (:class:`~megatron_grit.models.decoder.GritDecoder`).
        name: in the chunk, of a module or a parameter inside a layer, or of any other.
    """
    if name == _TIED and model.share_embeddings_and_output_weights:
        return _WORDS
    result = name
    expert = _EXPERT.match(name)
    if expert is not None:
        experts = model.get_submodule(expert[1])
        number = experts.ep_group.rank() * experts.num_local_experts + int(expert[2])
        result = f"{expert[1]}.local_experts.{number}.{name[expert.end() :]}"
    layer = _LAYER.match(name)
    if layer is not None:
        number = model.decoder.layers[int(layer[1])].layer_number - 1
        result = f"decoder.layers.{number}.{result[layer.end() :]}"
    return result
