"""A run with adapters from its base to embeddings: what is saved, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import CheckpointError, ConfigError
from tests.corpus import tiny_run
from tests.distributed.test_resume import metrics

pytestmark = pytest.mark.slow

STEPS = 4


def adapter_run(directory: Path, name: str, **adapter: Any) -> RunConfig:
    """A run beside the base, which is trained on the spot if it is not there: two steps of everything."""
    from megatron_grit.training.trainer import train

    config = tiny_run(directory)
    config.training.audit = "off"
    if not (directory / "base").exists():
        base = deepcopy(config)
        base.output_dir, base.training.steps = str(directory / "base"), 2
        train(base)
    config.checkpoint.load = str(directory / "base")
    config.checkpoint.save_interval, config.checkpoint.keep = 2, 0
    config.output_dir, config.training.steps = str(directory / name), STEPS
    for key, value in ({"kind": "lora", "rank": 4} | adapter).items():
        setattr(config.adapter, key, value)
    return config


def run(config: RunConfig) -> dict[str, torch.Tensor]:
    """Train; all weights at the end."""
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.trainer import Trainer

    with parallel_job(config.parallel, config.training.seed) as context:
        trainer = Trainer(config, context)
        trainer.run()
        return {name: value.detach().clone() for name, value in trainer.chunks[0].named_parameters()}


def go_on(config: RunConfig, name: str, step: int = 2) -> RunConfig:
    """The same run in a directory of its own, which has the checkpoint of one step only."""
    copy = deepcopy(config)
    copy.output_dir = str(Path(config.output_dir).with_name(name))
    folder = f"checkpoints/step_{step:08d}"
    shutil.copytree(Path(config.output_dir) / folder, Path(copy.output_dir) / folder)
    return copy


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def lora(directory: Path) -> tuple[RunConfig, dict[str, torch.Tensor]]:
    config = adapter_run(directory, "lora")
    config.training.audit = "on"
    config.training.trainable = ["norms"]
    return config, run(config)


def checkpoint(config: RunConfig, step: int = STEPS) -> Path:
    return Path(config.output_dir) / "checkpoints" / f"step_{step:08d}"


@pytest.mark.parametrize("adapter", [{}, {"kind": "dora"}, {"dropout": 0.2}, {"quantize": "nf4"}], ids=str)
def test_a_resumed_run_is_the_run_that_never_stopped(directory: Path, adapter: dict[str, Any]) -> None:
    name = "-".join(map(str, adapter.values())) or "plain"
    config = adapter_run(directory, f"whole-{name}", **adapter)
    whole = run(config)
    resumed = go_on(config, f"resumed-{name}")
    weights = run(resumed)
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[key], whole[key]) for key in whole)
    assert metrics(resumed.output_dir) == metrics(config.output_dir)[2:]


def test_only_adapters_move_and_are_saved(directory: Path, lora: tuple[RunConfig, dict[str, torch.Tensor]]) -> None:
    from megatron.core.dist_checkpointing import load_tensors_metadata

    config, weights = lora
    base_config = deepcopy(config)
    base_config.adapter.kind, base_config.training.steps = "none", 0
    base_config.output_dir = str(directory / "untouched")
    base = run(base_config)
    assert base.keys() < weights.keys()
    moved = {name for name in base if not torch.equal(base[name], weights[name])}
    assert moved == {name for name in base if "layernorm" in name}
    added = [name for name in weights if name not in base]
    assert added and all(".adapter." in name for name in added)
    assert all(weights[name].any() for name in added), "an adapter was not trained"
    saved = load_tensors_metadata(str(checkpoint(config) / "weights"))
    # The engine's checkpoints name a norm after the layer that follows it.
    assert {key for key in saved if ".adapter." not in key} == {
        "decoder.final_layernorm.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    }
    moments = load_tensors_metadata(str(checkpoint(config) / "optimizer"))
    assert {key.removeprefix("optimizer.state.exp_avg.") for key in moments if ".exp_avg." in key} == saved.keys()
    state = json.loads((checkpoint(config) / "state.json").read_text())
    assert state["base"]["source"] == str(directory / "base") and len(state["base"]["fingerprint"]) == 16


def test_a_loaded_model_has_base_and_adapters(
    directory: Path, lora: tuple[RunConfig, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    from megatron_grit.inference.model import GritModel

    config, weights = lora
    model = GritModel.load(config.output_dir, device="cpu")
    held = dict(model.model.named_parameters())
    assert held.keys() == weights.keys() and all(torch.equal(held[name], weights[name]) for name in weights)
    texts = ["what does the parser do?", "The queue counts a file."]
    embeddings = model.encode(texts)
    shutil.copytree(directory / "base", tmp_path / "moved")
    moved = GritModel.load(config.output_dir, device="cpu", base=tmp_path / "moved")
    np.testing.assert_array_equal(moved.encode(texts), embeddings)
    plain = GritModel.load(directory / "base", device="cpu").encode(texts)
    assert np.abs(plain - embeddings).max() > 1e-3


def test_adapters_are_refused_beside_another_base(
    directory: Path, lora: tuple[RunConfig, dict[str, torch.Tensor]]
) -> None:
    from megatron_grit.inference.model import GritModel
    from megatron_grit.training.trainer import train

    config, _ = lora
    other = tiny_run(directory)
    other.output_dir, other.training.steps, other.training.audit = str(directory / "other"), 1, "off"
    train(other)
    changed = go_on(config, "beside-another")
    changed.checkpoint.load = other.output_dir
    with pytest.raises(CheckpointError, match="trained beside the weights of .*base"):
        run(changed)
    with pytest.raises(CheckpointError, match="trained beside the weights of .*base"):
        GritModel.load(config.output_dir, device="cpu", base=other.output_dir)
    with pytest.raises(CheckpointError, match="their base .*gone is not there"):
        GritModel.load(config.output_dir, device="cpu", base=directory / "gone")


def test_a_run_starts_from_adapters(directory: Path, lora: tuple[RunConfig, dict[str, torch.Tensor]]) -> None:
    config, weights = lora
    second = deepcopy(config)
    second.output_dir, second.training.steps = str(directory / "second"), 0
    second.adapter.load = config.output_dir
    started = run(second)
    assert all(torch.equal(started[name], weights[name]) for name in weights)
    for key, value, words in (("rank", 8, "adapter.rank 4"), ("load", str(directory / "base"), "checkpoint.load")):
        wrong = deepcopy(second)
        wrong.output_dir = str(directory / f"wrong-{key}")
        setattr(wrong.adapter, key, value)
        with pytest.raises(CheckpointError, match=words):
            run(wrong)
    as_base = deepcopy(second)
    as_base.output_dir, as_base.checkpoint.load = str(directory / "as-base"), config.output_dir
    with pytest.raises(CheckpointError, match="give it as adapter.load"):
        run(as_base)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("adapter", "alpha", 8.0), ("training", "trainable", ["norms", "embeddings"]), ("adapter", "kind", "dora")],
)
def test_a_resume_with_other_adapters_is_refused(
    lora: tuple[RunConfig, dict[str, torch.Tensor]], section: str, key: str, value: Any
) -> None:
    changed = deepcopy(lora[0])
    setattr(getattr(changed, section), key, value)
    with pytest.raises(CheckpointError, match=f"{section}.{key}"):
        run(changed)


def test_weights_in_four_bits_are_not_trained(directory: Path) -> None:
    config = adapter_run(directory, "four-bits", quantize="nf4")
    config.training.trainable = ["decoder.layers.0.mlp.*"]
    with pytest.raises(ConfigError, match="cannot be trained"):
        run(config)
