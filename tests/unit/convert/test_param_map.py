"""The tables of each family: layouts against hand-written ones, both directions, and what a bad source says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.families import mistral, mixtral
from megatron_grit.convert.param_map import Family, GatedFC1, GroupedQKV, VocabularyRows, dimensions
from megatron_grit.errors import CheckpointError

# Every size is different, and head channels are not hidden size / heads.
DENSE = ModelConfig(
    num_layers=2,
    hidden_size=20,
    ffn_hidden_size=28,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=4,
    vocab_size=70,
)
MIXTURE = replace(DENSE, num_experts=5)
CASES = [
    pytest.param(mistral.FAMILY, DENSE, id="mistral"),
    pytest.param(mistral.FAMILY, replace(DENSE, tie_embeddings=True), id="mistral_tied"),
    pytest.param(mixtral.FAMILY, MIXTURE, id="mixtral"),
]


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
        torch.arange(heads).repeat_interleave(4)[:, None].expand(-1, 20) + offset
        for heads, offset in ((6, 0), (3, 100), (3, 200))
    ]
    joined = GroupedQKV().hf_to_megatron(tensors, DENSE, 0)
    assert joined[::4, 0].tolist() == [0, 1, 100, 200, 2, 3, 101, 201, 4, 5, 102, 202]
    assert all(torch.equal(a, b) for a, b in zip(GroupedQKV().megatron_to_hf(joined, DENSE), tensors, strict=True))


def test_gate_comes_before_up() -> None:
    joined = GatedFC1().hf_to_megatron([torch.zeros(28, 20), torch.ones(28, 20)], DENSE, 0)
    assert joined.shape == (56, 20) and joined[:28].sum() == 0 and joined[28:].min() == 1


def test_vocabulary_is_padded_with_zeros() -> None:
    padded = VocabularyRows().hf_to_megatron([torch.ones(70, 20)], DENSE, 0)
    assert padded.shape == (128, 20) and padded[:70].min() == 1 and padded[70:].abs().max() == 0
    assert VocabularyRows().megatron_to_hf(padded, DENSE)[0].shape == (70, 20)


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


@pytest.mark.parametrize(("family", "model"), CASES)
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
    source["model.layers.0.mlp.up_proj.weight"] = torch.zeros(27, 20)
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight has shape \[27, 20\], but config.json makes it \[28, 20\]"
    ):
        dict(mistral.FAMILY.to_megatron(source, DENSE))


def test_export_of_an_incomplete_model() -> None:
    converted = dict(mistral.FAMILY.to_megatron(random_hf(mistral.FAMILY, DENSE), DENSE))
    del converted["decoder.layers.1.mlp.linear_fc2.weight"]
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.1\.mlp\.linear_fc2\.weight is missing"):
        dict(mistral.FAMILY.to_hf(converted, DENSE))


@pytest.mark.parametrize(("family", "model"), CASES)
def test_config_there_and_back(family: Family, model: ModelConfig) -> None:
    model = replace(model, rotary_base=5e5, sliding_window=16, norm_epsilon=1e-6, moe_aux_loss_coeff=0.0)
    assert family.model_config(family.hf_config(model)) == model
