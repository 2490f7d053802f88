"""Smallest and largest values of the numbers in a configuration."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.schema import RunConfig

# Smallest allowed value of each number, and whether that value itself is allowed.
_MINIMA: dict[str, tuple[float, bool]] = {
    "model.num_layers": (1, True),
    "model.hidden_size": (1, True),
    "model.ffn_hidden_size": (1, True),
    "model.num_attention_heads": (1, True),
    "model.num_query_groups": (1, True),
    "model.kv_channels": (1, True),
    "model.vocab_size": (1, True),
    "model.vocab_multiple": (1, True),
    "model.max_position_embeddings": (1, True),
    "model.norm_epsilon": (0, False),
    "model.rope_factor": (0, False),
    "model.rope_original_length": (1, True),
    "model.rope_low_freq_factor": (0, False),
    "model.rope_high_freq_factor": (0, False),
    "model.rope_beta_fast": (0, False),
    "model.rope_beta_slow": (0, False),
    "model.rope_attention_factor": (0, False),
    "model.attention_scale": (0, False),
    "model.moe_ffn_hidden_size": (1, True),
    "model.moe_shared_ffn_hidden_size": (1, True),
    "model.rotary_base": (0, False),
    "model.rotary_percent": (0, False),
    "model.sliding_window": (1, True),
    "model.num_experts": (1, True),
    "model.moe_top_k": (1, True),
    "model.moe_aux_loss_coeff": (0, True),
    "model.moe_z_loss_coeff": (0, True),
    "model.hidden_dropout": (0, True),
    "model.attention_dropout": (0, True),
    "model.init_std": (0, True),
    "embedding.projection_dim": (1, True),
    "embedding.num_linear_layers": (0, True),
    "adapter.rank": (1, True),
    "adapter.alpha": (0, False),
    "adapter.dropout": (0, True),
    "parallel.tensor": (1, True),
    "parallel.pipeline": (1, True),
    "parallel.virtual_pipeline": (2, True),
    "parallel.context": (1, True),
    "parallel.expert": (1, True),
    "parallel.expert_tensor": (1, True),
    "parallel.timeout_minutes": (0, False),
    "data.tokens_per_row": (2, True),
    "data.train_group_size": (1, True),
    "data.num_rows_multiple": (1, True),
    "data.embedding_temperature": (0, False),
    "data.packing_window": (1, True),
    "data.prefetch_steps": (0, True),
    "training.max_minutes": (0, False),
    "training.max_skipped_steps": (1, True),
    "loss.temperature": (0, False),
    "loss.num_blocks": (1, True),
    "loss.false_negative_margin": (-2, True),
    "loss.loss_emb_factor": (0, True),
    "loss.loss_gen_factor": (0, True),
    "loss.grit_world_size": (1, True),
    "optimizer.lr": (0, False),
    "optimizer.min_lr": (0, True),
    "optimizer.warmup_ratio": (0, True),
    "optimizer.warmup_steps": (0, True),
    "optimizer.weight_decay": (0, True),
    "optimizer.beta1": (0, True),
    "optimizer.beta2": (0, True),
    "optimizer.eps": (0, False),
    "optimizer.clip_grad": (0, True),
    "training.steps": (0, True),
    "training.embedding_batch_size": (1, True),
    "training.generative_batch_size": (1, True),
    "training.generative_rows": (1, True),
    "training.seed": (0, True),
    "checkpoint.save_interval": (0, True),
    "checkpoint.keep": (0, True),
    "logging.interval": (1, True),
}

# Largest allowed values, likewise.
_MAXIMA: dict[str, tuple[float, bool]] = {
    "model.rotary_percent": (1, True),
    "model.hidden_dropout": (1, False),
    "model.attention_dropout": (1, False),
    "adapter.dropout": (1, False),
    "optimizer.warmup_ratio": (1, True),
    "optimizer.beta1": (1, False),
    "optimizer.beta2": (1, False),
    "training.seed": (2**32 - 1, True),
}


def range_problems(config: RunConfig) -> Iterator[Problem]:
    """Numbers outside their range."""
    for sign, bounds in ((1, _MINIMA), (-1, _MAXIMA)):
        word, equal_word = ("above", "at least") if sign > 0 else ("below", "at most")
        for key, (bound, inclusive) in bounds.items():
            section, name = key.split(".")
            value = getattr(getattr(config, section), name)
            # Written so that not-a-number fails.
            if value is None or sign * value > sign * bound or (inclusive and value == bound):
                continue
            yield Problem(key, f"{key} must be {equal_word if inclusive else word} {bound}, not {value}")
    optimizer, steps = config.optimizer, config.training.steps
    if optimizer.min_lr > optimizer.lr:
        yield Problem("optimizer.min_lr", f"optimizer.min_lr {optimizer.min_lr} is above optimizer.lr {optimizer.lr}")
    if optimizer.warmup_steps is not None and optimizer.warmup_steps > max(steps, 1):
        yield Problem(
            "optimizer.warmup_steps", f"optimizer.warmup_steps {optimizer.warmup_steps} is above training.steps {steps}"
        )
