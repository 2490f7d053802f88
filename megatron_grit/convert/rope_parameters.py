"""RoPE in a config.json: ``rope_parameters`` since transformers 5, ``rope_theta`` and ``rope_scaling`` before."""

from __future__ import annotations

from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.errors import CheckpointError

_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_length",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
    },
    "yarn": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_length",
        "beta_fast": "rope_beta_fast",
        "beta_slow": "rope_beta_slow",
        "attention_factor": "rope_attention_factor",
    },
}
"""Per kind: keys of config.json, and fields of ModelConfig."""
_OTHER_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate", "mscale", "mscale_all_dim"}


def read_rope(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig.

    Args:
        hf: config.json; ``rope_theta`` is the default where it is not given.

    Raises:
        CheckpointError: a kind that is not supported, or a key that is missing or that nothing here understands.
    """
    # Where both are there transformers takes rope_scaling, and nothing of rope_parameters.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"rope_scaling or rope_parameters is {rope!r}, and must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KEYS:
        raise CheckpointError(f"RoPE of type {kind} is not supported, only {', '.join(_KEYS)}")
    if rope.get("truncate") is False or rope.get("mscale") or rope.get("mscale_all_dim"):
        raise CheckpointError(f"RoPE of type {kind} with truncate, mscale or mscale_all_dim is not supported")
    if kind != "default" and (unknown := rope.keys() - _KEYS[kind].keys() - _OTHER_KEYS):
        raise CheckpointError(f"RoPE of type {kind} has no key {sorted(unknown)[0]} here")
    fields: dict[str, Any] = {"rope_type": kind}
    fields["rotary_base"] = _number("rope_theta", rope.get("rope_theta", hf["rope_theta"]))
    percent = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    fields["rotary_percent"] = 1.0 if percent is None else _number("partial_rotary_factor", percent)
    for key, name in _KEYS[kind].items():
        if key == "original_max_position_embeddings":
            fields[name] = rope.get(key) or hf["max_position_embeddings"]
        elif rope.get(key) is not None:
            fields[name] = _number(key, rope[key])
        elif key == "factor":
            raise CheckpointError(f"RoPE of type {kind} has no factor in config.json")
    return fields


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{name} is {'null' if value is None else repr(value)}, and must be a number")
    return float(value)


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Keys of config.json, for transformers 4 and 5."""
    scaling = {"rope_type": model.rope_type}
    for key, name in _KEYS[model.rope_type].items():
        value = getattr(model, name)
        if value is not None:
            scaling[key] = value
    rope = scaling | {"rope_theta": model.rotary_base}
    if model.rotary_percent != 1:
        rope["partial_rotary_factor"] = model.rotary_percent
    old = {} if model.rope_type == "default" else {"rope_scaling": scaling}
    return {"rope_theta": model.rotary_base, "rope_parameters": rope} | old
