"""Every launcher resolves, refuses what it cannot run, and runs in miniature."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_grit.config.checks.run import check
from megatron_grit.config.parse import load_config, parse_run_config
from tests.harness import command

LAUNCHERS = {"train_gritlm_7b.sh": 8, "train_gritlm_8x7b.sh": 256}
PATHS = {"EMBEDDING_DATA": "a b", "GENERATIVE_DATA": "c", "TOKENIZER": "t", "CHECKPOINT": "base"}
SGPT_LAUNCHERS = ("train_sgpt_nli.sh", "train_sgpt_msmarco.sh")
"""They take a model of transformers and embedding data."""
SFT_LAUNCHERS = ("finetune_im.sh", "finetune_tulu.sh")
"""They take a model of transformers and conversations."""
SFT_PATHS = {"MODEL": "llama", "GENERATIVE_DATA": "a b"}
REAL = {"PYTHON": sys.executable, "PYTHON_EXEC": sys.executable}
"""A fresh interpreter: for one launcher of each family."""
SGPT_PATHS = {"MODEL": "gpt-j", "EMBEDDING_DATA": "a b"}


def launch(
    repository: Path, cwd: Path, name: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    unset = PATHS | SGPT_PATHS | SFT_PATHS | {"EPOCHS": "", "ROLLOUTS": ""}
    clean = {key: value for key, value in os.environ.items() if key not in unset and not key.startswith("SLURM")}
    return subprocess.run(
        ["bash", str(repository / "examples" / name), *options],
        cwd=cwd,
        env=clean | command.environment() | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_list_of_launchers_is_complete(repository: Path) -> None:
    others = {"common.sh", "quickstart.sh", "quickstart_retro.sh"}  # the latter have tests of their own
    others |= {"build_retro_db.sh", "pretrain_retro.sh"}  # see test_retro_launcher.py
    others |= {"eval_lm.sh"}
    others |= {"train_dpo.sh", "train_kto.sh", "train_reward.sh"}  # see test_preference_launchers.py
    scripts = {path.name for path in (repository / "examples").glob("*.sh")} - others
    assert scripts == {*LAUNCHERS, *SGPT_LAUNCHERS, *SFT_LAUNCHERS, "train_grpo.sh"}


@pytest.mark.parametrize("scale", ["", "tiny"])
def test_dry_run_of_an_evaluation(repository: Path, tmp_path: Path, scale: str) -> None:
    options = ("--tensor", "2", "--apply-chat-template")
    result = launch(repository, tmp_path, "eval_lm.sh", *options, DRY_RUN="1", SCALE=scale, MODEL="m", SUITE="gritlm")
    assert result.returncode == 0, result.stderr
    words = result.stdout.split()
    assert words[words.index("--tasks") + 1] == ("gritlm" if not scale else "tiny_choice\\,tiny_text")
    assert words[words.index("--nproc-per-node") + 1] == ("8" if not scale else "2")
    assert words[-3:] == list(options) and list(tmp_path.iterdir()) == []


def test_every_configuration_of_the_examples_is_read(repository: Path) -> None:
    for path in (repository / "examples" / "configs").glob("*.yaml"):
        load_config(path)


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("environment", [{}, PATHS], ids=["nothing set", "paths set"])
def test_dry_run(name: str, environment: dict[str, str], repository: Path, tmp_path: Path) -> None:
    result = launch(repository, tmp_path, name, "--training.seed", "7", DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"# {LAUNCHERS[name]} processes = ")
    resolved = yaml.safe_load(result.stdout)
    assert resolved["training"]["seed"] == 7, "options of the command line do not reach the run"
    expected = {
        "tokenizer": environment.get("TOKENIZER", "TOKENIZER"),
        "embedding": environment.get("EMBEDDING_DATA", "EMBEDDING_DATA").split(),
        "generative": environment.get("GENERATIVE_DATA", "GENERATIVE_DATA").split(),
    }
    assert {key: resolved["data"][key] for key in expected} == expected
    assert resolved["checkpoint"]["load"] == environment.get("CHECKPOINT", "CHECKPOINT")
    assert list(tmp_path.iterdir()) == [], "a dry run wrote something"


@pytest.mark.parametrize(
    ("name", "batches", "loss", "factor", "world_size"),
    [("gritlm_7b", (2048, 256), "mixed", 1.0, 8), ("gritlm_8x7b", (256, 256), "sequence", 0.003, 256)],
)
def test_recipes_are_the_published_ones(
    name: str, batches: tuple[int, int], loss: str, factor: float, world_size: int, repository: Path
) -> None:
    """Numbers of GritLM's own launch scripts."""
    config = parse_run_config(
        ["--config", str(repository / "examples" / "configs" / f"{name}.yaml"), "--data.tokenizer=t"]
        + ["--data.embedding=[e]", "--data.generative=[g]"]
    )
    check(config, world_size, files=False)
    training, losses, optimizer = config.training, config.loss, config.optimizer
    assert (training.embedding_batch_size, training.generative_batch_size) == batches
    assert (training.steps, training.precision, training.objective) == (1253, "bf16", "unified")
    assert (losses.loss_gen_type, losses.loss_gen_factor, losses.temperature) == (loss, factor, 0.02)
    assert (losses.emb_grad_scale, losses.grit_world_size) == ("grit", world_size)
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_ratio, optimizer.weight_decay) == (
        2e-5,
        "linear",
        0.03,
        0.0,
    )
    assert (config.embedding.pooling, config.embedding.normalize, config.embedding.causal) == ("mean", True, False)
    assert config.data.train_group_size == 2


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("missing", PATHS)
def test_a_missing_path_is_named(name: str, missing: str, repository: Path, tmp_path: Path) -> None:
    given = {key: value for key, value in PATHS.items() if key != missing}
    result = launch(repository, tmp_path, name, **given)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{name}: error: set {missing} to ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is no file a.idx"),
        (["--model.num_leyers", "3"], "did you mean --model.num_layers?"),
        (["--parallel.tensor", "3"], "no multiple of tensor 3"),
    ],
)
def test_mistakes_end_before_processes_start(
    options: list[str], message: str, repository: Path, tmp_path: Path
) -> None:
    result = launch(repository, tmp_path, "train_gritlm_7b.sh", *options, **PATHS)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[0]
    assert all(line.startswith("megatron-grit: error: ") for line in result.stderr.splitlines())
    assert list(tmp_path.iterdir()) == []


def unchecked(folder: Path) -> str:
    """An interpreter that finds nothing wrong in a dry run, for launches of which the command alone is looked at."""
    path = folder / "unchecked"
    interpreter = command.environment().get("PYTHON", sys.executable)
    path.write_text(f'#!/usr/bin/env bash\n[[ " $* " == *" --dry-run "* ]] || exec {interpreter} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_many_nodes_need_a_cluster(repository: Path, tmp_path: Path) -> None:
    result = launch(repository, tmp_path, "train_gritlm_8x7b.sh", **PATHS, PYTHON=unchecked(tmp_path))
    assert result.returncode == 2
    assert "32 nodes: submit this script with sbatch" in result.stderr


def test_slurm_starts_one_torchrun_on_each_node(repository: Path, tmp_path: Path) -> None:
    """With commands in place of SLURM's that print what they are given."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in {"scontrol": "printf 'node7\\nnode8\\n'", "srun": 'printf "%s\\n" "$@"'}.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "11", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[7-10]"}
    given = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHON": unchecked(tmp_path), "MAX_RESTARTS": "3"}
    result = launch(repository, tmp_path, "train_gritlm_8x7b.sh", **given, **slurm, **PATHS)
    assert result.returncode == 0, result.stderr
    words = result.stdout.split()
    for option, value in {
        "--nodes": "4",
        "--nnodes": "4",
        "--ntasks-per-node": "1",
        "--nproc-per-node": "8",
        "--max-restarts": "3",
        "--kill-on-bad-exit": "1",
        "--rdzv-endpoint": "node7:29400",
        "--rdzv-id": "11",
        "-m": "megatron_grit.parallel.torchrun",
    }.items():
        assert words[words.index(option) + 1] == value


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.processes(2)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_recipe_in_miniature(name: str, repository: Path, tmp_path: Path) -> None:
    interpreter = REAL if name == "train_gritlm_7b.sh" else {}
    result = launch(repository, tmp_path, name, SCALE="tiny", OUTPUT_DIR=str(tmp_path / "run"), **interpreter)
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(math.isfinite(record[key]) for record in records for key in ("loss_emb", "loss_gen", "grad_norm"))
    # Learns: next-token loss of four steps on a few dozen texts.
    assert records[-1]["loss_gen"] < records[0]["loss_gen"]
    saved = load_config(tmp_path / "run" / "config.yaml")
    recipe = load_config(
        repository / "examples" / "configs" / f"{name.removeprefix('train_').removesuffix('.sh')}.yaml"
    )
    assert saved.loss == recipe.loss and saved.embedding == recipe.embedding
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("name", SGPT_LAUNCHERS)
@pytest.mark.parametrize("environment", [{}, SGPT_PATHS], ids=["nothing set", "paths set"])
def test_dry_run_of_sgpt(name: str, environment: dict[str, str], repository: Path, tmp_path: Path) -> None:
    """Without the model's files the shape is GPT-J's."""
    result = launch(repository, tmp_path, name, "--training.seed", "7", DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("# 8 processes = ")
    resolved = yaml.safe_load(result.stdout)
    assert resolved["training"]["seed"] == 7
    assert (resolved["model"]["num_layers"], resolved["model"]["rotary_interleaved"]) == (28, True)
    assert resolved["data"]["embedding"] == environment.get("EMBEDDING_DATA", "EMBEDDING_DATA").split()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "batch", "lr", "steps", "warmup", "brackets"),
    [
        ("sgpt_nli", 1024, 32e-5, 563_648 // 1024, (0.1, None), "none"),
        ("sgpt_msmarco", 256, 4e-4, 10 * (502_939 // 256), (0.03, 1000), "specb"),
    ],
)
def test_sgpts_recipes_are_the_published_ones(
    name: str,
    batch: int,
    lr: float,
    steps: int,
    warmup: tuple[float, int | None],
    brackets: str,
    repository: Path,
) -> None:
    """Numbers of SGPT's commands for its models of 5.8 billion parameters."""
    configs = repository / "examples" / "configs"
    config = parse_run_config(
        ["--config", str(configs / f"{name}.yaml"), "--config", str(configs / "gptj_6b.yaml")]
        + ["--data.tokenizer=t", "--data.embedding=[e]"]
    )
    check(config, 8, files=False)
    training, optimizer = config.training, config.optimizer
    assert (training.embedding_batch_size, training.steps, training.objective) == (batch, steps, "embedding")
    assert training.trainable == ["biases"]
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_ratio, optimizer.warmup_steps) == (lr, "linear", *warmup)
    assert (config.loss.temperature, config.data.train_group_size, config.data.allow_shared_texts) == (0.05, 2, False)
    embedding = config.embedding
    assert (embedding.pooling, embedding.causal, embedding.brackets) == ("weightedmean_sgpt", True, brackets)


@pytest.mark.parametrize("name", SGPT_LAUNCHERS)
@pytest.mark.parametrize("missing", SGPT_PATHS)
def test_a_missing_path_of_sgpt_is_named(name: str, missing: str, repository: Path, tmp_path: Path) -> None:
    given = {key: value for key, value in SGPT_PATHS.items() if key != missing}
    result = launch(repository, tmp_path, name, **given)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{name}: error: set {missing} to ")
    assert len(result.stderr.splitlines()) == 1


def test_epochs_are_counted_from_the_data(repository: Path, tmp_path: Path) -> None:
    """The first mistake that is left is the model's directory, which is looked at after the data."""
    result = launch(repository, tmp_path, "train_sgpt_nli.sh", **SGPT_PATHS)
    assert result.returncode == 2
    assert "train_sgpt_nli.sh: error: EMBEDDING_DATA: " in result.stderr and "a.json" in result.stderr
    for name, records in (("a", 3000), ("b", 2000)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"num_records": records}))
    body = 'shift 2; printf "%s\\n" "$@"'
    script = (repository / "examples" / "train_sgpt_msmarco.sh").read_text()
    # In place of the job, its options.
    script = script.replace("\ntrain_sgpt ", f"\nrun_training() {{ {body}; }}\ntrain_sgpt ")
    copy = tmp_path / "copy"
    (copy / "examples").mkdir(parents=True)
    (copy / "examples" / "launcher.sh").write_text(script)
    for name in ("examples/common.sh", "pyproject.toml"):
        (copy / name).write_text((repository / name).read_text())
    for epochs, steps in (({}, 10 * 5000 // 256), ({"EPOCHS": "0.5"}, 2500 // 256)):
        options = launch(copy, tmp_path, "launcher.sh", **SGPT_PATHS, **epochs)
        assert options.returncode == 0, options.stderr
        words = options.stdout.split()
        assert words[words.index("--training.steps") + 1] == str(steps)
        assert words[words.index("--model.pretrained") + 1] == "gpt-j"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.processes(2)
@pytest.mark.parametrize("name", SGPT_LAUNCHERS)
def test_sgpts_recipe_in_miniature(name: str, repository: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"SCALE": "tiny", "OUTPUT_DIR": str(run)} | (REAL if name == "train_sgpt_nli.sh" else {})
    result = launch(repository, tmp_path, name, "--training.steps", "12", **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13))
    losses = [record["loss_emb"] for record in records]
    assert all(map(math.isfinite, losses))
    assert sum(losses[6:]) < sum(losses[:6]), losses
    saved = load_config(run / "config.yaml")
    recipe = load_config(
        repository / "examples" / "configs" / f"{name.removeprefix('train_').removesuffix('.sh')}.yaml"
    )
    assert saved.loss == recipe.loss and saved.embedding == recipe.embedding
    assert saved.training.trainable == ["biases"]
    assert list((run / "checkpoints").iterdir())


@pytest.mark.parametrize("name", SFT_LAUNCHERS)
@pytest.mark.parametrize("environment", [{}, SFT_PATHS], ids=["nothing set", "paths set"])
def test_dry_run_of_fine_tuning(name: str, environment: dict[str, str], repository: Path, tmp_path: Path) -> None:
    """Without the model's files the shape is that of Mistral 7B."""
    result = launch(repository, tmp_path, name, "--training.seed", "7", DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("# 8 processes = tensor 2 x pipeline 1 x data 4")
    resolved = yaml.safe_load(result.stdout)
    assert (resolved["training"]["seed"], resolved["model"]["num_layers"]) == (7, 32)
    assert resolved["data"]["generative"] == environment.get("GENERATIVE_DATA", "GENERATIVE_DATA").split()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "labels", "steps"), [("finetune_im", "im", 46), ("finetune_tulu", "it", 5096)])
def test_recipes_of_fine_tuning_are_the_published_ones(name: str, labels: str, steps: int, repository: Path) -> None:
    path = repository / "examples" / "configs" / f"{name}.yaml"
    config = parse_run_config(
        ["--config", str(path), "--model", "mistral_7b", "--data.tokenizer=t", "--data.generative=[g]"]
    )
    check(config, 8, files=False)
    training, optimizer = config.training, config.optimizer
    assert (training.generative_batch_size, training.steps, training.objective) == (128, steps, "generative")
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_ratio, optimizer.weight_decay) == (
        2e-5,
        "linear",
        0.03,
        0,
    )
    assert (config.loss.labels, config.loss.loss_gen_type) == (labels, "token")


@pytest.mark.parametrize("name", SFT_LAUNCHERS)
@pytest.mark.parametrize("missing", SFT_PATHS)
def test_a_missing_path_of_fine_tuning_is_named(name: str, missing: str, repository: Path, tmp_path: Path) -> None:
    given = {key: value for key, value in SFT_PATHS.items() if key != missing}
    result = launch(repository, tmp_path, name, **given)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{name}: error: set {missing} to ")
    assert len(result.stderr.splitlines()) == 1


def test_data_of_fine_tuning_that_is_not_there_is_named(repository: Path, tmp_path: Path) -> None:
    result = launch(repository, tmp_path, "finetune_im.sh", **SFT_PATHS)
    assert result.returncode == 2
    assert "finetune_im.sh: error: GENERATIVE_DATA: " in result.stderr and "a.json" in result.stderr
    assert "make it with tools/preprocess/build_sft.py" in result.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.processes(2)
@pytest.mark.parametrize("name", SFT_LAUNCHERS)
def test_fine_tuning_in_miniature(name: str, repository: Path, tmp_path: Path) -> None:
    result = launch(repository, tmp_path, name, SCALE="tiny", OUTPUT_DIR=str(tmp_path / "run"))
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["loss_gen"] < records[0]["loss_gen"]
    recipe = load_config(repository / "examples" / "configs" / f"{name.removesuffix('.sh')}.yaml")
    assert load_config(tmp_path / "run" / "config.yaml").loss == recipe.loss


def test_dry_run_of_grpo(repository: Path, tmp_path: Path) -> None:
    for given in ({}, {"MODEL": "llama", "ROLLOUTS": "a b"}):
        result = launch(repository, tmp_path, "train_grpo.sh", "--rollout.kl_weight", "0.1", DRY_RUN="1", **given)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("# 8 processes = tensor 2 x pipeline 1 x data 4")
        rollout = yaml.safe_load(result.stdout)["rollout"]
        assert rollout["data"] == given.get("ROLLOUTS", "ROLLOUTS").split()
        assert (rollout["batch_size"], rollout["clip_high"], rollout["kl_weight"]) == (512, 0.28, 0.1)
    result = launch(repository, tmp_path, "train_grpo.sh", MODEL="llama")
    assert result.returncode == 2 and result.stderr.startswith("train_grpo.sh: error: set ROLLOUTS to ")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.processes(2)
def test_grpo_in_miniature(repository: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = launch(repository, tmp_path, "train_grpo.sh", SCALE="tiny", OUTPUT_DIR=str(run))
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0]["reward_rollout"] == pytest.approx(0.25, abs=0.2)
    # The model of the start stands for the one that sampled.
    assert records[0]["ratio_rollout"] == pytest.approx(1, abs=1e-4) and records[-1]["kl_rollout"] > 0
    assert list((run / "checkpoints").iterdir())
