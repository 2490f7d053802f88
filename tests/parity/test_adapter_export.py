"""Runs with adapters to Hugging Face and PEFT and back: merged, as an adapter, from 4 bits, from the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import CheckpointError, ConfigError
from tests.corpus import tiny_run
from tests.harness.command import cli, python

transformers = pytest.importorskip("transformers", reason="exports are read by transformers")
peft = pytest.importorskip("peft", reason="adapters are read by PEFT")
pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
TEXTS = ["what does the parser do?", "The queue counts a file and every byte."]


def train_adapters(directory: Path, name: str, **adapter: Any) -> RunConfig:
    """Three steps beside the exported base, with a rate at which adapters change what the model says."""
    from megatron_grit.convert.hf_in.pretrained import pretrained_weights, resolve_pretrained
    from megatron_grit.convert.peft.runtime import peft_adapters
    from megatron_grit.training.trainer import train

    config = tiny_run(directory)
    config.training.audit, config.training.steps = "off", 3
    config.optimizer.lr, config.optimizer.warmup_steps = 0.02, 0
    config.model.pretrained, config.output_dir = str(directory / "hf"), str(directory / name)
    for key, value in ({"kind": "lora", "rank": 4} | adapter).items():
        setattr(config.adapter, key, value)
    config = resolve_pretrained(config, {})
    train(config, pretrained_weights(config), peft_adapters(config))
    return config


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/: a base of two steps, exported."""
    from megatron_grit.convert.hf_out.convert import export_checkpoint
    from megatron_grit.training.trainer import train

    directory = tmp_path_factory.mktemp("export")
    config = tiny_run(directory)
    config.training.audit, config.training.steps = "off", 2
    config.output_dir = str(directory / "base")
    train(config)
    export_checkpoint(directory / "base", directory / "hf")
    return directory


RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"kind": "dora", "targets": ["q_proj", "v_proj", "o_proj", "up_proj"]},
    "nf4": {"quantize": "nf4"},
}


@pytest.fixture(scope="module", params=RUNS)
def trained(request: pytest.FixtureRequest, directory: Path) -> tuple[str, RunConfig]:
    return request.param, train_adapters(directory, request.param, **RUNS[request.param])


def our_logits(run: str | Path) -> Tensor:
    """Of the model with its adapters beside it."""
    from megatron_grit.data.rows.batch import PackedRow
    from megatron_grit.inference.model import GritModel
    from megatron_grit.models.decoder import Output

    model = GritModel.load(run, device="cpu")
    tokens = torch.tensor([ids(model.tokenizer)])
    row = PackedRow(
        embeds=False,
        tokens_1T=tokens,
        positions_1T=torch.arange(tokens.shape[1])[None],
        cu_seqlens=torch.tensor([0, tokens.shape[1]], dtype=torch.int32),
        max_seqlen=tokens.shape[1],
        padding_mask_1T=torch.zeros_like(tokens, dtype=torch.bool),
    )
    with torch.no_grad():
        return model.model(row, Output.LOGITS)


def ids(tokenizer: Any) -> list[int]:
    return [token for text in TEXTS for token in tokenizer.encode(text)]


def their_logits(model: Any, run: RunConfig) -> Tensor:
    from megatron_grit.data.text.tokenizer import load_tokenizer

    with torch.no_grad():
        return model.eval()(torch.tensor([ids(load_tokenizer(run.data.tokenizer))])).logits[0]


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def load_hf(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_a_merged_run_is_the_run(trained: tuple[str, RunConfig], directory: Path) -> None:
    from megatron_grit.convert.hf_out.convert import export_checkpoint

    name, config = trained
    export_checkpoint(config.output_dir, directory / f"{name}_merged", adapters="trained")
    ours = our_logits(config.output_dir)
    merged = their_logits(load_hf(directory / f"{name}_merged"), config)
    assert apart(merged, ours) < TOLERANCE
    base = their_logits(load_hf(directory / "hf"), config)
    assert apart(base, ours) > 0.01, "the adapters changed nothing"
    if name == "nf4":
        export_checkpoint(config.output_dir, directory / "nf4_original", adapters="original")
        original = their_logits(load_hf(directory / "nf4_original"), config)
        assert TOLERANCE < apart(original, ours) < 0.5


def test_peft_loads_the_adapter_of_a_run(trained: tuple[str, RunConfig], directory: Path) -> None:
    """Onto the exported base; of a run in 4 bits, onto the base in the same 4 bits by bitsandbytes' arithmetic."""
    from megatron_grit.convert.peft.merge import export_adapter
    from megatron_grit.models.adapters.quantization import round_trip

    name, config = trained
    export_adapter(config.output_dir, directory / f"{name}_adapter")
    base = load_hf(directory / "hf")
    if name == "nf4":
        for key, parameter in base.named_parameters():
            if key.endswith("_proj.weight"):
                parameter.data = round_trip(parameter.data)
    loaded = peft.PeftModel.from_pretrained(base, directory / f"{name}_adapter")
    assert apart(their_logits(loaded, config), our_logits(config.output_dir)) < TOLERANCE
    settings = json.loads((directory / f"{name}_adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(directory / "hf")


def test_a_run_starts_from_an_adapter_of_peft(trained: tuple[str, RunConfig], directory: Path) -> None:
    """The exported adapter, trained no further, is the run that it came from."""
    from megatron_grit.convert.hf_in.pretrained import pretrained_weights
    from megatron_grit.convert.peft.merge import export_adapter
    from megatron_grit.convert.peft.runtime import peft_adapters
    from megatron_grit.training.trainer import train

    name, config = trained
    export_adapter(config.output_dir, directory / f"{name}_again")
    again = deepcopy(config)
    again.training.steps, again.output_dir = 0, str(directory / f"{name}_run")
    again.adapter.load = str(directory / f"{name}_again")
    train(again, pretrained_weights(again), peft_adapters(again))
    assert torch.equal(our_logits(again.output_dir), our_logits(config.output_dir))


def test_what_is_refused(trained: tuple[str, RunConfig], directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from megatron_grit.convert.hf_out.convert import export_checkpoint
    from megatron_grit.convert.peft.merge import export_adapter

    _, config = trained
    with pytest.raises(ConfigError, match="holds adapters; give --merge"):
        export_checkpoint(config.output_dir, tmp_path / "a")
    with pytest.raises(ConfigError, match="holds a whole model"):
        export_checkpoint(directory / "base", tmp_path / "a", adapters="trained")
    with pytest.raises(CheckpointError, match="holds a whole model and no adapters"):
        export_adapter(directory / "base", tmp_path / "a")
    shutil.copytree(directory / "hf", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="fingerprint"):
        export_checkpoint(config.output_dir, tmp_path / "a", adapters="trained", base=tmp_path / "other")
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").glob("*.safetensors"))


def test_a_merge_into_a_moved_base_and_a_trained_norm(directory: Path, tmp_path: Path) -> None:
    """What was trained beside adapters comes from the run; the base may be one of our own checkpoints."""
    from megatron_grit.convert.hf_out.convert import export_checkpoint
    from megatron_grit.convert.peft.merge import export_adapter
    from megatron_grit.training.trainer import train

    config = tiny_run(directory)
    config.training.audit, config.training.steps, config.optimizer.lr = "off", 2, 0.02
    config.training.trainable = ["norms", "embeddings"]
    config.adapter.kind, config.adapter.rank = "lora", 2
    config.checkpoint.load, config.output_dir = str(directory / "base"), str(tmp_path / "run")
    train(config)
    shutil.copytree(directory / "base", tmp_path / "moved")
    export_checkpoint(config.output_dir, tmp_path / "merged", adapters="trained", base=tmp_path / "moved")
    ours = our_logits(config.output_dir)
    assert apart(their_logits(load_hf(tmp_path / "merged"), config), ours) < TOLERANCE
    export_adapter(config.output_dir, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load_hf(directory / "hf"), tmp_path / "adapter")
    assert apart(their_logits(loaded, config), ours) < TOLERANCE


def test_the_commands(trained: tuple[str, RunConfig], directory: Path, tmp_path: Path) -> None:
    """What docs/adapters.md says to type."""
    name, config = trained
    convert = ["-m", "megatron_grit.cli.main", "convert", "--from", config.output_dir]
    # One by a fresh interpreter.
    merge = [sys.executable if name == "lora" else python(), *convert, "--to", str(tmp_path / "m"), "--merge"]
    subprocess.run(merge, check=True, capture_output=True, timeout=300)
    cli([*convert, "--to", str(tmp_path / "a"), "--adapter-only"]).check_returncode()
    merged = their_logits(load_hf(tmp_path / "m"), config)
    assert apart(merged, our_logits(config.output_dir)) < TOLERANCE
    written = {file.name for file in (tmp_path / "a").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"} <= written
    assert not any(name.startswith("model") for name in written), "no weights but the adapters'"
    result = cli([*convert, "--to", str(tmp_path / "n")])
    assert result.returncode == 2 and "give --merge" in result.stderr and "Traceback" not in result.stderr
    assert np.isfinite(merged.numpy()).all()
