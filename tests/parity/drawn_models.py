"""Models drawn at random from the keys of every family's config.json, taken through import, a step and export.

A case is a model of transformers with random weights: its family, every key that its family reads (sizes, grouped
heads, biases, norms, kinds of RoPE, windows, experts, tied or not), whether it is saved with its output layer, and the
adapter that stands beside it. It is right if

- states of both modes and logits are those of transformers,
- the gradient of every tensor is that of transformers,
- after a step the exported model, loaded by transformers, has our logits, and
- an adapter's logits are PEFT's, beside weights that bitsandbytes has rounded to 4 bits where it is quantised.

Or it is refused in one line, for a reason that :data:`REFUSED` lists.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_grit.config.checks.run import find_problems
from megatron_grit.config.schema import AdapterConfig, ModelConfig, RunConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.errors import CheckpointError, GritError
from tests.parity.test_hf_import import everything_seen
from tests.rows import TWO_PASSES

VOCAB, LENGTHS = 67, (19, 7, 33)
TOLERANCE, GRADIENT = 2e-5, 1e-4
RENAMED: dict[str, dict[str, str]] = {
    "GPTJ": {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
    "GPTNeo": {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"},
}
REFUSED = (
    "num_experts_per_tok is 1 with a normalised weight",
    "partial_rotary_factor is .* with RoPE of type",
    "model.rope_type yarn with model.rotary_percent",
    "RoPE turns pairs of channels",
    "PEFT has no DoRA for experts",
    "PEFT gives adapters named gate_proj, up_proj or down_proj to experts alone",
    "DoRA of .* alone has no form in PEFT",
)
"""What may be said of a case in place of computing it."""


def rope(draw: random.Random, *, partial: bool) -> dict[str, Any]:
    """``rope_parameters``."""
    found: dict[str, Any] = {"rope_type": draw.choice(["default", "linear", "llama3", "yarn"])}
    found["rope_theta"] = draw.choice([100.0, 10000.0, 1e6])
    if found["rope_type"] != "default":
        found["factor"] = draw.choice([1.5, 4.0])
    if found["rope_type"] in ("llama3", "yarn"):
        found["original_max_position_embeddings"] = draw.choice([16, 32])
    if found["rope_type"] == "llama3":
        found |= {"low_freq_factor": 1.0, "high_freq_factor": draw.choice([2.0, 4.0])}
    if found["rope_type"] == "yarn":
        found |= draw.choice([{}, {"attention_factor": 1.3}, {"beta_fast": 20.0, "beta_slow": 2.0}])
    if partial:
        found["partial_rotary_factor"] = draw.choice([0.25, 0.5, 1.0])
    return found


def windows(draw: random.Random, layers: int) -> dict[str, Any]:
    """Qwen2's and Qwen3's, by number or layer by layer."""
    found: dict[str, Any] = {"use_sliding_window": draw.random() < 0.7, "sliding_window": draw.choice([3, 8, 64])}
    found["max_window_layers"] = draw.randint(0, layers)
    if draw.random() < 0.4:
        found["layer_types"] = draw.choices(["sliding_attention", "full_attention"], k=layers)
        found["use_sliding_window"] = "sliding_attention" in found["layer_types"]
    return found


def experts(draw: random.Random, layers: int) -> dict[str, Any]:
    """Qwen's mixtures."""
    count = draw.randint(2, 5)
    return {
        "num_experts": count,
        "num_experts_per_tok": draw.randint(1, count),
        "moe_intermediate_size": draw.choice([8, 20]),
        "norm_topk_prob": draw.random() < 0.5,
        "decoder_sparse_step": draw.choice([1, 1, 2]),
        "mlp_only_layers": sorted(draw.sample(range(layers), draw.randint(0, layers - 1))),
    }


def draw_settings(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A family's name in transformers, and the settings of its configuration."""
    family = draw.choice(
        ["Mistral", "Mixtral", "Llama", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "GPTNeoX", "GPTJ", "GPTNeo"]
    )
    layers, groups = draw.randint(1, 3), draw.choice([1, 2, 3])
    heads = groups * draw.choice([1, 2, 3])
    width = draw.choice([8, 16])
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": heads * width,
        "intermediate_size": draw.choice([24, 40]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": draw.choice([64, 128]),
        "initializer_range": 0.15,
        "tie_word_embeddings": draw.random() < 0.4,
        "attn_implementation": "eager" if family in RENAMED else "sdpa",
    }
    if family.startswith("GPT"):
        shape |= {
            "layer_norm_eps" if family == "GPTNeoX" else "layer_norm_epsilon": draw.choice([1e-5, 1e-3]),
            "hidden_act" if family == "GPTNeoX" else "activation_function": draw.choice(
                ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"]
            ),
        }
    else:
        shape |= {"num_key_value_heads": groups, "rms_norm_eps": draw.choice([1e-6, 1e-4])}
        shape["rope_parameters"] = rope(draw, partial=draw.random() < 0.1)
        if family == "Mixtral":
            shape["head_dim"] = width  # without it transformers cannot make YaRN's angles
        if family != "Qwen2Moe" and draw.random() < 0.5:
            # transformers refuses a Llama whose hidden size its heads do not divide.
            shape |= {
                "head_dim": draw.choice([8, 16]),
                "hidden_size": heads * 8 if family == "Llama" else draw.choice([24, 40]),
            }
    shape |= of_family(family, draw, layers, width)
    for new, old in RENAMED.get(family, {}).items():
        shape[new] = shape.pop(old)
    return family, shape


def of_family(family: str, draw: random.Random, layers: int, width: int) -> dict[str, Any]:
    """Settings that one family has."""
    window = draw.choice([None, 3, 8])
    bias = {"attention_bias": draw.random() < 0.5}
    if family == "Mistral":
        return {"sliding_window": window}
    if family == "Mixtral":
        count = draw.randint(2, 5)
        return {"sliding_window": window, "num_local_experts": count, "num_experts_per_tok": draw.randint(1, count)}
    if family == "Llama":
        return bias | {"mlp_bias": draw.random() < 0.5}
    if family == "Qwen2":
        return windows(draw, layers)
    if family == "Qwen3":
        return windows(draw, layers) | bias
    if family == "Qwen2Moe":
        shared = {"shared_expert_intermediate_size": draw.choice([12, 28]), "qkv_bias": draw.random() < 0.5}
        return windows(draw, layers) | experts(draw, layers) | shared
    if family == "Qwen3Moe":
        one = {"use_sliding_window": draw.random() < 0.5, "sliding_window": draw.choice([3, 8])}
        return experts(draw, layers) | bias | one
    if family == "GPTNeoX":
        serial = {"use_parallel_residual": draw.random() < 0.5}
        return bias | serial | {"rope_parameters": rope(draw, partial=True)}
    if family == "GPTJ":
        return {"rotary_dim": draw.choice([2, 4, width]), "n_inner": draw.choice([None, 24])}
    kinds = draw.choices(["global", "local"], k=layers)
    return {"attention_types": [[[kind], 1] for kind in kinds], "window_size": draw.choice([3, 8])}


def draw_adapter(draw: random.Random) -> AdapterConfig:
    """Half of the cases have none."""
    kind = draw.choice(["none", "none", "lora", "dora"])
    if kind == "none":
        return AdapterConfig()
    targets = draw.sample(["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], draw.randint(1, 6))
    pattern = [f"{draw.choice(targets)}={draw.randint(1, 6)}"] if draw.random() < 0.5 else []
    return AdapterConfig(
        kind=kind,
        rank=3,
        alpha=7.0,
        targets=targets,
        rslora=draw.random() < 0.3,
        rank_pattern=pattern,
        alpha_pattern=[f"{draw.choice(targets)}={draw.randint(1, 20)}"] if draw.random() < 0.3 else [],
        quantize="nf4" if draw.random() < 0.4 else "none",
        double_quantize=False,  # the library's search for codes of scales is not exact on a CPU
    )


def make_row(kind: RowKind) -> PackedRow:
    """Segments of random tokens, labels everywhere but at each segment's end."""
    total, ends = sum(LENGTHS), torch.tensor(LENGTHS).cumsum(0)
    tokens = torch.randint(0, VOCAB, (1, total), generator=torch.Generator().manual_seed(1))
    return PackedRow(
        embeds=kind is RowKind.EMBEDDING,
        tokens_1T=tokens,
        positions_1T=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int(),
        max_seqlen=max(LENGTHS),
        padding_mask_1T=torch.zeros(1, total, dtype=torch.bool),
        labels_1T=tokens.roll(-1, 1),
        loss_mask_1T=torch.ones(total).index_fill(0, ends - 1, 0.0)[None],
    )


ROWS = {kind: make_row(kind) for kind in TWO_PASSES}
SEGMENTS = ROWS[RowKind.GENERATIVE].tokens_1T[0].split(LENGTHS)


def make_theirs(family: str, settings: dict[str, Any], seed: int) -> Any:
    """A model of transformers with biases and norms away from 0 and 1."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def logits_of_theirs(model: Any) -> Tensor:
    return torch.cat([model(input_ids=ids[None]).logits[0] for ids in SEGMENTS])


def states_of_theirs(model: Any) -> Tensor:
    """Of the bidirectional pass."""
    states = []
    with everything_seen(model):
        for ids in SEGMENTS:
            is_eager = model.config._attn_implementation == "eager"
            shape = (1, 1, len(ids), len(ids))
            mask = torch.zeros(shape) if is_eager else torch.ones(shape, dtype=torch.bool)
            states.append(model.base_model(input_ids=ids[None], attention_mask=mask).last_hidden_state[0])
    return torch.cat(states)


def near(what: str, found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compare as shares of the largest value, or of 1."""
    apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    assert apart <= tolerance, f"{what}: {apart:.1e} apart"


def run_case(seed: int, folder: Path, context: Any) -> str:
    """Draw a case and take it all the way. Returns what it was, or the line in which it is refused.

    Args:
        seed: of the draw.
        folder: empty.
        context: of the process.

    Raises:
        AssertionError: a number differs.
        CheckpointError: it is refused for another reason than those of :data:`REFUSED`.
    """
    draw = random.Random(seed)
    family, settings = draw_settings(draw)
    decoder_only, adapter = draw.random() < 0.25, draw_adapter(draw)
    told = f"{family} {settings}, {'decoder only, ' * decoder_only}{adapter}"
    try:
        _run(family, settings, decoder_only, adapter, seed, folder, context)
    except GritError as error:
        if not any(re.search(pattern, str(error)) for pattern in REFUSED):
            raise
        return f"{told}: refused, {error}"
    except Exception as error:
        raise AssertionError(f"case {seed}, {told}: {error}") from error
    return told


def _run(
    family: str,
    settings: dict[str, Any],
    decoder_only: bool,
    adapter: AdapterConfig,
    seed: int,
    folder: Path,
    context: Any,
) -> None:  # many: all that is drawn
    import transformers

    from megatron_grit.convert.families.registry import family_of_model
    from megatron_grit.convert.hf_in.pretrained import fill_chunks
    from megatron_grit.convert.hf_in.stored_model import open_model
    from megatron_grit.models.decoder import Output, build_model

    theirs = make_theirs(family, settings, seed)
    if decoder_only:
        theirs.base_model.save_pretrained(folder / "in")
        head = theirs.get_output_embeddings()
        head.weight = theirs.get_input_embeddings().weight
        if head.bias is not None:
            torch.nn.init.zeros_(head.bias)
    else:
        theirs.save_pretrained(folder / "in")
    config = RunConfig()
    config.training.precision, config.parallel.device, config.data.tokenizer = "fp32", "cpu", "none"
    with open_model(folder / "in") as stored:
        config.model = replace(stored.shape, moe_aux_loss_coeff=0.0)
        for problem in find_problems(config, 1, files=False):
            if problem.key.startswith("model."):
                raise CheckpointError(problem.message)
        ours = build_model(config, VOCAB, context)
        fill_chunks([ours], config.model, stored.plan, stored.weights)
    ours.train()
    near("logits", ours(ROWS[RowKind.GENERATIVE], Output.LOGITS).detach(), logits_of_theirs(theirs).detach())
    with torch.no_grad():
        near("states", ours(ROWS[RowKind.EMBEDDING], Output.HIDDEN).squeeze(1), states_of_theirs(theirs))
    table, shape = family_of_model(config.model), config.model
    assert family_of_model(replace(shape, architecture=None)), "a shape that no family has"
    _step(ours, theirs, table, shape)
    export_case(ours, table, shape, folder / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "out", attn_implementation=theirs.config._attn_implementation
    ).eval()
    with torch.no_grad():
        near("exported", ours(ROWS[RowKind.GENERATIVE], Output.LOGITS), logits_of_theirs(again))
    if adapter.kind != "none":
        _adapt(config, adapter, again, folder, context)


def _step(ours: Any, theirs: Any, table: Any, shape: ModelConfig) -> None:
    """Gradients of both, tensor by tensor; then ours takes a step."""
    from megatron_grit.models.decoder import Output

    row = ROWS[RowKind.GENERATIVE]
    ours(row, Output.TOKEN_LOSSES).sum().backward()
    losses = torch.nn.functional.cross_entropy(logits_of_theirs(theirs), row.labels_1T[0], reduction="none")
    (losses * row.loss_mask_1T[0]).sum().backward()
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in ours.named_parameters()
    }
    found = dict(table.to_hf(gradients, shape))
    expected = _as_files(
        {name: value.grad for name, value in theirs.named_parameters() if value.grad is not None}, theirs
    )
    assert any(value.abs().max() > 1e-3 for value in found.values())
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in found.items():
        reference = expected.get(name, torch.zeros_like(value))
        apart = float((value - reference).abs().max()) / max(scale * 1e-2, float(reference.abs().max()), 1.0)
        assert apart <= GRADIENT, f"gradient of {name}: {apart:.1e} apart"
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 / scale * parameter.grad
                parameter.grad = None


def _as_files(tensors: dict[str, Tensor], theirs: Any) -> dict[str, Tensor]:
    """Tensors by the names of files: in memory transformers 5 holds a layer's experts in one."""
    found = {}
    mixtral = theirs.config.model_type == "mixtral"
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)", name)
        if match is None:
            name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if mixtral else name
            found[
                "embed_out.weight" if (theirs.config.model_type, name) == ("gpt_neox", "lm_head.weight") else name
            ] = tensor
            continue
        prefix = f"{match[1]}.{'block_sparse_moe' if mixtral else 'mlp'}.experts"
        names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        for number, expert in enumerate(tensor):
            parts = (
                dict(zip(names[:2], expert.chunk(2), strict=True)) if match[2] == "gate_up_proj" else {names[2]: expert}
            )
            found |= {f"{prefix}.{number}.{part}.weight": value for part, value in parts.items()}
    return found


def export_case(ours: Any, table: Any, shape: ModelConfig, folder: Path) -> None:
    """Write a model as its family does."""
    folder.mkdir()
    weights = {name: value.detach() for name, value in ours.named_parameters()}
    tensors = {name: value.clone().contiguous() for name, value in table.to_hf(weights, shape)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(table.hf_config(shape)))


def _adapt(config: RunConfig, adapter: AdapterConfig, theirs: Any, folder: Path, context: Any) -> None:
    """Random adapters beside the exported model, here and in PEFT."""
    import peft

    from megatron_grit.config.checks.adapter import adapter_problems
    from megatron_grit.convert.hf_in.pretrained import load_pretrained
    from megatron_grit.convert.peft.sites import WholeAdapter
    from megatron_grit.convert.peft.writer import write_peft
    from megatron_grit.models.decoder import Output, build_model
    from megatron_grit.training.base_weights import prepare_base

    run = replace(config, model=replace(config.model, pretrained=str(folder / "out")), adapter=adapter)
    for problem in adapter_problems(run):
        raise CheckpointError(problem.message)
    ours = build_model(run, VOCAB, context)
    load_pretrained(run, [ours], context)
    factors = {name: value for name, value in ours.named_parameters() if ".adapter." in name}
    prepare_base([ours], adapter)
    with torch.no_grad():
        if adapter.quantize != "none":
            before = logits_of_theirs(theirs)
            _round(theirs, adapter, run.model)
            assert (logits_of_theirs(theirs) - before).abs().max() > 1e-4, "nothing is rounded"
        for value in factors.values():
            value.add_(torch.randn_like(value) * 0.1)
        before = logits_of_theirs(theirs)
        write_peft(folder / "adapter", WholeAdapter(adapter, dict(factors)), run.model)
        loaded = peft.PeftModel.from_pretrained(theirs, folder / "adapter").eval()
        expected = logits_of_theirs(loaded)
        assert (expected - before).abs().max() > 1e-3, "the adapter does nothing"
        near("adapter", ours.eval()(ROWS[RowKind.GENERATIVE], Output.LOGITS), expected)


def _round(theirs: Any, adapter: AdapterConfig, model: ModelConfig) -> None:
    """Round the weights of the layers with an adapter to 4 bits, each projection by itself, by bitsandbytes."""
    import bitsandbytes.functional as library

    def rounded(weight: Tensor) -> Tensor:
        packed, state = library.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=False)
        # By the format: its kernel for CPUs gives other values for rows of 16 (bitsandbytes 0.50).
        codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: weight.numel()].long()
        values = state.code[codes] * state.absmax.repeat_interleave(state.blocksize)[: weight.numel()]
        return values.view_as(weight).to(weight.dtype)

    targets = set(adapter.targets or ())
    for together in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}):  # one layer of the engine
        targets |= together if targets & together else set()
    for name, module in theirs.named_modules():
        own = name.rpartition(".")[2]
        if own == "query_key_value" and "q_proj" in targets:
            heads = model.num_attention_heads
            weight = module.weight.view(heads, 3, -1, module.weight.shape[1])
            for place in range(3):
                weight[:, place] = rounded(weight[:, place].flatten(0, 1)).view_as(weight[:, place])
        elif _OURS.get(own, own) in targets and own != "query_key_value":
            module.weight.copy_(rounded(module.weight))
    for layer in theirs.modules():  # experts, which are adapted one by one
        for name, key in (("gate_up_proj", "up_proj"), ("down_proj", "down_proj")):
            weight = getattr(layer, name, None)
            if isinstance(weight, torch.nn.Parameter) and key in targets:
                for expert in weight:
                    for part in expert.chunk(2) if name == "gate_up_proj" else (expert,):
                        part.copy_(rounded(part))


_OURS = {
    "out_proj": "o_proj",
    "fc_in": "up_proj",
    "c_fc": "up_proj",
    "dense_h_to_4h": "up_proj",
    "fc_out": "down_proj",
    "c_proj": "down_proj",
    "dense_4h_to_h": "down_proj",
    "dense": "o_proj",
}
"""Projections by their names in transformers, where these are others."""
