"""Options of Megatron-LM's Retro training script: the run that they describe, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_grit.config.database.megatron_training import (
    DEFAULTS,
    FLAGS,
    NO_MEANING,
    REFUSED,
    SAME,
    training_options,
)
from megatron_grit.config.parse import known_keys, parse_run_config
from megatron_grit.errors import ConfigError

THEIRS = """--retro-project-dir db --retro-add-retriever --num-layers 24 --hidden-size 1024 --num-attention-heads 16
--seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 4 --global-batch-size 256 --train-samples 200000
--lr-decay-samples 200000 --lr-warmup-samples 2560 --lr 6.0e-4 --min-lr=6.0e-5 --lr-decay-style cosine --clip-grad 1.0
--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.023 --bf16 --no-data-sharding
--tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --save runs/retro --load runs/retro
--use-mcore-models --model.retro.gate null""".split()
OURS: dict[str, Any] = {
    "model.num_layers": 24,
    "model.hidden_size": 1024,
    "model.ffn_hidden_size": 4096,
    "model.num_attention_heads": 16,
    "model.num_query_groups": None,
    "model.max_position_embeddings": 2048,
    "model.position_embedding": "learned_absolute",
    "model.normalization": "layernorm",
    "model.activation": "gelu",
    "model.add_bias_linear": True,
    "model.tie_embeddings": True,
    "model.hidden_dropout": 0.1,
    "model.init_std": 0.023,
    "model.retro.num_neighbors": 2,
    "model.retro.gate": None,
    "data.retro_project": "db",
    "data.tokens_per_row": 2049,
    "data.packing": "window",
    "training.objective": "generative",
    "training.generative_rows": 256,
    "training.steps": 782,
    "training.precision": "bf16",
    "optimizer.warmup_steps": 10,
    "optimizer.lr": 6e-4,
    "optimizer.min_lr": 6e-5,
    "optimizer.schedule": "cosine",
    "optimizer.beta2": 0.95,
    "parallel.tensor": 8,
    "output_dir": "runs/retro",
    "checkpoint.load": None,
}


def value_of(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def run_of(*more: str) -> Any:
    return parse_run_config(training_options([*THEIRS, *more])[0])


def test_their_options_are_a_run_of_ours() -> None:
    options, passed = training_options(THEIRS)
    config = parse_run_config(options)
    assert {key: value_of(config, key) for key in OURS} == OURS
    assert passed == ["--micro-batch-size", "--no-data-sharding", "--use-mcore-models"]


@pytest.mark.parametrize(
    ("more", "key", "value"),
    [
        ("--load gpt --finetune", "checkpoint.load", "gpt"),
        ("--swiglu", "model.ffn_hidden_size", 2688),
        ("--ffn-hidden-size 5000", "model.ffn_hidden_size", 5000),
        ("--use-rotary-position-embeddings --no-position-embedding", "model.position_embedding", "rope"),
        ("--no-position-embedding", "model.position_embedding", "none"),
        ("--normalization RMSNorm", "model.normalization", "rmsnorm"),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3", "parallel.virtual_pipeline", 4),
    ],
)
def test_options_that_hang_together(more: str, key: str, value: Any) -> None:
    assert value_of(run_of(*more.split()), key) == value


def test_without_the_retriever_the_decoder_is_trained_alone() -> None:
    words = [word for word in THEIRS if word != "--retro-add-retriever"]
    config = parse_run_config(training_options(words)[0])
    assert config.model.retro.num_neighbors == 0 and config.data.retro_project == "db"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--load other", "--load other: give the directory of --save to resume, or add --finetune"),
        ("--lr-decay-samples 166400000", "the rate falls until the last of 782 steps"),
        ("--train-iters 5", "--train-samples: leave it out, or --train-iters"),
        ("--rope-scaling", "--rope-scaling is no option of Megatron-LM that is known here"),
        ("--normalization LayerNorm1p", "--normalization LayerNorm1p: write LayerNorm or RMSNorm"),
        ("--seq-length 2k", "--seq-length 2k: give a number of 1 or more"),
        ("--seed", "--seed has no value; give one"),
        ("db", "'db' is no option; options begin with --"),
    ],
)
def test_what_cannot_be_run_says_what_to_write(more: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        training_options([*THEIRS, *more.split()])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_number_of_steps_has_to_be_given() -> None:
    with pytest.raises(ConfigError, match="give --train-samples or --train-iters"):
        training_options(["--retro-project-dir", "db"])
    with pytest.raises(ConfigError, match="--train-samples: give --global-batch-size too"):
        training_options(["--train-samples", "100"])


def test_every_option_of_ours_that_is_named_exists() -> None:
    keys = known_keys()
    assert {*SAME.values(), *DEFAULTS, *(key for key, _ in FLAGS.values())} <= keys.keys()
    assert not {*SAME} & {*FLAGS} and not {*SAME, *FLAGS} & {*NO_MEANING, *REFUSED}
    named = {word for said in REFUSED.values() for word in re.findall(r"--([a-z_]+\.[a-z_]+)", said)}
    assert named <= keys.keys()
