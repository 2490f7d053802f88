"""Weights that each rank reads for itself from a Hugging Face directory are those of a checkpoint that was converted.

At every layout, bit for bit; and a rank reads its share of the bytes and no more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_grit.config.schema import ParallelConfig
from tests.harness.ranks import run_on_ranks
from tests.unit.convert.hf_in.test_reader import stack_experts
from tests.unit.convert.test_param_map import random_hf

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

VOCAB, GROWN = 300, 330
SHAPE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": VOCAB,
}
EXPERTS = {"num_experts": 4, "moe_top_k": 2}
NEOX = {
    "num_query_groups": 4,
    "normalization": "layernorm",
    "activation": "gelu",
    "parallel_residual": "two_norms",
    "add_qkv_bias": True,
    "add_attention_output_bias": True,
    "add_mlp_bias": True,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", {}),
    "mistral_tied": ("MistralForCausalLM", {"tie_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", EXPERTS),
    "mixtral_stacked": ("MixtralForCausalLM", EXPERTS),
    "qwen2": ("Qwen2ForCausalLM", {"add_qkv_bias": True}),
    "gpt_neox": ("GPTNeoXForCausalLM", NEOX),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "ep2": (2, {"expert": 2}),
    "tp2_sp_etp1_ep2": (2, {"tensor": 2, "sequence_parallel": True, "expert_tensor": 1, "expert": 2}),
    "tp2_pp2": (4, {"tensor": 2, "sequence_parallel": True, "pipeline": 2}),
}


def fits(name: str, layout: str) -> bool:
    """The engine wants experts for expert parallelism, and sequence parallelism with experts and tensor parallelism."""
    has_experts = "mixtral" in name
    return has_experts if "ep2" in layout else not (has_experts and layout == "tp2")


def write_source(directory: Path, name: str) -> None:
    """A Hugging Face directory of random weights in two files."""
    from megatron_grit.config.schema import ModelConfig
    from megatron_grit.convert.families.registry import FAMILIES
    from tests.unit.convert.hf_in.test_reader import write_shards

    architecture, changes = MODELS[name]
    family = next(family for family in FAMILIES if family.architecture == architecture)
    model = ModelConfig(**(SHAPE | changes))
    tensors = random_hf(family, model)
    if name == "mixtral_stacked":
        tensors = stack_experts(tensors, model.num_layers, 4)
    write_shards(directory, tensors)
    (directory / "config.json").write_text(json.dumps(family.hf_config(model)))


def convert_all(directory: str) -> None:
    from megatron_grit.convert.hf_in.convert import convert_checkpoint

    root = Path(directory)
    for name in MODELS:
        vocab_size = GROWN if name == "gpt_neox" else None
        convert_checkpoint(root / "hf" / name, root / "ours" / name, root / "tiny.model", vocab_size=vocab_size)


def head_of(chunk: Any) -> torch.Tensor:
    """A copy of the embedding head's weights; empty where there is none."""
    head = chunk.embedding_head
    return torch.empty(0) if head is None else head.weight.detach().clone()


def compare(directory: str, num_processes: int) -> dict[str, dict[str, Any]]:
    """For each model and layout of so many processes: parameters that differ, and the bytes that were read."""
    from megatron_grit.convert.hf_in.pretrained import load_pretrained
    from megatron_grit.models.decoder import build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights, read_config, resolve_checkpoint

    found = {}
    for layout, (size, parallel) in LAYOUTS.items():
        for name in MODELS:
            if size != num_processes or not fits(name, layout):
                continue
            checkpoint = resolve_checkpoint(Path(directory) / "ours" / name)
            config = read_config(checkpoint)
            config.parallel = ParallelConfig(device="cpu", **parallel)
            config.model.pretrained = str(Path(directory) / "hf" / name)
            config.embedding.projection_dim = 8 if name == "mistral" else None
            with parallel_job(config.parallel, seed=3) as context, torch.no_grad():
                config_of_ours = read_config(checkpoint)
                config_of_ours.parallel = config.parallel
                ours = build_chunks(config_of_ours, config.model.vocab_size or 0, context)
                load_weights(checkpoint, ours, context)
                direct = build_chunks(config, config.model.vocab_size or 0, context)
                heads = [head_of(chunk) for chunk in direct]
                for chunk in direct:
                    for key, parameter in chunk.named_parameters():
                        if "embedding_head" not in key:
                            parameter.fill_(float("nan"))
                num_bytes = load_pretrained(config, direct, context)
                different = [
                    key
                    for one, other in zip(ours, direct, strict=True)
                    for key, parameter in one.named_parameters()
                    if not torch.equal(parameter, dict(other.named_parameters())[key])
                ]
                if not all(torch.equal(head_of(chunk), head) for chunk, head in zip(direct, heads, strict=True)):
                    different.append("embedding_head")
                held = sum(p.numel() * p.element_size() for chunk in direct for p in chunk.parameters())
                found[f"{name}-{layout}"] = {"different": different, "bytes": num_bytes, "held": held}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """(directory, for each case what each rank found)."""
    from megatron_grit.data.text.tokenizer import train_sentencepiece

    directory = tmp_path_factory.mktemp("pretrained")
    words = [f"word{number} number {number * 7} of many" for number in range(300)]
    train_sentencepiece(words, directory / "tiny", VOCAB)
    for name in MODELS:
        write_source(directory / "hf" / name, name)
    run_on_ranks(convert_all, 1, tmp_path_factory.mktemp("convert"), str(directory))
    found: dict[str, list[dict[str, Any]]] = {}
    for size in sorted({size for size, _ in LAYOUTS.values()}):
        for rank in run_on_ranks(compare, size, tmp_path_factory.mktemp(f"ranks{size}"), str(directory), size):
            for case, result in rank.items():
                found.setdefault(case, []).append(result)
    return directory, found


CASES = [f"{name}-{layout}" for name in MODELS for layout in LAYOUTS if fits(name, layout)]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_checkpoint(results: Any, case: str) -> None:
    for rank in results[1][case]:
        assert rank["different"] == []


@pytest.mark.parametrize("case", [case for case in CASES if "gpt_neox" not in case])
def test_a_rank_reads_what_it_holds(results: Any, case: str) -> None:
    """Not a byte more than its parameters, which hold padding and a fresh head besides."""
    for rank in results[1][case]:
        assert 0 < rank["bytes"] <= rank["held"]


@pytest.mark.parametrize(
    ("case", "size"),
    [
        ("mistral-tp2", 2),
        ("qwen2-tp2_sp", 2),
        ("mistral-pp2", 2),
        ("mixtral-tp2_pp2", 4),
        ("mixtral_stacked-tp2_pp2", 4),
    ],
)
def test_ranks_share_the_bytes(results: Any, case: str, size: int) -> None:
    """Together they read the whole, and only norms and routers more than once; padding makes shares uneven."""
    directory, found = results
    whole = sum(file.stat().st_size for file in (directory / "hf" / case.partition("-")[0]).glob("*.safetensors"))
    read = [rank["bytes"] for rank in found[case]]
    assert len(read) == size
    assert sum(read) == pytest.approx(whole, rel=0.05)
    assert max(read) < 1.3 * whole / size
