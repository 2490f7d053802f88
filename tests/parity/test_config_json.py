"""A config.json means what transformers takes it for: absent keys, null, other names, keys that contradict each other.

What transformers refuses, when it reads the file, makes the model or computes with it, is refused here in one line.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_grit.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_grit.convert.families import gpt_neo, gpt_neox, gptj, llama, mistral, mixtral, qwen
from megatron_grit.convert.families.keys import Keys
from megatron_grit.convert.families.registry import family_of_config, load_hf_config
from megatron_grit.convert.hf_in.pretrained import load_pretrained
from megatron_grit.convert.hf_in.stored_model import stored_shape
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.errors import CheckpointError
from tests.parity.test_hf_import import TOLERANCE, WINDOW, make_model, make_row, segments

transformers = pytest.importorskip("transformers", reason="the reference is transformers")

VOCAB = 331
KEYS: dict[str, Keys] = {
    "mistral": mistral.KEYS,
    "mixtral": mixtral.KEYS,
    "llama": llama.KEYS,
    "qwen2": qwen.QWEN2_KEYS,
    "qwen2_moe": qwen.QWEN2_MOE_KEYS,
    "qwen3": qwen.QWEN3_KEYS,
    "qwen3_moe": qwen.QWEN3_MOE_KEYS,
    "gpt_neox": gpt_neox.KEYS,
    "gptj": gptj.KEYS,
    "gpt_neo": gpt_neo.KEYS,
}
GONE = object()


def as_json(config: Any) -> dict[str, Any]:
    """All that a configuration of transformers holds, its defaults too."""
    settings: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return settings


@pytest.fixture(scope="module")
def configurations() -> Callable[[str], dict[str, Any]]:
    """The whole config.json of a tiny model, by its name."""
    made = {name: as_json(make_model(name, VOCAB).config) for name in KEYS}
    for settings in made.values():
        settings["architectures"] = [make_class(settings).__name__.replace("Config", "ForCausalLM")]
    return lambda name: copy.deepcopy(made[name])


def make_class(settings: dict[str, Any]) -> Any:
    return transformers.CONFIG_MAPPING[settings["model_type"]]


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (settings | changes).items() if value is not GONE}


def theirs(settings: dict[str, Any]) -> ModelConfig | None:
    """The shape that transformers makes of a config.json; None: it refuses the file."""
    try:
        config = make_class(settings).from_dict(copy.deepcopy(settings))
    except Exception:  # of many kinds
        return None
    return ours(as_json(config))


def ours(settings: dict[str, Any]) -> ModelConfig | None:
    try:
        return family_of_config(settings, Path()).model_config(settings)
    except CheckpointError:
        return None


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("value", [GONE, None, "text", [], True, 0.5], ids="gone null text list true half".split())
def test_every_key_without_its_value(configurations: Callable[[str], dict[str, Any]], name: str, value: Any) -> None:
    """Each key that is read is taken away, or given a value of another type: the same shape, or both refuse."""
    settings, keys = configurations(name), KEYS[name]
    read = {**keys.defaults, **keys.nullable}
    known = {keys.aliases.get(key, key) for key in settings}
    assert read.keys() - known <= {"layer_types", "rope_theta", "rotary_emb_base", "rotary_pct"}  # tried below
    for key in sorted(read.keys() & settings.keys()):
        settings_of_it = changed(settings, {key: value})
        found, expected = ours(settings_of_it), theirs(settings_of_it)
        if expected is None or found is None:
            assert found is expected, f"{key}: {found} and {expected}"
        else:
            assert asdict(found) == asdict(expected), key


def test_a_file_that_says_nothing(tmp_path: Path) -> None:
    """With a model_type alone, each family has the defaults of its class, which differ."""
    shapes = []
    for name in KEYS:
        settings = {"model_type": name}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        shapes.append(load_hf_config(tmp_path))
        assert asdict(shapes[-1]) == asdict(theirs(settings) or ModelConfig()), name
    assert [shape.num_query_groups for shape in shapes[:7]] == [8, 8, 32, 32, 16, 32, 4]
    assert [shape.norm_epsilon for shape in shapes[:3]] == [1e-6, 1e-5, 1e-6]


ROPE: dict[str, Any] = {"rope_theta": 50.0, "rope_type": "default"}
TAKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "both names of experts": ("mixtral", {"num_experts": 3, "num_local_experts": 4}),
    "the other name of experts": ("qwen3_moe", {"num_local_experts": 3, "num_experts": 4}),
    "a name that the family does not know": ("qwen2_moe", {"num_local_experts": 3}),
    "no list of dense layers": ("qwen3_moe", {"mlp_only_layers": None, "decoder_sparse_step": 2}),
    "no epsilon": ("mixtral", {"rms_norm_eps": GONE}),
    "as many keys as heads": ("qwen2", {"num_key_value_heads": None}),
    "heads wider than the model": ("qwen2", {"head_dim": 24}),
    "no head_dim": ("qwen3_moe", {"head_dim": GONE, "hidden_size": 96}),
    "layer_types before the rule": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 0,
            "layer_types": ["attention", "sliding_attention", "full_attention"],
        },
    ),
    "a window that no layer has": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["full_attention"] * 3},
    ),
    "a window that is not used": (
        "qwen2",
        {"use_sliding_window": False, "sliding_window": WINDOW, "layer_types": GONE, "max_window_layers": 0},
    ),
    "a window that the family does not read": ("llama", {"sliding_window": WINDOW}),
    "rotary names of GPT-NeoX": (
        "gpt_neox",
        {
            "rope_parameters": GONE,
            "rotary_emb_base": 20.0,
            "rotary_pct": 0.5,
            "rope_theta": 900.0,
            "partial_rotary_factor": 1.0,
        },
    ),
    "rotary names of others": ("gpt_neox", {"rope_parameters": GONE, "rope_theta": 9.0, "partial_rotary_factor": 1.0}),
    "RoPE of a layer's type": ("llama", {"rope_parameters": {"full_attention": ROPE}, "rope_theta": 30.0}),
    "rope_scaling beside rope_parameters": (
        "llama",
        {"rope_parameters": ROPE, "rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 70.0},
    ),
    "standard names of GPT-J": ("gptj", {"hidden_size": 48, "n_embd": 96, "num_hidden_layers": 2, "n_layer": 3}),
    "layers of GPT-Neo": ("gpt_neo", {"attention_layers": ["local", "global", "local"]}),
    "standard names of GPT-Neo": ("gpt_neo", {"num_heads": 12, "num_attention_heads": 3}),
    "architectures of another family": ("llama", {"architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}),
    "no architectures": ("qwen3", {"architectures": GONE}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", TAKEN)
def test_logits_are_those_of_transformers(
    configurations: Callable[[str], dict[str, Any]], case: str, tmp_path: Path
) -> None:
    """A model of each surprising file, by both readers."""
    name, changes = TAKEN[case]
    settings = changed(configurations(name), changes)
    torch.manual_seed(3)
    attention = "eager" if name in ("gptj", "gpt_neo") else "sdpa"
    config = make_class(settings).from_dict(copy.deepcopy(settings))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
    row = make_row(RowKind.GENERATIVE)
    expected = torch.cat([model(input_ids=ids[None]).logits[0] for ids in segments(row.tokens_1T[0])])
    torch.testing.assert_close(logits_of_ours(tmp_path, row), expected, rtol=TOLERANCE, atol=TOLERANCE)


def logits_of_ours(folder: Path, row: Any) -> torch.Tensor:
    from megatron_grit.models.decoder import Output, build_chunks
    from megatron_grit.parallel.launch import parallel_job

    config = RunConfig(model=stored_shape(folder))
    config.model.pretrained, config.parallel.device, config.training.precision = str(folder), "cpu", "fp32"
    with parallel_job(ParallelConfig(device="cpu"), seed=2) as context:
        chunks = build_chunks(config, VOCAB, context)
        load_pretrained(config, chunks, context)
        logits: torch.Tensor = chunks[0].eval()(row, Output.LOGITS)
        return logits


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "windows that are switched off": (
        "qwen2",
        {"use_sliding_window": False, "sliding_window": 4, "layer_types": ["sliding_attention"] * 3},
        "layer 0 has a sliding window, and use_sliding_window is false",
    ),
    "windows without a width": (
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": None,
            "layer_types": ["sliding_attention"] * 4,
        },
        "layer_types has 4 entries for 3 layers",
    ),
    "windows of width null": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": None, "layer_types": GONE, "max_window_layers": 3},
        "layer 0 has a sliding window, and sliding_window is null",
    ),
    "a window of 0": ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
    "windows of some layers": (
        "mistral",
        {"sliding_window": None, "layer_types": ["sliding_attention"] * 3},
        "layer_types has 3 of 3 layers with a sliding window, and sliding_window is null",
    ),
    "too few types of layers": ("llama", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
    "an unknown type of layers": ("qwen3", {"layer_types": ["linear"] * 3}, "layer_types has 'linear'"),
    "RoPE of a layer's type": (
        "qwen3",
        {"rope_parameters": {"full_attention": ROPE}},
        "rope_parameters has RoPE for full_attention alone",
    ),
    "no base of RoPE": ("llama", {"rope_parameters": {"rope_theta": None}}, "rope_theta is null"),
    "no channels turned": ("gptj", {"rotary_dim": 0}, "rotary_dim is 0, and must be at least 1"),
    "too many channels turned": (
        "gptj",
        {"rotary_dim": 64},
        "rotary_dim is 64, and must be even and at most a head's 8",
    ),
    "half a pair turned": ("gptj", {"rotary_dim": 3}, "rotary_dim is 3"),
    "no width of heads": ("qwen2", {"head_dim": None}, "head_dim is null, and must be a whole number"),
    "no sparse layer": ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    "layers of their own shapes": (
        "llama",
        {"per_layer_config": {"0": {"intermediate_size": 40}}},
        "per_layer_config is not supported",
    ),
    "layers of GPT-Neo": ("gpt_neo", {"attention_layers": ["local"]}, "attention_layers, has 1 layers, local"),
    "an unknown model_type": ("llama", {"model_type": "lama"}, "model_type is lama, by which transformers goes"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_cannot_compute(
    configurations: Callable[[str], dict[str, Any]], case: str, tmp_path: Path
) -> None:
    name, changes, message = REFUSED[case]
    settings = changed(configurations(name), changes)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError) as caught:
        load_hf_config(tmp_path)
    assert message in str(caught.value) and str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    with pytest.raises(Exception):  # noqa: B017 (of many kinds)
        config = make_class(settings).from_dict(copy.deepcopy(settings))
        transformers.AutoModelForCausalLM.from_config(config)(torch.arange(30)[None])
