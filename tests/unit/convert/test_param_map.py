"""The tables of each family: layouts against hand-written ones, both directions, and what a bad source says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.families import gpt_neo, gpt_neox, gptj, llama, mistral, mixtral, qwen
from megatron_grit.convert.families.registry import describes, family_of_model
from megatron_grit.convert.param_map import Family, GatedFC1, GroupedQKV, VocabularyRows, dimensions
from megatron_grit.errors import CheckpointError

# Every size is different, and head channels are not hidden size / heads.
DENSE = ModelConfig(
    num_layers=2,
    hidden_size=30,
    ffn_hidden_size=28,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=4,
    vocab_size=70,
)
MIXTURE = replace(DENSE, num_experts=5)
BIASES = {"add_qkv_bias": True, "add_attention_output_bias": True}
QWEN_MIXTURE = replace(MIXTURE, moe_ffn_hidden_size=12, moe_dense_layers=[0])
GPT = ModelConfig(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=28,
    num_attention_heads=6,
    num_query_groups=None,
    vocab_size=70,
    normalization="layernorm",
    activation="gelu_tanh",
    add_mlp_bias=True,
    max_position_embeddings=50,
)
LIKE_LLAMA = [
    pytest.param(mistral.FAMILY, DENSE, id="mistral"),
    pytest.param(mistral.FAMILY, replace(DENSE, tie_embeddings=True), id="mistral_tied"),
    pytest.param(mixtral.FAMILY, MIXTURE, id="mixtral"),
    pytest.param(llama.FAMILY, replace(DENSE, add_mlp_bias=True, **BIASES), id="llama"),
    pytest.param(qwen.QWEN2, replace(DENSE, add_qkv_bias=True), id="qwen2"),
    pytest.param(qwen.QWEN3, replace(DENSE, qk_norm=True, **BIASES), id="qwen3"),
    pytest.param(
        qwen.QWEN2_MOE,
        replace(
            QWEN_MIXTURE,
            add_qkv_bias=True,
            moe_shared_ffn_hidden_size=36,
            moe_shared_expert_gate=True,
            moe_normalize_top_k=False,
        ),
        id="qwen2_moe",
    ),
    pytest.param(qwen.QWEN3_MOE, replace(QWEN_MIXTURE, qk_norm=True), id="qwen3_moe"),
]
LIKE_GPT = [
    pytest.param(
        gpt_neox.FAMILY,
        replace(GPT, parallel_residual="two_norms", rotary_percent=0.5, activation="gelu", **BIASES),
        id="gpt_neox",
    ),
    pytest.param(
        gptj.FAMILY,
        replace(GPT, parallel_residual="one_norm", rotary_interleaved=True, add_output_bias=True),
        id="gptj",
    ),
    pytest.param(
        gpt_neo.FAMILY,
        replace(
            GPT,
            position_embedding="learned_absolute",
            add_attention_output_bias=True,
            attention_scale=1.0,
            tie_embeddings=True,
            window_layers=[1],
        ),
        id="gpt_neo",
    ),
]
CASES = LIKE_LLAMA + LIKE_GPT


def random_hf(family: Family, model: ModelConfig) -> dict[str, Tensor]:
    """A state dict in the family's exported form."""
    generator, sizes, tensors = torch.Generator().manual_seed(0), dimensions(model), {}
    for entry in family.entries:
        if entry.only_if(model):
            for _, layer, expert in entry.instances(model):
                for name, shape in entry.forms[0].tensors.items():
                    size = [sizes[dimension] for dimension in shape]
                    tensors[name.format(layer=layer, expert=expert)] = torch.randn(size, generator=generator)
    return tensors


@pytest.mark.parametrize(("family", "model"), CASES)
def test_there_and_back(family: Family, model: ModelConfig) -> None:
    source = random_hf(family, model)
    converted = dict(family.to_megatron(source, model))
    back = dict(family.to_hf(converted, model))
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], source[name]) for name in source)
    assert ("output_layer.weight" in converted) is not model.tie_embeddings
    assert sum(tensor.numel() for tensor in converted.values()) >= sum(tensor.numel() for tensor in source.values())


def test_qkv_is_grouped() -> None:
    """Six query heads in three groups of channels 4: q0 q1 k0 v0, q2 q3 k1 v1, q4 q5 k2 v2."""
    tensors = [
        torch.arange(heads).repeat_interleave(4)[:, None].expand(-1, 30) + offset
        for heads, offset in ((6, 0), (3, 100), (3, 200))
    ]
    joined = GroupedQKV().hf_to_megatron(tensors, DENSE, 0)
    assert joined[::4, 0].tolist() == [0, 1, 100, 200, 2, 3, 101, 201, 4, 5, 102, 202]
    assert all(torch.equal(a, b) for a, b in zip(GroupedQKV().megatron_to_hf(joined, DENSE), tensors, strict=True))


def test_gate_comes_before_up() -> None:
    joined = GatedFC1().hf_to_megatron([torch.zeros(28, 30), torch.ones(28, 30)], DENSE, 0)
    assert joined.shape == (56, 30) and joined[:28].sum() == 0 and joined[28:].min() == 1


def test_vocabulary_is_padded_with_zeros() -> None:
    padded = VocabularyRows().hf_to_megatron([torch.ones(70, 30)], DENSE, 0)
    assert padded.shape == (128, 30) and padded[:70].min() == 1 and padded[70:].abs().max() == 0
    assert VocabularyRows().megatron_to_hf(padded, DENSE)[0].shape == (70, 30)


def test_experts_in_one_tensor_are_read() -> None:
    """The form that transformers 5 has in memory gives the same weights as one tensor an expert."""
    source = random_hf(mixtral.FAMILY, MIXTURE)
    fused = {name: tensor for name, tensor in source.items() if "block_sparse_moe" not in name}
    for layer in range(2):
        theirs, ours = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        fused[theirs + "gate.weight"] = source[ours + "gate.weight"]
        gated = [torch.cat([source[f"{ours}experts.{e}.w{w}.weight"] for w in (1, 3)]) for e in range(5)]
        fused[theirs + "experts.gate_up_proj"] = torch.stack(gated)
        fused[theirs + "experts.down_proj"] = torch.stack([source[f"{ours}experts.{e}.w2.weight"] for e in range(5)])
    expected = dict(mixtral.FAMILY.to_megatron(source, MIXTURE))
    converted = dict(mixtral.FAMILY.to_megatron(fused, MIXTURE))
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("family", "model"), LIKE_LLAMA)
def test_missing_tensor(family: Family, model: ModelConfig) -> None:
    source = random_hf(family, model)
    del source["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight is missing"):
        dict(family.to_megatron(source, model))


def test_missing_expert() -> None:
    source = random_hf(mixtral.FAMILY, MIXTURE)
    del source["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.block_sparse_moe\.experts\.3\.w3"):
        dict(mixtral.FAMILY.to_megatron(source, MIXTURE))


def test_left_over_tensor() -> None:
    """Biases that the table does not know would be lost silently; old rotary buffers hold nothing."""
    source = random_hf(mistral.FAMILY, DENSE)
    source["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    dict(mistral.FAMILY.to_megatron(source, DENSE))
    source["model.layers.0.self_attn.q_proj.bias"] = torch.ones(24)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias .* has no place in a Mistral model"):
        dict(mistral.FAMILY.to_megatron(source, DENSE))


def test_dense_weights_with_a_mixture_config() -> None:
    with pytest.raises(CheckpointError, match="block_sparse_moe.gate.weight is missing"):
        dict(mixtral.FAMILY.to_megatron(random_hf(mistral.FAMILY, DENSE), MIXTURE))


def test_wrong_shape() -> None:
    source = random_hf(mistral.FAMILY, DENSE)
    source["model.layers.0.mlp.up_proj.weight"] = torch.zeros(27, 30)
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight has shape \[27, 30\], but config.json makes it \[28, 30\]"
    ):
        dict(mistral.FAMILY.to_megatron(source, DENSE))


def test_export_of_an_incomplete_model() -> None:
    converted = dict(mistral.FAMILY.to_megatron(random_hf(mistral.FAMILY, DENSE), DENSE))
    del converted["decoder.layers.1.mlp.linear_fc2.weight"]
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.1\.mlp\.linear_fc2\.weight is missing"):
        dict(mistral.FAMILY.to_hf(converted, DENSE))


@pytest.mark.parametrize(("family", "model"), CASES)
def test_config_there_and_back(family: Family, model: ModelConfig) -> None:
    """A shape survives in the config.json of its family, and is refused where that cannot say it."""
    model = replace(model, norm_epsilon=1e-6, moe_aux_loss_coeff=0.3, sliding_window=16)
    if family in (llama.FAMILY, gpt_neox.FAMILY, gptj.FAMILY):
        assert not describes(family, model)  # no windows there
        model = replace(model, sliding_window=None)
    assert describes(family, model)
    assert family_of_model(replace(model, architecture=family.architecture)) is family
    for change in ({"norm_epsilon": 1e-7}, {"num_layers": 3, "window_layers": None}):
        assert describes(family, replace(model, **change)), change  # these it can say
    unknown = replace(model, qk_norm=not model.qk_norm, attention_scale=0.3)
    assert not describes(family, unknown)
    with pytest.raises(CheckpointError, match="whose config.json cannot say the model's shape"):
        family_of_model(replace(unknown, architecture=family.architecture))


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_stretched_rope_there_and_back(kind: Any) -> None:
    model = replace(DENSE, rope_type=kind, rope_factor=4.0, rotary_base=5e5)
    if kind != "linear":
        model = replace(model, rope_original_length=64)
    assert describes(llama.FAMILY, model)
    assert not describes(gptj.FAMILY, model)


def test_the_first_family_with_the_shape() -> None:
    shapes = (DENSE, MIXTURE, replace(DENSE, add_mlp_bias=True), replace(QWEN_MIXTURE, qk_norm=True))
    assert [family_of_model(shape).name for shape in shapes] == ["Mistral", "Mixtral", "Llama", "Qwen3-MoE"]
    with pytest.raises(CheckpointError, match="no architecture of transformers that is known here has such a shape"):
        family_of_model(replace(DENSE, attention_scale=0.3))
    with pytest.raises(CheckpointError, match="model.architecture is Falcon; supported: Mistral"):
        family_of_model(replace(DENSE, architecture="Falcon"))
