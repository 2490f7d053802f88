"""Resume checkpoints of another checkout: the next steps and their checkpoint are the same to the last bit, or differ.

The older checkout trains four steps with a checkpoint after the second. This one resumes from that checkpoint, model,
optimizer and random states included, and trains the last two steps again. Compared are the metrics of those steps
(losses, gradient norm, learning rate, tokens) and the tensors of the checkpoint after the fourth: of one process, and
of four with tensor parallel size 2 and pipeline parallel size 2; of a dense model and of a mixture of experts.

Example:
    python -m tests.golden.old_checkpoint ../older
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.golden.commands import Commands, checkpoint_tensors, metrics
from tests.golden.parts import inputs
from tests.golden.record import ROOT, differences

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, ["--model=tiny_mixtral"]),
    "TP2 x PP2": (4, ["--model=tiny_mistral", "--parallel.tensor=2", "--parallel.pipeline=2"]),
}
FIRST, LAST = 2, 4


def train(commands: Commands, processes: int, output: str, options: list[str]) -> None:
    """Train up to step ``LAST`` with a checkpoint after each second step."""
    config = str(commands.tree / "examples" / "configs" / "tiny.yaml")
    given = ["--config", config, f"--training.steps={LAST}", "--logging.progress=false", "--data.tokens_per_row=512"]
    given += ["--data.tokenizer=tokenizer.model", "--data.embedding=[pairs]", "--data.generative=[chats]"]
    given += [f"--checkpoint.save_interval={FIRST}", "--checkpoint.keep=0", f"--output_dir={output}", *options]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    commands.run(sys.executable, *(launch if processes > 1 else []), "-m", "megatron_grit.cli.train", *given)


def outcome(folder: Path) -> dict[str, Any]:
    """What the last steps of a run came to."""
    steps = {line["step"]: line for line in metrics(folder / "metrics.jsonl")}
    checkpoint = folder / "checkpoints" / f"step_{LAST:08d}"
    found: dict[str, Any] = {f"step {step}": steps[step] for step in range(FIRST + 1, LAST + 1)}
    return found | {part: checkpoint_tensors(checkpoint / part) for part in ("weights", "optimizer")}


def compare(old_tree: Path, new_tree: Path, folder: Path, layouts: list[str]) -> list[str]:
    """A line for each difference."""
    old, new = Commands(old_tree, folder), Commands(new_tree, folder)
    inputs(old)
    for name in ("pairs", "chats"):
        given = ["--tokenizer", "tokenizer.model", "--input", f"{name}.jsonl", "--output-prefix", name]
        old.tool("preprocess/build_grit.py", *given, "--workers", "1")
    lines = []
    for layout in layouts:
        processes, options = LAYOUTS[layout]
        before, after = (f"{side}_{processes}" for side in ("old", "new"))
        train(old, processes, before, options)
        shutil.copytree(folder / before, folder / after)
        shutil.rmtree(folder / after / "checkpoints" / f"step_{LAST:08d}")
        train(new, processes, after, options)
        found = outcome(folder / after)
        lines += differences({layout: outcome(folder / before)}, {layout: found})
        for step in range(FIRST + 1, LAST + 1):
            values = {name: found[f"step {step}"][name] for name in ("loss_emb", "loss_gen", "grad_norm")}
            print(f"{layout}, step {step}: {values}", flush=True)
    return lines


def main() -> int:
    """Parse the command line and compare. Returns the exit status: 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old_tree", type=Path, help="the other checkout")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout that resumes (default: this one)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = compare(arguments.old_tree, arguments.tree, Path(folder), arguments.layouts)
    print("\n".join(lines) or "the same to the last bit")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
