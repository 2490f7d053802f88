"""Peak memory of a conversion against the source's largest file, at the shape of Mixtral-8x7B, a tenth as wide.

    python benchmarks/convert_memory.py --directory /scratch/convert

Makes a checkpoint of 32 layers with 8 experts in 19 files (1 GB), imports it, and exports what was imported into files
of that size. Each is done in a process of its own, and the most memory that this process ever held (VmHWM) is compared
with that of one that only imported the same modules. What is left is below twice the largest file, or the exit status
is 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.families import mixtral
from megatron_grit.convert.families.registry import load_hf_config
from megatron_grit.data.text.tokenizer import train_sentencepiece

NUM_FILES = 19
SHAPE = ModelConfig(
    num_layers=32,
    hidden_size=416,
    ffn_hidden_size=1434,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=12,
    vocab_size=32000,
    num_experts=8,
)
FULL = replace(SHAPE, hidden_size=4096, ffn_hidden_size=14336, kv_channels=128)
IMPORT = """
from megatron_grit.convert.hf_in.convert import convert_checkpoint
import megatron_grit.convert.hf_in.writer
work = lambda: convert_checkpoint({source!r}, {target!r})
"""
EXPORT = """
from megatron_grit.convert.hf_out.convert import export_checkpoint
work = lambda: export_checkpoint({source!r}, {target!r}, max_shard_size="{size}B")
"""
PEAK = """
import sys, time
began = time.perf_counter()
if {run}:
    work()
seconds = time.perf_counter() - began
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, seconds)
"""


@dataclass(frozen=True)
class Measured:
    """A conversion."""

    peak: int
    """Bytes that it held at most, above what a process holds that imported the same modules."""
    seconds: float
    num_bytes: int
    """Of the source's weights."""
    largest: int
    """Bytes of the source's largest file."""

    @property
    def ratio(self) -> float:
        """Of the peak to twice the largest file."""
        return self.peak / (2 * self.largest)

    def __str__(self) -> str:
        return (
            f"{self.num_bytes / 1e6:.0f} MB in {self.seconds:.1f} s, {self.num_bytes / 1e6 / self.seconds:.0f} MB/s; "
            f"peak {self.peak / 1e6:.1f} MB above the imports, twice the largest file {2 * self.largest / 1e6:.1f} MB, "
            f"ratio {self.ratio:.2f}"
        )


def tensor_shapes(model: ModelConfig) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of each tensor of a Mixtral file, layer by layer as transformers writes them."""
    hidden, width = model.hidden_size, model.ffn_hidden_size
    query, key = (
        model.num_attention_heads * (model.kv_channels or 0),
        (model.num_query_groups or 0) * (model.kv_channels or 0),
    )
    assert model.vocab_size is not None
    yield "model.embed_tokens.weight", [model.vocab_size, hidden]
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        for letter, rows in (("q", query), ("k", key), ("v", key)):
            yield f"{prefix}self_attn.{letter}_proj.weight", [rows, hidden]
        yield f"{prefix}self_attn.o_proj.weight", [hidden, query]
        yield f"{prefix}block_sparse_moe.gate.weight", [model.num_experts or 0, hidden]
        for expert in range(model.num_experts or 0):
            for name, shape in (("w1", [width, hidden]), ("w2", [hidden, width]), ("w3", [width, hidden])):
                yield f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight", shape
        yield f"{prefix}input_layernorm.weight", [hidden]
        yield f"{prefix}post_attention_layernorm.weight", [hidden]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [model.vocab_size, hidden]


def num_bytes_of(model: ModelConfig) -> int:
    """Bytes of a model's weights in bf16."""
    return sum(2 * torch.Size(shape).numel() for _, shape in tensor_shapes(model))


def make_source(directory: Path, model: ModelConfig, num_files: int) -> None:
    """Random bf16 weights, written file by file, with config.json and a tokenizer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(mixtral.hf_config(model)))
    words = [f"word{number} number {number * 7} of many" for number in range(300)]
    train_sentencepiece(words, directory / "tokenizer", 300)
    generator, budget = torch.Generator().manual_seed(0), num_bytes_of(model) / num_files
    files: list[dict[str, list[int]]] = [{}]
    weight_map: dict[str, str] = {}
    filled = 0
    for name, shape in tensor_shapes(model):
        if filled >= budget * len(files):
            files.append({})
        files[-1][name] = shape
        filled += 2 * torch.Size(shape).numel()
    for number, part in enumerate(tqdm(files, desc="writing the source", unit="file"), start=1):
        file = directory / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file({name: torch.randn(shape, generator=generator).bfloat16() for name, shape in part.items()}, file)
        weight_map |= dict.fromkeys(part, file.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure(code: str, source: Path) -> Measured:
    """Run ``work()`` of some code in a process of its own.

    Args:
        code: imports what it needs and defines ``work``.
        source: folder of the weights that it reads.
    """
    imported, _ = _run(code + PEAK.format(run=False))
    peak, seconds = _run(code + PEAK.format(run=True))
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
    return Measured(int(peak - imported), seconds, sum(sizes), max(sizes))


def _run(code: str) -> tuple[float, float]:
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    peak, seconds = result.stdout.split()[-2:]
    return float(peak), float(seconds)


def main() -> int:
    """Make, convert, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="for 2.1 GB at a time (default: a temporary directory)")
    parser.add_argument("--layers", type=int, default=SHAPE.num_layers, help="of 32; files become fewer likewise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        source, target = Path(temporary) / "source", Path(temporary) / "imported"
        model = replace(SHAPE, num_layers=options.layers)
        make_source(source, model, max(NUM_FILES * options.layers // SHAPE.num_layers, 1))
        assert load_hf_config(source).num_experts == model.num_experts
        began = time.perf_counter()
        measured = measure(IMPORT.format(source=str(source), target=str(target)), source)
        print(f"import: {measured}")
        shutil.rmtree(source)
        exported = Path(temporary) / "exported"
        code = EXPORT.format(source=str(target), target=str(exported), size=measured.largest)
        back = measure(code, exported)
        print(f"export: {back}")
        print(f"the full size is {num_bytes_of(FULL) / 1e9:.1f} GB; all of it took {time.perf_counter() - began:.0f} s")
        return int(max(measured.ratio, back.ratio) >= 1)


if __name__ == "__main__":
    sys.exit(main())
