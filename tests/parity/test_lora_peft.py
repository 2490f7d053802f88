"""Adapters against PEFT on tiny models of transformers: read, written, merged, and trained side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.errors import CheckpointError
from tests.harness.ranks import run_on_ranks
from tests.parity.test_hf_import import LENGTHS, make_model, make_row

transformers = pytest.importorskip("transformers", reason="the reference is transformers")
peft = pytest.importorskip("peft", reason="the reference is PEFT")

VOCAB = 331
TOLERANCE = 5e-6
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA_LIKE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# The modules of transformers that hold what our seven projections are, and parameters of experts.
TARGETS: dict[str, dict[str, Any]] = {
    "mistral": {"target_modules": LLAMA_LIKE},
    "mistral_tied": {"target_modules": LLAMA_LIKE},
    "llama_biases": {"target_modules": LLAMA_LIKE},
    "qwen2": {"target_modules": LLAMA_LIKE},
    "gpt_neox": {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    "gptj": {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]},
    "gpt_neo": {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"]},
    "mixtral": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "qwen3_moe": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
}
MIXTURES = ("mixtral", "qwen3_moe")
CASES = [(name, dora) for name in TARGETS for dora in (False, True) if not (dora and name in MIXTURES)]


def make_adapter(name: str, directory: Path, **options: Any) -> Any:
    """A model of transformers with a random adapter of PEFT, both saved below ``directory``."""
    torch.manual_seed(5)
    model = make_model(name, VOCAB)
    model.save_pretrained(directory / "hf")
    settings = {"r": 4, "lora_alpha": 8} | TARGETS[name] | options
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key or parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(directory / "adapter")
    return adapted.eval()


def run_config(directory: Path, **adapter: Any) -> RunConfig:
    """A run beside the saved model with adapters as the saved one has."""
    from megatron_grit.convert.families.registry import load_hf_config
    from megatron_grit.convert.peft.reader import read_peft

    model = load_hf_config(directory / "hf")
    found = read_peft(directory / "adapter", model).config
    model = replace(model, pretrained=str(directory / "hf"))
    config = RunConfig(output_dir=str(directory), model=model, adapter=replace(found, **adapter))
    config.training.precision, config.parallel.device = "fp32", "cpu"
    return config


def build(directory: Path, config: RunConfig, context: Any) -> Any:
    """Our model with the base and the adapter in it."""
    from megatron_grit.convert.hf_in.pretrained import load_pretrained
    from megatron_grit.convert.peft.runtime import load_peft
    from megatron_grit.models.decoder import build_model

    model = build_model(config, VOCAB, context)
    load_pretrained(config, [model], context)
    load_peft(directory / "adapter", config, [model])
    return model.eval()


def our_logits(model: Any) -> Tensor:
    from megatron_grit.models.decoder import Output

    with torch.no_grad():
        return model(make_row(RowKind.GENERATIVE), Output.LOGITS)


def their_logits(model: Any) -> Tensor:
    """Of the row's segments, one after the other."""
    segments = make_row(RowKind.GENERATIVE).tokens_1T.split(LENGTHS, dim=1)
    with torch.no_grad():
        return torch.cat([model(segment).logits[0] for segment in segments])


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def load_theirs(directory: Path, adapter: Path | None = None) -> Any:
    """The saved model of transformers; with an adapter, PEFT's of it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "hf", attn_implementation="eager")
    return (model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)).eval()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} {'dora' if case[1] else 'lora'}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    name, dora = request.param
    directory = tmp_path_factory.mktemp("peft")
    return name, directory, make_adapter(name, directory, use_dora=dora)


@pytest.fixture(scope="module")
def ours(case: tuple[str, Path, Any]) -> Iterator[Any]:
    from megatron_grit.parallel.launch import parallel_job

    config = run_config(case[1])
    with parallel_job(config.parallel, seed=2) as context:
        yield build(case[1], config, context)


def test_an_adapter_of_peft_gives_its_logits(case: tuple[str, Path, Any], ours: Any) -> None:
    theirs = their_logits(case[2])
    with case[2].disable_adapter():
        assert (theirs - their_logits(case[2])).abs().max() > 0.5, "the adapter does nothing"
    assert apart(our_logits(ours), theirs) < TOLERANCE


def test_peft_loads_what_is_written(case: tuple[str, Path, Any], ours: Any) -> None:
    from megatron_grit.convert.peft.reader import read_peft
    from megatron_grit.convert.peft.writer import write_peft

    name, directory, _ = case
    model = run_config(directory).model
    adapter = read_peft(directory / "adapter", model)
    if name == "qwen3_moe":  # with a layer that has no experts
        with pytest.raises(CheckpointError, match="other layers of these names"):
            write_peft(directory / "written", adapter, model)
        return
    write_peft(directory / "written", adapter, model, str(directory / "hf"))
    loaded = load_theirs(directory, directory / "written")
    assert apart(their_logits(loaded), our_logits(ours)) < TOLERANCE
    again = read_peft(directory / "written", model)
    if name != "gpt_neox":  # where three adapters have become one of a higher rank
        assert again.config == replace(adapter.config, dropout=0.0)
        assert again.tensors.keys() == adapter.tensors.keys()
        assert all(torch.equal(again.tensors[key], adapter.tensors[key]) for key in adapter.tensors)


def test_merged_weights_give_the_logits_of_the_adapter(case: tuple[str, Path, Any], ours: Any) -> None:
    from megatron_grit.convert.peft.merge import merged_weight
    from megatron_grit.convert.peft.reader import read_peft
    from megatron_grit.convert.peft.sites import adapter_sites

    expected = our_logits(ours)
    model = run_config(case[1]).model
    adapter = read_peft(case[1] / "adapter", model)
    sites = {f"{site.linear}.weight": site for site in adapter_sites(model)}
    before = {name: value.detach().clone() for name, value in ours.named_parameters()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name in sites:
                parameter.copy_(merged_weight(parameter, sites[name], adapter, model, None))
            elif ".lora_B" in name:
                parameter.zero_()
        for name in before:
            if name.endswith(".magnitude"):  # of the rows as they are now
                linear = ours.get_submodule(name.partition(".adapter.")[0])
                linear.adapter.reset_magnitudes(linear)
    try:
        assert apart(our_logits(ours), expected) < TOLERANCE
        assert any(not torch.equal(value, before[name]) for name, value in ours.named_parameters())
    finally:
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                parameter.copy_(before[name])


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("mistral", {"use_rslora": True, "r": 3}),
    "patterns": ("mistral", {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"k_proj": 3}}),
    "rslora patterns": ("qwen2", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "dora patterns": ("mistral", {"use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}),
    "saved modules": ("mistral", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "saved, neox": ("gpt_neox", {"modules_to_save": ["embed_in", "final_layer_norm"]}),
    "tied, saved": ("mistral_tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "some layers": ("mistral", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "old experts": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"], "target_parameters": None}),
    "rslora, neox": ("gpt_neox", {"use_rslora": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_of_peft(variant: str, tmp_path: Path) -> None:
    """Read, with the logits of PEFT, and written, with the same again."""
    from megatron_grit.convert.peft.reader import read_peft
    from megatron_grit.convert.peft.writer import write_peft
    from megatron_grit.parallel.launch import parallel_job

    name, options = VARIANTS[variant]
    theirs = their_logits(make_adapter(name, tmp_path, **options))
    config = run_config(tmp_path)
    with parallel_job(config.parallel, seed=2) as context:
        assert apart(our_logits(build(tmp_path, config, context)), theirs) < TOLERANCE
    write_peft(tmp_path / "written", read_peft(tmp_path / "adapter", config.model), config.model)
    assert apart(their_logits(load_theirs(tmp_path, tmp_path / "written")), theirs) < TOLERANCE


def test_a_run_of_higher_rank_and_other_alpha_starts_from_the_same_function(tmp_path: Path) -> None:
    from megatron_grit.parallel.launch import parallel_job

    theirs = their_logits(make_adapter("mistral", tmp_path))
    config = run_config(tmp_path, rank=6, alpha=5.0)
    with parallel_job(config.parallel, seed=2) as context:
        assert apart(our_logits(build(tmp_path, config, context)), theirs) < TOLERANCE


@pytest.mark.parametrize("targets", [["up_proj"], ["down_proj"], ["gate_proj", "v_proj"]], ids=str)
def test_adapters_of_some_projections_of_experts(targets: list[str], tmp_path: Path) -> None:
    """PEFT leaves out adapters of experts in silence where one of their projections has none."""
    from megatron_grit.convert.peft.reader import read_peft
    from megatron_grit.convert.peft.writer import write_peft
    from megatron_grit.parallel.launch import parallel_job

    make_adapter("mixtral", tmp_path)
    config = run_config(tmp_path)
    adapter = read_peft(tmp_path / "adapter", config.model)
    adapter.tensors = {key: value for key, value in adapter.tensors.items() if key.split(".")[-2] in targets}
    write_peft(tmp_path / "adapter", adapter, config.model)
    theirs = their_logits(load_theirs(tmp_path, tmp_path / "adapter"))
    assert (theirs - their_logits(load_theirs(tmp_path))).abs().max() > 0.1
    with parallel_job(config.parallel, seed=2) as context:
        assert apart(our_logits(build(tmp_path, config, context)), theirs) < TOLERANCE


def test_experts_are_written_one_by_one(tmp_path: Path) -> None:
    """The names of transformers 4, which vLLM reads as well; an absent gate is one that adds nothing."""
    from megatron_grit.convert.peft.reader import read_peft
    from megatron_grit.convert.peft.writer import to_peft

    make_adapter("mixtral", tmp_path)
    model = run_config(tmp_path).model
    adapter = read_peft(tmp_path / "adapter", model)
    for key in [key for key in adapter.tensors if ".gate_proj." in key]:
        del adapter.tensors[key]
    settings, tensors = to_peft(adapter, model)
    assert settings["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"]
    names = {key for key in tensors if ".layers.1." in key and ".experts.3." in key and "lora_A" in key}
    prefix = "base_model.model.model.layers.1.block_sparse_moe.experts.3"
    assert names == {f"{prefix}.{leaf}.lora_A.weight" for leaf in ("w1", "w2", "w3")}
    assert not tensors[f"{prefix}.w1.lora_B.weight"].any() and tensors[f"{prefix}.w3.lora_B.weight"].any()


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda factors: torch.optim.SGD(factors, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda factors: torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.1),
}


def trained(
    config: RunConfig, directory: Path, steps: int, optimizer_name: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our factors after steps on the row, and the first step's gradients."""
    from megatron_grit.models.decoder import Output
    from megatron_grit.parallel.launch import parallel_job

    with parallel_job(config.parallel, seed=2) as context:
        model = build(directory, config, context)
        factors = {name: value for name, value in model.named_parameters() if value.requires_grad}
        optimizer = OPTIMIZERS[optimizer_name](factors.values())
        gradients: dict[str, Tensor] = {}
        row = make_row(RowKind.GENERATIVE)
        for _ in range(steps):
            optimizer.zero_grad()
            losses = model(row, Output.TOKEN_LOSSES)
            (losses.sum() / row.loss_mask_1T.sum()).backward()
            gradients = gradients or {name: value.grad.clone() for name, value in factors.items()}
            optimizer.step()
        return {name: value.detach().clone() for name, value in factors.items()}, gradients


def trained_by_peft(model: Any, steps: int, optimizer_name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same with PEFT."""
    row = make_row(RowKind.GENERATIVE)
    factors = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = OPTIMIZERS[optimizer_name](factors.values())
    gradients: dict[str, Tensor] = {}
    for _ in range(steps):
        optimizer.zero_grad()
        logits = torch.cat([model(segment).logits[0] for segment in row.tokens_1T.split(LENGTHS, dim=1)])
        losses = torch.nn.functional.cross_entropy(logits, row.labels_1T[0], reduction="none") * row.loss_mask_1T[0]
        (losses.sum() / row.loss_mask_1T.sum()).backward()
        gradients = gradients or {name: value.grad.clone() for name, value in factors.items()}
        optimizer.step()
    return {name: value.detach().clone() for name, value in factors.items()}, gradients


def by_our_names(theirs: dict[str, Tensor], config: RunConfig, directory: Path) -> dict[str, Tensor]:
    """Values of PEFT's parameters by the names of ours, through the reader."""
    from safetensors.torch import save_file

    from megatron_grit.convert.peft.reader import read_peft

    folder = directory / "renamed"
    folder.mkdir(exist_ok=True)
    settings = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    names = {name: name.replace(".default.weight", ".weight").replace(".default", "") for name in theirs}
    own = {names[name]: value.clone().contiguous() for name, value in theirs.items()}
    save_file(own, folder / "adapter_model.safetensors")
    return read_peft(folder, config.model).tensors


def distance(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of factors, as a share of the largest value of each where that is above 1."""
    assert mine.keys() == expected.keys()
    return max(
        float((value - expected[key]).abs().max() / expected[key].abs().max().clamp(min=1))
        for key, value in mine.items()
    )


@pytest.mark.parametrize("variant", ["rslora", "patterns", "rslora patterns", "dora patterns"])
def test_steps_with_patterns_are_those_of_peft(variant: str, tmp_path: Path) -> None:
    """Ranks and scalings of modules count in each step: with one scaling for all the function starts alike and the
    steps differ."""
    name, options = VARIANTS[variant]
    theirs = make_adapter(name, tmp_path, **options)
    config = run_config(tmp_path)
    reference, _ = trained_by_peft(theirs, 5, "sgd")
    expected = by_our_names(reference, config, tmp_path)
    assert distance(trained(config, tmp_path, 5, "sgd")[0], expected) < 1e-5
    if variant == "patterns":
        other = run_config(tmp_path, rank=7, alpha=14.0, rank_pattern=[], alpha_pattern=[])
        ours, _ = trained(other, tmp_path, 5, "sgd")
        cut = {key: value[tuple(map(slice, expected[key].shape))] for key, value in ours.items()}
        assert distance(cut, expected) > 1e-2


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["mistral", "llama_biases"])
def test_training_is_that_of_peft(name: str, dora: bool, tmp_path: Path) -> None:
    """Gradients of the factors, and the factors after four steps of AdamW."""
    theirs = make_adapter(name, tmp_path, use_dora=dora)
    config = run_config(tmp_path)
    ours, our_gradients = trained(config, tmp_path, 4, "adamw")
    reference, reference_gradients = trained_by_peft(theirs, 4, "adamw")
    for mine, other, tolerance in ((our_gradients, reference_gradients, 1e-5), (ours, reference, 2e-4)):
        expected = by_our_names(other, config, tmp_path)
        assert distance(mine, expected) <= tolerance
    assert max(gradient.abs().max() for gradient in our_gradients.values()) > 1e-3


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tensor": ("mistral", {"tensor": 2}),
    "tensor dora": ("mistral dora", {"tensor": 2}),
    "tensor patterns": ("mistral patterns", {"tensor": 2}),
    "tensor neox": ("gpt_neox", {"tensor": 2}),
    "saved modules": ("mistral saved", {"tensor": 2}),
    "expert": ("mixtral", {"expert": 2}),
    "expert tensor": ("mixtral", {"tensor": 2, "expert_tensor": 2, "sequence_parallel": True}),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "mistral dora": ("mistral", {"use_dora": True}),
    "mistral patterns": VARIANTS["patterns"],
    "mistral saved": ("mistral", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "gpt_neox": ("gpt_neox", {}),
    "mixtral": ("mixtral", {}),
}


def logits_at(directory: str) -> dict[str, list[float]]:
    """A checksum of each layout's logits, by token."""
    from megatron_grit.parallel.launch import parallel_job

    found = {}
    for layout, (model, mesh) in LAYOUTS.items():
        folder = Path(directory) / model
        config = run_config(folder)
        config.parallel = ParallelConfig(device="cpu", **mesh)
        with parallel_job(config.parallel, seed=2) as context:
            found[layout] = our_logits(build(folder, config, context)).flatten().tolist()[:: VOCAB // 3]
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_an_adapter_loads_at_any_layout(tmp_path: Path) -> None:
    theirs = {}
    for model, (name, options) in MODELS.items():
        theirs[model] = their_logits(make_adapter(name, tmp_path / model, **options)).flatten()[:: VOCAB // 3]
    (tmp_path / "ranks").mkdir()
    for rank in run_on_ranks(logits_at, 2, tmp_path / "ranks", str(tmp_path)):
        for layout, (model, _) in LAYOUTS.items():
            assert (torch.tensor(rank[layout]) - theirs[model]).abs().max() < 2e-5, layout
