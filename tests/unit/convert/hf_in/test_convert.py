"""Reading a Hugging Face directory: config.json of both generations, safetensors, and bad directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.families import mistral
from megatron_grit.convert.families.registry import hf_state_dict_to_megatron, load_hf_config
from megatron_grit.convert.hf_in.convert import convert_checkpoint
from megatron_grit.convert.hf_in.reader import SafetensorsFolder
from megatron_grit.errors import CheckpointError
from tests.unit.convert.test_param_map import DENSE, random_hf

# As transformers 4 wrote it for Mixtral-8x7B-v0.1, and for Mistral-7B-v0.1.
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def write_config(directory: Path, settings: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A whole tiny Mistral directory, but for the tokenizer."""
    directory = write_config(tmp_path / "hf", mistral.hf_config(DENSE))
    save_file(random_hf(mistral.FAMILY, DENSE), directory / "model.safetensors")
    return directory


def test_mixtral_8x7b(tmp_path: Path) -> None:
    assert load_hf_config(write_config(tmp_path, MIXTRAL_8X7B)) == ModelConfig(
        architecture="MixtralForCausalLM",
        kv_channels=128,
        vocab_size=32000,
        rotary_base=1e6,
        num_experts=8,
        moe_aux_loss_coeff=pytest.approx(0.02 * 2 / 32),  # type: ignore[arg-type]
    )


def test_mistral_7b(tmp_path: Path) -> None:
    assert load_hf_config(write_config(tmp_path, MISTRAL_7B)) == ModelConfig(
        architecture="MistralForCausalLM", kv_channels=128, vocab_size=32000, sliding_window=4096
    )


def test_rope_parameters_of_transformers_5(tmp_path: Path) -> None:
    settings = MISTRAL_7B | {"rope_parameters": {"rope_theta": 123.0, "rope_type": "default"}}
    del settings["rope_theta"]
    assert load_hf_config(write_config(tmp_path, settings)).rotary_base == 123.0


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_theta": 77.0}, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 77.0}, "rope_scaling": None},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_rope_is_what_transformers_computes(tmp_path: Path, change: dict[str, Any]) -> None:
    """rope_scaling beside rope_parameters, and a partial_rotary_factor that the code of the family does not read."""
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

    config = transformers.MistralConfig(**json.loads(json.dumps(MISTRAL_7B | change)))
    model = load_hf_config(write_config(tmp_path, MISTRAL_7B | change))
    assert model.rotary_base == config.rope_parameters["rope_theta"]
    assert model.rope_type == config.rope_parameters["rope_type"]
    assert model.rotary_percent * 128 / 2 == len(MistralRotaryEmbedding(config).inv_freq)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 8.0}}, "partial_rotary_factor"),
        (
            {"architectures": ["FalconForCausalLM"]},
            "FalconForCausalLM.*supported: MistralForCausalLM, MixtralForCausalLM",
        ),
        ({"rope_scaling": {"type": "longrope", "factor": 8.0}}, "longrope"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0, "beta": 1.0}}, "linear has no key beta"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0, "mscale": 1.0}}, "mscale"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_unsupported(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_hf_config(write_config(tmp_path, MISTRAL_7B | change))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no config.json"), ("{", "cannot be read"), ("[]", "JSON object")]
)
def test_bad_config_file(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_hf_config(tmp_path)


def test_folder_reads_every_shard(source: Path) -> None:
    tensors = random_hf(mistral.FAMILY, DENSE)
    names = sorted(tensors)
    (source / "model.safetensors").unlink()
    shards = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, source / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with SafetensorsFolder(source) as folder:
        assert sorted(folder) == names and len(folder) == len(names)
        converted = hf_state_dict_to_megatron(folder, load_hf_config(source))
    expected = hf_state_dict_to_megatron(tensors, DENSE)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_command_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_grit.cli.convert import main

    assert main(["--from", str(tmp_path / "nowhere"), "--to", str(tmp_path / "out")]) == 2
    *phases, error = capsys.readouterr().err.splitlines()
    assert all("importing" in line for line in phases) and "nowhere: no config.json" in error
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_without_weights(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "hf", MISTRAL_7B)
    with pytest.raises(CheckpointError, match="no \\*.safetensors"):
        convert_checkpoint(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
