"""Options of Megatron-LM's training scripts of Retro, as options of ``megatron-grit train``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_grit.errors import ConfigError

SAME = {
    "ffn-hidden-size": "model.ffn_hidden_size",
    "num-layers": "model.num_layers",
    "hidden-size": "model.hidden_size",
    "num-attention-heads": "model.num_attention_heads",
    "num-query-groups": "model.num_query_groups",
    "kv-channels": "model.kv_channels",
    "max-position-embeddings": "model.max_position_embeddings",
    "rotary-percent": "model.rotary_percent",
    "rotary-base": "model.rotary_base",
    "norm-epsilon": "model.norm_epsilon",
    "layernorm-epsilon": "model.norm_epsilon",
    "position-embedding-type": "model.position_embedding",
    "hidden-dropout": "model.hidden_dropout",
    "attention-dropout": "model.attention_dropout",
    "init-method-std": "model.init_std",
    "retro-num-neighbors": "model.retro.num_neighbors",
    "retro-num-retrieved-chunks": "model.retro.retrieved_chunks",
    "retro-encoder-layers": "model.retro.encoder_layers",
    "retro-attention-gate": "model.retro.gate",
    "retro-encoder-hidden-dropout": "model.retro.encoder_hidden_dropout",
    "retro-encoder-attention-dropout": "model.retro.encoder_attention_dropout",
    "retro-project-dir": "data.retro_project",
    "retro-workdir": "data.retro_project",
    "global-batch-size": "training.generative_rows",
    "seed": "training.seed",
    "exit-duration-in-mins": "training.max_minutes",
    "recompute-granularity": "training.recompute",
    "lr": "optimizer.lr",
    "min-lr": "optimizer.min_lr",
    "lr-decay-style": "optimizer.schedule",
    "lr-warmup-fraction": "optimizer.warmup_ratio",
    "weight-decay": "optimizer.weight_decay",
    "adam-beta1": "optimizer.beta1",
    "adam-beta2": "optimizer.beta2",
    "adam-eps": "optimizer.eps",
    "clip-grad": "optimizer.clip_grad",
    "tensor-model-parallel-size": "parallel.tensor",
    "pipeline-model-parallel-size": "parallel.pipeline",
    "context-parallel-size": "parallel.context",
    "distributed-timeout-minutes": "parallel.timeout_minutes",
    "save": "output_dir",
    "save-interval": "checkpoint.save_interval",
    "log-interval": "logging.interval",
    "wandb-project": "logging.wandb_project",
}
"""Options with a value, by what takes the same value here."""
FLAGS = {
    "swiglu": ("model.activation", "swiglu"),
    "disable-bias-linear": ("model.add_bias_linear", "false"),
    "add-qkv-bias": ("model.add_qkv_bias", "true"),
    "qk-layernorm": ("model.qk_norm", "true"),
    "untie-embeddings-and-output-weights": ("model.tie_embeddings", "false"),
    "use-rotary-position-embeddings": ("model.position_embedding", "rope"),
    "sequence-parallel": ("parallel.sequence_parallel", "true"),
    "recompute-activations": ("training.recompute", "selective"),
    "bf16": ("training.precision", "bf16"),
}
"""Options without a value, and what they set."""
DEFAULTS = {
    "model.normalization": "layernorm",
    "model.activation": "gelu",
    "model.position_embedding": "learned_absolute",
    "model.sliding_window": "null",
    "model.add_bias_linear": "true",
    "model.tie_embeddings": "true",
    "model.hidden_dropout": "0.1",
    "model.attention_dropout": "0.1",
    "model.num_query_groups": "null",
    "model.retro.num_neighbors": "2",
    "model.retro.encoder_hidden_dropout": "0.1",
    "model.retro.encoder_attention_dropout": "0.1",
    "data.over_long": "split",
    "data.packing": "window",
    "optimizer.weight_decay": "0.01",
    "optimizer.warmup_ratio": "0",
    "training.objective": "generative",
    "training.precision": "fp32",
    "training.seed": "1234",
}
"""Megatron-LM's defaults where they are others than ours, and how its samples are made."""
NO_MEANING = {
    **dict.fromkeys(("num-workers", "micro-batch-size", "transformer-impl", "tensorboard-dir"), True),
    **dict.fromkeys(("recompute-method", "recompute-num-layers", "dataloader-type", "ckpt-format"), True),
    **dict.fromkeys(
        ("attention-backend", "DDP-impl", "tensorboard-log-interval", "make-vocab-size-divisible-by"), True
    ),
    **dict.fromkeys(("use-mcore-models", "use-legacy-models", "log-params-norm", "log-num-zeros-in-grad"), False),
    **dict.fromkeys(("no-data-sharding", "use-distributed-optimizer", "no-load-optim", "no-load-rng"), False),
    **dict.fromkeys(("use-flash-attn", "overlap-grad-reduce", "overlap-param-gather"), False),
    **dict.fromkeys(("no-masked-softmax-fusion", "no-bias-gelu-fusion", "no-bias-dropout-fusion"), False),
    **dict.fromkeys(("no-gradient-accumulation-fusion", "no-async-tensor-model-parallel-allreduce"), False),
    **dict.fromkeys(("log-validation-ppl-to-tensorboard", "log-timers-to-tensorboard"), False),
    **dict.fromkeys(("retro-no-verify-neighbor-count", "group-query-attention"), False),
}
"""What is passed over, since nothing that is trained depends on it, and whether it has a value."""
_OF_DATABASE = "leave it out: documents and tokenizer are those of --retro-project-dir"
_VALIDATION = "give the documents to validate on with --data.valid '[PREFIX]'"
REFUSED = {
    **dict.fromkeys(("data-path", "split", "vocab-file", "merge-file"), _OF_DATABASE),
    **dict.fromkeys(("tokenizer-type", "tokenizer-model"), _OF_DATABASE),
    **dict.fromkeys(("eval-interval", "eval-iters"), f"{_VALIDATION} and --training.valid_interval STEPS"),
    "skip-train": f"{_VALIDATION} and --training.skip_train true",
    "fp16": "write --bf16, or leave it out for fp32",
    "apply-layernorm-1p": "leave it out: it stores the same weights less 1",
    "squared-relu": "write --swiglu, or --model.activation gelu_tanh",
    "retro-cyclic-train-iters": "leave it out: documents are read again when all were read",
    "rampup-batch-size": "leave it out: the batch does not grow",
}
"""What ends a run, and what to write."""
_OWN = {"normalization": {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}}
_COUNTS = ("train", "lr-decay", "lr-warmup")


@dataclass(kw_only=True)
class _Read:
    """What was read of a command line."""

    values: dict[str, str] = field(default_factory=lambda: dict(DEFAULTS))
    theirs: dict[str, str] = field(default_factory=dict)
    """Options that are translated together, flags as ""."""
    passed: list[str] = field(default_factory=list)


def training_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Translate a command line.

    Args:
        argv: options of Megatron-LM; those with a dot are ours, and are passed on.

    Returns:
        Options of ``megatron-grit train``, and the names of those that were passed over.

    Raises:
        ConfigError: an option that is not known, or that has to be written in another way; says how.
    """
    read, words = _Read(), list(argv)
    own: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} is no option; options begin with --")
        name, equals, value = word[2:].partition("=")

        def take(name: str = name, equals: str = equals, value: str = value) -> str:
            if not equals and not words:
                raise ConfigError(f"--{name} has no value; give one")
            return value if equals else words.pop(0)

        if "." in name or name in ("model", "config", "output_dir"):
            own += [f"--{name}", take()]
        elif name in SAME:
            read.values[SAME[name]] = take()
        elif name in FLAGS:
            read.values[FLAGS[name][0]] = FLAGS[name][1]
        elif name in NO_MEANING:
            read.passed.append(f"--{name}")
            if NO_MEANING[name]:
                take()
        elif name in REFUSED:
            raise ConfigError(f"--{name}: {REFUSED[name]}")
        elif name in _OWN:
            given = take()
            if given not in _OWN[name]:
                raise ConfigError(f"--{name} {given}: write {' or '.join(_OWN[name])}")
            read.values[f"model.{name}"] = _OWN[name][given]
        elif name in ("retro-add-retriever", "finetune", "no-position-embedding"):
            read.theirs[name] = ""
        elif name in ("seq-length", "load", "num-layers-per-virtual-pipeline-stage") or name in _count_names():
            read.theirs[name] = take()
        else:
            raise ConfigError(
                f"--{name} is no option of Megatron-LM that is known here; write the one of megatron-grit train"
            )
    _translate(read)
    return [word for key, value in read.values.items() for word in (f"--{key}", value)] + own, read.passed


def _count_names() -> list[str]:
    return [f"{what}-{unit}" for what in _COUNTS for unit in ("iters", "samples")]


def _translate(read: _Read) -> None:
    """Options that depend on others."""
    values, theirs = read.values, read.theirs
    if "retro-add-retriever" not in theirs:
        values["model.retro.num_neighbors"] = "0"
    if "no-position-embedding" in theirs and values["model.position_embedding"] != "rope":
        values["model.position_embedding"] = "none"
    if "seq-length" in theirs:
        length = _integer("seq-length", theirs["seq-length"])
        values["data.tokens_per_row"] = str(length + 1)  # and the label of the last token
        values.setdefault("model.max_position_embeddings", str(length))
    if "model.hidden_size" in values:
        width = 4 * _integer("hidden-size", values["model.hidden_size"])
        gated = width * 2 // 3 // 64 * 64  # as many weights in three matrices
        values.setdefault("model.ffn_hidden_size", str(gated if values["model.activation"] == "swiglu" else width))
    _translate_steps(values, theirs)
    if "num-layers-per-virtual-pipeline-stage" in theirs:
        name = "num-layers-per-virtual-pipeline-stage"
        size = _integer(name, theirs[name]) * _integer("stages", values.get("parallel.pipeline", "1"))
        values["parallel.virtual_pipeline"] = str(_integer("num-layers", values.get("model.num_layers", "")) // size)
    load = theirs.get("load")
    if load is not None and load != values.get("output_dir"):
        if "finetune" not in theirs:
            raise ConfigError(
                f"--load {load}: give the directory of --save to resume, or add --finetune to start from its weights"
            )
        values["checkpoint.load"] = load


def _translate_steps(values: dict[str, str], theirs: dict[str, str]) -> None:
    counts: dict[str, int] = {}
    for what in _COUNTS:
        iters, samples = theirs.get(f"{what}-iters"), theirs.get(f"{what}-samples")
        if iters is not None and samples is not None:
            raise ConfigError(f"--{what}-samples: leave it out, or --{what}-iters")
        if samples is not None:
            if "training.generative_rows" not in values:
                raise ConfigError(f"--{what}-samples: give --global-batch-size too, or --{what}-iters")
            batch = _integer("global-batch-size", values["training.generative_rows"])
            counts[what] = -(-_integer(f"{what}-samples", samples) // batch)
        elif iters is not None:
            counts[what] = _integer(f"{what}-iters", iters)
    steps = counts.get("train", counts.get("lr-decay"))
    if steps is None:
        raise ConfigError("give --train-samples or --train-iters")
    if counts.get("lr-decay", steps) != steps:
        raise ConfigError(
            f"--lr-decay: the rate falls until the last of {steps} steps; leave it out, or train for as many, "
            f"{counts['lr-decay']}"
        )
    values["training.steps"] = str(steps)
    if "lr-warmup" in counts:
        values["optimizer.warmup_steps"] = str(counts["lr-warmup"])


def _integer(name: str, text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--{name} {text}: give a number of 1 or more")
    return int(text)
