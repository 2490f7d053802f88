"""The estimate of a run's memory against what the process took, on the CPU.

Each run has a process of its own, which first trains a tiny model, so that code and libraries are loaded before the
measurement starts. The C library is told to give freed memory back: by default it keeps much of it, which is not the
model's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_grit.config.parse import save_config
from megatron_grit.config.schema import RunConfig
from tests.corpus import tiny_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import ctypes, gc, json, sys
from megatron_grit.config.parse import load_config
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.store.logs import configure_logging
from megatron_grit.training.trainer import Trainer

configure_logging()
for path in sys.argv[1:]:
    config = load_config(path)
    with parallel_job(config.parallel, config.training.seed) as context:
        trainer = Trainer(config, context)
        trainer.run()
        report = trainer.report
        del trainer
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
print(json.dumps([report.estimated_bytes, report.measured_bytes]))
"""


def dense(config: RunConfig) -> None:
    """Both objectives in fp32, several embedding rows."""
    config.model = replace(config.model, hidden_size=384, ffn_hidden_size=1024, vocab_size=4000)


def mixture(config: RunConfig) -> None:
    """A mixture of experts with full recompute, both objectives. In fp32: oneDNN's bf16 products cache code and buffers
    for every number of tokens that an expert gets."""
    config.model = replace(config.model, hidden_size=384, ffn_hidden_size=768, vocab_size=4000, num_experts=4)
    config.training.recompute = "full"


def wide_vocabulary(config: RunConfig) -> None:
    """Generative only, logits above all, with biases, GELU and recomputed attention."""
    config.model = replace(
        config.model,
        hidden_size=256,
        ffn_hidden_size=1024,
        vocab_size=16000,
        normalization="layernorm",
        activation="gelu",
        add_bias_linear=True,
    )
    config.training.objective, config.training.recompute = "generative", "selective"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("shape", [dense, mixture, wide_vocabulary])
def test_peak_memory_is_within_a_tenth_of_the_estimate(tmp_path: Path, shape: Callable[[RunConfig], None]) -> None:
    paths = []
    for name in ("tiny", "run"):
        config = tiny_run(tmp_path)
        config.output_dir, config.training.steps, config.data.prefetch_steps = str(tmp_path / name), 2, 0
        config.data.allow_shared_texts, config.data.num_rows_multiple = True, None
        if name == "run":
            shape(config)
            config.model.num_layers, config.data.tokens_per_row = 4, 1024
            config.training.embedding_batch_size, config.training.generative_batch_size = 16, 16
        else:
            config.model.num_experts = 4 if shape is mixture else None
        paths.append(tmp_path / f"{name}.yaml")
        save_config(config, paths[-1])
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    estimated, measured = json.loads(done.stdout.splitlines()[-1])
    print(f"{estimated / 2**20:.1f} MiB estimated, {measured / 2**20:.1f} MiB measured")
    assert "estimated" in done.stderr and "measured" in done.stderr
    assert measured > 150 * 2**20, "too small a run to tell a model from a library"
    assert estimated == pytest.approx(measured, rel=0.1)
