"""``model.pretrained``: what config.json decides, what may be given besides, and a run that starts from it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_grit.cli import plan, train
from megatron_grit.config.parse import dump_config, load_config, parse_train_arguments
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import padded_vocabulary
from megatron_grit.convert.families.registry import load_hf_config
from megatron_grit.convert.hf_in.pretrained import resolve_pretrained
from megatron_grit.convert.hf_in.reader import SafetensorsFolder
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import CheckpointError, ConfigError
from megatron_grit.training.checkpoint import list_checkpoints, read_config, read_state
from megatron_grit.training.trainer import Trainer
from tests.corpus import tiny_run
from tests.unit.convert.hf_in.test_reader import write_shards
from tests.unit.convert.test_param_map import random_hf

SHAPE: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "sliding_window": None,
    "attention_dropout": 0.1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Data and tokenizer of a tiny run."""
    return tiny_run(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def source(tmp_path: Path, run: RunConfig) -> Path:
    """A Hugging Face directory whose model fits the run's tokenizer."""
    from megatron_grit.convert.families import mistral

    assert run.data.tokenizer is not None
    tokenizer = load_tokenizer(run.data.tokenizer)
    settings = SHAPE | {"vocab_size": tokenizer.vocab_size}
    directory = tmp_path / "hf"
    write_shards(directory, random_hf(mistral.FAMILY, mistral.model_config(settings)))
    (directory / "config.json").write_text(json.dumps(settings))
    shutil.copyfile(tokenizer.path, directory / f"tokenizer{tokenizer.path.suffix}")
    return directory


def resolved(source: Path, *options: str, files: bool = True) -> RunConfig:
    arguments = parse_train_arguments(["--model.pretrained", str(source), *options])
    return resolve_pretrained(arguments.config, arguments.origins, files=files)


def test_config_json_fills_the_model(source: Path) -> None:
    config = resolved(source)
    expected = asdict(load_hf_config(source)) | {"pretrained": str(source)}
    assert asdict(config.model) == expected
    assert config.model.num_layers == 2 and config.model.attention_dropout == 0.1
    assert config.data.tokenizer == str(source)


def test_a_configuration_without_it_is_left_alone() -> None:
    config = RunConfig()
    assert resolve_pretrained(config, {}) is config


def test_saved_configuration_resolves_to_itself(source: Path, tmp_path: Path) -> None:
    config = resolved(source, "--model.attention_dropout", "0.0", "--model.max_position_embeddings", "256")
    assert config.model.attention_dropout == 0.0 and config.model.max_position_embeddings == 256
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    arguments = parse_train_arguments(["--config", str(file)])
    assert resolve_pretrained(arguments.config, arguments.origins) == config == load_config(file)


def test_key_that_contradicts_config_json(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model:\n  pretrained: {source}\n  num_layers: 2\n  hidden_size: 64\n")
    arguments = parse_train_arguments(["--config", str(file)])
    with pytest.raises(ConfigError) as caught:
        resolve_pretrained(arguments.config, arguments.origins)
    assert str(caught.value).startswith(f"{file}:4: model.hidden_size is 64, but {source} has 32")


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("kv_channels", "8", True),
        ("kv_channels", "null", True),  # hidden size / heads is 8
        ("kv_channels", "16", False),
        ("num_query_groups", "null", False),  # as many as heads
        ("norm_epsilon", "1e-6", True),
        ("norm_epsilon", "1e-5", False),
        ("max_position_embeddings", "1024", False),
        ("num_experts", "4", False),
        ("tie_embeddings", "true", False),
        ("sliding_window", "64", False),
        ("hidden_dropout", "0.5", True),
        ("attention_backend", "sdpa", True),
        ("moe_aux_loss_coeff", "0.3", True),
        ("vocab_multiple", "16", True),
    ],
)
def test_keys_that_may_be_given(source: Path, key: str, value: str, same: bool) -> None:
    if same:
        resolved(source, f"--model.{key}", value)
        return
    with pytest.raises(ConfigError, match=rf"command line: model\.{key} is .*, but .*hf has "):
        resolved(source, f"--model.{key}", value)


def test_two_sources_of_weights(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.pretrained .* and checkpoint\.load other: give one of them"):
        resolved(source, "--checkpoint.load", "other")


def test_weights_are_looked_at_before_the_run(source: Path) -> None:
    file = source / "model-00002-of-00002.safetensors"
    file.rename(source / "elsewhere")
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors: missing"):
        resolved(source)
    assert resolved(source, files=False).model.num_layers == 2


def test_tokenizer_with_more_tokens(source: Path) -> None:
    settings = json.loads((source / "config.json").read_text())
    size = settings["vocab_size"]
    with pytest.raises(CheckpointError, match=f"has {size} tokens; model.vocab_size {size - 1} would cut some off"):
        resolved(source, "--model.vocab_size", str(size - 1))
    assert resolved(source, "--model.vocab_size", str(size + 5)).model.vocab_size == size + 5
    (source / "config.json").write_text(json.dumps(settings | {"vocab_size": size - 5}))
    with pytest.raises(CheckpointError, match=rf"has {size} tokens, the model {size - 5}.*model\.vocab_size {size}$"):
        resolved(source)


def test_trainer_does_not_forget_the_weights(source: Path, run: RunConfig) -> None:
    """A trainer that is not given them would start from random ones."""
    config = resolved(source)
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.initial_weights = config, None
    with pytest.raises(ConfigError, match=r"model\.pretrained is set"):
        trainer._load_initial_weights()


def options_of(run: RunConfig, output: Path, source: Path, steps: int) -> list[str]:
    """The tiny run's options, but for its model's shape and its tokenizer."""
    settings = asdict(run) | {"output_dir": str(output), "model": {"pretrained": str(source)}}
    settings["data"]["tokenizer"] = None
    settings["training"] |= {"steps": steps, "precision": "fp32"}
    settings["checkpoint"] |= {"save_interval": 2, "keep": 1}
    settings["parallel"]["device"] = "cpu"
    output.mkdir(exist_ok=True)
    (output.parent / "run.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(output.parent / "run.yaml")]


def test_a_run_starts_and_resumes_without_the_directory(source: Path, run: RunConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with SafetensorsFolder(source) as weights:
        norm = weights["model.norm.weight"]
    # Without a step, what is saved is what was read.
    assert train.main(options_of(run, output, source, 0)) == 0
    assert stored_norm(output).equal(norm)
    assert train.main(options_of(run, output, source, 2)) == 0
    settings = read_config(list_checkpoints(output)[-1])
    assert settings.model.pretrained == str(source) and settings.data.tokenizer == str(source)
    shutil.rmtree(source)
    assert train.main(options_of(run, output, source, 4)) == 0
    assert read_state(list_checkpoints(output)[-1])["step"] == 4
    assert not stored_norm(output).equal(norm)
    # The tokenizer that it goes on with is not in a checkpoint, which will be removed.
    assert Path(read_config(list_checkpoints(output)[-1]).data.tokenizer or "").parent == output
    assert train.main(["--config", str(output / "config.yaml"), "--training.steps", "5"]) == 0


def stored_norm(output: Path) -> torch.Tensor:
    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights

    checkpoint = list_checkpoints(output)[-1]
    config = read_config(checkpoint)
    with parallel_job(config.parallel, 7) as context:
        model = build_model(config, int(read_state(checkpoint)["vocab_size"]), context)
        load_weights(checkpoint, model, context)
        norm: torch.Tensor = model.decoder.final_layernorm.weight.detach()
        return norm


def test_gone_before_the_first_checkpoint(source: Path, run: RunConfig, tmp_path: Path, capsys: Any) -> None:
    shutil.rmtree(source)
    assert train.main(options_of(run, tmp_path / "run", source, 2)) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].endswith("hf: no config.json; give the directory of a Hugging Face model")


def test_plan_reads_the_shape(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "model-00001-of-00002.safetensors").unlink()  # weights are not looked at
    plan.main(["--json", "--model.pretrained", str(source)])
    shape = json.loads((source / "config.json").read_text())
    found = json.loads(capsys.readouterr().out)
    expected = 2 * padded_vocabulary(shape["vocab_size"], 64, 1) * 32
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert found["configured"]["parameters"]["total"] == expected + 2 * layer + 32


def test_a_teacher_is_read_from_a_directory(source: Path, run: RunConfig, tmp_path: Path, capsys: Any) -> None:
    """Of the trained model's own weights: nothing to learn at the first step. Of others: something, at each."""
    from megatron_grit.convert.families import mistral

    other = tmp_path / "other"
    shutil.copytree(source, other)
    settings = json.loads((source / "config.json").read_text()) | {"hidden_size": 64, "num_hidden_layers": 4}
    write_shards(other, random_hf(mistral.FAMILY, mistral.model_config(settings)))
    (other / "config.json").write_text(json.dumps(settings))

    def losses(name: str, teacher: Path, kind: str = "full", steps: int = 2) -> list[float]:
        options = [f"--loss.teacher.kind={kind}", f"--loss.teacher.model={teacher}", "--training.objective=generative"]
        options += ["--model.attention_dropout=0"]
        status = train.main([*options_of(run, tmp_path / f"run {name}", source, steps), *options])
        if status:
            return []
        lines = (tmp_path / f"run {name}" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss_teacher"] for line in lines]

    first, second = losses("same", source)
    assert first == 0 < second
    assert min(losses("other", other)) > 0.01
    assert len(losses("other", other, steps=3)) == 3
    capsys.readouterr()
    assert not losses("other", source, steps=4)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was trained beside a teacher with the weights" in error and str(source) in error
    assert len(losses("gold", other, "gold")) == 2
    assert "is the KL baseline of Instruction Modelling as published" in capsys.readouterr().err
    for key, value, words in (
        ("max_position_embeddings", 64, "takes 64 tokens, and segments may have 512"),
        ("vocab_size", settings["vocab_size"] + 64, "rows of tokens, and the trained model"),
    ):
        changed, folder = settings | {key: value}, tmp_path / f"other {key}"
        shutil.copytree(source, folder)
        write_shards(folder, random_hf(mistral.FAMILY, mistral.model_config(changed)))
        (folder / "config.json").write_text(json.dumps(changed))
        assert not losses(key, folder)
        error = capsys.readouterr().err.splitlines()[-1]
        assert words in error and str(folder) in error
