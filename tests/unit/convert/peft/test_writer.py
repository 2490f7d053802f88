"""PEFT's files without PEFT: what is refused and how it is said, fused and stacked projections against formulas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_grit.config.adapter_shape import projection_name, rank_of
from megatron_grit.config.schema import AdapterConfig, ModelConfig
from megatron_grit.convert.peft.merge import merged_weight
from megatron_grit.convert.peft.reader import read_peft
from megatron_grit.convert.peft.sites import WholeAdapter, adapter_sites, part_shape, resized
from megatron_grit.convert.peft.writer import is_peft_folder, to_peft, write_peft
from megatron_grit.errors import CheckpointError

# Every size is different, so that a wrong one shows.
LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=30,
    ffn_hidden_size=28,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=4,
    vocab_size=70,
)
NEOX = ModelConfig(
    architecture="GPTNeoXForCausalLM",
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=28,
    num_attention_heads=6,
    num_query_groups=None,
    vocab_size=70,
    normalization="layernorm",
    activation="gelu",
    add_mlp_bias=True,
    add_qkv_bias=True,
    add_attention_output_bias=True,
    rotary_percent=0.5,
    parallel_residual="two_norms",
)
MIXTRAL = replace(LLAMA, architecture="MixtralForCausalLM", num_experts=5)


def random_adapter(model: ModelConfig, targets: list[str] | None = None, **options: Any) -> WholeAdapter:
    """Random factors for all projections, or some."""
    config = AdapterConfig(**({"kind": "lora", "rank": 3, "alpha": 7.0} | options))
    tensors = {}
    generator = torch.Generator().manual_seed(1)
    for site in adapter_sites(model):
        for part in site.parts:
            if targets is not None and part not in targets:
                continue
            rows, width = part_shape(site, part, model)
            prefix = f"{site.linear}.adapter.{part}."
            rank = rank_of(config, projection_name(site.linear, part))
            tensors[prefix + "lora_A"] = torch.randn(rank, width, generator=generator)
            tensors[prefix + "lora_B"] = torch.randn(rows, rank, generator=generator)
            if config.kind == "dora":
                tensors[prefix + "magnitude"] = torch.rand(rows, generator=generator) + 0.5
    return WholeAdapter(config, tensors)


def same(found: WholeAdapter, expected: WholeAdapter) -> bool:
    return found.tensors.keys() == expected.tensors.keys() and all(
        torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors
    )


@pytest.mark.parametrize("model", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_written_is_read(model: ModelConfig, rslora: bool, tmp_path: Path) -> None:
    adapter = random_adapter(model, rslora=rslora)
    assert not is_peft_folder(tmp_path)
    write_peft(tmp_path, adapter, model, "base")
    assert is_peft_folder(tmp_path)
    found = read_peft(tmp_path, model)
    assert same(found, adapter)
    if rslora and model is MIXTRAL:  # PEFT scales experts wrongly with square roots
        assert not found.config.rslora and found.config.alpha == pytest.approx(7.0 * 3**0.5, rel=1e-12)
    else:
        assert found.config == replace(adapter.config, targets=found.config.targets)


def delta(adapter: WholeAdapter, linear: str, part: str) -> Tensor:
    factors = adapter.part(linear, part)
    return adapter.scaling(linear, part) * factors["lora_B"] @ factors["lora_A"]


@pytest.mark.parametrize("targets", [None, ["k_proj"], ["q_proj", "v_proj"]], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_fused_projection_adds_what_its_parts_add(targets: list[str] | None, rslora: bool) -> None:
    """The update of query_key_value, head by head its query, key and value; 4 channels a head."""
    adapter = random_adapter(NEOX, targets, rslora=rslora)
    settings, tensors = to_peft(adapter, NEOX)
    module = "gpt_neox.layers.1.attention.query_key_value"
    lora_A, lora_B = (tensors[f"base_model.model.{module}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
    rank = settings["rank_pattern"].get("query_key_value", settings["r"])
    assert len(lora_A) == rank == 3 * len(targets or "qkv")
    scaling = settings["alpha_pattern"].get("query_key_value", settings["lora_alpha"]) / (rank**0.5 if rslora else rank)
    found = (scaling * lora_B @ lora_A).unflatten(0, (6, 3, 4))
    for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
        if targets is not None and part not in targets:
            assert not found[:, number].any()
            continue
        expected = delta(adapter, "decoder.layers.1.self_attention.linear_qkv", part)
        assert torch.allclose(found[:, number].flatten(0, 1), expected, atol=1e-5)


def test_a_fused_projection_is_read_as_three(tmp_path: Path) -> None:
    adapter = random_adapter(NEOX, kind="dora")
    write_peft(tmp_path, adapter, NEOX)
    found = read_peft(tmp_path, NEOX)
    assert found.config.rank_pattern == ["q_proj=9", "k_proj=9", "v_proj=9"] and found.config.kind == "dora"
    for site in adapter_sites(NEOX):
        for part in site.parts:
            mine, other = delta(found, site.linear, part), delta(adapter, site.linear, part)
            assert torch.allclose(mine, other, atol=1e-5)
            assert torch.equal(found.part(site.linear, part)["magnitude"], adapter.part(site.linear, part)["magnitude"])


def test_experts_of_transformers_5_are_taken_apart(tmp_path: Path) -> None:
    """lora_A [experts x rank, in] by expert, lora_B [out, rank x experts] by rank: PEFT's ParamWrapper."""
    generator = torch.Generator().manual_seed(2)
    rank, experts = 2, 5
    gate_up = (torch.randn(experts, rank, 30, generator=generator), torch.randn(experts, 56, rank, generator=generator))
    down = (torch.randn(experts, rank, 28, generator=generator), torch.randn(experts, 30, rank, generator=generator))
    tensors = {}
    for layer in range(2):
        for suffix, (lora_A, lora_B) in ((".base_layer", gate_up), ("", down)):
            prefix = f"base_model.model.model.layers.{layer}.mlp.experts{suffix}"
            tensors[f"{prefix}.lora_A.weight"] = lora_A.flatten(0, 1).clone()
            tensors[f"{prefix}.lora_B.weight"] = lora_B.permute(1, 2, 0).flatten(1).clone()
    write_folder(tmp_path, tensors, r=rank, lora_alpha=rank)
    adapter = read_peft(tmp_path, MIXTRAL)
    for expert in range(experts):
        block = f"decoder.layers.1.mlp.experts.local_experts.{expert}."
        found = [delta(adapter, f"{block}linear_fc1", part) for part in ("gate_proj", "up_proj")]
        assert torch.allclose(torch.cat(found), gate_up[1][expert] @ gate_up[0][expert], atol=1e-5)
        assert torch.allclose(delta(adapter, f"{block}linear_fc2", "down_proj"), down[1][expert] @ down[0][expert])


PATTERNS = {
    "rank_pattern": ["layers.1.mlp.down_proj=5", "down_proj=2", "k_proj=6"],
    "alpha_pattern": ["k_proj=1.5", "layers.0.self_attention.q_proj=20"],
}


@pytest.mark.parametrize("model", [LLAMA, NEOX, MIXTRAL], ids=["llama", "neox", "mixtral"])
def test_patterns_are_written_and_read(model: ModelConfig, tmp_path: Path) -> None:
    """Of ranks and alphas by projection; of experts the highest rank, with the update as it was."""
    adapter = random_adapter(model, rslora=True, **PATTERNS)
    write_peft(tmp_path, adapter, model)
    found = read_peft(tmp_path, model)
    for site in adapter_sites(model):
        for part in site.parts:
            mine, other = delta(found, site.linear, part), delta(adapter, site.linear, part)
            assert torch.allclose(mine, other, atol=1e-4)
    if model is LLAMA:
        assert same(found, adapter)
        assert {len(found.part("decoder.layers.1.mlp.linear_fc2", "down_proj")["lora_A"])} == {5}


def test_a_smaller_adapter_in_a_larger_one() -> None:
    factors = {"lora_A": torch.randn(2, 5), "lora_B": torch.randn(4, 2)}
    larger = resized(factors, 6, scaling=2.0, new_scaling=0.5)
    assert larger["lora_A"].shape == (6, 5) and larger["lora_B"].shape == (4, 6)
    assert torch.allclose(0.5 * larger["lora_B"] @ larger["lora_A"], 2.0 * factors["lora_B"] @ factors["lora_A"])
    assert not larger["lora_A"][2:].any() and not larger["lora_B"][:, 2:].any()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merging_is_the_formula(kind: str) -> None:
    """On queries, keys and values of grouped attention: groups of two queries, a key, a value, of 4 channels."""
    adapter = random_adapter(LLAMA, ["q_proj", "v_proj"], kind=kind)
    site = next(site for site in adapter_sites(LLAMA) if site.leaf == "linear_qkv")
    weight = torch.randn(48, 30, generator=torch.Generator().manual_seed(3))
    found = merged_weight(weight, site, adapter, LLAMA, None).unflatten(0, (3, 16))
    groups = weight.unflatten(0, (3, 16))
    for part, rows in (("q_proj", slice(0, 8)), ("v_proj", slice(12, 16))):
        expected = groups[:, rows].flatten(0, 1) + delta(adapter, site.linear, part)
        if kind == "dora":
            expected = adapter.part(site.linear, part)["magnitude"][:, None] * expected / expected.norm(dim=1)[:, None]
        assert torch.allclose(found[:, rows].flatten(0, 1), expected, atol=1e-5)
    assert torch.equal(found[:, 8:12], groups[:, 8:12])


def test_merging_rounds_once() -> None:
    adapter = random_adapter(LLAMA)
    site = adapter_sites(LLAMA)[0]
    weight = torch.randn(48, 30).bfloat16()
    expected = merged_weight(weight.float(), site, adapter, LLAMA, None).bfloat16()
    assert torch.equal(merged_weight(weight, site, adapter, LLAMA, None), expected)


def write_folder(path: Path, tensors: dict[str, Tensor], **settings: Any) -> None:
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors"
    )
    plain = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(plain | settings))


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"peft_type": "VERA"}, "peft_type is VERA; only LORA"),
    "bias": ({"bias": "all"}, "bias is all; only none"),
    "unknown": ({"use_qalora": True}, "use_qalora is True; this is not supported"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    "tokens": ({"trainable_token_indices": [1]}, r"trainable_token_indices is \[1\]"),
    "replicated": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changes the base model"),
    "rank": ({"r": 0}, "r and lora_alpha must be given"),
    "other rank": ({"r": 4}, "has rank 3, adapter_config.json says 4"),
    "pattern": ({"rank_pattern": {"(": 3}}, "not a regular expression"),
    "dora": ({"use_dora": True}, "use_dora and its lora_magnitude_vector contradict"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_are_refused(what: str, tmp_path: Path) -> None:
    settings, message = SETTINGS[what]
    write_folder(tmp_path, to_peft(random_adapter(LLAMA), LLAMA)[1], **settings)
    with pytest.raises(CheckpointError, match=message):
        read_peft(tmp_path, LLAMA)


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def factors_of(module: str) -> dict[str, Tensor]:
    prefix = f"base_model.model.model.layers.{module}"
    return {f"{prefix}.{factor}.weight": torch.ones(3, 3) for factor in ("lora_A", "lora_B")}


TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "half": ({f"{QUERY}.lora_B.weight": None}, r"q_proj has lora_A and not both"),
    "wide": (
        {f"{QUERY}.lora_A.weight": torch.ones(3, 31)},
        r"lora_A has shape \[3, 31\], this model makes it \[3, 30\]",
    ),
    "router": (
        {
            f"base_model.model.model.layers.0.mlp.gate.{factor}.weight": torch.ones(3, 3)
            for factor in ("lora_A", "lora_B")
        },
        "routers cannot",
    ),
    "no place": ({"base_model.model.model.rotary.weight": torch.ones(3)}, "rotary.weight has no place"),
    "third layer": (
        {
            f"base_model.model.model.layers.2.mlp.up_proj.{factor}.weight": torch.ones(3, 3)
            for factor in ("lora_A", "lora_B")
        },
        "layers.2.mlp.up_proj has an adapter",
    ),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_refused(what: str, tmp_path: Path) -> None:
    changes, message = TENSORS[what]
    tensors: dict[str, Any] = to_peft(random_adapter(LLAMA), LLAMA)[1] | changes
    write_folder(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=message):
        read_peft(tmp_path, LLAMA)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: missing"):
        read_peft(tmp_path, LLAMA)
    write_peft(tmp_path, random_adapter(LLAMA), LLAMA)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: not a whole"):
        read_peft(tmp_path, LLAMA)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"missing; adapters in pickle"):
        read_peft(tmp_path, LLAMA)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_peft(tmp_path, LLAMA)


def test_what_peft_has_no_form_for() -> None:
    with pytest.raises(CheckpointError, match="no DoRA for experts; export the merged model"):
        to_peft(random_adapter(MIXTRAL, kind="dora"), MIXTRAL)
    with pytest.raises(CheckpointError, match="DoRA of q_proj alone has no form"):
        to_peft(random_adapter(NEOX, ["q_proj"], kind="dora"), NEOX)
    biased = random_adapter(NEOX, ["down_proj"])
    biased.trained["gpt_neox.final_layer_norm.bias"] = torch.ones(24)
    with pytest.raises(CheckpointError, match=r"final_layer_norm was trained and .*weight was not"):
        to_peft(biased, NEOX)
    whole = random_adapter(LLAMA)
    whole.trained["model.layers.0.mlp.up_proj.weight"] = torch.ones(28, 30)
    with pytest.raises(CheckpointError, match="it has an adapter as well"):
        to_peft(whole, LLAMA)


def test_dropout_of_experts_is_written_as_none(caplog: pytest.LogCaptureFixture) -> None:
    assert to_peft(random_adapter(MIXTRAL, dropout=0.1), MIXTRAL)[0]["lora_dropout"] == 0.0
    assert to_peft(random_adapter(LLAMA, dropout=0.1), LLAMA)[0]["lora_dropout"] == 0.1


def test_names_without_the_head_are_understood(tmp_path: Path) -> None:
    """An adapter of AutoModel, as sentence-transformers trains it: its modules lack the decoder's prefix."""
    adapter = random_adapter(LLAMA)
    write_peft(tmp_path, adapter, LLAMA)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name.replace("base_model.model.model.", "base_model.model."): t for name, t in load_file(file).items()}
    file.unlink()
    save_file(tensors, file)
    assert same(read_peft(tmp_path, LLAMA), adapter)
